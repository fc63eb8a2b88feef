//! The life of a worker: load, prove, serve, drain. This file alone advances the lifecycle; a
//! newcomer reads [`Worker::live`] from top to bottom.

pub mod health;
pub mod heartbeat;
mod host;
pub mod lifecycle;
mod link;
mod orders;
mod parts;
mod start;
mod swap;
pub mod systemd;
mod warmup;
mod watchdog;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::broker::amqp::Link;
use crate::broker::topology::Topology;
use crate::candidate::fetch::Fetcher;
use crate::config::Config;
use crate::engine::EngineError;
use crate::engine::thread::{EngineHandle, TERMINATE_GRACE};
use crate::protocol::control::Order;
use crate::protocol::state::{Detail, Phase, State};
use crate::scoring::consumer::{Consumer, HAND_BACK, ServeEnd, Serving};
use crate::scoring::crash_marks::CrashMarks;
use crate::scoring::device_queue::Waiting;
use crate::scoring::pipeline::Pipeline;
use crate::scoring::recent_results::RecentResults;
use crate::store::Store;
use crate::telemetry::status::WorkerStatus;
use crate::update::state::StateDir;
use crate::update::{Follower, PreparedUpdate};
use crate::util::backoff::Backoff;
use crate::worker::heartbeat::NameClaim;
use crate::worker::lifecycle::Lifecycle;
pub use parts::Part;
use parts::Parts;
use start::{Life, grant, model_name};
use watchdog::Watchdog;

/// How long a start waits for the broker before it warms up without it.
const FIRST_LINK: Duration = Duration::from_secs(3);
/// What a drain keeps of its time to say goodbye to the broker and to Redis, at most.
const GOODBYE: Duration = Duration::from_secs(2);
/// A consumer that lasted this long was no failure to register: back-off begins anew.
const LASTING: Duration = Duration::from_secs(30);

/// Why the worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Every job it held was answered or handed back.
    Drained,
    /// A computation had to be cut short at the drain's deadline.
    CutShort,
    /// A terminated run did not come back: only the end of the process frees the device.
    Stuck,
    /// A part that must live has ended.
    PartLost(Part),
}

/// What whoever runs the worker wishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// It is to drain.
    Drain,
    /// The drain is to end now: what can be handed back is.
    EndNow,
}

/// What the worker is asked to do.
#[derive(Debug)]
enum Request {
    Command(Order),
    /// The package that is to be loaded was found sound.
    Reload(Order),
    Signal,
    /// A part has ended.
    Lost(Part),
}

struct Worker {
    config: Config,
    dir: PathBuf,
    incarnation: String,
    lifecycle: Lifecycle,
    status: Arc<WorkerStatus>,
    topology: Arc<Topology>,
    store: Store,
    marks: CrashMarks,
    recent_results: RecentResults,
    waiting: Waiting,
    /// Once something was served: connections and files outlive the consumer.
    fetcher: Option<Fetcher>,
    links: watch::Receiver<Option<Arc<Link>>>,
    requests: mpsc::Receiver<Request>,
    /// To ask ourselves.
    asking: mpsc::Sender<Request>,
    /// Orders that the end of the next warm-up answers.
    due: Vec<Order>,
    /// Answers on their way.
    answers: TaskTracker,
    follower: Option<Follower>,
    /// What becomes of the session that was proven last, or is being proven; without holding it.
    loss: Option<watch::Receiver<Option<Detail>>>,
    /// Where newer weights are kept, once it could be locked.
    state: Option<Arc<StateDir>>,
    claim: watch::Receiver<NameClaim>,
    paused: bool,
    /// A drain is to end now.
    hurry: CancellationToken,
    /// See [`Serving::cautious`].
    cautious: bool,
    /// The package is no longer the one that was served, and no other could be loaded since.
    package_changed: bool,
    warming: Backoff,
    registering: Backoff,
    /// Each try costs a job one of the returns that the broker counts.
    forbidden: Backoff,
}

/// What a worker has to score with.
enum Model {
    Absent,
    /// Loaded, to be proven (again).
    Unproven(EngineHandle),
    Warm(EngineHandle),
}

impl Model {
    fn engine(&self) -> Option<EngineHandle> {
        match self {
            Self::Absent => None,
            Self::Unproven(engine) | Self::Warm(engine) => Some(engine.clone()),
        }
    }
}

