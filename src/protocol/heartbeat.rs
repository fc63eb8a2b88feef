//! The record that a worker publishes into Redis: declared once, for those who write it and for those
//! who read what any worker wrote.

use std::mem::discriminant;
use std::sync::LazyLock;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::document::from_json;
use super::message::V1;
use super::word::words;

/// A heartbeat record.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "heartbeat.v1")]
pub struct Record {
    /// Always 1.
    pub v: V1,
    /// The worker; unique among those that live.
    pub worker_id: String,
    /// Which start of the worker: a new UUID for each.
    pub incarnation: String,
    /// Number of this beat, from 1.
    pub seq: u64,
    /// When it was written, unix milliseconds.
    pub at_ms: u64,
    /// When the process began, unix milliseconds.
    pub started_at_ms: u64,
    /// Host name.
    pub host: String,
    /// Process number on that host.
    pub pid: u32,
    /// Digest of the machine's boot and of the namespace of `pid`: only a process with the same one can tell whether this one lives; null = unknown.
    // Added later: older workers leave it out.
    #[serde(default)]
    pub pid_space: Option<String>,
    /// The program.
    pub build: Build,
    /// What the worker does.
    pub state: String,
    /// Why: a detail, see Codes.
    pub state_detail: String,
    /// The state is `ready`, the broker has confirmed the consumer, and a computation, if any, makes progress.
    pub ready: bool,
    /// `ready`, and fewer than `amqp.prefetch` jobs are held.
    pub accepting: bool,
    /// When `ready` was last entered, unix milliseconds; null = never.
    pub last_ready_at_ms: Option<u64>,
    /// Since when the state is what it is, unix milliseconds.
    pub last_state_change_at_ms: u64,
    /// Warm-ups.
    pub warm: WarmFacts,
    /// The model that is served; all but its name are null or empty before the first warm-up.
    pub model: ModelFacts,
    /// Kinds of jobs and options that the worker knows. Clients ask for any but `score` and `validate` only while every live worker lists it.
    // Added later: older workers leave it out.
    #[serde(default)]
    pub accepts: Accepts,
    /// What computes.
    pub engine: EngineFacts,
    /// The machine.
    pub host_info: HostFacts,
    /// Jobs since the start.
    pub jobs: JobFacts,
    /// Written by the computing thread itself, so that a hung device is seen.
    pub progress: ProgressFacts,
    /// The connection to RabbitMQ.
    pub broker: BrokerFacts,
    /// Whether Redis does what jobs ask of it: results are found and stored, jobs are marked.
    // Added later: older workers leave it out.
    #[serde(default)]
    pub store: StoreFacts,
    /// Memory of the process.
    pub memory: MemoryFacts,
    /// How the worker follows its model; null without `model.update_url`.
    pub update: Option<UpdateFacts>,
    /// What degraded the worker, else the last problem; kept after it is fixed.
    pub last_error: Option<LastError>,
}

/// What was built.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Build {
    /// Version of the program.
    pub version: String,
    /// Commit that it was built from; null = unknown.
    pub git: Option<String>,
}

/// The last warm-up.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WarmFacts {
    /// Warm-ups begun since the start.
    pub attempt: u64,
    /// When the last one ended, unix milliseconds.
    pub last_at_ms: Option<u64>,
    /// How long it took, milliseconds.
    pub last_ms: Option<u64>,
    /// The loss of the last successful one, nats per target.
    pub baseline_loss: Option<f64>,
    /// When a failed one is repeated, unix milliseconds.
    pub next_retry_at_ms: Option<u64>,
    /// Tensors without any visible effect on the loss in the last successful one, at most 32 names. A warning.
    // Added later: older workers leave it out.
    #[serde(default)]
    #[schemars(length(max = 32))]
    pub inert: Vec<String>,
    /// How many such tensors there are.
    #[serde(default)]
    pub inert_count: u64,
}

/// The model that is served.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ModelFacts {
    /// The model's name.
    pub name: String,
    /// The version that is served.
    pub version: Option<u64>,
    /// Digest of the trainable weights.
    pub weights_id: Option<String>,
    /// Digest of the windows of a job without a nonce, on all shards.
    pub plan: Option<String>,
    /// Ids of the shards.
    pub shards: Vec<u64>,
    /// Plans whose baseline is kept.
    pub baseline_cache_entries: u64,
}

words! {
    /// What a job may ask of a worker: its kind, and options that not every released worker knows.
    pub enum Ability {
        /// Score jobs.
        Score,
        /// Validate jobs.
        Validate,
        /// Merge jobs.
        Merge,
        /// Score jobs that may end early.
        Stop,
    }
}

/// What a worker knows, in words: a newer worker has words that this version lacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Accepts(Vec<String>);

impl Accepts {
    /// Exactly these.
    pub fn of(abilities: &[Ability]) -> Self {
        let words = abilities.iter().map(|ability| ability.as_str().to_owned());
        Self(words.collect())
    }

