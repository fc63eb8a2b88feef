//! Loading a model and proving it, retried until it succeeds, and reporting how it went.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::run::Worker;
use super::transition::{Model, Next, Transition};
use crate::engine::thread::EngineHandle;
use crate::engine::{EngineError, Warm};
use crate::model::package::Package;
use crate::protocol::heartbeat::{EngineFacts, ModelFacts, WarmFacts};
use crate::protocol::state::{Detail, State};
use crate::update::state::{StateDir, StateError};
use crate::util::clock::{millis, unix_ms};

impl Worker {
    /// One attempt: load (unless there is an engine), prove, report. A failure waits for its back-off,
    /// and the model is loaded again; there is no last attempt.
    pub(super) async fn warm_up(&mut self, model: &mut Model) -> Next {
        let began = Instant::now();
        let warmed = match self.prove(model.engine()).await {
            Ok(warmed) => warmed,
            Err(stop) => return self.enter(stop),
        };
        match warmed {
            Ok((engine, warm)) => {
                self.warming.reset();
                self.package_changed = false;
                self.report_warm(&engine, &warm, began.elapsed());
                *model = Model::Warm(engine);
                Next::Again
            }
            Err(error) => {
                let wait = self.warming.next_delay();
                self.report_failure(&error, wait);
                match self.wait(Some(wait)).await {
                    next @ (Next::Stop(_) | Next::Swap(_)) => next,
                    Next::Again | Next::Retry(_) | Next::Rewarm | Next::Reload => Next::Reload,
                }
            }
        }
    }

    /// Loads and proves; the outer error is a stop that came first.
    async fn prove(
        &mut self,
        engine: Option<EngineHandle>,
    ) -> Result<Result<(EngineHandle, Warm), EngineError>, Transition> {
        self.count_attempt();
        let loaded = match engine {
            Some(engine) => {
                self.lifecycle.advance(State::Warming, Detail::Rewarm);
                Ok(engine)
            }
            None => self.load().await?,
        };
        let engine = match loaded.and_then(|engine| self.check_name(engine)) {
            Ok(engine) => engine,
            Err(error) => return Ok(Err(error)),
        };
        self.lifecycle
            .advance(State::Warming, Detail::StartupBaseline);
        let warm = self.warm(&engine).await?;
        Ok(warm.map(|warm| (engine, warm)))
    }

    pub(super) async fn warm(
        &mut self,
        engine: &EngineHandle,
    ) -> Result<Result<Warm, EngineError>, Transition> {
        self.loss = Some(engine.follow_loss());
        let proving = engine.clone();
        let warm = async move { proving.turn().await.warm().await };
        self.unless_stopped(warm).await
    }

    pub(super) fn count_attempt(&self) {
        let mut facts = self.status.facts();
        facts.warm.attempt += 1;
        facts.warm.next_retry_at_ms = None;
    }

    async fn load(&mut self) -> Result<Result<EngineHandle, EngineError>, Transition> {
        self.lifecycle.advance(State::Warming, Detail::LoadingModel);
        if let Err(error) = self.open_state() {
            return Ok(Err(error));
        }
        let (dir, state, config) = (self.dir.clone(), self.state.clone(), self.config.clone());
        let (progress, subset) = (
            Arc::clone(&self.status.progress),
            config.model.allow_shards_subset,
        );
        let read = move || match state {
            Some(state) => state.load(&dir, subset).map(Arc::new),
            None => Package::load(&dir, subset, &[]).map(Arc::new),
        };
        let loading = async move { EngineHandle::start(read, &config, progress).await };
        self.unless_stopped(loading).await
    }

