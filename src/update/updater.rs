//! The updater: looks at the manifest, and gets, prepares and offers what is live.

use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::time::Instant;

use super::Served;
use super::channels::{UpdaterHandle, WorkerHandle, channels};
use super::download::{Mirrors, Published};
use super::known_manifest::{Decision, KnownManifest};
use super::outcome::{Followed, UpdateError, answer};
use super::prepare::{NewWeights, Preparation};
use super::rollout_lease::{RolloutLease, SwapProgress};
use crate::config::Config;
use crate::protocol::control::Order;
use crate::protocol::heartbeat::{RefusedVersion, UpdateFacts};
use crate::protocol::signature::UpdateKey;
use crate::protocol::state::{Phase, State};
use crate::store::Store;
use crate::telemetry::status::WorkerStatus;
use crate::util::clock::unix_ms;

/// The shortest time between two looks, when jobs for a newer version ask for one.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
/// A failure that does not change is logged again after this.
const LOG_AGAIN: Duration = Duration::from_secs(3600);
/// How long the fleet waits until a worker that has swapped its weights takes jobs again.
const READY_AGAIN: Duration = Duration::from_secs(30);

/// Looks for new versions, gets them and offers them to the worker.
#[derive(Debug)]
pub struct Updater {
    mirrors: Mirrors,
    key: Option<UpdateKey>,
    model: String,
    config: Config,
    holder: String,
    store: Store,
    status: Arc<WorkerStatus>,
    phase: watch::Receiver<Phase>,
    worker: WorkerHandle,
    known: Option<KnownManifest>,
    /// The failure that was logged last, and when.
    logged: Option<(String, Instant)>,
}

impl Updater {
    /// Prepares to follow `model.update_url`, if there is one.
    ///
    /// # Errors
    /// For unusable configuration.
    pub fn new(
        config: &Config,
        model: &str,
        holder: &str,
        store: Store,
        status: Arc<WorkerStatus>,
        phase: watch::Receiver<Phase>,
    ) -> anyhow::Result<Option<(Self, UpdaterHandle)>> {
        let Some(url) = &config.model.update_url else {
            return Ok(None);
        };
        let key = config.model.update_key.as_deref().map(UpdateKey::parse);
        status.facts().update = Some(UpdateFacts::default());
        let (handle, worker) = channels();
        let updater = Self {
            mirrors: Mirrors::new(url.parse()?, &config.candidates)?,
            key: key.transpose().map_err(anyhow::Error::msg)?,
            model: model.to_owned(),
            config: config.clone(),
            holder: holder.to_owned(),
            store,
            status,
            phase,
            worker,
            known: None,
            logged: None,
        };
        Ok(Some((updater, handle)))
    }

    /// Follows the model until its task is aborted or the worker is gone.
    pub async fn follow(mut self) {
        if self.worker.served.wait_for(Option::is_some).await.is_err() {
            return;
        }
        let mut orders: Vec<Order> = Vec::new();
        loop {
            let looked_at = Instant::now();
            let outcome = self.look(!orders.is_empty()).await;
            self.report(&outcome);
            for order in orders.drain(..) {
                answer(order, &outcome);
            }
            match self.pause(looked_at).await {
                Some(order) => orders.extend(order),
                None => return,
            }
        }
    }

    fn report(&mut self, outcome: &Result<Followed, UpdateError>) {
        let failure = outcome.as_ref().err().map(ToString::to_string);
        match (outcome, &failure) {
            // What failed before is reported already; only a new attempt is a new error.
            (Err(UpdateError::Refused(..) | UpdateError::BackingOff(_)), _) | (_, None) => {}
            (_, Some(failure)) => self.status.error("update_failed", failure),
        }
        match &failure {
            None => self.logged = None,
            Some(failure) if self.is_news(failure) => {
                tracing::error!(error = %failure, "not updated; the version before is served");
                self.logged = Some((failure.clone(), Instant::now()));
            }
            Some(_) => {}
        }
        let mut facts = self.status.facts();
        if let Some(update) = &mut facts.update {
            update.looked_at_ms = Some(unix_ms());
            update.failure = failure;
            (update.bytes_here, update.bytes_wanted) = (0, 0);
        }
    }

    fn is_news(&self, failure: &str) -> bool {
        let logged = self.logged.as_ref();
        logged.is_none_or(|(logged, at)| logged != failure || at.elapsed() > LOG_AGAIN)
    }

