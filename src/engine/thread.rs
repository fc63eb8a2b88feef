//! One named thread owns the session. The async side holds a cheap handle, waits its turn, and
//! can end a run that takes too long; the thread itself never waits for anything but commands.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, mpsc, oneshot};

use super::session::Terminator;
use super::{Engine, EngineError, Evaluation, Progress, Warm};
use crate::candidate::Update;
use crate::config::EngineConfig;
use crate::failure::{Code, Failure};
use crate::job::Rule;
use crate::lifecycle::Detail;
use crate::package::Package;
use crate::package::plan::Plan;

/// How long a terminated run may take to come back before it counts as stuck.
const TERMINATE_GRACE: Duration = Duration::from_secs(10);

enum Command {
    Warm(oneshot::Sender<Result<Warm, EngineError>>),
    Score(
        Box<Update>,
        Rule,
        Arc<Plan>,
        oneshot::Sender<Result<Evaluation, Failure>>,
    ),
    Validate(Arc<Plan>, oneshot::Sender<Result<Arc<Vec<f64>>, Failure>>),
}

/// What both sides see.
#[derive(Debug, Default)]
struct Shared {
    broken: AtomicBool,
    gave_up: Notify,
    baselines: AtomicUsize,
}

/// A loaded model behind its thread.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    /// What it was made of.
    pub package: Arc<Package>,
    commands: mpsc::Sender<Command>,
    turn: Arc<Semaphore>,
    terminator: Terminator,
    shared: Arc<Shared>,
}

impl EngineHandle {
    /// Reads the package and makes the session, on the engine's own thread.
    ///
    /// # Errors
    /// What is wrong, with its `state_detail`.
    pub async fn load(
        dir: &Path,
        config: &EngineConfig,
        progress: Arc<Progress>,
    ) -> Result<Self, EngineError> {
        let (dir, config) = (dir.to_owned(), config.clone());
        let (commands, inbox) = mpsc::channel(1);
        let (loaded, loading) = oneshot::channel();
        let shared = Arc::new(Shared::default());
        let inside = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("scorer-engine".into())
            .spawn(move || {
                let engine = Package::load(&dir)
                    .map_err(|e| EngineError {
                        detail: Detail::ModelLoadFailed,
                        message: e.to_string(),
                    })
                    .and_then(|package| Engine::load(Arc::new(package), &config, progress));
                match engine {
                    Ok(engine) => {
                        let told =
                            loaded.send(Ok((Arc::clone(&engine.package), engine.terminator())));
                        if told.is_ok() {
                            serve(engine, inbox, &inside);
                        }
                    }
                    Err(error) => drop(loaded.send(Err(error))),
                }
            });
        let gone = |m: String| EngineError {
            detail: Detail::ModelLoadFailed,
            message: m,
        };
        thread.map_err(|e| gone(format!("the engine's thread cannot be started: {e}")))?;
        let (package, terminator) = loading
            .await
            .map_err(|_| gone("the engine's thread ended while loading".into()))??;
        Ok(Self {
            package,
            commands,
            turn: Arc::new(Semaphore::new(1)),
            terminator,
            shared,
        })
    }

    /// Proves the session; see [`Engine::warm`].
    ///
    /// # Errors
    /// The first proof that fails.
    pub async fn warm(&self) -> Result<Warm, EngineError> {
        let (reply, answer) = oneshot::channel();
        let gone = || EngineError {
            detail: Detail::WarmFailed,
            message: "the engine's thread has ended".into(),
        };
        self.commands
            .send(Command::Warm(reply))
            .await
            .map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Measures a candidate, ending the run when it takes longer than `limit`.
    ///
    /// # Errors
    /// A typed refusal.
    pub async fn score(
        &self,
        update: Update,
        rule: Rule,
        plan: Arc<Plan>,
        limit: Duration,
    ) -> Result<Evaluation, Failure> {
        self.in_turn(limit, |reply| {
            Command::Score(Box::new(update), rule, plan, reply)
        })
        .await
    }

    /// Measures the current model.
    ///
    /// # Errors
    /// A typed refusal.
    pub async fn validate(
        &self,
        plan: Arc<Plan>,
        limit: Duration,
    ) -> Result<Arc<Vec<f64>>, Failure> {
        self.in_turn(limit, |reply| Command::Validate(plan, reply))
            .await
    }

    /// Ends the run that is going on.
    pub fn terminate(&self) {
        self.terminator.terminate();
    }

    /// Number of baselines kept.
    pub fn baseline_cache_entries(&self) -> usize {
        self.shared.baselines.load(Ordering::Relaxed)
    }

    /// Resolves when the engine can no longer be used: its thread ended or a run never came back.
    pub async fn broken(&self) {
        loop {
            let notified = self.shared.gave_up.notified();
            if self.shared.broken.load(Ordering::Acquire) || self.commands.is_closed() {
                return;
            }
            tokio::select! {
                () = notified => {}
                () = self.commands.closed() => {}
            }
        }
    }

    async fn in_turn<T>(
        &self,
        limit: Duration,
        command: impl FnOnce(oneshot::Sender<Result<T, Failure>>) -> Command,
    ) -> Result<T, Failure> {
        let gone = || Failure::new(Code::InferenceFailed, "the engine's thread has ended");
        // The limit is on the evaluation, not on the wait for it.
        let _turn = self.turn.acquire().await.map_err(|_| gone())?;
        let (reply, mut answer) = oneshot::channel();
        self.commands
            .send(command(reply))
            .await
            .map_err(|_| gone())?;
        if let Ok(answer) = tokio::time::timeout(limit, &mut answer).await {
            return answer.map_err(|_| gone())?;
        }
        self.terminator.terminate();
        if tokio::time::timeout(TERMINATE_GRACE, answer).await.is_err() {
            tracing::error!("a terminated run did not come back; the engine is given up");
            self.shared.broken.store(true, Ordering::Release);
            self.shared.gave_up.notify_waiters();
        }
        let message = format!(
            "the evaluation took longer than worker.score_timeout = {}",
            crate::config::format_duration(limit)
        );
        Err(Failure::new(Code::ScoreTimeout, message))
    }
}

fn serve(mut engine: Engine, mut inbox: mpsc::Receiver<Command>, shared: &Shared) {
    while let Some(command) = inbox.blocking_recv() {
        // A receiver that is gone no longer wants the answer.
        match command {
            Command::Warm(reply) => drop(reply.send(engine.warm())),
            Command::Score(update, rule, plan, reply) => {
                drop(reply.send(engine.score(&update, rule, &plan)))
            }
            Command::Validate(plan, reply) => drop(reply.send(engine.baseline(&plan))),
        }
        shared
            .baselines
            .store(engine.baseline_cache_entries(), Ordering::Relaxed);
    }
}
