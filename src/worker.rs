//! The life of a worker: load, prove, serve, drain. This file alone advances the lifecycle; a
//! newcomer reads [`Worker::live`] from top to bottom.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::broker::amqp::Link;
use crate::broker::topology::Topology;
use crate::clock::unix_ms;
use crate::config::{Config, host_name};
use crate::consumer::{Ended, Running, Serving};
use crate::control::{self, Command};
use crate::engine::thread::EngineHandle;
use crate::engine::{EngineError, Warm};
use crate::heartbeat::{EngineFacts, Heartbeat, Identity, ModelFacts, NameClaim, Source, Vitals};
use crate::lifecycle::{Detail, Lifecycle, State};
use crate::package::Package;
use crate::package::plan::Plan;
use crate::pipeline::{Pipeline, device_name};
use crate::retry::Backoff;
use crate::store::Store;

/// How long a start waits for the broker before it warms up without it.
const FIRST_LINK: Duration = Duration::from_secs(3);

/// Why the worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stop {
    /// A computation had to be cut short at the drain's deadline.
    pub cut_short: bool,
}

/// What the worker is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Request {
    Command(Command),
    Signal,
}

struct Worker {
    config: Config,
    dir: PathBuf,
    incarnation: String,
    lifecycle: Lifecycle,
    vitals: Arc<Vitals>,
    topology: Arc<Topology>,
    store: Store,
    links: watch::Receiver<Option<Arc<Link>>>,
    requests: mpsc::Receiver<Request>,
    claim: watch::Receiver<NameClaim>,
    paused: bool,
}

/// Why a wait or a phase ended.
enum Next {
    Go,
    Drain(Detail),
    Rewarm,
}

/// Runs a worker until it is drained. `shutdown` resolves on the first signal.
///
/// # Errors
/// Only for what no waiting can mend: unusable configuration.
pub async fn run(
    config: Config,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<Stop> {
    let Some(dir) = config.model.dir.clone() else {
        anyhow::bail!("model.dir: not set; it names the model package")
    };
    let (requests, inbox) = mpsc::channel(16);
    let signals = requests.clone();
    tokio::spawn(async move {
        shutdown.await;
        signals.send(Request::Signal).await.unwrap_or_default();
    });
    let mut inbox = inbox;
    let Some(name) = model_name(&config, &dir, &mut inbox).await else {
        return Ok(Stop { cut_short: false });
    };

    let identity = Identity {
        worker_id: config.worker_id(),
        incarnation: Uuid::new_v4().to_string(),
        host: host_name(),
        started_at_ms: unix_ms(),
    };
    let (lifecycle, phase, changes) = Lifecycle::start();
    let vitals = Arc::new(Vitals::default());
    vitals
        .slots
        .store(config.amqp.prefetch.into(), Ordering::Relaxed);
    vitals.facts().model.name.clone_from(&name);
    vitals.facts().engine = EngineFacts {
        execution_provider: config.engine.execution_provider.execution_provider().into(),
        device: device_name(&config),
        ..EngineFacts::default()
    };
    let store = Store::new(&config.redis, &name)?;
    let heartbeat = Heartbeat::start(Source {
        identity: identity.clone(),
        vitals: Arc::clone(&vitals),
        phase: phase.clone(),
        changes,
        store: store.clone(),
        config: config.heartbeat,
    })?;
    if let Err(error) = crate::health::serve(
        &config.redis.namespace,
        &identity.worker_id,
        Arc::clone(&vitals),
        phase,
    ) {
        tracing::warn!(%error, "probes of this host will not reach this worker; is another one running under its id?");
    }
    let topology = Arc::new(Topology::new(&config.amqp, &name));
    let (links, linked) = watch::channel(None);
    let supervisor = tokio::spawn(keep_linked(
        config.clone(),
        Arc::clone(&topology),
        Arc::clone(&vitals),
        links,
        requests,
    ));

    let mut worker = Worker {
        dir,
        incarnation: identity.incarnation,
        lifecycle,
        vitals,
        topology,
        store,
        links: linked,
        requests: inbox,
        claim: heartbeat.claim.clone(),
        paused: false,
        config,
    };
    let stop = worker.live().await;
    supervisor.abort();
    let link = worker.links.borrow().clone();
    if let Some(link) = link {
        link.close().await;
    }
    worker.lifecycle.advance(State::Stopped, Detail::Drained);
    heartbeat.stop().await;
    Ok(stop)
}

/// The queue and the keys carry the model's name: without it there is nowhere to report to.
async fn model_name(
    config: &Config,
    dir: &std::path::Path,
    inbox: &mut mpsc::Receiver<Request>,
) -> Option<String> {
    let mut backoff = Backoff::new();
    loop {
        if let Some(name) = &config.model.name {
            return Some(name.clone());
        }
        match Package::read_manifest(dir) {
            Ok((manifest, _)) => return Some(manifest.name),
            Err(error) => {
                tracing::error!(%error, "the model's name cannot be read; set model.name or mend the package")
            }
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.wait()) => {}
            _ = inbox.recv() => return None,
        }
    }
}