    /// Waits for the next look: the interval, or less if an order or a job asks for it. None = the
    /// worker is gone.
    async fn pause(&mut self, looked_at: Instant) -> Option<Option<Order>> {
        let interval = self.config.model.update_interval;
        let next = looked_at + interval.mul_f64(rand::random_range(0.9..=1.1));
        let newer = async {
            self.worker.newer.notified().await;
            tokio::time::sleep_until(looked_at + SHORTEST_PAUSE).await;
        };
        tokio::select! {
            () = tokio::time::sleep_until(next) => Some(None),
            () = newer => Some(None),
            // Also one that came during the look: it asks for what has happened since.
            order = self.worker.orders.recv() => order.map(Some),
        }
    }

    /// Reads the manifest, and does all it takes to serve the live version. What failed is not
    /// attempted again at every look, but when somebody `asked`.
    async fn look(&mut self, asked: bool) -> Result<Followed, UpdateError> {
        let read = self.read_manifest().await;
        let Some(served) = self.worker.served.borrow().clone() else {
            return Err(UpdateError::NotNow("no model is loaded yet"));
        };
        if let Err(why) = read {
            return Err(self.unreadable(why, &served));
        }
        let (version, refused) = (served.package.manifest.version, served.state.refused());
        let Some(known) = &self.known else {
            return Err(UpdateError::NotNow("no manifest was read yet"));
        };
        let live = known.manifest.live_version;
        self.report_live(live, &served);
        match known.decide(version, refused, asked) {
            Decision::Served => return Ok(Followed::Already(live)),
            Decision::Refused(why) => return Err(UpdateError::Refused(live, why)),
            Decision::BackOff(why) => return Err(UpdateError::BackingOff(why)),
            Decision::Get => {}
        }
        let outcome = self.update(&served).await;
        let interval = self.config.model.update_interval;
        if let Some(known) = &mut self.known {
            known.note(outcome.as_ref().err(), interval);
        }
        outcome
    }

    /// The manifest cannot be read. What is known from the last one still counts.
    fn unreadable(&self, why: String, served: &Served) -> UpdateError {
        let (version, refused) = (served.package.manifest.version, served.state.refused());
        let known = self.known.as_ref();
        let before = known.and_then(|known| known.why_not_served(version, refused));
        UpdateError::Manifest(match before {
            Some(before) => format!("{why}; from the one that was read last: {before}"),
            None => why,
        })
    }

    fn report_live(&self, live: u64, served: &Served) {
        let refused = served.state.refused().map(|refused| RefusedVersion {
            version: refused.version,
            why: refused.why,
            at_ms: refused.at_ms,
        });
        if let Some(update) = &mut self.status.facts().update {
            update.live_version = Some(live);
            update.refused = refused;
        }
    }

    /// Reads the manifest, if it has changed. The error says why it cannot be followed.
    async fn read_manifest(&mut self) -> Result<(), String> {
        let revision = self
            .known
            .as_ref()
            .and_then(|known| known.revision.as_ref());
        let published = self.mirrors.manifest(revision).await;
        let Some(Published { bytes, revision }) = published.map_err(|e| e.to_string())? else {
            return Ok(());
        };
        let sha256 = hex::encode(Sha256::digest(&bytes));
        if let Some(known) = self.known.as_mut().filter(|known| known.sha256 == sha256) {
            known.revision = revision;
            return Ok(());
        }
        if let Some(key) = &self.key {
            let signature = self.mirrors.signature().await;
            let signature = signature.map_err(|e| format!("no signature: {e}"))?;
            key.verify(&bytes, &signature)?;
        }
        // Megabytes may have to be parsed: not on a thread that others wait for.
        let manifest =
            tokio::task::block_in_place(|| crate::protocol::update_manifest::decode(&bytes))?;
        if manifest.name != self.model {
            let (name, model) = (&manifest.name, &self.model);
            return Err(format!(
                "it is for model {name:?}, this worker serves {model:?}"
            ));
        }
        tracing::info!(
            live_version = manifest.live_version,
            "a new update manifest"
        );
        self.known = Some(KnownManifest::new(manifest, sha256, revision));
        Ok(())
    }

    /// Gets the live version, without the files that are known to be unfit, and offers it.
    async fn update(&mut self, served: &Served) -> Result<Followed, UpdateError> {
        let Some(known) = &mut self.known else {
            return Err(UpdateError::NotNow("no manifest was read yet"));
        };
        let sha256 = known.sha256.clone();
        let preparation = Preparation {
            mirrors: &self.mirrors,
            status: &self.status,
            served,
            manifest: &known.manifest,
            subset: self.config.model.allow_shards_subset,
        };
        let new = preparation.run(&mut known.unfit).await?;
        self.offer(new, served, sha256).await
    }

