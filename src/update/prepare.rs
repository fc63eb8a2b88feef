//! From a manifest to new weights, over the cheapest route; if something on it is wrong, over the next
//! one.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::Served;
use super::build::{BuildError, build};
use super::download::{DownloadError, Mirrors, Progress, is_full};
use super::outcome::UpdateError;
use super::route::{Route, Step, cheapest};
use crate::model::manifest::PackageError;
use crate::model::package::{Package, WeightsFile};
use crate::protocol::update_manifest::UpdateManifest;
use crate::telemetry::status::WorkerStatus;

/// New weights, and where they are; none for the package's own.
pub(super) type NewWeights = (Arc<Package>, Option<WeightsFile>);

/// Files that block the routes that they are on, by digest, and what is wrong with them.
pub(super) type BlockedFiles = BTreeMap<String, String>;

/// Reasons that a message names, at most.
const MOST_NAMED: usize = 4;

/// What is needed to get a version.
pub(super) struct Preparation<'a> {
    pub(super) mirrors: &'a Mirrors,
    pub(super) status: &'a WorkerStatus,
    pub(super) served: &'a Served,
    pub(super) manifest: &'a UpdateManifest,
    /// See `model.allow_shards_subset`.
    pub(super) subset: bool,
}

/// Where weights are that need not be downloaded.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Local {
    /// Served, and mapped into memory.
    Served,
    /// In the worker's folder.
    Kept,
    /// In the package, which is read again.
    Package,
}

/// What blocks a route.
enum RouteBlocked {
    /// A file cannot be downloaded or used: another route may do without it.
    File {
        sha256: String,
        why: String,
        /// Later attempts need not try it again.
        for_good: bool,
    },
    /// The worker's folder cannot be written.
    Disk(std::io::Error, PathBuf),
    /// The weights to start from have changed.
    Base(PackageError),
}

/// Why a step cannot be used for a package with this graph, if it cannot.
pub(super) fn unusable(step: Step<'_>, graph: &str, blocked: &BlockedFiles) -> Option<String> {
    if let Step::Full(full) = step
        && full.graph_sha256 != graph
    {
        let (version, theirs, ours) = (full.version, begin(&full.graph_sha256), begin(graph));
        return Some(format!(
            "the weights of version {version} are for another graph ({theirs}) than the package's ({ours})"
        ));
    }
    blocked.get(step.sha256()).cloned()
}

/// As much of a digest as tells it from others.
fn begin(digest: &str) -> &str {
    const SHOWN: usize = 12;
    digest.get(..SHOWN).unwrap_or(digest)
}

/// Why no route leads to the live version: what is wrong with its files, or that there is none.
pub(super) fn no_route(
    manifest: &UpdateManifest,
    local: &[u64],
    graph: &str,
    blocked: &BlockedFiles,
) -> String {
    let live = manifest.live_version;
    let local: Vec<String> = local.iter().map(u64::to_string).collect();
    let local = local.join(", ");
    // What would have led to it at once comes first.
    let mut steps: Vec<Step<'_>> = Step::all(manifest).collect();
    steps.sort_by_key(|step| step.to() != live);
    let mut reasons: Vec<String> = Vec::new();
    for why in steps
        .into_iter()
        .filter_map(|step| unusable(step, graph, blocked))
    {
        if !reasons.contains(&why) {
            reasons.push(why);
        }
    }
    if reasons.is_empty() {
        return format!("the manifest has no route from version {local} to {live}");
    }
    let more = match reasons.len().saturating_sub(MOST_NAMED) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    let named = reasons[..reasons.len().min(MOST_NAMED)].join("; ");
    // The reasons come first: what shows this may cut its end.
    format!("{named}{more}; so there is no usable route from version {local} to {live}")
}