/// What comes after a phase of the worker's life.
enum Step {
    /// Look again with the same model.
    Again,
    /// The model is warm now.
    Warmed(EngineHandle),
    /// Prove the same session again.
    Rewarm,
    /// Load the model anew.
    Reload,
    /// Serve other weights.
    Swap(Box<PreparedUpdate>),
    /// Prove this session, whatever there was before.
    Prove(EngineHandle),
    /// Leave.
    Stop(Stop),
}

/// Why the worker takes no more jobs: the state to go to, and what comes then.
struct Leaving {
    state: State,
    detail: Detail,
    then: Step,
    /// Who asked for it, and waits for an answer.
    order: Option<Order>,
}

impl Leaving {
    fn drain(detail: Detail) -> Self {
        Self::to(State::Draining, detail, Step::Stop(Stop::Drained))
    }

    fn degraded(detail: Detail, then: Step) -> Self {
        Self::to(State::Degraded, detail, then)
    }

    fn to(state: State, detail: Detail, then: Step) -> Self {
        Self {
            state,
            detail,
            then,
            order: None,
        }
    }

    fn update(offer: PreparedUpdate) -> Self {
        let detail = Detail::UpdateTo(offer.package.manifest.version);
        Self::to(State::Updating, detail, Step::Swap(Box::new(offer)))
    }

    fn because(ended: ServeEnd) -> Self {
        match ended {
            ServeEnd::Cleared => Self::to(State::Ready, Detail::Serving, Step::Again),
            ServeEnd::Stalled => Self::degraded(Detail::Stuck, Step::Reload),
            ServeEnd::BrokerLost => Self::degraded(Detail::BrokerDisconnected, Step::Again),
            ServeEnd::Forbidden => Self::degraded(Detail::PublishForbidden, Step::Again),
            ServeEnd::ConsumerLost => Self::degraded(Detail::ConsumerLost, Step::Again),
            ServeEnd::EngineLost(Detail::Stuck) => {
                Self::degraded(Detail::Stuck, Step::Stop(Stop::Stuck))
            }
            ServeEnd::EngineLost(detail) => Self::degraded(detail, Step::Reload),
        }
    }
}

/// Runs a worker until it is drained, by a control message or as one of the `wishes`. `overdue` ends
/// the process when a drain hangs, and is told how it ends. `show` is given what can be looked at
/// meanwhile.
///
/// # Errors
/// Only for what no waiting can mend: unusable configuration.
pub async fn run(
    config: Config,
    wishes: mpsc::Receiver<Wish>,
    overdue: fn(Stop),
    show: impl FnOnce(Arc<WorkerStatus>, watch::Receiver<Phase>),
) -> anyhow::Result<Stop> {
    let Some(dir) = config.model.dir.clone() else {
        anyhow::bail!("model.dir: not set; it names the model package")
    };
    let metrics =
        crate::telemetry::metrics::install(config.telemetry.metrics_addr.as_deref()).await?;
    crate::telemetry::traces::install(&config)?;
    let (requests, mut inbox) = mpsc::channel(16);
    let watchdog = Watchdog::new(config.worker.drain_timeout, overdue);
    let hurry = CancellationToken::new();
    let parts = Parts {
        requests,
        watchdog: watchdog.clone(),
    };
    let granting = grant(wishes, parts.clone(), hurry.clone());
    let mut tasks = vec![parts.spawn(Part::Signals, granting)];
    let life = Life::begin(&config);
    watchdog.watch(Arc::clone(&life.status.progress));
    if let Some(listener) = metrics {
        crate::telemetry::metrics::serve(listener, Arc::clone(&life.status));
    }
    let name = match model_name(&config, &dir, &mut inbox).await {
        Ok(name) => name,
        Err(stop) => return Ok(stop),
    };
    let started = Worker::start(config, dir, &name, life, inbox, &parts, hurry);
    let (mut worker, beside) = started?;
    tasks.extend(beside.tasks);
    show(Arc::clone(&worker.status), worker.lifecycle.follow());
    let stop = worker.live().await;
    watchdog.ended(stop);
    for task in tasks {
        task.abort();
    }
    worker.dismiss().await;
    match stop {
        Stop::Drained | Stop::CutShort => {
            worker.lifecycle.advance(State::Stopped, Detail::Drained);
        }
        // The last record says why the process is gone.
        Stop::Stuck | Stop::PartLost(_) => {}
    }
    // Side by side: each may have to wait for a service that does not answer.
    tokio::join!(
        worker.marks.settle(),
        worker.close_link(),
        beside.heartbeat.stop(),
        crate::telemetry::traces::flush()
    );
    Ok(stop)
}