    /// Whether this is among them.
    pub fn contains(&self, ability: Ability) -> bool {
        self.0.iter().any(|word| word == ability.as_str())
    }
}

impl Default for Accepts {
    /// What the workers know that do not say it.
    fn default() -> Self {
        Self::of(&[Ability::Score, Ability::Validate])
    }
}

/// What runs it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EngineFacts {
    /// ONNX Runtime's name of the execution provider.
    pub execution_provider: String,
    /// The device.
    pub device: String,
    /// Element type of the weights.
    pub precision: Option<String>,
    /// Version of ONNX Runtime.
    pub onnxruntime: Option<String>,
    /// Whether the device is software in place of a GPU, which is meant for tests.
    // Added later, as all that follows: older workers leave them out.
    #[serde(default)]
    pub software_device: bool,
    /// Windows that run at a time in a job without a nonce, on all shards; null before the first warm-up, as all that follows.
    #[serde(default)]
    pub micro_batch: Option<u64>,
    /// Where the nodes of the graph run.
    #[serde(default)]
    pub placement: Option<PlacementFacts>,
    /// Parts that the graph is cut into.
    #[serde(default)]
    pub parts: Option<u64>,
    /// Digest of all that the bits of a loss may depend on beside weights and windows. Bits are compared within a class only.
    #[serde(default)]
    pub class: Option<String>,
}

/// Where the nodes of the graph run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PlacementFacts {
    /// Nodes on the device.
    pub device: u64,
    /// Nodes on the host beside it, which compute shapes and indices.
    pub host: u64,
}

/// The machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HostFacts {
    /// Processor.
    pub cpu_model: String,
    /// Cores.
    pub cores: u64,
    /// Memory.
    pub ram_bytes: u64,
    /// GPU; null = none or unknown.
    pub gpu_model: Option<String>,
    /// Memory of the GPU; always null for now.
    pub gpu_memory_bytes: Option<u64>,
    /// Operating system.
    pub os: String,
    /// Architecture.
    pub arch: String,
}

/// Jobs since the start.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct JobFacts {
    /// 1 if a job is held, else 0.
    pub in_flight: u64,
    /// Held jobs beside that one.
    pub buffered: u64,
    /// Held jobs that wait until it is known whether other workers that held them are alive.
    // Added later: older workers leave out this and the next.
    #[serde(default)]
    pub waiting: u64,
    /// Some of those workers.
    #[serde(default)]
    pub waits_for: Vec<String>,
    /// Results with this status.
    pub scored: u64,
    /// Results with this status.
    pub rejected: u64,
    /// Results with this status.
    pub failed: u64,
    /// Jobs answered from a stored result.
    pub duplicates: u64,
    /// Deliveries that the broker marked as redelivered.
    pub redelivered: u64,
    /// Mean time from delivery to the confirmed result over the last 256 jobs, milliseconds.
    pub avg_ms: Option<f64>,
    /// Median of the same.
    pub p50_ms: Option<f64>,
    /// 95th percentile of the same.
    pub p95_ms: Option<f64>,
    /// When the last result was confirmed, unix milliseconds.
    pub last_scored_at_ms: Option<u64>,
}

impl JobFacts {
    /// Jobs answered since the start.
    pub fn answered(&self) -> u64 {
        let counts = [self.scored, self.rejected, self.failed];
        counts.into_iter().fold(0, u64::saturating_add)
    }
}

/// Advanced by the computing thread itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProgressFacts {
    /// Micro-batches computed.
    pub counter: u64,
    /// When the last one was done, unix milliseconds.
    pub at_ms: u64,
    /// How long the current computation has taken, milliseconds; 0 = idle.
    pub busy_ms: u64,
}

/// The link to RabbitMQ.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BrokerFacts {
    /// Whether RabbitMQ is connected.
    pub connected: bool,
    /// The node in use, as host:port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Whether it has confirmed the worker's consumer.
    pub consuming: bool,
    /// Whether it blocks publishing.
    pub blocked: bool,
    /// Number of connections so far.
    pub generation: u64,
}

/// What jobs ask of Redis.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StoreFacts {
    /// Whether everything works.
    pub ok: bool,
    /// What is off and why, by the last answer to each kind of call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

impl Default for StoreFacts {
    fn default() -> Self {
        Self {
            ok: true,
            last_error: None,
        }
    }
}

/// Memory of the process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryFacts {
    /// Resident memory.
    pub rss_bytes: u64,
}

/// How the worker follows its model.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct UpdateFacts {
    /// What the manifest said last.
    pub live_version: Option<u64>,
    /// When the manifest was last read, unix milliseconds.
    pub looked_at_ms: Option<u64>,
    /// Bytes of the current download that are here.
    pub bytes_here: u64,
    /// Bytes of the current download; 0 = none.
    pub bytes_wanted: u64,
    /// The last version that failed its proof; null = none.
    pub refused: Option<RefusedVersion>,
    /// Why the live version is not served; null after a successful look.
    pub failure: Option<String>,
}

