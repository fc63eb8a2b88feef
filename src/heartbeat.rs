//! The record a worker publishes into Redis, from a thread of its own that scoring cannot starve.
//! It only relays: the state comes from the lifecycle, progress from the computing thread.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::clock::{steady_ms, unix_ms};
use crate::config::HeartbeatConfig;
use crate::engine::Progress;
use crate::host;
use crate::job::message::V1;
use crate::lifecycle::{Change, Event, Phase, State};
use crate::store::{Beat, Health, Ownership, Store};
use crate::systemd::Notifier;

/// A heartbeat record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "heartbeat.v1")]
#[expect(
    missing_docs,
    reason = "the fields are the contract's; docs/observability.md explains each"
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
    // Workers of before this was known do not say it.
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
    // Workers of before this was known do not say it.
    #[serde(default)]
    pub store: StoreFacts,
    pub memory: MemoryFacts,
    pub update: Option<UpdateFacts>,
    pub last_error: Option<LastError>,
}

/// What was built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
    // Workers of before this was known do not say it.
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct LastError {
    pub code: String,
    pub message: String,
    pub at_ms: u64,
}

/// How long before a change of state its reason may have been noted.
const JUST_BEFORE_MS: u64 = 1000;
/// Durations kept for the percentiles.
const KEPT: usize = 256;

/// The facts that the worker's parts report and the beat relays.
#[derive(Debug, Default)]
pub struct Facts {
    /// The last warm-up.
    pub warm: WarmFacts,
    /// The model that is served.
    pub model: ModelFacts,
    /// What runs it.
    pub engine: EngineFacts,
    /// Jobs since the start, but for what is derived.
    pub jobs: JobFacts,
    /// How the worker follows its model, if it does.
    pub update: Option<UpdateFacts>,
    /// The last thing of each kind that went wrong, by its code, and when by the steady clock.
    errors: BTreeMap<String, (u64, LastError)>,
    durations_ms: std::collections::VecDeque<f64>,
}

/// Shared between the worker's parts.
#[derive(Debug, Default)]
pub struct Vitals {
    facts: Mutex<Facts>,
    /// Advanced by the computing thread.
    pub progress: Arc<Progress>,
    /// Both connections are up.
    pub connected: AtomicBool,
    /// The broker has confirmed our consumer.
    pub consuming: AtomicBool,
    /// The broker holds our publishes back.
    blocked: Mutex<Arc<AtomicBool>>,
    /// How often a link was made.
    pub generation: AtomicU64,
    /// Jobs held.
    pub in_flight: AtomicU64,
    /// Jobs that may be held.
    pub slots: AtomicU64,
    /// When a beat last got through, by the steady clock.
    pub beaten_ms: AtomicU64,
    record: Mutex<Option<Arc<Record>>>,
}

impl Vitals {
    /// The facts, to be changed.
    pub fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last record that was made, whether Redis took it or not.
    pub fn record(&self) -> Option<Arc<Record>> {
        let record = self.record.lock();
        record.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_record(&self, record: Arc<Record>) {
        let known = self.record.lock();
        *known.unwrap_or_else(PoisonError::into_inner) = Some(record);
    }

    /// From now on this says whether the broker holds our publishes back.
    pub fn holds_back(&self, blocked: Arc<AtomicBool>) {
        let known = self.blocked.lock();
        *known.unwrap_or_else(PoisonError::into_inner) = blocked;
    }

    /// Notes what went wrong, for the record.
    pub fn error(&self, code: &str, message: &str) {
        let error = LastError {
            code: code.to_owned(),
            message: message.to_owned(),
            at_ms: unix_ms(),
        };
        let noted = (steady_ms(), error);
        self.facts().errors.insert(code.to_owned(), noted);
    }

    /// Whether jobs can be trusted to this worker: warm, confirmed consumer, computing or idle.
    pub fn ready(&self, phase: Phase) -> bool {
        phase.state == State::Ready
            && self.consuming.load(Ordering::Relaxed)
            && !self.progress.is_stuck()
    }
}

impl Facts {
    /// What went wrong last. While the worker is degraded that is what degraded it: whatever fails
    /// beside it, and again and again, must not hide the reason.
    fn last_error(&self, phase: Phase) -> Option<&LastError> {
        let of_the_state = self.errors.get(&phase.detail.to_string());
        // It is noted just before the state changes.
        let is_new = |(at, _): &&(u64, LastError)| at + JUST_BEFORE_MS >= phase.since;
        let of_the_state = of_the_state.filter(is_new);
        let found = of_the_state
            .filter(|_| phase.state == State::Degraded)
            .or_else(|| self.errors.values().max_by_key(|(at, _)| *at));
        found.map(|(_, error)| error)
    }