impl Worker {
    async fn live(&mut self) -> Stop {
        let first = self.links.wait_for(Option::is_some);
        // Declared before warming, where the broker is there; a drain ends the next wait at once.
        drop(
            tokio::time::timeout(FIRST_LINK, first)
                .await
                .map(|link| link.map(|_| ())),
        );
        let mut engine: Option<EngineHandle> = None;
        let mut unproven: Option<EngineHandle> = None;
        let mut backoff = Backoff::new();
        let mut lost = Backoff::between(Duration::from_millis(200), Duration::from_secs(10));
        loop {
            let Some(warm) = engine.clone() else {
                match self.warm_up(unproven.take(), &mut backoff).await {
                    Ok(loaded) => engine = Some(loaded),
                    Err(Next::Drain(detail)) => return self.drain_idle(detail).await,
                    Err(Next::Go | Next::Rewarm) => {}
                }
                continue;
            };
            let Some(link) = self.may_serve() else {
                match self.wait(None).await {
                    Next::Drain(detail) => return self.drain_idle(detail).await,
                    Next::Rewarm => unproven = engine.take(),
                    Next::Go => {}
                }
                continue;
            };
            let served_since = Instant::now();
            let (ended, next, stop) = self.serve(warm.clone(), link).await;
            if let Next::Drain(_) = next {
                return stop;
            }
            match (ended, next) {
                (Ended::Asked, Next::Rewarm) => unproven = engine.take(),
                (Ended::EngineBroken, _) => engine = None,
                (Ended::Asked | Ended::BrokerLost, _) => {}
                (Ended::ConsumerLost, _) => {
                    if served_since.elapsed() > Duration::from_secs(30) {
                        lost.reset();
                    }
                    if let Next::Drain(detail) = self.wait(Some(lost.wait())).await {
                        return self.drain_idle(detail).await;
                    }
                }
            }
        }
    }

    /// The link to serve on, if nothing stands in the way; else the state says what does.
    fn may_serve(&mut self) -> Option<Arc<Link>> {
        if self.paused {
            self.lifecycle.advance(State::Degraded, Detail::Paused);
            return None;
        }
        if *self.claim.borrow_and_update() == NameClaim::Taken {
            self.lifecycle.advance(State::Degraded, Detail::DuplicateId);
            return None;
        }
        let link = self
            .links
            .borrow_and_update()
            .clone()
            .filter(|link| !link.lost.is_cancelled());
        if link.is_none() {
            self.lifecycle
                .advance(State::Degraded, Detail::BrokerDisconnected);
        }
        link
    }

