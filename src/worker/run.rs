//! Performs the worker's state machine. This room alone advances the lifecycle; read
//! [`Worker::live`] from top to bottom.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::OptionFuture;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::assemble::{Background, Startup, model_name};
use super::heartbeat::NameClaim;
use super::lifecycle::Lifecycle;
use super::orders::{Request, Wish, forward};
use super::parts::{Part, Parts};
use super::transition::{Activity, Interruption, Model, Next, Stop, Transition, after, obstacle};
use super::watchdog::Watchdog;
use crate::broker::amqp::Link;
use crate::broker::topology::Topology;
use crate::candidate::fetch::Fetcher;
use crate::config::Config;
use crate::protocol::control::Order;
use crate::protocol::state::{Detail, Phase, State};
use crate::scoring::consumer::ServeEnd;
use crate::scoring::crash_marks::CrashMarks;
use crate::scoring::device_queue::DeviceQueue;
use crate::scoring::recent_results::RecentResults;
use crate::store::Store;
use crate::telemetry::status::WorkerStatus;
use crate::update::state::StateDir;
use crate::update::{PreparedUpdate, UpdaterHandle};
use crate::util::backoff::Backoff;

/// How long a worker waits for the broker at its start before it warms up without it.
const FIRST_LINK: Duration = Duration::from_secs(3);

pub(super) struct Worker {
    pub(super) config: Config,
    pub(super) dir: PathBuf,
    pub(super) incarnation: String,
    pub(super) lifecycle: Lifecycle,
    pub(super) status: Arc<WorkerStatus>,
    pub(super) topology: Arc<Topology>,
    pub(super) store: Store,
    pub(super) marks: CrashMarks,
    pub(super) recent_results: RecentResults,
    pub(super) device_queue: DeviceQueue,
    /// Made when the worker first serves; its connections and files outlive the consumer.
    pub(super) fetcher: Option<Fetcher>,
    pub(super) links: watch::Receiver<Option<Arc<Link>>>,
    pub(super) requests: mpsc::Receiver<Request>,
    /// For requests that the worker makes of itself.
    pub(super) own_requests: mpsc::Sender<Request>,
    /// Pauses to be confirmed at the next transition.
    pub(super) pausing: Vec<Order>,
    /// Orders that the end of the next warm-up answers.
    pub(super) due: Vec<Order>,
    /// Replies still being published.
    pub(super) replies: TaskTracker,
    pub(super) updates: Option<UpdaterHandle>,
    /// Whether the session that was proven last, or is being proven, is lost. Does not keep it alive.
    pub(super) loss: Option<watch::Receiver<Option<Detail>>>,
    /// Where newer weights are kept, once it is locked.
    pub(super) state: Option<Arc<StateDir>>,
    pub(super) claim: watch::Receiver<NameClaim>,
    pub(super) paused: bool,
    /// Cancelled when a drain must end now.
    pub(super) hurry: CancellationToken,
    /// See [`Serving::cautious`](crate::scoring::consumer::Serving::cautious).
    pub(super) cautious: bool,
    /// The package on disk is not the one that was served, and none was loaded since.
    pub(super) package_changed: bool,
    pub(super) warming: Backoff,
    pub(super) registering: Backoff,
    pub(super) publishing: Backoff,
}

/// Runs a worker until it is drained, by a control message or by one of the `wishes`. `overdue` is
/// called when a drain hangs, with how the worker ends, and must end the process. `show` is
/// called once with the status and the phase to display.
///
/// # Errors
/// Only for unusable configuration; everything else is retried.
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
    let forwarding = forward(wishes, parts.clone(), hurry.clone());
    let signals = parts.spawn(Part::Signals, forwarding);
    let startup = Startup::begin(&config);
    watchdog.watch(Arc::clone(&startup.status.progress));
    if let Some(listener) = metrics {
        crate::telemetry::metrics::serve(listener, Arc::clone(&startup.status));
    }
    let name = match model_name(&config, &dir, &mut inbox).await {
        Ok(name) => name,
        Err(stop) => return Ok(stop),
    };
    let assembled = Worker::assemble(config, dir, &name, startup, inbox, &parts, hurry);
    let (mut worker, mut background) = assembled?;
    background.tasks.push(signals);
    show(Arc::clone(&worker.status), worker.lifecycle.follow());
    let stop = worker.live().await;
    watchdog.ended(stop);
    worker.end(background, stop).await;
    Ok(stop)
}