/// A version that did not prove itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RefusedVersion {
    /// The version.
    pub version: u64,
    /// What failed.
    pub why: String,
    /// When, unix milliseconds.
    pub at_ms: u64,
}

/// The last thing that went wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LastError {
    /// A detail of the state, `update_failed` or `state_not_saved`.
    pub code: String,
    /// What happened and what to do.
    pub message: String,
    /// When, unix milliseconds.
    pub at_ms: u64,
}

/// A record that says nothing, and one in which every optional object is there: so that part of one can
/// be completed, too.
static EMPTY: LazyLock<[Value; 2]> = LazyLock::new(|| {
    let whole = Record {
        engine: EngineFacts {
            placement: Some(PlacementFacts::default()),
            ..EngineFacts::default()
        },
        update: Some(UpdateFacts {
            refused: Some(RefusedVersion::default()),
            ..UpdateFacts::default()
        }),
        last_error: Some(LastError::default()),
        ..Record::default()
    };
    [Record::default(), whole].map(|record| serde_json::to_value(record).unwrap_or_default())
});

impl Record {
    /// Reads a record of any worker, older, newer or foreign ones included. Whatever it leaves out, or
    /// says in another form, is empty: no text, zero, `false`, no value. The strict reading is
    /// [`Record`]'s own, by serde.
    ///
    /// None: the text is no record.
    pub fn read(text: &str) -> Option<Self> {
        // Those that this version's workers write need no more, and there may be a thousand a second.
        let record: Self = match serde_json::from_str(text) {
            Ok(record) => record,
            Err(_) => Self::read_leniently(text)?,
        };
        let last_error = record.last_error.filter(|e| *e != LastError::default());
        Some(Self {
            last_error,
            ..record
        })
    }

    fn read_leniently(text: &str) -> Option<Self> {
        let Value::Object(mut record) = from_json(text.as_bytes()).ok()? else {
            return None;
        };
        if let [Value::Object(empty), Value::Object(whole)] = &*EMPTY {
            complete(&mut record, empty, whole);
        }
        record.insert("v".to_owned(), 1.into());
        serde_json::from_value(record.into()).ok()
    }
}

/// Puts what is empty in the place of what is missing or has another form.
fn complete(
    fields: &mut Map<String, Value>,
    empty: &Map<String, Value>,
    whole: &Map<String, Value>,
) {
    for (name, empty) in empty {
        let field = fields.entry(name.as_str()).or_insert(Value::Null);
        match (&mut *field, empty, &whole[name]) {
            (Value::Object(fields), Value::Object(empty), Value::Object(whole)) => {
                complete(fields, empty, whole);
            }
            (Value::Object(fields), Value::Null, Value::Object(whole)) => {
                complete(fields, whole, whole);
            }
            // Null = an optional field. The form of one that is no object is not known here.
            (_, Value::Null, whole) if !whole.is_object() => {}
            (found, empty, _) if discriminant(found) != discriminant(empty) => {
                *found = empty.clone();
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const READY: &str = include_str!("../../schemas/examples/valid/heartbeat.v1-ready.json");

    #[test]
    fn a_record_that_the_schema_allows_is_read_as_it_is() {
        let strict: Record = from_json(READY.as_bytes()).unwrap();
        assert_eq!(Record::read(READY), Some(strict));
    }

    #[test]
    fn whatever_a_record_leaves_out_or_says_in_another_form_is_empty() {
        assert_eq!(Record::read("{}"), Some(Record::default()));
        let oldest = Record::default().accepts;
        assert!(oldest.contains(Ability::Score) && oldest.contains(Ability::Validate));
        let text = json!({
            "v": 2, "worker_id": 7, "ready": "yes", "seq": 3.0, "host_info": null, "broker": [true],
            "model": {"name": "m"}, "jobs": {"scored": 5}, "colour": "red",
            "last_error": {"code": "stuck"}, "accepts": ["score", "juggle"], "engine": {"placement": 7},
            "update": {"live_version": 9, "refused": {"version": 8, "colour": "red"}},
        });
        let read = Record::read(&text.to_string());
        let expected = Record {
            seq: 3,
            model: ModelFacts {
                name: "m".into(),
                ..ModelFacts::default()
            },
            jobs: JobFacts {
                scored: 5,
                ..JobFacts::default()
            },
            accepts: Accepts(vec!["score".into(), "juggle".into()]),
            last_error: Some(LastError {
                code: "stuck".into(),
                ..LastError::default()
            }),
            update: Some(UpdateFacts {
                live_version: Some(9),
                refused: Some(RefusedVersion {
                    version: 8,
                    ..RefusedVersion::default()
                }),
                ..UpdateFacts::default()
            }),
            ..Record::default()
        };
        assert_eq!(read, Some(expected));
    }

    #[test]
    fn what_is_no_object_is_no_record() {
        for text in ["", "7", "[]", "null", "{", "{\"seq\":1,\"seq\":2}"] {
            assert_eq!(Record::read(text), None, "{text}");
        }
    }
}