    /// One attempt: load (unless there is an engine), prove, report. A failure waits its back-off
    /// and is tried again for ever; it never latches.
    async fn warm_up(
        &mut self,
        engine: Option<EngineHandle>,
        backoff: &mut Backoff,
    ) -> Result<EngineHandle, Next> {
        let began = Instant::now();
        self.lifecycle.advance(
            State::Warming,
            if engine.is_some() {
                Detail::Rewarm
            } else {
                Detail::LoadingModel
            },
        );
        {
            let mut facts = self.vitals.facts();
            facts.warm.attempt += 1;
            facts.warm.next_retry_at_ms = None;
        }
        let (dir, config, progress) = (
            self.dir.clone(),
            self.config.engine.clone(),
            Arc::clone(&self.vitals.progress),
        );
        let loading = async move {
            match engine {
                Some(engine) => Ok(engine),
                None => EngineHandle::load(&dir, &config, progress).await,
            }
        };
        let loaded = self.unless_drained(loading).await?;
        let warmed = match loaded {
            Ok(engine) => {
                self.lifecycle
                    .advance(State::Warming, Detail::StartupBaseline);
                let name = &engine.package.manifest.name;
                if *name == self.topology.model {
                    let proving = engine.clone();
                    let warm = self
                        .unless_drained(async move { proving.warm().await })
                        .await?;
                    warm.map(|warm| (engine, warm))
                } else {
                    let message = format!(
                        "{}: names model {name:?}, model.name is {:?}",
                        self.dir.display(),
                        self.topology.model
                    );
                    Err(EngineError {
                        detail: Detail::ModelLoadFailed,
                        message,
                    })
                }
            }
            Err(error) => Err(error),
        };
        match warmed {
            Ok((engine, warm)) => {
                backoff.reset();
                self.report_warm(&engine, warm, began.elapsed());
                Ok(engine)
            }
            Err(error) => {
                let wait = backoff.wait();
                self.report_failure(&error, wait);
                Err(self.wait(Some(wait)).await)
            }
        }
    }

    fn report_warm(&self, engine: &EngineHandle, warm: Warm, took: Duration) {
        let package = &engine.package;
        let plan = Plan::new(&package.shards, None, "", package.cut()).ok();
        let mut facts = self.vitals.facts();
        facts.warm.last_at_ms = Some(unix_ms());
        facts.warm.last_ms = u64::try_from(took.as_millis()).ok();
        facts.warm.baseline_loss = Some(warm.baseline_loss);
        facts.model = ModelFacts {
            name: package.manifest.name.clone(),
            version: Some(package.manifest.version),
            weights_id: Some(package.weights.weights_id.clone()),
            plan: plan.map(|plan| hex::encode(plan.hash)),
            shards: package.shards.iter().map(|s| s.id).collect(),
            baseline_cache_entries: engine.baseline_cache_entries() as u64,
        };
        facts.engine.precision = Some(package.manifest.precision.as_str().into());
        facts.engine.onnxruntime = crate::engine::session::library_version(&self.config.engine);
        tracing::info!(
            baseline_loss = warm.baseline_loss,
            windows = warm.windows,
            duration_ms = took.as_millis(),
            "warm: the baseline repeats, every tensor moves the loss and is restored"
        );
    }

    fn report_failure(&self, error: &EngineError, wait: Duration) {
        let retry_at = unix_ms() + u64::try_from(wait.as_millis()).unwrap_or(0);
        self.vitals.error(error.detail.as_str(), &error.message);
        {
            let mut facts = self.vitals.facts();
            facts.warm.last_at_ms = Some(unix_ms());
            facts.warm.next_retry_at_ms = Some(retry_at);
        }
        tracing::error!(%error, detail = error.detail.as_str(), retry_in_ms = wait.as_millis(), "the warm-up failed");
        self.lifecycle.advance(State::Degraded, error.detail);
    }

