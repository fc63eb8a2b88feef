//! From one version of the weights to the next, between jobs: the session stays, its weights are
//! replaced and proven. What does not prove itself is taken back.

use std::sync::Arc;
use std::time::Instant;

use super::{Leaving, Step, Worker};
use crate::engine::thread::EngineHandle;
use crate::engine::{EngineError, Warm};
use crate::model::package::{Package, WeightsFile};
use crate::protocol::state::{Detail, State};
use crate::update::PreparedUpdate;
use crate::update::state::{Refused, StateDir, StateError};
use crate::util::clock::unix_ms;

impl Worker {
    /// Serves the offered weights if they prove themselves, else those before. Without an engine,
    /// as when the weights before cannot be proven either, one is made.
    pub(super) async fn swap(
        &mut self,
        engine: Option<EngineHandle>,
        offer: PreparedUpdate,
    ) -> Step {
        let began = Instant::now();
        let PreparedUpdate {
            package,
            weights,
            manifest_sha256,
            settled,
        } = offer;
        let version = package.manifest.version;
        if !self.is_of_our_package(&package) {
            tracing::warn!(
                version,
                "an update for another package than the one that is there now"
            );
            return Step::Rewarm;
        }
        self.lifecycle
            .advance(State::Updating, Detail::UpdateTo(version));
        self.count_attempt();
        let proven = match self.prove_offered(engine.clone(), package).await {
            Ok(proven) => proven,
            Err(drain) => return self.stop_idle(drain),
        };
        let refused = proven.as_ref().err().map(|error| Refused {
            version,
            why: error.to_string(),
            at_ms: unix_ms(),
            manifest_sha256,
        });
        // An engine that is lost says nothing of the version: it may have been before.
        let lost = |error: &EngineError| error.detail == Detail::EngineLost;
        if !proven.as_ref().is_err_and(lost) {
            self.refuse(refused).await;
        }
        let (step, outcome) = match proven {
            Ok((engine, warm)) => {
                self.commit(weights).await;
                self.report_warm(&engine, &warm, began.elapsed());
                (Step::Warmed(engine), Ok(()))
            }
            Err(error) => {
                self.status.error(
                    &error.detail.to_string(),
                    &format!("version {version}: {error}"),
                );
                tracing::error!(%error, version, "the update is taken back");
                self.lifecycle.advance(State::Degraded, error.detail);
                (self.take_back(engine).await, Err(error))
            }
        };
        // The updater may be gone in a drain.
        drop(settled.send(outcome));
        step
    }

    /// The package may have been replaced while the update was prepared.
    fn is_of_our_package(&self, offered: &Package) -> bool {
        let found = Package::read_manifest(&self.dir);
        found.is_ok_and(|(manifest, id)| Package::root(&manifest, &id) == offered.root)
    }

    async fn prove_offered(
        &mut self,
        engine: Option<EngineHandle>,
        package: Arc<Package>,
    ) -> Result<Result<(EngineHandle, Warm), EngineError>, Leaving> {
        let detail = Detail::UpdateTo(package.manifest.version);
        let (config, progress) = (self.config.clone(), Arc::clone(&self.status.progress));
        let adopting = async move {
            match engine {
                Some(engine) => engine.turn().await.adopt(package).await,
                None => EngineHandle::start(move || Ok(package), &config, progress).await,
            }
        };
        let engine = match self.unless_drained(adopting).await? {
            Ok(engine) => engine,
            Err(error) => return Ok(Err(error)),
        };
        self.lifecycle.advance(State::Warming, detail);
        let warm = self.warm(&engine).await?;
        Ok(warm.map(|warm| (engine, warm)))
    }

    /// Gives the session the weights before, to be proven again; where there is no session any more,
    /// everything is loaded.
    async fn take_back(&mut self, engine: Option<EngineHandle>) -> Step {
        let Some(engine) = engine.filter(|engine| engine.loss().is_none()) else {
            return Step::Reload;
        };
        let package = Arc::clone(&engine.package);
        let adopting = async move { engine.turn().await.adopt(package).await };
        match self.unless_drained(adopting).await {
            Ok(Ok(engine)) => Step::Prove(engine),
            Ok(Err(error)) => {
                tracing::error!(%error, "the weights before are loaded again");
                Step::Reload
            }
            Err(drain) => self.stop_idle(drain),
        }
    }

    /// Remembers which version did not prove itself, if one did not: also for the next process, should
    /// this one have to end.
    async fn refuse(&self, refused: Option<Refused>) {
        let written = self.write_journal(move |state| state.refuse(refused));
        if let Err(error) = written.await {
            tracing::error!(error, "what was tried cannot be remembered");
        }
    }

    /// From here on the next process serves these weights too.
    async fn commit(&self, weights: Option<WeightsFile>) {
        let written = self.write_journal(move |state| state.commit(weights.as_ref()));
        let Err(error) = written.await else {
            return;
        };
        let why = format!("model.state_dir: {error}; after a restart the version before is served");
        self.status.error("state_not_saved", &why);
        tracing::error!(why, "the new version is served, but not saved");
    }

    async fn write_journal(
        &self,
        write: impl FnOnce(&StateDir) -> Result<(), StateError> + Send + 'static,
    ) -> Result<(), String> {
        let Some(state) = self.state.clone() else {
            return Ok(());
        };
        let written = tokio::task::spawn_blocking(move || write(&state));
        match written.await {
            Ok(written) => written.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }
}
