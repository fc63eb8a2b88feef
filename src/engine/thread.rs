//! One named thread owns the session. The async side holds a cheap handle, waits for its turn on
//! the device, and can end a run that takes too long; the thread itself waits only for commands.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::OptionFuture;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::coalition::Member;
use super::merge::{Merge, Passes};
use super::patch::Patches;
use super::session::{Partition, Placement, Terminator};
use crate::config::{Config, EngineConfig};
use crate::engine::{Early, Engine, EngineError, Evaluation, Warm};
use crate::model::manifest::PackageError;
use crate::model::package::Package;
use crate::model::plan::Plan;
use crate::protocol::failure::{Code, Failure};
use crate::protocol::heartbeat::EngineFacts;
use crate::protocol::merge::OnRejected;
use crate::protocol::state::Detail;
use crate::telemetry::progress::Progress;
use crate::util::clock;

/// How long a terminated run may take to come back before it counts as stuck.
pub const TERMINATE_GRACE: Duration = Duration::from_secs(10);

/// Works on the engine and answers whoever waits for it.
type Work = Box<dyn FnOnce(&mut Engine) + Send>;

/// Work, how to end it, and the turn it takes: given back by the thread when the work is over, so
/// that nobody's time runs while somebody else computes.
struct Command {
    work: Work,
    /// What the caller takes the engine's package to be; none if the work replaces it.
    package: Option<Arc<Package>>,
    terminator: Terminator,
    turn: OwnedSemaphorePermit,
    /// Tells the caller's side that the work is over, whether anybody waits for it or not.
    over: DropGuard,
}

/// Why the engine can no longer be used, once it cannot.
#[derive(Debug, Clone)]
struct Loss(watch::Sender<Option<Detail>>);

impl Loss {
    fn tell(&self, detail: Detail) {
        // The first reason is the cause, what comes after it the consequence.
        self.0.send_if_modified(|lost| {
            let first = lost.is_none();
            *lost = lost.or(Some(detail));
            first
        });
    }
}

/// Tells of the loss when the engine's thread ends, however it ends.
struct Ending(Loss);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.tell(Detail::EngineLost);
    }
}

/// A loaded model behind its thread.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    /// What it was made of.
    pub package: Arc<Package>,
    /// What computes.
    pub facts: Arc<EngineFacts>,
    /// Where the nodes of its graph run.
    pub placement: Arc<Placement>,
    /// Where its graph is cut into parts.
    pub partition: Arc<Partition>,
    commands: mpsc::Sender<Command>,
    turns: Arc<Semaphore>,
    loss: Loss,
    progress: Arc<Progress>,
    stalled: CancellationToken,
}

impl EngineHandle {
    /// Reads the package and makes the session, on the engine's own thread.
    ///
    /// # Errors
    /// What is wrong, with its `state_detail`.
    pub async fn load(
        dir: &Path,
        config: &Config,
        progress: Arc<Progress>,
    ) -> Result<Self, EngineError> {
        let (dir, subset) = (dir.to_owned(), config.model.allow_shards_subset);
        let read = move || Package::load(&dir, subset, &[]).map(Arc::new);
        Self::start(read, config, progress).await
    }

