//! From one version of the weights to the next, between jobs: the session stays, its weights are
//! replaced and proven. A version that does not prove itself is rolled back.

use std::sync::Arc;
use std::time::Instant;

use super::run::Worker;
use super::transition::{Model, Next, Transition};
use crate::engine::thread::EngineHandle;
use crate::engine::{EngineError, Warm};
use crate::model::package::{Package, WeightsFile};
use crate::protocol::state::{Detail, State};
use crate::update::PreparedUpdate;
use crate::update::state::{Refused, StateDir, StateError};
use crate::util::clock::unix_ms;

impl Worker {
    /// Serves the offered weights if they prove themselves, otherwise the ones before. If there is no
    /// engine, because the weights before cannot be proven either, one is started.
    pub(super) async fn swap(&mut self, model: &mut Model, update: PreparedUpdate) -> Next {
        let began = Instant::now();
        let PreparedUpdate {
            package,
            weights,
            manifest_sha256,
            outcome,
        } = update;
        let version = package.manifest.version;
        if !self.is_of_our_package(&package) {
            tracing::warn!(
                version,
                "the update is for another package than the one in model.dir; it is dropped"
            );
            return Next::Rewarm;
        }
        self.lifecycle
            .advance(State::Updating, Detail::UpdateTo(version));
        self.count_attempt();
        let proven = match self.prove_offered(model.engine(), package).await {
            Ok(proven) => proven,
            Err(stop) => return self.enter(stop),
        };
        self.note_refusal(version, manifest_sha256, proven.as_ref().err())
            .await;
        let (next, result) = match proven {
            Ok((engine, warm)) => {
                self.commit(weights).await;
                self.report_warm(&engine, &warm, began.elapsed());
                *model = Model::Warm(engine);
                (Next::Again, Ok(()))
            }
            Err(error) => (self.roll_back(model, version, &error).await, Err(error)),
        };
        // During a drain the updater may be gone.
        drop(outcome.send(result));
        next
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
    ) -> Result<Result<(EngineHandle, Warm), EngineError>, Transition> {
        let detail = Detail::UpdateTo(package.manifest.version);
        let (config, progress) = (self.config.clone(), Arc::clone(&self.status.progress));
        let adopting = async move {
            match engine {
                Some(engine) => engine.turn().await.adopt(package).await,
                None => EngineHandle::start(move || Ok(package), &config, progress).await,
            }
        };
        let engine = match self.unless_stopped(adopting).await? {
            Ok(engine) => engine,
            Err(error) => return Ok(Err(error)),
        };
        self.lifecycle.advance(State::Warming, detail);
        let warm = self.warm(&engine).await?;
        Ok(warm.map(|warm| (engine, warm)))
    }

    /// Reports the failure and gives the session its previous weights, to be proven again. Without a
    /// session everything is loaded.
    async fn roll_back(&mut self, model: &mut Model, version: u64, error: &EngineError) -> Next {
        let message = format!("version {version}: {error}");
        self.status.error(&error.detail.to_string(), &message);
        tracing::error!(%error, version, "the update is rolled back");
        self.lifecycle.advance(State::Degraded, error.detail);
        let Some(engine) = model.engine().filter(|engine| engine.loss().is_none()) else {
            return Next::Reload;
        };
        let package = Arc::clone(&engine.package);
        let adopting = async move { engine.turn().await.adopt(package).await };
        match self.unless_stopped(adopting).await {
            Ok(Ok(engine)) => {
                *model = Model::Unproven(engine);
                Next::Again
            }
            Ok(Err(error)) => {
                tracing::error!(%error, "the weights before the update are loaded again");
                Next::Reload
            }
            Err(stop) => self.enter(stop),
        }
    }

    /// Writes into the journal that this version was refused, or that none is. The entry outlives
    /// the process.
    async fn note_refusal(
        &self,
        version: u64,
        manifest_sha256: String,
        error: Option<&EngineError>,
    ) {
        // An engine that is lost says nothing about the version: it may have been lost before.
        if error.is_some_and(|error| error.detail == Detail::EngineLost) {
            return;
        }
        let refused = error.map(|error| Refused {
            version,
            why: error.to_string(),
            at_ms: unix_ms(),
            manifest_sha256,
        });
        let written = self.write_journal(move |state| state.refuse(refused));
        if let Err(error) = written.await {
            tracing::error!(error, "the journal does not say which version was refused");
        }
    }

    /// From here on the next process serves these weights too.
    async fn commit(&self, weights: Option<WeightsFile>) {
        let written = self.write_journal(move |state| state.commit(weights.as_ref()));
        let Err(error) = written.await else {
            return;
        };
        let why =
            format!("model.state_dir: {error}; after a restart the previous version is served");
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