impl Worker {
    async fn live(&mut self) -> Stop {
        self.first_link().await;
        let mut model = Model::Absent;
        loop {
            let step = match &model {
                Model::Absent => self.warm_up(None).await,
                Model::Unproven(engine) => self.warm_up(Some(engine.clone())).await,
                Model::Warm(engine) => match (engine.loss(), self.may_serve()) {
                    (Some(loss), _) => self.stop_idle(Leaving::because(ServeEnd::EngineLost(loss))),
                    (None, Some(link)) => self.serve(engine.clone(), link).await,
                    (None, None) => self.wait(None).await,
                },
            };
            let step = if let Step::Swap(offer) = step {
                self.swap(model.engine(), *offer).await
            } else {
                step
            };
            let step = self.unless_stranded(step);
            model = match (step, model) {
                (Step::Again | Step::Swap(_), model) => model,
                (Step::Warmed(engine), _) => Model::Warm(engine),
                (Step::Prove(engine), _) => Model::Unproven(engine),
                (Step::Rewarm, Model::Warm(engine) | Model::Unproven(engine)) => {
                    Model::Unproven(engine)
                }
                (Step::Rewarm, Model::Absent) | (Step::Reload, _) => Model::Absent,
                (Step::Stop(stop), _) => return stop,
            };
        }
    }

    /// A device that never came back is held by its thread: only the end of the process frees it.
    fn unless_stranded(&mut self, step: Step) -> Step {
        let lost = self.loss.as_ref().and_then(|loss| *loss.borrow());
        match (step, lost) {
            (step @ Step::Stop(_), _) => step,
            (_, Some(Detail::Stuck)) => {
                let lost = ServeEnd::EngineLost(Detail::Stuck);
                self.stop_idle(Leaving::because(lost))
            }
            (step, _) => step,
        }
    }

    /// The topology is declared before warming, where the broker is there.
    async fn first_link(&mut self) {
        let first = self.links.wait_for(Option::is_some);
        if tokio::time::timeout(FIRST_LINK, first).await.is_err() {
            tracing::warn!("no broker yet; warming up without it");
        }
    }

    async fn close_link(&self) {
        let link = self.links.borrow().clone();
        if let Some(link) = link {
            link.close().await;
        }
    }

    /// The link to serve on, if nothing stands in the way; else the state says what does.
    fn may_serve(&mut self) -> Option<Arc<Link>> {
        let usable = |link: &Arc<Link>| !link.lost.is_cancelled();
        let link = self.links.borrow_and_update().clone().filter(usable);
        let taken = *self.claim.borrow_and_update() == NameClaim::Taken;
        let obstacle = match (self.paused, taken, link) {
            (true, _, _) => Detail::Paused,
            (false, true, _) => Detail::DuplicateId,
            (false, false, None) => Detail::BrokerDisconnected,
            (false, false, Some(link)) => return Some(link),
        };
        self.lifecycle.advance(State::Degraded, obstacle);
        None
    }

    /// Takes jobs until something ends it. On the way out the consumer goes first, then the state
    /// changes, then running jobs end.
    async fn serve(&mut self, engine: EngineHandle, link: Arc<Link>) -> Step {
        if let Some(leaving) = self.not_free(&engine).await {
            return self.stop_idle(leaving);
        }
        let since = Instant::now();
        let audits = audits(engine.clone(), self.config.engine.audit_interval);
        let serving = match self.serving(engine.clone(), link).await {
            Ok(serving) => serving,
            Err(leaving) => return self.leave(leaving, since).await,
        };
        let mut consumer = match Consumer::register(serving).await {
            Ok(consumer) => consumer,
            Err(ended) => return self.leave(Leaving::because(ended), since).await,
        };
        self.lifecycle.advance(State::Ready, Detail::Serving);
        let asked = tokio::select! {
            ended = consumer.take() => Err(ended),
            leaving = self.asked_to_leave() => Ok(leaving),
            error = audits => Ok(self.distrust(&error)),
        };
        let asked_at = Instant::now();
        consumer.unregister().await;
        match asked {
            Ok(mut leaving) => {
                self.lifecycle.advance(leaving.state, leaving.detail);
                self.take_note(&mut leaving);
                let time = self.config.worker.drain_timeout;
                let deadline = asked_at + time.saturating_sub((time / 2).min(GOODBYE) + HAND_BACK);
                let (cut_short, leaving) = self.finish(consumer, deadline, leaving).await;
                if cut_short && matches!(leaving.then, Step::Stop(Stop::Drained)) {
                    Step::Stop(Stop::CutShort)
                } else {
                    leaving.then
                }
            }
            Err(ended) => {
                let leaving = Leaving::because(ended);
                self.lifecycle.advance(leaving.state, leaving.detail);
                self.give_up(consumer, ended).await;
                match engine.loss() {
                    Some(loss) => self.stop_idle(Leaving::because(ServeEnd::EngineLost(loss))),
                    None => self.leave(leaving, since).await,
                }
            }
        }
    }