impl Worker {
    pub(super) async fn live(&mut self) -> Stop {
        self.first_link().await;
        let mut model = Model::Absent;
        loop {
            let next = self.act(&mut model).await;
            let next = match next {
                Next::Swap(update) => self.swap(&mut model, *update).await,
                next @ (Next::Again
                | Next::Retry(_)
                | Next::Rewarm
                | Next::Reload
                | Next::Stop(_)) => next,
            };
            let next = self.unless_stranded(next);
            model = match model.followed_by(next) {
                Ok(model) => model,
                Err(stop) => return stop,
            };
        }
    }

    /// Does what the model allows: warms it up, serves, or waits until it can serve.
    async fn act(&mut self, model: &mut Model) -> Next {
        let Model::Warm(engine) = model else {
            return self.warm_up(model).await;
        };
        let engine = engine.clone();
        match (engine.loss(), self.may_serve()) {
            (Some(loss), _) => self.lose_engine(loss),
            (None, Some(link)) => self.serve(engine, link).await,
            (None, None) => self.wait(None).await,
        }
    }

    /// A device that never came back is held by its thread: only the end of the process frees it.
    fn unless_stranded(&mut self, next: Next) -> Next {
        let lost = self.loss.as_ref().and_then(|loss| *loss.borrow());
        match (next, lost) {
            (stop @ Next::Stop(_), _) => stop,
            (_, Some(Detail::Stuck)) => self.lose_engine(Detail::Stuck),
            (next, _) => next,
        }
    }

    pub(super) fn lose_engine(&mut self, loss: Detail) -> Next {
        self.enter(after(Interruption::ServeEnded(ServeEnd::EngineLost(loss))))
    }

    /// The topology is declared before the first warm-up, if the broker is there.
    async fn first_link(&mut self) {
        let first = self.links.wait_for(Option::is_some);
        if tokio::time::timeout(FIRST_LINK, first).await.is_err() {
            tracing::warn!("no broker yet; warming up without it");
        }
    }

    /// The link to serve on. None while there is an obstacle, which becomes the state's detail.
    fn may_serve(&mut self) -> Option<Arc<Link>> {
        let link = self.links.borrow_and_update().clone();
        let link = link.filter(|link| !link.lost.is_cancelled());
        let claim = *self.claim.borrow_and_update();
        match obstacle(self.paused, claim, link.is_some()) {
            None => link,
            Some(obstacle) => {
                self.lifecycle.advance(State::Degraded, obstacle);
                None
            }
        }
    }

    /// Waits for anything that may change what to do: a request, an update, the link, the name, or
    /// the end of a back-off. During a back-off only the first two cut the wait short.
    pub(super) async fn wait(&mut self, at_most: Option<Duration>) -> Next {
        let timer = OptionFuture::from(at_most.map(tokio::time::sleep));
        tokio::select! {
            Some(()) = timer => Next::Again,
            request = self.requests.recv() => match self.on_request(Activity::Waiting, request) {
                Some(transition) => self.enter(transition),
                None => Next::Again,
            },
            Some(update) = offered(&mut self.updates) => Next::Swap(Box::new(update)),
            Ok(()) = self.links.changed(), if at_most.is_none() => Next::Again,
            Ok(()) = self.claim.changed(), if at_most.is_none() => Next::Again,
        }
    }

    /// Runs this part of a warm-up to its end, unless a stop comes first.
    pub(super) async fn unless_stopped<T>(
        &mut self,
        work: impl Future<Output = T>,
    ) -> Result<T, Transition> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                request = self.requests.recv() => {
                    if let Some(stop) = self.on_request(Activity::Warming, request) {
                        return Err(stop);
                    }
                }
            }
        }
    }

    /// Answers the requests that are still open, and closes the connections.
    async fn end(&mut self, background: Background, stop: Stop) {
        for task in background.tasks {
            task.abort();
        }
        self.close_requests().await;
        match stop {
            Stop::Drained | Stop::CutShort => {
                self.lifecycle.advance(State::Stopped, Detail::Drained);
            }
            // The last record keeps the reason.
            Stop::Stuck | Stop::PartLost(_) => {}
        }
        // Side by side: each may have to wait for a service that does not answer.
        tokio::join!(
            self.marks.settle(),
            self.close_link(),
            background.heartbeat.stop(),
            crate::telemetry::traces::flush()
        );
    }

    async fn close_link(&self) {
        let link = self.links.borrow().clone();
        if let Some(link) = link {
            link.close().await;
        }
    }
}

/// The next new weights; none without an updater.
pub(super) async fn offered(updates: &mut Option<UpdaterHandle>) -> Option<PreparedUpdate> {
    updates.as_mut()?.offered().await
}
