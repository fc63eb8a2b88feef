//! How a worker follows its model. Beside the worker, which goes on serving, the [`Updater`] looks at
//! what training publishes ([`manifest`], vouched for by a [`signature`]), finds the way from the
//! weights that are here to those that are live ([`route`]) and goes it ([`prepare`]): gets its files
//! ([`download`]) and makes the new weights of them ([`build`]) in the worker's own folder
//! ([`state`]). Then it offers them to the worker, when it is this worker's [`turn`]. Nothing here
//! touches the engine.

pub mod build;
pub mod download;
mod prepare;
mod rollout_lease;
pub mod route;
pub mod state;

use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::config::Config;
use crate::engine::EngineError;
use crate::fetch::Revision;
use crate::model::package::{Package, WeightsFile};
use crate::protocol::control::Order;
use crate::protocol::heartbeat::{RefusedVersion, UpdateFacts};
use crate::protocol::signature::UpdateKey;
use crate::protocol::state::{Phase, State};
use crate::protocol::update_manifest::UpdateManifest;
use crate::store::Store;
use crate::telemetry::status::WorkerStatus;
use crate::update::rollout_lease::{Signs, Turn};
use crate::util::clock::unix_ms;
use download::{Mirrors, Published};
use prepare::{Obstacles, Preparation};
use state::{Refused, StateDir};

/// Jobs for a newer version make the worker look at once, but not more often than this.
const LEAST_PAUSE: Duration = Duration::from_secs(1);
/// The longest a failing worker waits between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);
/// A failure that does not change is logged again after this.
const LOG_AGAIN: Duration = Duration::from_secs(3600);
/// How long a fleet waits for a worker that has swapped its weights to take jobs again.
const READY_AGAIN: Duration = Duration::from_secs(30);

/// What the worker serves, and where it keeps newer weights.
#[derive(Debug, Clone)]
pub struct Served {
    /// The package with the weights that are served.
    pub package: Arc<Package>,
    /// The worker's folder.
    pub state: Arc<StateDir>,
}

/// New weights, checked and on the disk, to be served in place of the old ones.
#[derive(Debug)]
pub struct PreparedUpdate {
    /// The package with the new weights.
    pub package: Arc<Package>,
    /// Where they are; none for the package's own.
    pub weights: Option<WeightsFile>,
    /// Of the manifest that names them: another one is another try.
    pub manifest_sha256: String,
    /// Told whether they proved themselves.
    pub settled: oneshot::Sender<Result<(), EngineError>>,
}

/// The worker's ends of what connects it with the updater.
#[derive(Debug)]
pub struct Follower {
    /// New weights.
    pub offers: mpsc::Receiver<PreparedUpdate>,
    /// To be told what is served.
    pub served: watch::Sender<Option<Served>>,
    /// To ask for a look now.
    pub orders: mpsc::Sender<Order>,
    /// Notified by jobs for a newer version.
    pub newer: Arc<Notify>,
}

/// Looks for new versions, gets them and offers them.
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
    offers: mpsc::Sender<PreparedUpdate>,
    served: watch::Receiver<Option<Served>>,
    orders: mpsc::Receiver<Order>,
    newer: Arc<Notify>,
    known: Option<Known>,
    /// What the log was told last, and when.
    logged: Option<(String, Instant)>,
}

/// The manifest that was read last.
#[derive(Debug)]
struct Known {
    manifest: UpdateManifest,
    sha256: String,
    revision: Option<Revision>,
    /// Files that do not hold what they should: they will not get better.
    unfit: Obstacles,
    /// The last try to follow it, if it failed.
    failed: Option<Failed>,
}

/// A try that failed, and when the next one is.
#[derive(Debug)]
struct Failed {
    why: String,
    tries: u32,
    again_at: Instant,
}

impl Known {
    /// The live version, if it was tried by this very manifest and did not prove itself.
    fn refused(&self, served: &Served) -> Option<Refused> {
        let refused = served.state.refused();
        let live = self.manifest.live_version;
        refused.filter(|r| r.version == live && r.manifest_sha256 == self.sha256)
    }

    fn note(&mut self, hitch: Option<&UpdateError>, interval: Duration) {
        let tries = self.failed.take().map_or(0, |failed| failed.tries);
        let longer = interval.saturating_mul(1 << tries.min(16));
        self.failed = hitch.map(|hitch| Failed {
            why: hitch.to_string(),
            tries: tries + 1,
            again_at: Instant::now() + longer.min(LONGEST_PAUSE.max(interval)),
        });
    }
}

/// How a look at the manifest ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Followed {
    /// The live version is served already.
    Already(u64),
    /// It is served now.
    Updated(u64),
}

