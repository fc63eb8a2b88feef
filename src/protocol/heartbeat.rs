//! The record that a worker publishes into Redis: declared once, for those who write it and for those
//! who read what any worker wrote.

use std::mem::discriminant;
use std::sync::LazyLock;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::document::from_json;
use super::message::V1;

/// A heartbeat record.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "heartbeat.v1")]
#[expect(
    missing_docs,
    reason = "the fields are the contract's; schemas/README.md explains each"
)]
pub struct Record {
    pub v: V1,
    pub worker_id: String,
    pub incarnation: String,
    pub seq: u64,
    pub at_ms: u64,
    pub started_at_ms: u64,
    pub host: String,
    pub pid: u32,
    // Added later: older workers leave it out.
    #[serde(default)]
    pub pid_space: Option<String>,
    pub build: Build,
    pub state: String,
    pub state_detail: String,
    pub ready: bool,
    pub accepting: bool,
    pub last_ready_at_ms: Option<u64>,
    pub last_state_change_at_ms: u64,
    pub warm: WarmFacts,
    pub model: ModelFacts,
    pub engine: EngineFacts,
    pub host_info: HostFacts,
    pub jobs: JobFacts,
    pub progress: ProgressFacts,
    pub broker: BrokerFacts,
    // Added later: older workers leave it out.
    #[serde(default)]
    pub store: StoreFacts,
    pub memory: MemoryFacts,
    pub update: Option<UpdateFacts>,
    pub last_error: Option<LastError>,
}

/// What was built.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct Build {
    pub version: String,
    pub git: Option<String>,
}

/// The last warm-up.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct WarmFacts {
    pub attempt: u64,
    pub last_at_ms: Option<u64>,
    pub last_ms: Option<u64>,
    pub baseline_loss: Option<f64>,
    pub next_retry_at_ms: Option<u64>,
    // Added later: older workers leave it out.
    #[serde(default)]
    #[schemars(length(max = 32))]
    pub inert: Vec<String>,
    #[serde(default)]
    pub inert_count: u64,
}

/// The model that is served.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct ModelFacts {
    pub name: String,
    pub version: Option<u64>,
    pub weights_id: Option<String>,
    pub plan: Option<String>,
    pub shards: Vec<u64>,
    pub baseline_cache_entries: u64,
}

/// What runs it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct EngineFacts {
    pub execution_provider: String,
    pub device: String,
    pub precision: Option<String>,
    pub onnxruntime: Option<String>,
}

/// The machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct HostFacts {
    pub cpu_model: String,
    pub cores: u64,
    pub ram_bytes: u64,
    pub gpu_model: Option<String>,
    pub gpu_memory_bytes: Option<u64>,
    pub os: String,
    pub arch: String,
}

/// Jobs since the start.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct JobFacts {
    pub in_flight: u64,
    pub buffered: u64,
    pub scored: u64,
    pub rejected: u64,
    pub failed: u64,
    pub duplicates: u64,
    pub redelivered: u64,
    pub avg_ms: Option<f64>,
    pub p50_ms: Option<f64>,
    pub p95_ms: Option<f64>,
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
#[expect(missing_docs, reason = "see Record")]
pub struct ProgressFacts {
    pub counter: u64,
    pub at_ms: u64,
    pub busy_ms: u64,
}

/// The link to RabbitMQ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct BrokerFacts {
    pub connected: bool,
    pub consuming: bool,
    pub blocked: bool,
    pub generation: u64,
}

/// What jobs ask of Redis.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct StoreFacts {
    pub ok: bool,
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
#[expect(missing_docs, reason = "see Record")]
pub struct MemoryFacts {
    pub rss_bytes: u64,
}

/// How the worker follows its model.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct UpdateFacts {
    pub live_version: Option<u64>,
    pub looked_at_ms: Option<u64>,
    pub bytes_here: u64,
    pub bytes_wanted: u64,
    pub refused: Option<RefusedVersion>,
    pub failure: Option<String>,
}

/// A version that did not prove itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct RefusedVersion {
    pub version: u64,
    pub why: String,
    pub at_ms: u64,
}

/// The last thing that went wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct LastError {
    pub code: String,
    pub message: String,
    pub at_ms: u64,
}

/// A record that says nothing.
static EMPTY: LazyLock<Value> = LazyLock::new(|| {
    // The error is an object as well, so that part of one can be completed.
    let last_error = Some(LastError::default());
    let empty = Record {
        last_error,
        ..Record::default()
    };
    serde_json::to_value(empty).unwrap_or_default()
});

impl Record {
    /// Reads a record of any worker, older, newer or foreign ones included. Whatever it leaves out, or
    /// says in another form, is empty: no text, zero, `false`, no value. The strict reading is
    /// [`Record`]'s own, by serde.
    ///
    /// None: the text is no record.
    pub fn read(text: &str) -> Option<Self> {
        let Value::Object(mut record) = from_json(text.as_bytes()).ok()? else {
            return None;
        };
        if let Value::Object(empty) = &*EMPTY {
            complete(&mut record, empty);
        }
        record.insert("v".to_owned(), 1.into());
        let record: Self = serde_json::from_value(record.into()).ok()?;
        let last_error = record.last_error.filter(|e| *e != LastError::default());
        Some(Self {
            last_error,
            ..record
        })
    }
}

/// Puts what is empty in the place of what is missing or has another form.
fn complete(fields: &mut Map<String, Value>, empty: &Map<String, Value>) {
    for (name, empty) in empty {
        let field = fields.entry(name.as_str()).or_insert(Value::Null);
        match (&mut *field, empty) {
            (Value::Object(fields), Value::Object(empty)) => complete(fields, empty),
            // Null = an optional field, whose form the empty record does not tell.
            (found, empty) if !empty.is_null() && discriminant(found) != discriminant(empty) => {
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
        let text = json!({
            "v": 2, "worker_id": 7, "ready": "yes", "seq": 3.0, "host_info": null, "broker": [true],
            "model": {"name": "m"}, "jobs": {"scored": 5}, "colour": "red",
            "last_error": {"code": "stuck"},
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
            last_error: Some(LastError {
                code: "stuck".into(),
                ..LastError::default()
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