    /// Serves until something ends it; on the way out the consumer goes first, then the state
    /// changes, then running jobs end.
    async fn serve(&mut self, engine: EngineHandle, link: Arc<Link>) -> (Ended, Next, Stop) {
        let abandon = CancellationToken::new();
        let pipeline = match Pipeline::new(
            engine.clone(),
            &self.config,
            &self.incarnation,
            Some(self.store.clone()),
        ) {
            Ok(pipeline) => pipeline,
            Err(error) => {
                self.vitals.error("model_load_failed", &error.to_string());
                self.lifecycle
                    .advance(State::Degraded, Detail::ModelLoadFailed);
                return (Ended::ConsumerLost, Next::Go, Stop { cut_short: false });
            }
        };
        let serving = Arc::new(Serving {
            pipeline,
            link,
            topology: Arc::clone(&self.topology),
            vitals: Arc::clone(&self.vitals),
            store: self.store.clone(),
            results_ttl: self.config.results.ttl,
            prefetch: self.config.amqp.prefetch,
            retry_delays: self.config.amqp.retry_delays.clone(),
            abandon: abandon.clone(),
        });
        let leave = CancellationToken::new();
        let asked: Arc<std::sync::Mutex<Option<(State, Detail)>>> = Arc::default();
        let (lifecycle, why) = (&self.lifecycle, Arc::clone(&asked));
        let on_left = |ended: Ended| match ended {
            Ended::Asked => {
                if let Some((state, detail)) = why.lock().ok().and_then(|why| *why) {
                    lifecycle.advance(state, detail);
                }
            }
            Ended::ConsumerLost => lifecycle.advance(State::Degraded, Detail::ConsumerLost),
            Ended::BrokerLost => lifecycle.advance(State::Degraded, Detail::BrokerDisconnected),
            Ended::EngineBroken => lifecycle.advance(State::Degraded, Detail::Stuck),
        };
        let run = serving.serve(
            &leave,
            || lifecycle.advance(State::Ready, Detail::Serving),
            on_left,
        );
        tokio::pin!(run);
        let mut next = Next::Go;
        let mut asked_at = Instant::now();
        let (ended, running) = loop {
            let (state, detail) = tokio::select! {
                done = &mut run => break done,
                request = self.requests.recv(), if !leave.is_cancelled() => match leaving(request, &mut self.paused) {
                    Some((why, then)) => {
                        next = then;
                        why
                    }
                    None => continue,
                },
                Ok(taken) = self.claim.wait_for(|c| *c == NameClaim::Taken), if !leave.is_cancelled() => {
                    drop(taken);
                    (State::Degraded, Detail::DuplicateId)
                }
            };
            if let Ok(mut why) = asked.lock() {
                *why = Some((state, detail));
            }
            asked_at = Instant::now();
            leave.cancel();
        };
        if ended != Ended::Asked {
            abandon.cancel();
        }
        let deadline = asked_at + self.config.worker.drain_timeout;
        let cut_short = finish(running, deadline, &abandon, &engine, &self.vitals).await;
        (ended, next, Stop { cut_short })
    }

    /// Waits for anything that may change what to do: a request, the link, the name, or time.
    async fn wait(&mut self, at_most: Option<Duration>) -> Next {
        let timer = async move {
            match at_most {
                Some(wait) => tokio::time::sleep(wait).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(timer);
        loop {
            tokio::select! {
                () = &mut timer => return Next::Go,
                request = self.requests.recv() => match request {
                    Some(Request::Command(Command::Resume)) if !self.paused => {}
                    other => match leaving(other, &mut self.paused) {
                        Some((_, next)) => return next,
                        None => return Next::Go,
                    },
                },
                // With a timer running only a request cuts the wait short.
                changed = self.links.changed(), if at_most.is_none() => if changed.is_ok() {
                    return Next::Go;
                },
                changed = self.claim.changed(), if at_most.is_none() => if changed.is_ok() {
                    return Next::Go;
                },
            }
        }
    }

    /// Runs to its end unless a drain comes first; pauses are remembered.
    async fn unless_drained<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Next> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                request = self.requests.recv() => {
                    if let Some((_, Next::Drain(detail))) = leaving(request, &mut self.paused) {
                        return Err(Next::Drain(detail));
                    }
                }
            }
        }
    }

    async fn drain_idle(&self, detail: Detail) -> Stop {
        self.lifecycle.advance(State::Draining, detail);
        Stop { cut_short: false }
    }
}

/// What a request means for a worker that serves or waits: the state to go to, and what then.
/// `None` = nothing changes.
fn leaving(request: Option<Request>, paused: &mut bool) -> Option<((State, Detail), Next)> {
    match request {
        None | Some(Request::Signal) => Some((
            (State::Draining, Detail::DrainSignal),
            Next::Drain(Detail::DrainSignal),
        )),
        Some(Request::Command(Command::Drain)) => Some((
            (State::Draining, Detail::DrainControl),
            Next::Drain(Detail::DrainControl),
        )),
        Some(Request::Command(Command::Pause)) => {
            *paused = true;
            Some(((State::Degraded, Detail::Paused), Next::Go))
        }
        Some(Request::Command(Command::Resume)) => {
            *paused = false;
            None
        }
        Some(Request::Command(Command::Rewarm)) => {
            Some(((State::Warming, Detail::Rewarm), Next::Rewarm))
        }
        Some(Request::Command(command @ (Command::Update | Command::Reload))) => {
            tracing::warn!(
                command = command.as_str(),
                "refused: this version does not follow updates"
            );
            None
        }
    }
}