    /// What becomes of the jobs that are held when no more can be taken.
    async fn give_up(&mut self, consumer: Consumer, ended: ServeEnd) {
        match ended {
            ServeEnd::Cleared => {
                self.cautious = false;
                consumer.abandon().await;
            }
            // Its own job is answered, so that it does not stall the next worker too.
            ServeEnd::Stalled => {
                consumer.settle_stalled(TERMINATE_GRACE * 2).await;
            }
            ServeEnd::BrokerLost | ServeEnd::Forbidden | ServeEnd::ConsumerLost => {
                self.cautious = true;
                consumer.abandon().await;
            }
            ServeEnd::EngineLost(_) => consumer.abandon().await,
        }
    }

    /// A device that still computes for a job that was given up takes no other. Resolves when it is
    /// free, or with what came first.
    async fn not_free(&mut self, engine: &EngineHandle) -> Option<Leaving> {
        tokio::select! {
            biased;
            loss = engine.lost() => Some(Leaving::because(ServeEnd::EngineLost(loss))),
            _ = engine.turn() => None,
            leaving = self.asked_to_leave() => Some(leaving),
        }
    }

    /// Lets running jobs end, and heeds what is asked meanwhile: a drain must not wait behind it.
    async fn finish(
        &mut self,
        consumer: Consumer,
        deadline: Instant,
        mut leaving: Leaving,
    ) -> (bool, Leaving) {
        let finishing = consumer.finish(deadline, self.hurry.clone());
        tokio::pin!(finishing);
        loop {
            tokio::select! {
                cut_short = &mut finishing => return (cut_short, leaving),
                request = self.requests.recv(), if leaving.state != State::Draining => {
                    if let Some(mut asked) = self.heed(request) {
                        self.lifecycle.advance(asked.state, asked.detail);
                        self.take_note(&mut asked);
                        // What is asked meanwhile does not make forgotten what was due.
                        let then = match (leaving.then, asked.then) {
                            (Step::Reload, Step::Again | Step::Rewarm) => Step::Reload,
                            (Step::Rewarm, Step::Again) => Step::Rewarm,
                            (Step::Swap(offer), Step::Again | Step::Rewarm) => Step::Swap(offer),
                            (_, then) => then,
                        };
                        leaving = Leaving { then, ..asked };
                    }
                }
            }
        }
    }

    async fn serving(
        &mut self,
        engine: EngineHandle,
        link: Arc<Link>,
    ) -> Result<Arc<Serving>, Leaving> {
        let fetcher = self.fetcher().await.map_err(|error| {
            self.status.error("model_load_failed", &error.to_string());
            Leaving::degraded(Detail::ModelLoadFailed, Step::Again)
        })?;
        let marks = Some(self.marks.clone());
        let pipeline = Pipeline::new(engine, &self.config, fetcher, &self.incarnation, marks);
        Ok(Arc::new(Serving {
            pipeline: pipeline.with_shared(
                self.recent_results.clone(),
                self.waiting.clone(),
                self.newer(),
            ),
            link,
            topology: Arc::clone(&self.topology),
            status: Arc::clone(&self.status),
            store: self.store.clone(),
            results_ttl: self.config.results.ttl,
            prefetch: self.config.amqp.prefetch,
            cautious: self.cautious,
            delivered: Default::default(),
            retry_delays: self.config.amqp.retry_delays.clone(),
            abandon: CancellationToken::new(),
        }))
    }

    /// Made once, off the async threads: it looks through the folder of what was fetched before.
    async fn fetcher(&mut self) -> anyhow::Result<Fetcher> {
        if let Some(fetcher) = &self.fetcher {
            return Ok(fetcher.clone());
        }
        let (limits, folder) = (self.config.candidates.clone(), self.config.candidates_dir());
        let making = tokio::task::spawn_blocking(move || Fetcher::new(limits, folder));
        let fetcher = self.fetcher.insert(making.await??);
        Ok(fetcher.clone())
    }

