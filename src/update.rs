//! How a worker follows its model. Beside the worker, which goes on serving, the [`Updater`] looks at
//! what training publishes ([`manifest`], vouched for by a [`signature`]), finds the way from the
//! weights that are here to those that are live ([`route`]) and goes it ([`prepare`]): gets its files
//! ([`download`]) and makes the new weights of them ([`build`]) in the worker's own folder
//! ([`state`]). Then it offers them to the worker, when it is this worker's [`turn`]. Nothing here
//! touches the engine.

pub mod build;
pub mod download;
pub mod manifest;
mod prepare;
pub mod route;
pub mod signature;
pub mod state;
mod turn;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::clock::unix_ms;
use crate::config::Config;
use crate::control::Order;
use crate::engine::EngineError;
use crate::fetch::Revision;
use crate::heartbeat::{RefusedVersion, UpdateFacts, Vitals};
use crate::lifecycle::{Phase, State};
use crate::package::{Package, WeightsFile};
use crate::store::Store;
use download::{Mirrors, Published};
use manifest::UpdateManifest;
use prepare::Preparation;
use signature::UpdateKey;
use state::{Refused, StateDir};
use turn::Turn;

/// Jobs for a newer version make the worker look at once, but not more often than this.
const LEAST_PAUSE: Duration = Duration::from_secs(1);
/// The longest a failing worker waits between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);
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
pub struct Offer {
    /// The package with the new weights.
    pub package: Arc<Package>,
    /// Where they are; none for the package's own.
    pub weights: Option<WeightsFile>,
    /// Told whether they proved themselves.
    pub settled: oneshot::Sender<Result<(), EngineError>>,
}

/// The worker's ends of what connects it with the updater.
#[derive(Debug)]
pub struct Follower {
    /// New weights.
    pub offers: mpsc::Receiver<Offer>,
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
    vitals: Arc<Vitals>,
    phase: watch::Receiver<Phase>,
    offers: mpsc::Sender<Offer>,
    served: watch::Receiver<Option<Served>>,
    orders: mpsc::Receiver<Order>,
    newer: Arc<Notify>,
    known: Option<Known>,
}