    /// The same with a package that is read as the caller says.
    ///
    /// # Errors
    /// As [`EngineHandle::load`].
    pub async fn start(
        read: impl FnOnce() -> Result<Arc<Package>, PackageError> + Send + 'static,
        config: &Config,
        progress: Arc<Progress>,
    ) -> Result<Self, EngineError> {
        let config = config.engine.clone();
        let (commands, inbox) = mpsc::channel(1);
        let (loaded, loading) = oneshot::channel();
        let loss = Loss(watch::Sender::new(None));
        let ending = Ending(loss.clone());
        let reported = Arc::clone(&progress);
        let live = move || match load_engine(read, &config, reported) {
            Ok(engine) => {
                let facts = Arc::new(engine.facts(&config));
                let placement = Arc::new(engine.placement().clone());
                let partition = Arc::new(engine.partition());
                let made = (Arc::clone(&engine.package), facts, placement, partition);
                if loaded.send(Ok(made)).is_ok() {
                    serve(engine, inbox, &ending.0);
                }
            }
            // A starter that is gone no longer needs to know.
            Err(error) => drop(loaded.send(Err(error))),
        };
        let gone = |m: String| EngineError::new(Detail::ModelLoadFailed, m);
        std::thread::Builder::new()
            .name("scorer-engine".into())
            .spawn(live)
            .map_err(|e| gone(format!("the engine's thread cannot be started: {e}")))?;
        let (package, facts, placement, partition) = loading
            .await
            .map_err(|_| gone("the engine's thread ended while loading".into()))??;
        Ok(Self {
            package,
            facts,
            placement,
            partition,
            commands,
            turns: Arc::new(Semaphore::new(1)),
            loss,
            progress,
            stalled: CancellationToken::new(),
        })
    }

    /// Waits until the device is this caller's. Of an engine that is lost nobody gets it any more:
    /// whatever is asked of such a turn fails at once.
    pub async fn turn(&self) -> Turn<'_> {
        let permit = tokio::select! {
            biased;
            _ = self.lost() => None,
            permit = Arc::clone(&self.turns).acquire_owned() => permit.ok(),
        };
        Turn {
            engine: self,
            permit,
        }
    }

    /// Why the engine can no longer be used, if it cannot.
    pub fn loss(&self) -> Option<Detail> {
        *self.loss.0.borrow()
    }

    /// The same, for whoever wants to hear of it without holding the engine.
    pub fn follow_loss(&self) -> watch::Receiver<Option<Detail>> {
        self.loss.0.subscribe()
    }

    /// Resolves when a run makes no progress any more. It is ended, and what it was asked for is
    /// answered; whether the device comes back shows then.
    pub async fn stalled(&self) {
        self.stalled.cancelled().await;
    }

    /// Resolves when the engine can no longer be used: its thread ended, its weights could not be
    /// restored, or a run never came back.
    pub async fn lost(&self) -> Detail {
        let mut lost = self.loss.0.subscribe();
        let why = lost.wait_for(Option::is_some).await;
        why.ok().and_then(|why| *why).unwrap_or(Detail::EngineLost)
    }
}

/// The device is the holder's until the work it is used for is over.
#[derive(Debug)]
pub struct Turn<'a> {
    engine: &'a EngineHandle,
    permit: Option<OwnedSemaphorePermit>,
}

