//! From a manifest to new weights: the cheapest way is gone; where something on it is wrong, the
//! next one is.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use super::build::{BuildError, build};
use super::download::{DownloadError, Mirrors, News, is_full};
use super::manifest::UpdateManifest;
use super::route::{Step, Way, cheapest};
use super::{Hitch, Served};
use crate::heartbeat::Vitals;
use crate::package::{Package, PackageError, WeightsFile};

/// New weights, and where they are; none for the package's own.
type Made = (Arc<Package>, Option<WeightsFile>);

/// What it takes to get a version.
pub(super) struct Preparation<'a> {
    pub(super) mirrors: &'a Mirrors,
    pub(super) vitals: &'a Vitals,
    pub(super) served: &'a Served,
    pub(super) manifest: &'a UpdateManifest,
    /// See `model.allow_shards_subset`.
    pub(super) subset: bool,
}

/// Where weights are that need not be fetched.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Local {
    /// Mapped, and served.
    Served,
    /// In the worker's folder.
    Kept,
    /// In the package, which is read again.
    Package,
}

/// What closes a way.
enum Obstacle {
    /// A file cannot be had, or is of no use: another way may do without it.
    File {
        sha256: String,
        why: String,
        for_good: bool,
    },
    /// The worker's folder cannot take it.
    Disk(std::io::Error, PathBuf),
    /// What is here is not what it was.
    Base(PackageError),
}