/// Why the live version is not served.
#[derive(Debug, thiserror::Error)]
enum UpdateError {
    /// The manifest cannot be had, or must not be followed.
    #[error("the update manifest: {0}")]
    Manifest(String),
    /// The version failed before.
    #[error(
        "version {0} was tried and did not prove itself ({1}); it is tried again when the manifest changes"
    )]
    Refused(u64, String),
    /// It failed a while ago, for this reason, and is tried again in a while.
    #[error("{0}")]
    Later(String),
    /// There is no way to it.
    #[error("{0}")]
    NoWay(String),
    /// The worker's folder cannot take it.
    #[error("model.state_dir: {0}")]
    Disk(String),
    /// What is here is not what it was.
    #[error("the weights that are here: {0}")]
    Base(String),
    /// It did not prove itself just now.
    #[error("version {0} did not prove itself: {1}")]
    Unproven(u64, String),
    /// The worker has other things to do.
    #[error("{0}")]
    Away(&'static str),
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
    ) -> anyhow::Result<Option<(Self, Follower)>> {
        let Some(url) = &config.model.update_url else {
            return Ok(None);
        };
        let key = config.model.update_key.as_deref().map(UpdateKey::parse);
        let (offering, offers) = mpsc::channel(1);
        let (serving, served) = watch::channel(None);
        let (ordering, orders) = mpsc::channel(16);
        let newer = Arc::new(Notify::new());
        status.facts().update = Some(UpdateFacts::default());
        let follower = Follower {
            offers,
            served: serving,
            orders: ordering,
            newer: Arc::clone(&newer),
        };
        let updater = Self {
            mirrors: Mirrors::new(url.parse()?, &config.candidates)?,
            key: key.transpose().map_err(anyhow::Error::msg)?,
            model: model.to_owned(),
            config: config.clone(),
            holder: holder.to_owned(),
            store,
            status,
            phase,
            offers: offering,
            served,
            orders,
            newer,
            known: None,
            logged: None,
        };
        Ok(Some((updater, follower)))
    }

    /// Follows the model until its task is aborted or the worker is gone.
    pub async fn follow(mut self) {
        if self.served.wait_for(Option::is_some).await.is_err() {
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
            // What failed before is noted already; only a new try is a new error.
            (Err(UpdateError::Refused(..) | UpdateError::Later(_)), _) | (_, None) => {}
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

    /// Until the next look: the interval, or less when somebody asks. None = the worker is gone.
    async fn pause(&mut self, looked_at: Instant) -> Option<Option<Order>> {
        let interval = self.config.model.update_interval;
        let next = looked_at + interval.mul_f64(rand::random_range(0.9..=1.1));
        let newer = async {
            self.newer.notified().await;
            tokio::time::sleep_until(looked_at + LEAST_PAUSE).await;
        };
        tokio::select! {
            () = tokio::time::sleep_until(next) => Some(None),
            () = newer => Some(None),
            // Also one that came during the look: it asks for what has happened since.
            order = self.orders.recv() => order.map(Some),
        }
    }

    /// One look: what is live, and all it takes to serve it. What failed is not tried again at every
    /// look, but when somebody `asked`.
    async fn look(&mut self, asked: bool) -> Result<Followed, UpdateError> {
        let read = self.read_manifest().await;
        let Some(served) = self.served.borrow().clone() else {
            return Err(UpdateError::Away("no model is loaded yet"));
        };
        if let Err(why) = read {
            return Err(UpdateError::Manifest(match self.closed(&served) {
                Some(closed) => format!("{why}; by the one that was read last: {closed}"),
                None => why,
            }));
        }
        let Some(known) = &self.known else {
            return Err(UpdateError::Away("no manifest was read yet"));
        };
        let (live, sha256) = (known.manifest.live_version, known.sha256.clone());
        self.note_live(live, &served);
        if served.package.manifest.version == live {
            return Ok(Followed::Already(live));
        }
        if let Some(refused) = known.refused(&served) {
            return Err(UpdateError::Refused(live, refused.why));
        }
        let failed = known
            .failed
            .as_ref()
            .filter(|f| !asked && Instant::now() < f.again_at);
        if let Some(failed) = failed {
            return Err(UpdateError::Later(failed.why.clone()));
        }
        let outcome = match self.prepare(&served).await {
            Ok((package, weights)) => self.offer(package, weights, &served, sha256).await,
            Err(hitch) => Err(hitch),
        };
        let interval = self.config.model.update_interval;
        if let Some(known) = &mut self.known {
            known.note(outcome.as_ref().err(), interval);
        }
        outcome
    }

    /// Why the live version of the manifest that was read last is not served, if that is known.
    fn closed(&self, served: &Served) -> Option<String> {
        let known = self.known.as_ref()?;
        if served.package.manifest.version == known.manifest.live_version {
            return None;
        }
        let refused = known.refused(served);
        let refused = refused.map(|r| UpdateError::Refused(r.version, r.why).to_string());
        refused.or_else(|| known.failed.as_ref().map(|failed| failed.why.clone()))
    }

    fn note_live(&self, live: u64, served: &Served) {
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

    /// Reads the manifest, if it has changed; says why it cannot be followed.
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
        // It may have megabytes, which are read strictly: not on a thread that others wait for.
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
        self.known = Some(Known {
            manifest,
            sha256,
            revision,
            unfit: Obstacles::new(),
            failed: None,
        });
        Ok(())
    }

    /// Gets the live version, leaving out what is known not to be of use.
    async fn prepare(
        &mut self,
        served: &Served,
    ) -> Result<(Arc<Package>, Option<WeightsFile>), UpdateError> {
        let Some(known) = &mut self.known else {
            return Err(UpdateError::Away("no manifest was read yet"));
        };
        let preparation = Preparation {
            mirrors: &self.mirrors,
            status: &self.status,
            served,
            manifest: &known.manifest,
            subset: self.config.model.allow_shards_subset,
        };
        preparation.run(&mut known.unfit).await
    }

    /// Offers new weights when it is this worker's turn, and sees to it that the fleet waits until
    /// they are served.
    async fn offer(
        &mut self,
        package: Arc<Package>,
        weights: Option<WeightsFile>,
        served: &Served,
        manifest_sha256: String,
    ) -> Result<Followed, UpdateError> {
        let version = package.manifest.version;
        let turn = match self.config.model.update_stagger {
            true => {
                let signs = Signs {
                    status: Arc::clone(&self.status),
                    phase: self.phase.clone(),
                };
                Turn::wait(&self.store, &self.holder, signs).await
            }
            false => None,
        };
        let (settled, outcome) = oneshot::channel();
        let offer = PreparedUpdate {
            package,
            weights,
            manifest_sha256,
            settled,
        };
        let gone = UpdateError::Away(
            "the worker did not take the new weights: it is ending, or its package was replaced meanwhile; it looks again",
        );
        if self.offers.send(offer).await.is_err() {
            return Err(gone);
        }
        let Ok(outcome) = outcome.await else {
            return Err(gone);
        };
        if let Some(known) = &self.known {
            self.note_live(known.manifest.live_version, served);
        }
        let ready = self.phase.wait_for(|phase| phase.state == State::Ready);
        if tokio::time::timeout(READY_AGAIN, ready).await.is_err() {
            tracing::warn!("not ready again yet; the next worker of the fleet takes its turn");
        }
        drop(turn);
        match outcome {
            Ok(()) => {
                served.state.sweep_parts(|_| false);
                Ok(Followed::Updated(version))
            }
            Err(error) => Err(UpdateError::Unproven(version, error.to_string())),
        }
    }
}

fn answer(order: Order, outcome: &Result<Followed, UpdateError>) {
    match outcome {
        Ok(Followed::Already(version)) => {
            order.done(format!("version {version} is live and served already"));
        }
        Ok(Followed::Updated(version)) => order.done(format!("version {version} is served")),
        Err(hitch @ (UpdateError::Refused(..) | UpdateError::Away(_))) => {
            order.refuse(hitch.to_string())
        }
        Err(
            hitch @ (UpdateError::Manifest(_)
            | UpdateError::Later(_)
            | UpdateError::NoWay(_)
            | UpdateError::Disk(_)
            | UpdateError::Base(_)
            | UpdateError::Unproven(..)),
        ) => order.fail(hitch.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Layers;
    use crate::model::checkpoint::tests::put;
    use std::path::Path;
    use url::Url;

    /// An updater of a package in this folder, which is to follow `manifest.json` there.
    fn updater(folder: &Path, package: Package) -> (Updater, Follower) {
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
        let (updater, follower) = made.unwrap();
        let state = StateDir::open(&folder.join("state")).unwrap();
        follower.served.send_replace(Some(Served {
            package: Arc::new(package),
            state: Arc::new(state),
        }));
        (updater, follower)
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
    async fn why_the_way_is_closed_is_said_at_every_look_until_the_manifest_changes() {
        let (package, dir) = crate::model::fit::tests::package();
        let (folder, graph) = (dir.path(), package.manifest.graph.sha256.clone());
        put(
            &folder.join("full"),
            &[("w", safetensors::Dtype::F32, &[2])],
        );
        publish(folder, 2, &graph);
        let (mut updater, _follower) = updater(folder, package);
        let first = failure(&mut updater, false).await;
        for reason in ["w is not a tensor of the package", "delta"] {
            assert!(first.contains(reason), "{first}");
        }
        let logged = updater.logged.clone().unwrap();
        for asked in [false, true, false, true] {
            assert_eq!(failure(&mut updater, asked).await, first, "{asked}");
        }
        // Nothing new was said to the log.
        assert_eq!(updater.logged.as_ref(), Some(&logged));

        // Where the manifest cannot be had for a while, the reason is still known.
        std::fs::write(folder.join("manifest.json"), "{").unwrap();
        let meanwhile = failure(&mut updater, false).await;
        assert!(meanwhile.contains("the update manifest: ") && meanwhile.ends_with(&first));

        publish(folder, 2, &"0".repeat(64));
        let foreign = failure(&mut updater, false).await;
        assert!(foreign.contains("are for the graph 000"), "{foreign}");
        publish(folder, 1, &graph);
        assert_eq!(failure(&mut updater, false).await, "");
        assert_eq!(updater.logged, None);
    }
}