/// The manifest that was read last.
#[derive(Debug)]
struct Known {
    manifest: UpdateManifest,
    sha256: String,
    revision: Option<Revision>,
    /// Files that do not hold what they should, by digest: they will not get better.
    unfit: BTreeSet<String>,
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
    fn note(&mut self, hitch: Option<&Hitch>, interval: Duration) {
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
enum Hitch {
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
        vitals: Arc<Vitals>,
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
        vitals.facts().update = Some(UpdateFacts::default());
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
            vitals,
            phase,
            offers: offering,
            served,
            orders,
            newer,
            known: None,
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

    fn report(&self, outcome: &Result<Followed, Hitch>) {
        match outcome {
            // Said when it happened, and visible since.
            Ok(_) | Err(Hitch::Refused(..) | Hitch::Later(_)) => {}
            Err(hitch) => {
                self.vitals.error("update_failed", &hitch.to_string());
                tracing::error!(error = %hitch, "not updated; the version before is served");
            }
        }
        let mut facts = self.vitals.facts();
        if let Some(update) = &mut facts.update {
            update.looked_at_ms = Some(unix_ms());
            update.failure = outcome.as_ref().err().map(ToString::to_string);
            (update.bytes_here, update.bytes_wanted) = (0, 0);
        }
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
    async fn look(&mut self, asked: bool) -> Result<Followed, Hitch> {
        self.read_manifest().await?;
        let Some(served) = self.served.borrow().clone() else {
            return Err(Hitch::Away("no model is loaded yet"));
        };
        let Some(known) = &self.known else {
            return Err(Hitch::Away("no manifest was read yet"));
        };
        let (live, sha256) = (known.manifest.live_version, known.sha256.clone());
        self.note_live(live, &served);
        if served.package.manifest.version == live {
            return Ok(Followed::Already(live));
        }
        let refused = served.state.refused();
        let again = |r: &Refused| r.version == live && r.manifest_sha256 == sha256;
        if let Some(refused) = refused.filter(again) {
            return Err(Hitch::Refused(live, refused.why));
        }
        let failed = known
            .failed
            .as_ref()
            .filter(|f| !asked && Instant::now() < f.again_at);
        if let Some(failed) = failed {
            return Err(Hitch::Later(failed.why.clone()));
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

    fn note_live(&self, live: u64, served: &Served) {
        let refused = served.state.refused().map(|refused| RefusedVersion {
            version: refused.version,
            why: refused.why,
            at_ms: refused.at_ms,
        });
        if let Some(update) = &mut self.vitals.facts().update {
            update.live_version = Some(live);
            update.refused = refused;
        }
    }

    /// Reads the manifest, if it has changed.
    async fn read_manifest(&mut self) -> Result<(), Hitch> {
        let hitch = |why: String| Hitch::Manifest(why);
        let revision = self
            .known
            .as_ref()
            .and_then(|known| known.revision.as_ref());
        let published = self.mirrors.manifest(revision).await;
        let Some(Published { bytes, revision }) = published.map_err(|e| hitch(e.to_string()))?
        else {
            return Ok(());
        };
        let sha256 = hex::encode(Sha256::digest(&bytes));
        if let Some(known) = self.known.as_mut().filter(|known| known.sha256 == sha256) {
            known.revision = revision;
            return Ok(());
        }
        if let Some(key) = &self.key {
            let signature = self.mirrors.signature().await;
            let signature = signature.map_err(|e| hitch(format!("no signature: {e}")))?;
            key.verify(&bytes, &signature).map_err(hitch)?;
        }
        let manifest = manifest::decode(&bytes).map_err(hitch)?;
        if manifest.name != self.model {
            let (name, model) = (&manifest.name, &self.model);
            return Err(hitch(format!(
                "it is for model {name:?}, this worker serves {model:?}"
            )));
        }
        tracing::info!(
            live_version = manifest.live_version,
            "a new update manifest"
        );
        self.known = Some(Known {
            manifest,
            sha256,
            revision,
            unfit: BTreeSet::new(),
            failed: None,
        });
        Ok(())
    }

    /// Gets the live version, leaving out what is known not to be of use.
    async fn prepare(
        &mut self,
        served: &Served,
    ) -> Result<(Arc<Package>, Option<WeightsFile>), Hitch> {
        let Some(known) = &mut self.known else {
            return Err(Hitch::Away("no manifest was read yet"));
        };
        let preparation = Preparation {
            mirrors: &self.mirrors,
            vitals: &self.vitals,
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
    ) -> Result<Followed, Hitch> {
        let version = package.manifest.version;
        let turn = match self.config.model.update_stagger {
            true => Turn::wait(&self.store, &self.holder).await,
            false => None,
        };
        let (settled, outcome) = oneshot::channel();
        let offer = Offer {
            package,
            weights,
            settled,
        };
        let gone = Hitch::Away("the worker has other things to do; it looks again");
        if self.offers.send(offer).await.is_err() {
            return Err(gone);
        }
        let Ok(outcome) = outcome.await else {
            return Err(gone);
        };
        let refused = outcome.as_ref().err().map(|error| Refused {
            version,
            why: error.to_string(),
            at_ms: unix_ms(),
            manifest_sha256,
        });
        if let Err(error) = served.state.refuse(refused) {
            tracing::error!(%error, "what was tried cannot be remembered");
        }
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
            Err(error) => Err(Hitch::Unproven(version, error.to_string())),
        }
    }
}

fn answer(order: Order, outcome: &Result<Followed, Hitch>) {
    match outcome {
        Ok(Followed::Already(version)) => {
            order.done(format!("version {version} is live and served already"));
        }
        Ok(Followed::Updated(version)) => order.done(format!("version {version} is served")),
        Err(hitch @ (Hitch::Refused(..) | Hitch::Away(_))) => order.refuse(hitch.to_string()),
        Err(
            hitch @ (Hitch::Manifest(_)
            | Hitch::Later(_)
            | Hitch::NoWay(_)
            | Hitch::Disk(_)
            | Hitch::Unproven(..)),
        ) => order.fail(hitch.to_string()),
    }
}
