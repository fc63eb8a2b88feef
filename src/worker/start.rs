//! How a worker begins: alive at once, with a name as soon as the package tells it, and with
//! everything that runs beside it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::link::Keeper;
use super::parts::{Part, Parts};
use super::{Request, Stop, Wish, Worker};
use crate::broker::amqp::Link;
use crate::broker::topology::Topology;
use crate::config::device_name;
use crate::config::{Config, host_name};
use crate::model::package::Package;
use crate::protocol::heartbeat::EngineFacts;
use crate::protocol::state::Phase;
use crate::scoring::crash_marks::CrashMarks;
use crate::scoring::device_queue::DeviceQueue;
use crate::scoring::recent_results::RecentResults;
use crate::store::{Health, Store};
use crate::telemetry::status::WorkerStatus;
use crate::update::Updater;
use crate::util::backoff::Backoff;
use crate::util::clock::unix_ms;
use crate::worker::heartbeat::{Heartbeat, Identity, Source};
use crate::worker::host;
use crate::worker::lifecycle::{Event, Lifecycle};

/// Passes on what whoever runs the worker wishes.
pub(super) async fn grant(
    mut wishes: mpsc::Receiver<Wish>,
    parts: Parts,
    hurry: CancellationToken,
) {
    let Parts { requests, watchdog } = parts;
    while let Some(wish) = wishes.recv().await {
        match wish {
            Wish::Drain => {
                watchdog.arm();
                let requests = requests.clone();
                // Not here: a worker that drains already takes no requests, and the next wish counts.
                tokio::spawn(async move {
                    if requests.send(Request::Signal).await.is_err() {
                        tracing::debug!("the worker has ended already");
                    }
                });
            }
            Wish::EndNow => {
                watchdog.hurry();
                hurry.cancel();
            }
        }
    }
}

/// The queue and the keys carry the model's name: without it there is nowhere to report to.
pub(super) async fn model_name(
    config: &Config,
    dir: &Path,
    inbox: &mut mpsc::Receiver<Request>,
) -> Result<String, Stop> {
    let mut backoff = Backoff::new();
    loop {
        if let Some(name) = &config.model.name {
            return Ok(name.clone());
        }
        match Package::read_manifest(dir) {
            Ok((manifest, _)) => return Ok(manifest.name),
            Err(error) => {
                tracing::error!(%error, "the model's name cannot be read; set model.name or mend the package")
            }
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.next_delay()) => {}
            asked = inbox.recv() => return Err(match asked {
                Some(Request::Lost(part)) => Stop::PartLost(part),
                Some(Request::Signal | Request::Command(_) | Request::Reload(_)) | None => {
                    Stop::Drained
                }
            }),
        }
    }
}

/// What there is of a worker before it knows its model: it is alive, and answers probes.
pub(super) struct Life {
    identity: Identity,
    pub(super) status: Arc<WorkerStatus>,
    lifecycle: Lifecycle,
    phase: watch::Receiver<Phase>,
    /// Until the heartbeat has them.
    events: Option<std::sync::mpsc::Receiver<Event>>,
}

impl Life {
    pub(super) fn begin(config: &Config) -> Self {
        let (identity, status) = (identity(config), Arc::<WorkerStatus>::default());
        let (lifecycle, phase, events) = Lifecycle::start();
        serve_probes(config, &identity, &status, &phase);
        Self {
            identity,
            status,
            lifecycle,
            phase,
            events: Some(events),
        }
    }

    fn heartbeat(
        &mut self,
        config: &Config,
        name: &str,
        health: Arc<Health>,
        parts: &Parts,
    ) -> anyhow::Result<Heartbeat> {
        let source = Source {
            identity: self.identity.clone(),
            status: Arc::clone(&self.status),
            phase: self.phase.clone(),
            events: self.events.take().context("it beats already")?,
            // A connection of its own: what jobs do must not delay a beat.
            store: Store::new(&config.redis, name)?,
            health,
            config: config.heartbeat,
        };
        Ok(Heartbeat::start(source, parts.alive(Part::Heartbeat))?)
    }