impl Turn<'_> {
    /// Proves the session; see [`Engine::warm`].
    ///
    /// # Errors
    /// The first proof that fails.
    pub async fn warm(self) -> Result<Warm, EngineError> {
        self.prove(true, Engine::warm).await
    }

    /// Looks whether the session is still what was proven; see [`Engine::audit`].
    ///
    /// # Errors
    /// The first difference.
    pub async fn audit(self) -> Result<(), EngineError> {
        self.prove(true, Engine::audit).await
    }

    /// Takes other weights of the same package; see [`Engine::adopt`]. From then on only the handle
    /// that is returned computes.
    ///
    /// # Errors
    /// When the device fails; the engine is lost then.
    pub async fn adopt(self, package: Arc<Package>) -> Result<EngineHandle, EngineError> {
        let engine = self.engine.clone();
        let adopted = Arc::clone(&package);
        self.prove(false, |engine| engine.adopt(adopted)).await?;
        Ok(EngineHandle { package, ..engine })
    }

    /// With `same` weights, it is refused once the engine has others than this handle.
    async fn prove<T: Send + 'static>(
        self,
        same: bool,
        work: impl FnOnce(&mut Engine) -> Result<T, EngineError> + Send + 'static,
    ) -> Result<T, EngineError> {
        match self.run(None, same, work).await {
            Ok(answer) => answer,
            Err(Broken::Gone) => Err(EngineError::new(Detail::EngineLost, GONE)),
            Err(broken @ (Broken::Late(_) | Broken::Stalled(_))) => {
                Err(EngineError::new(Detail::Stuck, broken.to_string()))
            }
        }
    }

    /// Measures a candidate, ending the run when it takes longer than `limit`. A caller that goes
    /// away ends it too.
    ///
    /// # Errors
    /// A typed refusal.
    pub async fn score(
        self,
        patches: Arc<Patches>,
        plan: Arc<Plan>,
        early: Option<Early>,
        limit: Duration,
    ) -> Result<Evaluation, Failure> {
        let limit = Limit::of_one(limit);
        self.within(limit, move |engine| engine.score(&patches, &plan, early))
            .await
    }

    /// Measures a merge, ending it when a pass takes longer than `limit`; see [`Engine::merge`]. What hears of each pass
    /// runs on the engine's own thread.
    ///
    /// # Errors
    /// A typed refusal.
    pub async fn merge(
        self,
        members: Arc<[Member]>,
        on_rejected: OnRejected,
        plan: Arc<Plan>,
        limit: Duration,
        mut between: impl FnMut(Passes, &[&Member]) -> Result<(), Failure> + Send + 'static,
    ) -> Result<Merge, Failure> {
        let (begun, passes) = watch::channel(Passes::default());
        let limit = Limit {
            each: limit,
            passes,
        };
        self.within(limit, move |engine| {
            let mut between = |passes, members: &[&Member]| {
                begun.send_replace(passes);
                between(passes, members)
            };
            engine.merge(&members, on_rejected, &plan, &mut between)
        })
        .await
    }

    /// Measures the current model.
    ///
    /// # Errors
    /// A typed refusal.
    pub async fn validate(
        self,
        plan: Arc<Plan>,
        limit: Duration,
    ) -> Result<Arc<Vec<f64>>, Failure> {
        let limit = Limit::of_one(limit);
        self.within(limit, move |engine| engine.validate(&plan))
            .await
    }

    async fn begin(self, same: bool, work: Work) -> Option<Running> {
        let running = Running {
            terminator: Terminator::default(),
            over: CancellationToken::new(),
            loss: self.engine.loss.clone(),
        };
        let command = Command {
            work,
            package: same.then(|| Arc::clone(&self.engine.package)),
            terminator: running.terminator.clone(),
            turn: self.permit?,
            over: running.over.clone().drop_guard(),
        };
        self.engine.commands.send(command).await.ok()?;
        Some(running)
    }

    async fn within<T: Send + 'static>(
        self,
        limit: Limit,
        work: impl FnOnce(&mut Engine) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let stalled = self.engine.stalled.clone();
        match self.run(Some(limit), true, work).await {
            Ok(answer) => answer,
            Err(Broken::Gone) => Err(Failure::new(Code::InferenceFailed, GONE)),
            Err(broken @ (Broken::Late(_) | Broken::Stalled(_))) => {
                if let Broken::Stalled(_) = broken {
                    stalled.cancel();
                }
                Err(Failure::new(Code::ScoreTimeout, broken.to_string()))
            }
        }
    }

    /// Has the thread work, and ends what takes too long or makes no progress any more. The device may
    /// be lost then.
    async fn run<T: Send + 'static>(
        self,
        limit: Option<Limit>,
        same: bool,
        work: impl FnOnce(&mut Engine) -> T + Send + 'static,
    ) -> Result<T, Broken> {
        let progress = Arc::clone(&self.engine.progress);
        let (reply, mut answer) = oneshot::channel();
        let work = Box::new(move |engine: &mut Engine| {
            let began = Instant::now();
            let answer = work(engine);
            // Counted before anybody hears of the end.
            engine.worked(began.elapsed());
            // A receiver that is gone no longer wants it.
            drop(reply.send(answer));
        });
        let running = self.begin(same, work).await.ok_or(Broken::Gone)?;
        let late = OptionFuture::from(limit.map(Limit::passed));
        let broken = tokio::select! {
            answer = &mut answer => return answer.map_err(|_| Broken::Gone),
            Some(limit) = late => Broken::Late(limit),
            () = progress.stuck() => {
                tracing::error!("a run makes no progress any more; it is ended");
                Broken::Stalled(progress.patience())
            }
        };
        running.terminator.terminate();
        come_back(running.over.clone(), running.loss.clone()).await;
        Err(broken)
    }
}

