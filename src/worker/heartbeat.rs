//! Publishes the worker's record into Redis, from a thread of its own that scoring cannot starve. It only
//! relays: the state comes from the lifecycle, progress from the computing thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use strum::VariantArray;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::HeartbeatConfig;
use crate::protocol::heartbeat::{
    Ability, Accepts, BrokerFacts, Build, HostFacts, JobFacts, MemoryFacts, ModelFacts,
    ProgressFacts, Record, StoreFacts,
};
use crate::protocol::message::V1;
use crate::protocol::state::{Phase, State};
use crate::store::{Beat, Health, Ownership, Store};
use crate::telemetry::progress::Progress;
use crate::telemetry::status::WorkerStatus;
use crate::util::clock::{millis, steady_ms, unix_ms};
use crate::worker::host;
use crate::worker::lifecycle::Event;
use crate::worker::systemd::Notifier;

/// Events that are kept while Redis is away; older ones are dropped.
const MOST_UNSENT: usize = 1000;

/// Which process this is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The worker's name.
    pub worker_id: String,
    /// New for every start.
    pub incarnation: String,
    /// The host's name.
    pub host: String,
    /// Where its process id is valid; see [`host::pid_space`].
    pub pid_space: Option<String>,
    /// When the process started, unix milliseconds.
    pub started_at_ms: u64,
}

/// Whether this worker may use its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameClaim {
    /// Redis has not answered yet.
    Unknown,
    /// This worker holds it.
    Ours,
    /// Another live worker holds it.
    Taken,
}