impl Preparation<'_> {
    /// Gets the live version. Files with the wrong content are added to `unfit`, and block the same
    /// routes at every later attempt.
    pub(super) async fn run(&self, unfit: &mut BlockedFiles) -> Result<NewWeights, UpdateError> {
        let state = &self.served.state;
        state.sweep_parts(|digest| self.names(digest));
        let mut blocked = unfit.clone();
        loop {
            let local = self.local();
            let route = self.route(&local, &blocked)?;
            match self.follow(&route, &local).await {
                Ok(new) => return Ok(new),
                Err(RouteBlocked::File {
                    sha256,
                    why,
                    for_good,
                }) => {
                    tracing::warn!(
                        why,
                        "a route to the live version is blocked; looking for another"
                    );
                    if for_good {
                        unfit.insert(sha256.clone(), why.clone());
                    }
                    blocked.insert(sha256, why);
                }
                Err(RouteBlocked::Disk(error, _)) if is_full(&error) && state.make_room() => {}
                Err(RouteBlocked::Disk(error, path)) => {
                    return Err(UpdateError::Disk(format!("{}: {error}", path.display())));
                }
                Err(RouteBlocked::Base(error)) => return Err(UpdateError::Base(error.to_string())),
            }
        }
    }

    fn route(
        &self,
        local: &BTreeMap<u64, Local>,
        blocked: &BlockedFiles,
    ) -> Result<Route<'_>, UpdateError> {
        let versions: Vec<u64> = local.keys().copied().collect();
        let graph = &self.served.package.manifest.graph.sha256;
        let usable = |step: Step<'_>| unusable(step, graph, blocked).is_none();
        let price = |step| Some(self.missing(step)).filter(|_| usable(step));
        cheapest(self.manifest, self.manifest.live_version, &versions, price)
            .ok_or_else(|| UpdateError::NoRoute(no_route(self.manifest, &versions, graph, blocked)))
    }

    /// The local versions, each where it is cheapest to read.
    fn local(&self) -> BTreeMap<u64, Local> {
        let package = &self.served.package;
        let own = Package::read_manifest(&package.dir).ok();
        let own = own.map(|(manifest, _)| (manifest.version, Local::Package));
        let kept = self.served.state.previous();
        let kept = kept.map(|kept| (kept.version, Local::Kept));
        let served = (package.manifest.version, Local::Served);
        own.into_iter().chain(kept).chain([served]).collect()
    }

    fn open(&self, local: Local) -> Result<NewWeights, PackageError> {
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
                    "{dir}: the package was replaced; reload it"
                )))
            }
            (Local::Served | Local::Kept, _) => Ok((Arc::clone(package), None)),
        }
    }

    /// Bytes of a file that are not downloaded yet.
    fn missing(&self, step: Step<'_>) -> u64 {
        let part = std::fs::metadata(self.served.state.part(step.sha256()));
        step.size()
            .saturating_sub(part.map_or(0, |part| part.len()))
    }

    fn names(&self, digest: &str) -> bool {
        Step::all(self.manifest).any(|step| step.sha256() == digest)
    }

    /// Downloads the files of a route, then makes the weights at its end.
    async fn follow(
        &self,
        route: &Route<'_>,
        local: &BTreeMap<u64, Local>,
    ) -> Result<NewWeights, RouteBlocked> {
        let bytes: u64 = route.steps.iter().map(|step| self.missing(*step)).sum();
        let version = self.manifest.live_version;
        tracing::info!(
            version,
            from = route.from,
            files = route.steps.len(),
            bytes,
            "downloading a new version"
        );
        if let Some(update) = &mut self.status.facts().update {
            (update.bytes_here, update.bytes_wanted) = (0, bytes);
        }
        for step in &route.steps {
            self.fetch(*step).await?;
        }
        let local = route.from.and_then(|from| local.get(&from).copied());
        // Reads, decodes, writes and hashes: not on a thread that others wait for.
        tokio::task::block_in_place(|| self.make(local, &route.steps))
    }

    async fn fetch(&self, step: Step<'_>) -> Result<(), RouteBlocked> {
        let report = |progress| {
            if let Some(update) = &mut self.status.facts().update {
                match progress {
                    Progress::Received(bytes) => update.bytes_here += bytes,
                    Progress::Discarded(bytes) => update.bytes_wanted += bytes,
                }
            }
        };
        let part = self.served.state.part(step.sha256());
        let fetched = self.mirrors.fetch(step, step.urls(), &part, report).await;
        fetched.map_err(|error| match error {
            DownloadError::Disk(error) => RouteBlocked::Disk(error, part),
            DownloadError::Mirrors(_) => RouteBlocked::File {
                sha256: step.sha256().to_owned(),
                why: error.to_string(),
                for_good: false,
            },
        })
    }

    fn make(&self, local: Option<Local>, steps: &[Step<'_>]) -> Result<NewWeights, RouteBlocked> {
        let local = local.map(|local| self.open(local)).transpose();
        let local = local.map_err(RouteBlocked::Base)?;
        let (state, version) = (&self.served.state, self.manifest.live_version);
        let Some(last) = steps.last() else {
            let lost = || {
                PackageError(format!(
                    "version {version} is no longer in the worker's folder"
                ))
            };
            return local.ok_or_else(|| RouteBlocked::Base(lost()));
        };
        let out = state.new_file(version);
        let files: Vec<_> = steps
            .iter()
            .map(|step| (*step, state.part(step.sha256())))
            .collect();
        let base = local.as_ref().map(|(package, _)| &**package);
        let model = &self.served.package;
        let built = build(model, base, &files, &out).map_err(|error| match error {
            BuildError::Disk { path, error } => RouteBlocked::Disk(error, path),
            BuildError::Unfit { sha256, why } => RouteBlocked::File {
                sha256,
                why,
                for_good: true,
            },
        });
        let made = built.and_then(|()| {
            let opened = model.with_new_weights(version, out.clone(), last.canary());
            opened.map_err(RouteBlocked::Base)
        });
        match made {
            Ok((package, file)) => Ok((Arc::new(package), Some(file))),
            Err(blocked) => {
                // Incomplete weights are useless. If they cannot be deleted now, a later sweep does it.
                drop(std::fs::remove_file(&out));
                Err(blocked)
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
    fn no_route_names_what_blocks_each() {
        let graph = format!("{:0<64}", "aa");
        let blocked = |digests: &[&str]| -> BlockedFiles {
            let blocked = digests.iter();
            blocked
                .map(|d| (format!("{d:0<64}"), format!("{d} is bad")))
                .collect()
        };
        let why = |manifest: &UpdateManifest, digests: &[&str]| {
            no_route(manifest, &[7], &graph, &blocked(digests))
        };
        let none = "the manifest has no route from version 7 to 9";
        assert_eq!(why(&manifest(&[], &[(8, 9)]), &[]), none);
        // A file that the manifest no longer names is no reason.
        assert_eq!(why(&manifest(&[], &[(8, 9)]), &["5"]), none);
        let both = manifest(&[(9, "aa")], &[(7, 9)]);
        let unusable = "; so there is no usable route from version 7 to 9";
        assert_eq!(
            why(&both, &["9", "79"]),
            format!("9 is bad; 79 is bad{unusable}")
        );
        let foreign = "the weights of version 9 are for another graph (bb0000000000) than the package's (aa0000000000)";
        let older = manifest(&[(6, "bb"), (9, "bb")], &[]);
        let said = why(&older, &[]);
        assert!(
            said.starts_with(&format!("{foreign}; the weights of version 6 ")),
            "{said}"
        );
        assert!(said.ends_with(unusable), "{said}");
        let others: Vec<(u64, &str)> = (0..10).map(|version| (version, "bb")).collect();
        let many = why(&manifest(&others, &[]), &[]);
        assert!(many.ends_with(&format!("; and 6 more{unusable}")), "{many}");
        // The same is said once.
        let twice = why(&manifest(&[(9, "bb"); 2], &[]), &[]);
        assert_eq!(twice, format!("{foreign}{unusable}"));
    }
}