/// How long work may take: all of it, or from one of its passes to the next.
struct Limit {
    each: Duration,
    passes: watch::Receiver<Passes>,
}

impl Limit {
    /// Of work that is one pass: nothing is heard of others.
    fn of_one(each: Duration) -> Self {
        let (_, passes) = watch::channel(Passes::default());
        Self { each, passes }
    }

    /// Resolves when so much time has passed without news.
    async fn passed(mut self) -> Duration {
        loop {
            tokio::select! {
                () = clock::had(self.each) => return self.each,
                Ok(()) = self.passes.changed() => {}
            }
        }
    }
}

/// Why a command has no answer.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("{GONE}")]
    Gone,
    #[error("the evaluation took longer than {}, the shorter of worker.score_timeout and half of amqp.consumer_timeout", crate::config::format_duration(*.0))]
    Late(Duration),
    #[error("the model made no progress any more for {} s and was ended", .0.as_secs())]
    Stalled(Duration),
}

const GONE: &str = "the engine's thread has ended; see the worker's log for why";

/// A command under way. Dropped before it is over, it ends: its own runs, and no other's.
struct Running {
    terminator: Terminator,
    over: CancellationToken,
    loss: Loss,
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.over.is_cancelled() {
            return;
        }
        self.terminator.terminate();
        // Nobody waits for it any more, yet the device is not free before it comes back.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(come_back(self.over.clone(), self.loss.clone()));
        }
    }
}

/// Waits for a terminated command; one that does not come back in time costs the engine.
async fn come_back(over: CancellationToken, loss: Loss) {
    tokio::select! {
        () = over.cancelled() => {}
        () = clock::had(TERMINATE_GRACE) => {
            tracing::error!("a terminated run did not come back; the engine is given up");
            loss.tell(Detail::Stuck);
        }
    }
}

fn load_engine(
    read: impl FnOnce() -> Result<Arc<Package>, PackageError>,
    config: &EngineConfig,
    progress: Arc<Progress>,
) -> Result<Engine, EngineError> {
    let package = read().map_err(|e| EngineError::new(Detail::ModelLoadFailed, e.to_string()))?;
    Engine::load(package, config, progress)
}

fn serve(mut engine: Engine, mut inbox: mpsc::Receiver<Command>, loss: &Loss) {
    while let Some(command) = inbox.blocking_recv() {
        engine.obey(command.terminator);
        let other = |package| !Arc::ptr_eq(&engine.package, package);
        if command.package.as_ref().is_some_and(other) {
            // Its sender is told by the reply that is dropped.
            tracing::error!("refused to compute for weights that are no longer served");
            continue;
        }
        (command.work)(&mut engine);
        if engine.is_lost() {
            return loss.tell(Detail::EngineLost);
        }
        if !engine.is_sound() {
            return loss.tell(Detail::RestoreMismatch);
        }
        drop((command.over, command.turn));
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{configuration, hazard};
    use super::*;

    #[tokio::test]
    async fn with_its_device_the_engine_is_lost() {
        let (package, _folder) = hazard();
        let (config, read) = (configuration(), move || Ok(package));
        let engine = EngineHandle::start(read, &config, Arc::default());
        let engine = engine.await.unwrap();
        let turn = engine.turn().await;
        let answer = turn.run(None, true, |engine| engine.session.lose()).await;
        assert!(answer.is_ok(), "whoever asked has an answer first");
        assert_eq!(engine.lost().await, Detail::EngineLost);
    }
}
