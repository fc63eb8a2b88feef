//! From a manifest to new weights: the cheapest way is gone; where something on it is wrong, the
//! next one is.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::build::{BuildError, build};
use super::download::{DownloadError, Mirrors, News, is_full};
use super::route::{Step, Way, cheapest};
use super::{Served, UpdateError};
use crate::model::manifest::PackageError;
use crate::model::package::{Package, WeightsFile};
use crate::protocol::update_manifest::UpdateManifest;
use crate::telemetry::status::WorkerStatus;

/// New weights, and where they are; none for the package's own.
type Made = (Arc<Package>, Option<WeightsFile>);

/// Files that close the ways they are on, by digest, and what is wrong with them.
pub(super) type Obstacles = BTreeMap<String, String>;

/// Obstacles that a message names.
const MOST_NAMED: usize = 4;

/// What it takes to get a version.
pub(super) struct Preparation<'a> {
    pub(super) mirrors: &'a Mirrors,
    pub(super) status: &'a WorkerStatus,
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

/// What stands in the way of a step, for a package with this graph.
fn obstacle(step: Step<'_>, graph: &str, closed: &Obstacles) -> Option<String> {
    if let Step::Full(full) = step
        && full.graph_sha256 != graph
    {
        let (version, theirs) = (full.version, &full.graph_sha256);
        return Some(format!(
            "the weights of version {version} are for the graph {theirs}, and the package's is {graph}"
        ));
    }
    closed.get(step.sha256()).cloned()
}

/// Why no way leads to the live version: what stands in the way, if anything does.
fn no_way(manifest: &UpdateManifest, here: &[u64], graph: &str, closed: &Obstacles) -> String {
    let live = manifest.live_version;
    let here: Vec<String> = here.iter().map(u64::to_string).collect();
    let here = here.join(", ");
    let full = manifest.full.iter().map(Step::Full);
    let steps = full.chain(manifest.updates.iter().map(Step::Delta));
    let obstacles: Vec<String> = steps
        .filter_map(|step| obstacle(step, graph, closed))
        .collect();
    if obstacles.is_empty() {
        return format!("the manifest shows no way from version {here} to {live}");
    }
    let more = match obstacles.len().saturating_sub(MOST_NAMED) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    let named = obstacles[..obstacles.len().min(MOST_NAMED)].join("; ");
    format!("no way from version {here} to {live} is open: {named}{more}")
}

impl Preparation<'_> {
    /// Gets the live version. Files that turn out to be of no use are added to `unfit`, with what is
    /// wrong with them: they close the same ways at every later try.
    pub(super) async fn run(&self, unfit: &mut Obstacles) -> Result<Made, UpdateError> {
        let state = &self.served.state;
        state.sweep_parts(|digest| self.names(digest));
        let mut closed = unfit.clone();
        loop {
            let here = self.here();
            let versions: Vec<u64> = here.keys().copied().collect();
            let graph = &self.served.package.manifest.graph.sha256;
            let usable = |step: Step<'_>| obstacle(step, graph, &closed).is_none();
            let price = |step| Some(self.missing(step)).filter(|_| usable(step));
            let Some(way) = cheapest(self.manifest, &versions, price) else {
                return Err(UpdateError::NoWay(no_way(
                    self.manifest,
                    &versions,
                    graph,
                    &closed,
                )));
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
                        unfit.insert(sha256.clone(), why.clone());
                    }
                    closed.insert(sha256, why);
                }
                Err(Obstacle::Disk(error, _)) if is_full(&error) && state.make_room() => {}
                Err(Obstacle::Disk(error, path)) => {
                    return Err(UpdateError::Disk(format!("{}: {error}", path.display())));
                }
                Err(Obstacle::Base(error)) => return Err(UpdateError::Base(error.to_string())),
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
        if let Some(update) = &mut self.status.facts().update {
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
            if let Some(update) = &mut self.status.facts().update {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::update_manifest::decode;

    fn manifest(full: &[(u64, &str)], deltas: &[(u64, u64)]) -> UpdateManifest {
        let digest = |begin: String| format!("{begin:0<64}");
        let full = full.iter().map(|(version, graph)| {
            serde_json::json!({
                "version": version, "urls": ["x"], "size": 1,
                "sha256": digest(version.to_string()), "graph_sha256": digest((*graph).into()),
            })
        });
        let updates = deltas.iter().map(|(from, to)| {
            serde_json::json!({
                "from": from, "to": to, "urls": ["x"], "size": 1, "format": "binary_v2",
                "sha256": digest(format!("{from}{to}")),
            })
        });
        let document = serde_json::json!({
            "v": 1, "name": "tiny", "live_version": 9,
            "full": full.collect::<Vec<_>>(), "updates": updates.collect::<Vec<_>>(),
        });
        decode(document.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn why_no_way_is_open_names_what_closes_each() {
        let graph = format!("{:0<64}", "aa");
        let closed = |digests: &[&str]| -> Obstacles {
            let closed = digests.iter();
            closed
                .map(|d| (format!("{d:0<64}"), format!("{d} is bad")))
                .collect()
        };
        let why = |manifest: &UpdateManifest, digests: &[&str]| {
            no_way(manifest, &[7], &graph, &closed(digests))
        };
        let none = "the manifest shows no way from version 7 to 9";
        assert_eq!(why(&manifest(&[], &[(8, 9)]), &[]), none);
        // What is not in this manifest any more says nothing of it.
        assert_eq!(why(&manifest(&[], &[(8, 9)]), &["5"]), none);
        let both = manifest(&[(9, "aa")], &[(7, 9)]);
        let open = "no way from version 7 to 9 is open: ";
        assert_eq!(
            why(&both, &["9", "79"]),
            format!("{open}9 is bad; 79 is bad")
        );
        let foreign = why(&manifest(&[(9, "bb")], &[]), &[]);
        assert!(foreign.contains("are for the graph bb0"), "{foreign}");
        let many = why(&manifest(&[(9, "bb"); 10], &[]), &[]);
        assert!(many.ends_with("; and 6 more"), "{many}");
    }
}