    fn keeper(
        &self,
        config: &Config,
        topology: &Arc<Topology>,
        links: watch::Sender<Option<Arc<Link>>>,
        answers: &TaskTracker,
        parts: &Parts,
    ) -> Keeper {
        Keeper {
            config: config.clone(),
            topology: Arc::clone(topology),
            status: Arc::clone(&self.status),
            links,
            parts: parts.clone(),
            incarnation: self.identity.incarnation.clone(),
            phase: self.phase.clone(),
            events: self.lifecycle.events(),
            answers: answers.clone(),
        }
    }
}

fn describe(status: &WorkerStatus, config: &Config, name: &str) {
    let slots = config.amqp.prefetch.into();
    status.slots.store(slots, Ordering::Relaxed);
    let mut facts = status.facts();
    facts.model.name = name.to_owned();
    facts.engine = EngineFacts {
        execution_provider: config.engine.execution_provider.execution_provider().into(),
        device: device_name(config),
        ..EngineFacts::default()
    };
}

fn identity(config: &Config) -> Identity {
    Identity {
        worker_id: config.worker_id(),
        incarnation: Uuid::new_v4().to_string(),
        host: host_name(),
        pid_space: host::pid_space(),
        started_at_ms: unix_ms(),
    }
}

fn serve_probes(
    config: &Config,
    identity: &Identity,
    status: &Arc<WorkerStatus>,
    phase: &watch::Receiver<Phase>,
) {
    let (namespace, id) = (&config.redis.namespace, &identity.worker_id);
    if let Err(error) =
        crate::worker::health::serve(namespace, id, Arc::clone(status), phase.clone())
    {
        tracing::warn!(%error, "probes of this host will not reach this worker; is another one running under its id?");
    }
}

/// What runs beside a worker: its heartbeat, and tasks that are ended with it.
pub(super) struct Beside {
    pub(super) heartbeat: Heartbeat,
    pub(super) tasks: Vec<JoinHandle<()>>,
}

impl Worker {
    /// Starts what runs beside the worker: the heartbeat, the link to the broker, updates.
    pub(super) fn start(
        config: Config,
        dir: PathBuf,
        name: &str,
        mut life: Life,
        requests: mpsc::Receiver<Request>,
        parts: &Parts,
        hurry: CancellationToken,
    ) -> anyhow::Result<(Self, Beside)> {
        describe(&life.status, &config, name);
        let store = Store::new(&config.redis, name)?;
        let heartbeat = life.heartbeat(&config, name, store.health(), parts)?;
        let (topology, answers) = (
            Arc::new(Topology::new(&config.amqp, name)),
            TaskTracker::new(),
        );
        let (offered, links) = watch::channel(None);
        let keeper = life.keeper(&config, &topology, offered, &answers, parts);
        let mut tasks = vec![parts.spawn(Part::Link, keeper.keep())];
        let (incarnation, status) = (life.identity.incarnation, life.status);
        let (lease, facts) = (store.clone(), Arc::clone(&status));
        let updates = Updater::new(&config, name, &incarnation, lease, facts, life.phase)?;
        let (updater, follower) = updates.unzip();
        tasks.extend(updater.map(|updater| parts.spawn(Part::Updater, updater.follow())));
        let marks = CrashMarks::new(store.clone(), &config, &incarnation, Arc::clone(&status));
        tasks.push(parts.spawn(Part::CrashMarks, marks.clone().sweep()));
        let worker = Self {
            dir,
            incarnation,
            lifecycle: life.lifecycle,
            status,
            topology,
            store,
            marks,
            recent_results: RecentResults::default(),
            device_queue: DeviceQueue::default(),
            fetcher: None,
            links,
            requests,
            asking: parts.requests.clone(),
            due: Vec::new(),
            answers,
            follower,
            loss: None,
            state: None,
            claim: heartbeat.claim.clone(),
            paused: false,
            hurry,
            cautious: false,
            package_changed: false,
            warming: Backoff::new(),
            registering: Backoff::between(Duration::from_millis(200), Duration::from_secs(10)),
            forbidden: Backoff::between(Duration::from_secs(1), Duration::from_secs(300)),
            config,
        };
        Ok((worker, Beside { heartbeat, tasks }))
    }
}