    /// Adds a finished job's time.
    pub fn finished(&mut self, millis: f64) {
        if self.durations_ms.len() == KEPT {
            self.durations_ms.pop_front();
        }
        self.durations_ms.push_back(millis);
        self.jobs.last_scored_at_ms = Some(unix_ms());
    }

    #[expect(clippy::cast_precision_loss, reason = "at most 256 durations")]
    fn jobs(&self) -> JobFacts {
        let mut sorted: Vec<f64> = self.durations_ms.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let percentile = |percent: usize| {
            sorted
                .get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1)))
                .copied()
        };
        let average =
            (!sorted.is_empty()).then(|| sorted.iter().sum::<f64>() / sorted.len() as f64);
        JobFacts {
            avg_ms: average,
            p50_ms: percentile(50),
            p95_ms: percentile(95),
            ..self.jobs.clone()
        }
    }
}

/// Who beats.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The worker's name.
    pub worker_id: String,
    /// New for every start.
    pub incarnation: String,
    /// The host's name.
    pub host: String,
    /// What its process numbers count in; see [`host::pid_space`].
    pub pid_space: Option<String>,
    /// When the process began, unix milliseconds.
    pub started_at_ms: u64,
}

/// What the beat has found out about our name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameClaim {
    /// Redis has not answered yet, or is away.
    Unknown,
    /// The name is ours.
    Ours,
    /// Another live worker has it.
    Taken,
}

/// The thread that beats.
#[derive(Debug)]
pub struct Heartbeat {
    stop: CancellationToken,
    /// Whether the name is ours.
    pub claim: watch::Receiver<NameClaim>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// Everything the thread needs.
#[derive(Debug)]
pub struct Source {
    /// Who beats.
    pub identity: Identity,
    /// What the parts report.
    pub vitals: Arc<Vitals>,
    /// The state.
    pub phase: watch::Receiver<Phase>,
    /// What happens.
    pub events: std::sync::mpsc::Receiver<Event>,
    /// Where it goes.
    pub store: Store,
    /// Whether Redis does what jobs ask of it, on a connection of their own.
    pub health: Arc<Health>,
    /// How often.
    pub config: HeartbeatConfig,
}

impl Heartbeat {
    /// Starts beating; `alive` is dropped when the thread ends, however it does.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(source: Source, alive: impl Send + 'static) -> std::io::Result<Self> {
        let stop = CancellationToken::new();
        let (claims, claim) = watch::channel(NameClaim::Unknown);
        let stopping = stop.clone();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let thread = std::thread::Builder::new()
            .name("scorer-heartbeat".into())
            .spawn(move || {
                let _alive = alive;
                runtime.block_on(beat_until(source, &stopping, &claims));
            })?;
        Ok(Self {
            stop,
            claim,
            thread: Some(thread),
        })
    }