/// Lets running jobs end until the deadline; then hands back what waits and cuts short what
/// computes. Says whether something was cut.
async fn finish(
    mut running: Running,
    deadline: Instant,
    abandon: &CancellationToken,
    engine: &EngineHandle,
    vitals: &Vitals,
) -> bool {
    const HAND_BACK: Duration = Duration::from_secs(2);
    let all = async |jobs: &mut JoinSet<()>| while jobs.join_next().await.is_some() {};
    if tokio::time::timeout_at(deadline.into(), all(&mut running.jobs))
        .await
        .is_ok()
    {
        return false;
    }
    let computing = vitals.progress.busy_since_ms.load(Ordering::Relaxed) != 0;
    tracing::warn!(
        left = running.jobs.len(),
        computing,
        "the drain's deadline has come; jobs are handed back"
    );
    abandon.cancel();
    engine.terminate();
    drop(tokio::time::timeout(HAND_BACK, all(&mut running.jobs)).await);
    computing
}

/// Keeps a link to the broker: connect, declare, listen for control, and again when it is lost.
async fn keep_linked(
    config: Config,
    topology: Arc<Topology>,
    vitals: Arc<Vitals>,
    links: watch::Sender<Option<Arc<Link>>>,
    requests: mpsc::Sender<Request>,
) {
    let name = format!("scorer-{}", config.worker_id());
    let mut backoff = Backoff::new();
    loop {
        let linked = async {
            let link = Link::connect(&config.amqp, &name).await?;
            link.declare(&topology).await?;
            let control = match config.amqp.control {
                true => Some(
                    link.subscribe(&topology.control_exchange(), &control_keys(&config)[..])
                        .await?
                        .1,
                ),
                false => None,
            };
            Ok::<_, crate::broker::BrokerError>((link, control))
        };
        match linked.await {
            Ok((link, mut control)) => {
                backoff.reset();
                vitals.generation.fetch_add(1, Ordering::Relaxed);
                vitals.connected.store(true, Ordering::Relaxed);
                if let Ok(mut blocked) = vitals.blocked.lock() {
                    *blocked = Arc::clone(&link.blocked);
                }
                let lost = link.lost.clone();
                links.send_replace(Some(Arc::new(link)));
                loop {
                    let delivery = tokio::select! {
                        () = lost.cancelled() => break,
                        delivery = async { match &mut control {
                            Some(control) => control.next().await,
                            None => std::future::pending().await,
                        } } => delivery,
                    };
                    match delivery {
                        Some(delivery) => forward(&delivery, &config.worker_id(), &requests).await,
                        None => lost.cancel(),
                    }
                }
                vitals.connected.store(false, Ordering::Relaxed);
                links.send_replace(None);
            }
            Err(error) => {
                vitals.error("broker_disconnected", &error.to_string());
                tracing::warn!(%error, "no link to the broker yet");
            }
        }
        tokio::time::sleep(backoff.wait()).await;
    }
}

fn control_keys(config: &Config) -> [String; 2] {
    ["all".to_owned(), format!("worker.{}", config.worker_id())]
}

async fn forward(
    delivery: &crate::broker::amqp::Delivery,
    worker_id: &str,
    requests: &mpsc::Sender<Request>,
) {
    match control::decode(&delivery.body, delivery.properties.encoding()) {
        Ok(message)
            if message
                .worker_id
                .as_deref()
                .is_none_or(|id| id == worker_id) =>
        {
            tracing::info!(
                command = message.command.as_str(),
                "asked by a control message"
            );
            requests
                .send(Request::Command(message.command))
                .await
                .unwrap_or_default();
        }
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "a control message is refused"),
    }
}
