//! Wires a worker together: it answers probes at once, gets its name from the package, and then starts
//! everything that runs in the background.

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

use super::link::LinkKeeper;
use super::orders::Request;
use super::parts::{Part, Parts};
use super::run::Worker;
use super::transition::{Ask, Stop};
use crate::broker::amqp::Link;
use crate::broker::nodes::Nodes;
use crate::broker::topology::Topology;
use crate::config::{Config, device_name, host_name};
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
use crate::worker::heartbeat::{Heartbeat, Identity, Inputs};
use crate::worker::host;
use crate::worker::lifecycle::{Event, Lifecycle};

/// The queue and the keys carry the model's name: without it there is nowhere to report to. The error is
/// how the worker ends if it is asked to first.
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
                tracing::error!(%error, "the package in model.dir cannot be read, so the model is not known; correct model.dir or the package: it is read again")
            }
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.next_delay()) => {}
            request = inbox.recv() => return Err(match request.map(|request| request.ask) {
                Some(Ask::PartLost(part)) => Stop::PartLost(part),
                Some(Ask::Signal | Ask::Command(_) | Ask::Reload) | None => Stop::Drained,
            }),
        }
    }
}

/// A worker that does not know its model yet: it lives, and answers probes.
pub(super) struct Startup {
    identity: Identity,
    pub(super) status: Arc<WorkerStatus>,
    lifecycle: Lifecycle,
    phase: watch::Receiver<Phase>,
    /// Taken by the heartbeat.
    events: Option<std::sync::mpsc::Receiver<Event>>,
}

impl Startup {
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
        let inputs = Inputs {
            identity: self.identity.clone(),
            status: Arc::clone(&self.status),
            phase: self.phase.clone(),
            events: self
                .events
                .take()
                .context("the heartbeat has started already")?,
            // A connection of its own, so that jobs do not delay a beat.
            store: Store::new(&config.redis, name)?,
            health,
            config: config.heartbeat,
        };
        Ok(Heartbeat::start(inputs, parts.alive(Part::Heartbeat))?)
    }

    fn link_keeper(
        &self,
        config: &Config,
        topology: &Arc<Topology>,
        links: watch::Sender<Option<Arc<Link>>>,
        replies: &TaskTracker,
        parts: &Parts,
    ) -> LinkKeeper {
        LinkKeeper {
            config: config.clone(),
            nodes: Nodes::new(&config.amqp),
            topology: Arc::clone(topology),
            status: Arc::clone(&self.status),
            links,
            parts: parts.clone(),
            incarnation: self.identity.incarnation.clone(),
            phase: self.phase.clone(),
            events: self.lifecycle.events(),
            replies: replies.clone(),
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
        tracing::warn!(%error, "health probes on this host will not reach this worker; is another one running under its id?");
    }
}

/// What runs in the background of a worker: its heartbeat, and tasks that are aborted at its end.
pub(super) struct Background {
    pub(super) heartbeat: Heartbeat,
    pub(super) tasks: Vec<JoinHandle<()>>,
}

impl Worker {
    /// Starts everything that runs in the background: the heartbeat, the link to the broker, updates.
    ///
    /// # Errors
    /// For unusable configuration.
    pub(super) fn assemble(
        config: Config,
        dir: PathBuf,
        name: &str,
        mut startup: Startup,
        requests: mpsc::Receiver<Request>,
        parts: &Parts,
        hurry: CancellationToken,
    ) -> anyhow::Result<(Self, Background)> {
        describe(&startup.status, &config, name);
        let store = Store::new(&config.redis, name)?;
        let heartbeat = startup.heartbeat(&config, name, store.health(), parts)?;
        let topology = Arc::new(Topology::new(&config.amqp, name));
        let (replies, (offered, links)) = (TaskTracker::new(), watch::channel(None));
        let keeper = startup.link_keeper(&config, &topology, offered, &replies, parts);
        let mut tasks = vec![parts.spawn(Part::Link, keeper.keep())];
        let (incarnation, status) = (startup.identity.incarnation, startup.status);
        let (lease, facts) = (store.clone(), Arc::clone(&status));
        let updates = Updater::new(&config, name, &incarnation, lease, facts, startup.phase)?;
        let (updater, updates) = updates.unzip();
        tasks.extend(updater.map(|updater| parts.spawn(Part::Updater, updater.follow())));
        let marks = CrashMarks::new(store.clone(), &config, &incarnation, Arc::clone(&status));
        tasks.push(parts.spawn(Part::CrashMarks, marks.clone().sweep()));
        let worker = Self {
            dir,
            incarnation,
            lifecycle: startup.lifecycle,
            status,
            topology,
            store,
            marks,
            recent_results: RecentResults::default(),
            device_queue: DeviceQueue::default(),
            fetcher: None,
            links,
            requests,
            own_requests: parts.requests.clone(),
            pausing: Vec::new(),
            due: Vec::new(),
            replies,
            updates,
            loss: None,
            state: None,
            claim: heartbeat.claim.clone(),
            paused: false,
            hurry,
            cautious: false,
            package_changed: false,
            warming: Backoff::new(),
            registering: Backoff::between(Duration::from_millis(200), Duration::from_secs(10)),
            publishing: Backoff::between(Duration::from_secs(1), Duration::from_secs(300)),
            config,
        };
        Ok((worker, Background { heartbeat, tasks }))
    }
}