    /// Sends the last beat and ends the thread.
    pub async fn stop(mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // Its beats are bounded in time, so is this.
            drop(tokio::task::spawn_blocking(move || thread.join()).await);
        }
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn beat_until(
    mut source: Source,
    stop: &CancellationToken,
    claims: &watch::Sender<NameClaim>,
) {
    let progress = Arc::clone(&source.vitals.progress);
    tokio::spawn(async move { progress.watch().await });
    let mut ticks = tokio::time::interval(source.config.interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let (mut pulse, mut systemd) = (Pulse::new(), Notifier::default());
    loop {
        let stopping = stop.is_cancelled();
        let phase = *source.phase.borrow();
        systemd.tell(phase, source.vitals.progress.is_stuck());
        pulse.beat(&source, claims).await;
        if stopping {
            return;
        }
        tokio::select! {
            _ = ticks.tick() => {}
            changed = source.phase.changed() => if changed.is_err() {
                return;
            },
            () = stop.cancelled() => {}
        }
    }
}

/// What the thread remembers between beats.
struct Pulse {
    seq: u64,
    host: HostFacts,
    unsent: Vec<Event>,
    dead: Option<String>,
    failing: bool,
    system: sysinfo::System,
}

impl Pulse {
    fn new() -> Self {
        Self {
            seq: 0,
            host: host::facts(),
            unsent: Vec::new(),
            dead: None,
            failing: false,
            system: sysinfo::System::new(),
        }
    }

    async fn beat(&mut self, source: &Source, claims: &watch::Sender<NameClaim>) {
        self.seq += 1;
        self.unsent.extend(source.events.try_iter());
        // Redis away for long must not grow the process.
        let surplus = self.unsent.len().saturating_sub(1000);
        self.unsent.drain(..surplus);
        let phase = *source.phase.borrow();
        let record = Arc::new(self.record(source, phase));
        source.vitals.set_record(Arc::clone(&record));
        let Ok(record) = serde_json::to_string(&*record) else {
            return;
        };
        let events: Vec<_> = self
            .unsent
            .iter()
            .map(|event| entry(&source.identity, event))
            .collect();
        let beat = Beat {
            worker_id: &source.identity.worker_id,
            incarnation: &source.identity.incarnation,
            record: &record,
            ttl: source.config.ttl,
            events: &events,
            // A worker that ends in any other state stays in sight until its record expires.
            leaving: phase.state == State::Stopped,
            dead: self.dead.as_deref(),
        };
        let beaten = source.store.beat(&beat).await;
        crate::metrics::beat(beaten.is_ok());
        match beaten {
            Ok(ownership) => {
                self.unsent.clear();
                let beaten = &source.vitals.beaten_ms;
                beaten.store(steady_ms(), Ordering::Relaxed);
                if std::mem::take(&mut self.failing) {
                    tracing::info!("Redis takes heartbeats again");
                }
                self.note(ownership, &source.identity, claims);
            }
            Err(error) if !self.failing => {
                self.failing = true;
                tracing::warn!(%error, "the heartbeat is not published; scoring goes on, beats are retried");
            }
            Err(_) => {}
        }
    }

    fn note(
        &mut self,
        ownership: Ownership,
        identity: &Identity,
        claims: &watch::Sender<NameClaim>,
    ) {
        let claim = match ownership {
            Ownership::Ours => NameClaim::Ours,
            Ownership::Theirs {
                incarnation,
                pid,
                pid_space,
            } => {
                // A dead process cannot come back: its record is taken over at once. Only where its
                // number means to us what it means to it: pods that share a host's name have their own.
                let ours = pid_space.is_some() && pid_space == identity.pid_space;
                let dead = ours && !host::lives(pid);
                self.dead = dead.then_some(incarnation);
                NameClaim::Taken
            }
        };
        claims.send_if_modified(|current| std::mem::replace(current, claim) != claim);
    }

    fn record(&mut self, source: &Source, phase: Phase) -> Record {
        let (vitals, identity) = (&source.vitals, &source.identity);
        let in_flight = vitals.in_flight.load(Ordering::Relaxed);
        let ready = vitals.ready(phase);
        let facts = vitals.facts();
        Record {
            v: V1,
            worker_id: identity.worker_id.clone(),
            incarnation: identity.incarnation.clone(),
            seq: self.seq,
            at_ms: unix_ms(),
            started_at_ms: identity.started_at_ms,
            host: identity.host.clone(),
            pid: std::process::id(),
            pid_space: identity.pid_space.clone(),
            build: Build {
                version: env!("CARGO_PKG_VERSION").into(),
                git: option_env!("SCORER_BUILD_GIT").map(Into::into),
            },
            state: phase.state.as_str().into(),
            state_detail: phase.detail.to_string(),
            ready,
            accepting: ready && in_flight < vitals.slots.load(Ordering::Relaxed),
            last_ready_at_ms: (phase.last_ready_at_ms != 0).then_some(phase.last_ready_at_ms),
            last_state_change_at_ms: phase.since_ms,
            warm: facts.warm.clone(),
            model: ModelFacts {
                baseline_cache_entries: vitals.progress.baselines.load(Ordering::Relaxed),
                ..facts.model.clone()
            },
            engine: facts.engine.clone(),
            host_info: self.host.clone(),
            jobs: JobFacts {
                in_flight: in_flight.min(1),
                buffered: in_flight.saturating_sub(1),
                ..facts.jobs()
            },
            progress: progress(&vitals.progress),
            broker: BrokerFacts {
                connected: vitals.connected.load(Ordering::Relaxed),
                consuming: vitals.consuming.load(Ordering::Relaxed),
                blocked: vitals
                    .blocked
                    .lock()
                    .is_ok_and(|b| b.load(Ordering::Relaxed)),
                generation: vitals.generation.load(Ordering::Relaxed),
            },
            store: store(&source.health),
            memory: MemoryFacts {
                rss_bytes: host::rss(&mut self.system),
            },
            update: facts.update.clone(),
            last_error: facts.last_error(phase).cloned(),
        }
    }
}

fn entry(identity: &Identity, event: &Event) -> Vec<(String, String)> {
    let (from, to, at) = match event {
        Event::Changed(Change { from, to }) => (from, to, to.since_ms),
        Event::Answered { phase, .. } => (phase, phase, unix_ms()),
    };
    let mut fields = vec![
        ("worker_id", identity.worker_id.clone()),
        ("incarnation", identity.incarnation.clone()),
        ("from", from.state.as_str().to_owned()),
        ("to", to.state.as_str().to_owned()),
        ("detail", to.detail.to_string()),
        ("at", at.to_string()),
    ];
    if let Event::Answered {
        command,
        outcome,
        message,
        ..
    } = event
    {
        fields.push(("command", command.as_str().to_owned()));
        fields.push(("outcome", outcome.as_str().to_owned()));
        fields.push(("message", message.clone()));
    }
    let fields = fields.into_iter();
    fields
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

fn progress(progress: &Progress) -> ProgressFacts {
    ProgressFacts {
        counter: progress.counter.load(Ordering::Relaxed),
        at_ms: progress.at_ms.load(Ordering::Relaxed),
        busy_ms: u64::try_from(progress.busy_for().as_millis()).unwrap_or(u64::MAX),
    }
}

fn store(health: &Health) -> StoreFacts {
    let last_error = health.trouble();
    StoreFacts {
        ok: last_error.is_none(),
        last_error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lifecycle::Detail;

    fn error(code: &str, at: u64) -> (u64, LastError) {
        let error = LastError {
            code: code.into(),
            message: String::new(),
            // A clock that is set says nothing of what came first.
            at_ms: 1_000_000 - at,
        };
        (at, error)
    }

    #[test]
    fn what_degraded_a_worker_is_not_hidden_by_what_fails_beside_it() {
        let mut facts = Facts::default();
        let mut phase = Phase {
            state: State::Degraded,
            detail: Detail::WarmFailed,
            since_ms: 0,
            since: 10_000,
            last_ready_at_ms: 0,
            changes: 1,
        };
        assert_eq!(facts.last_error(phase), None);
        for (code, at_ms) in [("warm_failed", 9_990), ("broker_disconnected", 12_000)] {
            facts.errors.insert(code.into(), error(code, at_ms));
        }
        let code = |facts: &Facts, phase| facts.last_error(phase).map(|e| e.code.clone());
        assert_eq!(code(&facts, phase).as_deref(), Some("warm_failed"));
        // Of another time, or no reason of the state at all.
        phase.since = 20_000;
        assert_eq!(code(&facts, phase).as_deref(), Some("broker_disconnected"));
        (phase.since, phase.state) = (10_000, State::Warming);
        assert_eq!(code(&facts, phase).as_deref(), Some("broker_disconnected"));
    }
}