impl Preparation<'_> {
    /// Gets the live version. Files that turn out to be of no use are added to `unfit`.
    pub(super) async fn run(&self, unfit: &mut BTreeSet<String>) -> Result<Made, Hitch> {
        let state = &self.served.state;
        state.sweep_parts(|digest| self.names(digest));
        let mut out_of_reach = unfit.clone();
        let mut reasons = Vec::new();
        loop {
            let here = self.here();
            let versions: Vec<u64> = here.keys().copied().collect();
            let usable = |step: Step<'_>| !out_of_reach.contains(step.sha256());
            let price = |step| Some(self.missing(step)).filter(|_| self.fits(step) && usable(step));
            let Some(way) = cheapest(self.manifest, &versions, price) else {
                return Err(self.no_way(&versions, &reasons));
            };
            match self.walk(&way, &here).await {
                Ok(made) => return Ok(made),
                Err(Obstacle::File {
                    sha256,
                    why,
                    for_good,
                }) => {
                    tracing::warn!(
                        why,
                        "a way to the live version is closed; looking for another"
                    );
                    if for_good {
                        unfit.insert(sha256.clone());
                    }
                    out_of_reach.insert(sha256);
                    reasons.push(why);
                }
                Err(Obstacle::Disk(error, _)) if is_full(&error) && state.make_room() => {}
                Err(Obstacle::Disk(error, path)) => {
                    return Err(Hitch::Disk(format!("{}: {error}", path.display())));
                }
                Err(Obstacle::Base(error)) => return Err(Hitch::Disk(error.to_string())),
            }
        }
    }

    /// The versions that are here, each in the place where it is cheapest to read.
    fn here(&self) -> BTreeMap<u64, Local> {
        let package = &self.served.package;
        let own = Package::read_manifest(&package.dir).ok();
        let own = own.map(|(manifest, _)| (manifest.version, Local::Package));
        let kept = self.served.state.previous();
        let kept = kept.map(|kept| (kept.version, Local::Kept));
        let served = (package.manifest.version, Local::Served);
        own.into_iter().chain(kept).chain([served]).collect()
    }

    fn open(&self, local: Local) -> Result<Made, PackageError> {
        let package = &self.served.package;
        let kept = self.served.state.previous();
        match (local, kept) {
            (Local::Kept, Some(file)) => Ok((Arc::new(package.with_weights(&file)?), Some(file))),
            (Local::Package, _) => {
                let own = Package::load(&package.dir, self.subset, &[])?;
                if own.root == package.root {
                    return Ok((Arc::new(own), None));
                }
                let dir = package.dir.display();
                Err(PackageError(format!(
                    "{dir}: is another package now; reload it"
                )))
            }
            (Local::Served | Local::Kept, _) => Ok((Arc::clone(package), None)),
        }
    }

    fn fits(&self, step: Step<'_>) -> bool {
        match step {
            Step::Full(full) => full.graph_sha256 == self.served.package.manifest.graph.sha256,
            Step::Delta(_) => true,
        }
    }

    /// Bytes of a file that are still to come.
    fn missing(&self, step: Step<'_>) -> u64 {
        let part = std::fs::metadata(self.served.state.part(step.sha256()));
        step.size()
            .saturating_sub(part.map_or(0, |part| part.len()))
    }

    fn names(&self, digest: &str) -> bool {
        let full = self.manifest.full.iter().map(|full| &full.sha256);
        let deltas = self.manifest.updates.iter().map(|delta| &delta.sha256);
        full.chain(deltas).any(|sha256| sha256 == digest)
    }

    fn no_way(&self, here: &[u64], reasons: &[String]) -> Hitch {
        let live = self.manifest.live_version;
        let here: Vec<String> = here.iter().map(u64::to_string).collect();
        let here = here.join(", ");
        Hitch::NoWay(match reasons {
            [] => format!("the manifest shows no way from version {here} to {live}"),
            reasons => format!(
                "no way from version {here} to {live} is open: {}",
                reasons.join("; ")
            ),
        })
    }

    /// Goes one way: gets its files, then makes the weights at its end.
    async fn walk(&self, way: &Way<'_>, here: &BTreeMap<u64, Local>) -> Result<Made, Obstacle> {
        let bytes: u64 = way.steps.iter().map(|step| self.missing(*step)).sum();
        let version = self.manifest.live_version;
        tracing::info!(
            version,
            from = way.from,
            files = way.steps.len(),
            bytes,
            "getting a new version"
        );
        if let Some(update) = &mut self.vitals.facts().update {
            (update.bytes_here, update.bytes_wanted) = (0, bytes);
        }
        for step in &way.steps {
            self.fetch(*step).await?;
        }
        let local = way.from.and_then(|from| here.get(&from).copied());
        // Reads, decodes, writes and hashes: not for long on a thread that others wait for.
        tokio::task::block_in_place(|| self.make(local, &way.steps))
    }

    async fn fetch(&self, step: Step<'_>) -> Result<(), Obstacle> {
        let told = |news| {
            if let Some(update) = &mut self.vitals.facts().update {
                match news {
                    News::Came(bytes) => update.bytes_here += bytes,
                    News::Again(bytes) => update.bytes_wanted += bytes,
                }
            }
        };
        let part = self.served.state.part(step.sha256());
        let fetched = self.mirrors.fetch(step, &part, told).await;
        fetched.map_err(|error| match error {
            DownloadError::Disk(error) => Obstacle::Disk(error, part),
            DownloadError::Mirrors(_) => Obstacle::File {
                sha256: step.sha256().to_owned(),
                why: error.to_string(),
                for_good: false,
            },
        })
    }

    fn make(&self, local: Option<Local>, steps: &[Step<'_>]) -> Result<Made, Obstacle> {
        let local = local.map(|local| self.open(local)).transpose();
        let local = local.map_err(Obstacle::Base)?;
        let (state, version) = (&self.served.state, self.manifest.live_version);
        let Some(last) = steps.last() else {
            let lost = || PackageError(format!("version {version} is not here any more"));
            return local.ok_or_else(|| Obstacle::Base(lost()));
        };
        let out = state.new_file(version);
        let files: Vec<_> = steps
            .iter()
            .map(|step| (*step, state.part(step.sha256())))
            .collect();
        let base = local.as_ref().map(|(package, _)| &**package);
        let model = &self.served.package;
        let built = build(model, base, &files, &out).map_err(|error| match error {
            BuildError::Disk { path, error } => Obstacle::Disk(error, path),
            BuildError::Unfit { sha256, why } => Obstacle::File {
                sha256,
                why,
                for_good: true,
            },
        });
        let made = built.and_then(|()| {
            let opened = model.with_new_weights(version, out.clone(), last.canary());
            opened.map_err(Obstacle::Base)
        });
        match made {
            Ok((package, file)) => Ok((Arc::new(package), Some(file))),
            Err(obstacle) => {
                // Half of something is of no use; what cannot be deleted now is swept later.
                drop(std::fs::remove_file(&out));
                Err(obstacle)
            }
        }
    }
}