    /// Offers new weights while this worker holds the rollout lease, and keeps it until they are
    /// served.
    async fn offer(
        &mut self,
        (package, weights): NewWeights,
        served: &Served,
        manifest_sha256: String,
    ) -> Result<Followed, UpdateError> {
        let version = package.manifest.version;
        let lease = self.lease().await;
        let outcome = self.worker.offer(package, weights, manifest_sha256).await;
        let outcome = outcome.ok_or(UpdateError::NotNow(
            "the worker did not take the new weights: it is ending, or its package was replaced meanwhile; it looks again",
        ))?;
        if let Some(known) = &self.known {
            self.report_live(known.manifest.live_version, served);
        }
        let ready = self.phase.wait_for(|phase| phase.state == State::Ready);
        if tokio::time::timeout(READY_AGAIN, ready).await.is_err() {
            tracing::warn!(
                "not ready again yet; the next worker of the fleet may swap its weights"
            );
        }
        drop(lease);
        match outcome {
            Ok(()) => {
                served.state.sweep_parts(|_| false);
                Ok(Followed::Updated(version))
            }
            Err(error) => Err(UpdateError::Unproven(version, error.to_string())),
        }
    }

    async fn lease(&self) -> Option<RolloutLease> {
        if !self.config.model.update_stagger {
            return None;
        }
        let progress = SwapProgress {
            status: Arc::clone(&self.status),
            phase: self.phase.clone(),
        };
        RolloutLease::acquire(&self.store, &self.holder, progress).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Layers;
    use crate::model::checkpoint::tests::put;
    use crate::model::package::Package;
    use crate::update::state::StateDir;
    use std::path::Path;
    use url::Url;

    /// An updater of a package in this folder, which is to follow `manifest.json` there.
    fn updater(folder: &Path, package: Package) -> (Updater, UpdaterHandle) {
        let url = Url::from_file_path(folder.join("manifest.json")).unwrap();
        let config = Config::load(&Layers {
            set: &[format!("model.update_url={url}")],
            ..Layers::default()
        });
        let config = config.unwrap();
        let store = Store::new(&config.redis, "tiny").unwrap();
        let (_, phase) = watch::channel(Phase::starting());
        let status = Arc::default();
        let made = Updater::new(&config, "tiny", "w1", store, status, phase).unwrap();
        let (updater, handle) = made.unwrap();
        let state = StateDir::open(&folder.join("state")).unwrap();
        handle.now_serving(&Arc::new(package), &Arc::new(state));
        (updater, handle)
    }

    fn publish(folder: &Path, live_version: u64, graph: &str) {
        let full = std::fs::read(folder.join("full")).unwrap();
        let document = serde_json::json!({
            "v": 1, "name": "tiny", "live_version": live_version,
            "full": [{
                "version": 2, "urls": ["full"], "size": full.len(),
                "sha256": hex::encode(Sha256::digest(&full)), "graph_sha256": graph,
            }],
            "updates": [{
                "from": 1, "to": 2, "urls": ["delta"], "size": 1, "format": "binary_v2",
                "sha256": "0".repeat(64),
            }],
        });
        std::fs::write(folder.join("manifest.json"), document.to_string()).unwrap();
    }

    async fn failure(updater: &mut Updater, asked: bool) -> String {
        let outcome = updater.look(asked).await;
        updater.report(&outcome);
        let facts = updater.status.facts();
        facts.update.clone().unwrap().failure.unwrap_or_default()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_reason_for_no_route_is_reported_at_every_look_until_the_manifest_changes() {
        let (package, dir) = crate::model::fit::tests::package();
        let (folder, graph) = (dir.path(), package.manifest.graph.sha256.clone());
        put(
            &folder.join("full"),
            &[("w", safetensors::Dtype::F32, &[2])],
        );
        publish(folder, 2, &graph);
        let (mut updater, _handle) = updater(folder, package);
        let first = failure(&mut updater, false).await;
        for reason in ["w is not a tensor of the package", "delta"] {
            assert!(first.contains(reason), "{first}");
        }
        let logged = updater.logged.clone().unwrap();
        for asked in [false, true, false, true] {
            assert_eq!(failure(&mut updater, asked).await, first, "{asked}");
        }
        // Nothing was logged twice.
        assert_eq!(updater.logged.as_ref(), Some(&logged));

        // While the manifest cannot be read, the reason is still known.
        std::fs::write(folder.join("manifest.json"), "{").unwrap();
        let meanwhile = failure(&mut updater, false).await;
        assert!(meanwhile.contains("the update manifest: ") && meanwhile.ends_with(&first));

        publish(folder, 2, &"0".repeat(64));
        let foreign = failure(&mut updater, false).await;
        assert!(
            foreign.contains("are for another graph (000000000000) than"),
            "{foreign}"
        );
        publish(folder, 1, &graph);
        assert_eq!(failure(&mut updater, false).await, "");
        assert_eq!(updater.logged, None);
    }
}