    /// Locks the worker's state folder, which only a worker that follows updates has.
    fn open_state(&mut self) -> Result<(), EngineError> {
        if self.state.is_some() || self.updates.is_none() {
            return Ok(());
        }
        let unusable =
            |detail, e: String| EngineError::new(detail, format!("model.state_dir: {e}"));
        let Some(folder) = self.config.state_dir() else {
            return Err(unusable(
                Detail::ModelLoadFailed,
                "not set, and model.dir has no parent".into(),
            ));
        };
        let opened = StateDir::open(&folder).map_err(|error| match error {
            StateError::Locked(_) => unusable(Detail::DuplicateId, error.to_string()),
            StateError::Disk { .. } => unusable(Detail::ModelLoadFailed, error.to_string()),
        })?;
        self.state = Some(Arc::new(opened));
        Ok(())
    }

    /// The queue and the keys carry the name that was known at the start.
    fn check_name(&self, engine: EngineHandle) -> Result<EngineHandle, EngineError> {
        let (found, ours) = (&engine.package.manifest.name, &self.topology.model);
        if found == ours {
            return Ok(engine);
        }
        let dir = self.dir.display();
        let message = format!("{dir}: names model {found:?}, this worker serves {ours:?}");
        Err(EngineError::new(Detail::ModelLoadFailed, message))
    }

    pub(super) fn report_warm(&mut self, engine: &EngineHandle, warm: &Warm, took: Duration) {
        if let (Some(updates), Some(state)) = (&self.updates, &self.state) {
            updates.now_serving(&engine.package, state);
        }
        crate::telemetry::metrics::warmed(true);
        let windows = u32::try_from(warm.windows).unwrap_or(u32::MAX).max(1);
        self.device_queue.set_pace(warm.pass / windows);
        let package = &engine.package;
        let mut facts = self.status.facts();
        facts.warm.last_at_ms = Some(unix_ms());
        facts.warm.last_ms = Some(millis(took));
        facts.warm.baseline_loss = Some(warm.baseline_loss);
        note_inert(&mut facts.warm, warm);
        facts.model = model_facts(package, warm);
        facts.engine = EngineFacts::clone(&engine.facts);
        tracing::info!(
            baseline_loss = warm.baseline_loss,
            windows = warm.windows,
            duration_ms = took.as_millis(),
            inert = warm.inert.len(),
            "warm: the baseline repeats; every tensor but the inert ones moves the loss and is restored"
        );
        drop(facts);
        let (version, loss) = (package.manifest.version, warm.baseline_loss);
        for order in self.due.drain(..) {
            order.done(format!("warm: version {version}, loss {loss}"));
        }
    }

    fn report_failure(&mut self, error: &EngineError, wait: Duration) {
        for order in self.due.drain(..) {
            order.fail(error.to_string());
        }
        crate::telemetry::metrics::warmed(false);
        let retry_at = unix_ms() + millis(wait);
        self.status.error(&error.detail.to_string(), &error.message);
        {
            let mut facts = self.status.facts();
            facts.warm.last_at_ms = Some(unix_ms());
            facts.warm.next_retry_at_ms = Some(retry_at);
        }
        let changed = self.package_changed && error.detail == Detail::ModelLoadFailed;
        let detail = if changed {
            Detail::PackageChanged
        } else {
            error.detail
        };
        tracing::error!(%error, %detail, retry_in_ms = wait.as_millis(), "the warm-up failed");
        self.lifecycle.advance(State::Degraded, detail);
    }
}

fn model_facts(package: &Package, warm: &Warm) -> ModelFacts {
    ModelFacts {
        name: package.manifest.name.clone(),
        version: Some(package.manifest.version),
        weights_id: Some(package.weights.weights_id.clone()),
        plan: Some(hex::encode(warm.plan)),
        shards: package.shards.iter().map(|s| s.id).collect(),
        ..ModelFacts::default()
    }
}

/// Puts the tensors without effect into the record. The log names them only when they have changed,
/// not with every new version of the weights.
fn note_inert(facts: &mut WarmFacts, warm: &Warm) {
    facts.inert_count = warm.inert.len() as u64;
    let before = std::mem::replace(&mut facts.inert, warm.named_inert().to_vec());
    if let Some(inert) = warm.inert_in_words().filter(|_| before != facts.inert) {
        tracing::warn!("{inert}; see \"Inert tensors\" in ops/runbook.md");
    }
}