/// The thread that sends heartbeats.
#[derive(Debug)]
pub struct Heartbeat {
    stop: CancellationToken,
    /// Whether this worker may use its name.
    pub claim: watch::Receiver<NameClaim>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// Everything the thread needs.
#[derive(Debug)]
pub struct Inputs {
    /// Which process this is.
    pub identity: Identity,
    /// What the worker's parts report.
    pub status: Arc<WorkerStatus>,
    /// The worker's state.
    pub phase: watch::Receiver<Phase>,
    /// Entries for the event stream.
    pub events: std::sync::mpsc::Receiver<Event>,
    /// Where the record goes.
    pub store: Store,
    /// Whether Redis serves the jobs, which use another connection.
    pub health: Arc<Health>,
    /// How often, and how long a record lives.
    pub config: HeartbeatConfig,
}

impl Heartbeat {
    /// Starts the thread; `alive` is dropped when it ends, however that happens.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(inputs: Inputs, alive: impl Send + 'static) -> std::io::Result<Self> {
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
                runtime.block_on(beat_until(inputs, &stopping, &claims));
            })?;
        Ok(Self {
            stop,
            claim,
            thread: Some(thread),
        })
    }

    /// Sends a last heartbeat and ends the thread.
    pub async fn stop(mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // Each heartbeat has a time limit, so this returns.
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
    mut inputs: Inputs,
    stop: &CancellationToken,
    claims: &watch::Sender<NameClaim>,
) {
    let progress = Arc::clone(&inputs.status.progress);
    tokio::spawn(async move { progress.watch().await });
    let mut ticks = tokio::time::interval(inputs.config.interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut publisher = Publisher {
        host: host::facts(),
        ..Publisher::default()
    };
    let mut systemd = Notifier::default();
    loop {
        let stopping = stop.is_cancelled();
        let phase = *inputs.phase.borrow();
        systemd.tell(phase, inputs.status.progress.is_stuck());
        publisher.beat(&inputs, claims).await;
        if stopping {
            return;
        }
        tokio::select! {
            _ = ticks.tick() => {}
            changed = inputs.phase.changed() => if changed.is_err() {
                return;
            },
            () = stop.cancelled() => {}
        }
    }
}

/// Publishes records, and remembers what is needed between them.
#[derive(Default)]
struct Publisher {
    seq: u64,
    host: HostFacts,
    unsent: Vec<Event>,
    /// The incarnation of a dead process that holds our name.
    dead: Option<String>,
    failing: bool,
    system: sysinfo::System,
}

impl Publisher {
    async fn beat(&mut self, inputs: &Inputs, claims: &watch::Sender<NameClaim>) {
        self.seq += 1;
        self.collect_events(inputs);
        let phase = *inputs.phase.borrow();
        let record = Arc::new(self.record(inputs, phase));
        inputs.status.set_record(Arc::clone(&record));
        let Ok(record) = serde_json::to_string(&*record) else {
            return;
        };
        let events: Vec<_> = self
            .unsent
            .iter()
            .map(|event| entry(&inputs.identity, event))
            .collect();
        let beat = Beat {
            worker_id: &inputs.identity.worker_id,
            incarnation: &inputs.identity.incarnation,
            record: &record,
            ttl: inputs.config.ttl,
            events: &events,
            // A worker that ends in any other state stays visible until its record expires.
            leaving: phase.state == State::Stopped,
            dead: self.dead.as_deref(),
        };
        let beaten = inputs.store.beat(&beat).await;
        crate::telemetry::metrics::beat(beaten.is_ok());
        match beaten {
            Ok(ownership) => self.note_success(inputs, ownership, claims),
            Err(error) if !self.failing => {
                self.failing = true;
                tracing::warn!(%error, "the heartbeat is not published; scoring goes on, and publishing is retried");
            }
            Err(_) => {}
        }
    }

    fn collect_events(&mut self, inputs: &Inputs) {
        self.unsent.extend(inputs.events.try_iter());
        let surplus = self.unsent.len().saturating_sub(MOST_UNSENT);
        self.unsent.drain(..surplus);
    }

    fn note_success(
        &mut self,
        inputs: &Inputs,
        ownership: Ownership,
        claims: &watch::Sender<NameClaim>,
    ) {
        self.unsent.clear();
        let beaten = &inputs.status.beaten_ms;
        beaten.store(steady_ms(), Ordering::Relaxed);
        if std::mem::take(&mut self.failing) {
            tracing::info!("heartbeats are published again");
        }
        self.note_claim(ownership, &inputs.identity, claims);
    }

    fn note_claim(
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
                // A dead process cannot come back, so its record is taken over at once. That needs its
                // process id to be valid here, too: pods that share a host name have their own ids.
                let ours = pid_space.is_some() && pid_space == identity.pid_space;
                let dead = ours && !host::lives(pid);
                self.dead = dead.then_some(incarnation);
                NameClaim::Taken
            }
        };
        claims.send_if_modified(|current| std::mem::replace(current, claim) != claim);
    }

    fn record(&mut self, inputs: &Inputs, phase: Phase) -> Record {
        let (status, identity) = (&inputs.status, &inputs.identity);
        let in_flight = status.in_flight.load(Ordering::Relaxed);
        let ready = status.ready(phase);
        let facts = status.facts();
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
            accepting: ready && in_flight < status.slots.load(Ordering::Relaxed),
            last_ready_at_ms: (phase.last_ready_at_ms != 0).then_some(phase.last_ready_at_ms),
            last_state_change_at_ms: phase.since_ms,
            warm: facts.warm.clone(),
            model: ModelFacts {
                baseline_cache_entries: status.progress.baselines.load(Ordering::Relaxed),
                ..facts.model.clone()
            },
            accepts: Accepts::of(Ability::VARIANTS),
            engine: facts.engine.clone(),
            host_info: self.host.clone(),
            jobs: JobFacts {
                in_flight: in_flight.min(1),
                buffered: in_flight.saturating_sub(1),
                waiting: status.waits.count(),
                waits_for: status.waits.workers(),
                ..facts.jobs()
            },
            progress: progress(&status.progress),
            broker: broker(status, facts.node.clone()),
            store: store(&inputs.health),
            memory: MemoryFacts {
                rss_bytes: host::rss(&mut self.system),
            },
            update: facts.update.clone(),
            last_error: facts.last_error(phase).cloned(),
        }
    }
}

fn entry(identity: &Identity, event: &Event) -> Vec<(&'static str, String)> {
    let (from, to, at) = match event {
        Event::Changed { from, to } => (from, to, to.since_ms),
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
    fields
}

fn broker(status: &WorkerStatus, node: Option<String>) -> BrokerFacts {
    BrokerFacts {
        connected: status.connected.load(Ordering::Relaxed),
        node,
        consuming: status.consuming.load(Ordering::Relaxed),
        blocked: status
            .blocked
            .lock()
            .is_ok_and(|b| b.load(Ordering::Relaxed)),
        generation: status.generation.load(Ordering::Relaxed),
    }
}

fn progress(progress: &Progress) -> ProgressFacts {
    ProgressFacts {
        counter: progress.counter.load(Ordering::Relaxed),
        at_ms: progress.at_ms.load(Ordering::Relaxed),
        busy_ms: millis(progress.busy_for()),
    }
}

fn store(health: &Health) -> StoreFacts {
    let last_error = health.trouble();
    StoreFacts {
        ok: last_error.is_none(),
        last_error,
    }
}