    /// What follows a failure to serve: where a new try could fail at once, only after a while.
    async fn leave(&mut self, leaving: Leaving, served_since: Instant) -> Step {
        self.lifecycle.advance(leaving.state, leaving.detail);
        if leaving.detail == Detail::PublishForbidden {
            let wait = self.forbidden.next_delay();
            return self.wait(Some(wait)).await;
        }
        // Not by time: a job may take long before it turns out that its answer may not be published.
        self.forbidden.reset();
        if !matches!(
            leaving.detail,
            Detail::ConsumerLost | Detail::ModelLoadFailed
        ) {
            return leaving.then;
        }
        if served_since.elapsed() > LASTING {
            self.registering.reset();
        }
        let wait = self.registering.next_delay();
        self.wait(Some(wait)).await
    }

    /// Resolves when the worker must stop taking jobs although it could go on.
    async fn asked_to_leave(&mut self) -> Leaving {
        loop {
            tokio::select! {
                request = self.requests.recv() => {
                    if let Some(leaving) = self.heed(request) {
                        return leaving;
                    }
                }
                offer = offer(&mut self.follower) => return Leaving::update(offer),
                true = taken(&mut self.claim) => {
                    return Leaving::degraded(Detail::DuplicateId, Step::Again);
                }
            }
        }
    }

    /// The audit has found the engine changed: nothing it says can be relied on any more.
    fn distrust(&mut self, error: &EngineError) -> Leaving {
        self.status.error(&error.detail.to_string(), &error.message);
        tracing::error!(%error, detail = %error.detail, "the audit failed; the model is loaded again");
        self.package_changed |= error.detail == Detail::PackageChanged;
        Leaving::degraded(error.detail, Step::Reload)
    }

    /// Waits for anything that may change what to do: a request, the link, the name, or time.
    async fn wait(&mut self, at_most: Option<Duration>) -> Step {
        let timer = async move {
            match at_most {
                Some(wait) => tokio::time::sleep(wait).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = timer => Step::Again,
            request = self.requests.recv() => match self.heed(request) {
                Some(leaving @ Leaving { then: Step::Stop(_), .. }) => self.stop_idle(leaving),
                Some(mut leaving) => {
                    self.take_note(&mut leaving);
                    leaving.then
                }
                None => Step::Again,
            },
            offer = offer(&mut self.follower) => Step::Swap(Box::new(offer)),
            // With a timer running only a request cuts the wait short.
            Ok(()) = self.links.changed(), if at_most.is_none() => Step::Again,
            Ok(()) = self.claim.changed(), if at_most.is_none() => Step::Again,
        }
    }

    /// Runs to its end unless a drain comes first; pauses are remembered.
    async fn unless_drained<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Leaving> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                request = self.requests.recv() => {
                    if let Some(leaving) = self.heed_while_warming(request) {
                        return Err(leaving);
                    }
                }
            }
        }
    }

    fn stop_idle(&mut self, mut leaving: Leaving) -> Step {
        self.lifecycle.advance(leaving.state, leaving.detail);
        self.take_note(&mut leaving);
        leaving.then
    }

    /// Whom jobs for a newer version are told to.
    fn newer(&self) -> Arc<Notify> {
        let follower = self.follower.as_ref();
        follower.map_or_else(Arc::default, |follower| Arc::clone(&follower.newer))
    }
}

/// Resolves when another worker has the name; false = nobody looks any more.
async fn taken(claim: &mut watch::Receiver<NameClaim>) -> bool {
    claim
        .wait_for(|claim| *claim == NameClaim::Taken)
        .await
        .is_ok()
}

/// Resolves with new weights; never without an updater.
async fn offer(follower: &mut Option<Follower>) -> PreparedUpdate {
    let offered = match follower {
        Some(follower) => follower.offers.recv().await,
        None => None,
    };
    match offered {
        Some(offer) => offer,
        None => std::future::pending().await,
    }
}

/// Audits the engine between jobs, again and again; resolves with the first difference.
async fn audits(engine: EngineHandle, interval: Duration) -> EngineError {
    loop {
        tokio::time::sleep(interval).await;
        if let Err(error) = audit(&engine).await {
            return error;
        }
        tracing::debug!("audit: package, weights and losses are what they were");
    }
}

/// Looks at the files before it takes the device: jobs must not wait for a disk.
async fn audit(engine: &EngineHandle) -> Result<(), EngineError> {
    let package = Arc::clone(&engine.package);
    let verified = tokio::task::spawn_blocking(move || package.verify());
    match verified.await {
        Ok(Ok(())) => engine.turn().await.audit().await,
        Ok(Err(error)) => Err(EngineError::new(Detail::PackageChanged, error.to_string())),
        Err(error) => Err(EngineError::new(Detail::EngineLost, error.to_string())),
    }
}
