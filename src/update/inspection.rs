//! A manifest looked at as a worker would that serves the package, without a worker: `scorer manifest check`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::build::{self, BuildError, build};
use super::download::{DownloadError, Mirrors};
use super::prepare::{BlockedFiles, no_route, unusable};
use super::route::{Route, Step, cheapest};
use tempfile::TempDir;

use crate::model::package::Package;
use crate::protocol::update_manifest::UpdateManifest;

/// A manifest, the package it is for, and what was found of its files.
#[derive(Debug)]
pub struct Inspection<'a> {
    mirrors: &'a Mirrors,
    manifest: &'a UpdateManifest,
    package: Arc<Package>,
    /// Where files are meanwhile.
    folder: PathBuf,
    blocked: BlockedFiles,
    /// Digests of files that some mirror has.
    sound: BTreeSet<String>,
}

impl<'a> Inspection<'a> {
    /// Nothing is fetched yet.
    pub fn new(
        mirrors: &'a Mirrors,
        manifest: &'a UpdateManifest,
        package: Arc<Package>,
        folder: &Path,
    ) -> Self {
        Self {
            mirrors,
            manifest,
            package,
            folder: folder.to_owned(),
            blocked: BlockedFiles::new(),
            sound: BTreeSet::new(),
        }
    }

    /// Fetches a step's file from each of its mirrors, and checks that it is what the manifest says and that a worker
    /// could use it. Returns what is wrong with each, if anything is.
    pub async fn look_at(&mut self, step: Step<'_>) -> Vec<Option<String>> {
        let mut wrong = Vec::new();
        for url in step.urls() {
            wrong.push(self.mirror(step, url).await.err());
        }
        let sha256 = step.sha256().to_owned();
        match wrong.first() {
            Some(Some(why)) if wrong.iter().all(Option::is_some) => {
                // Another entry may say where the same file is.
                if !self.sound.contains(&sha256) {
                    self.blocked.insert(sha256, why.clone());
                }
            }
            Some(_) | None => {
                self.blocked.remove(&sha256);
                self.sound.insert(sha256);
            }
        }
        wrong
    }

    async fn mirror(&self, step: Step<'_>, url: &String) -> Result<(), String> {
        // A folder of its own: nothing that another mirror sent is left in it.
        let folder = tempfile::tempdir_in(&self.folder).map_err(|e| e.to_string())?;
        let part = folder.path().join("file");
        let fetched = self
            .mirrors
            .fetch(step, std::slice::from_ref(url), &part, |_| {});
        fetched.await.map_err(|e| e.to_string())?;
        // Reads and decodes: not on a thread that others wait for.
        tokio::task::block_in_place(|| match self.passed_over(step) {
            None => build::check(&self.package, step, &part),
            Some(_) => Ok(()),
        })
    }

    /// Why workers with this package pass a step over whose files are sound, if they do.
    pub fn passed_over(&self, step: Step<'_>) -> Option<String> {
        unusable(step, self.graph(), &BlockedFiles::new())
    }

    /// The package that versions are for.
    pub fn package(&self) -> &Arc<Package> {
        &self.package
    }

    fn graph(&self) -> &str {
        &self.package.manifest.graph.sha256
    }

    /// The route of a worker that has nothing but the package.
    ///
    /// # Errors
    /// Why there is none.
    pub fn route(&self) -> Result<Route<'a>, String> {
        let own = [self.package.manifest.version];
        self.cheapest(self.manifest.live_version)
            .ok_or_else(|| no_route(self.manifest, &own, self.graph(), &self.blocked))
    }

    /// The route that ends with this step; none if the package's version does not lead there.
    pub fn route_by(&self, last: Step<'a>) -> Option<Route<'a>> {
        if unusable(last, self.graph(), &self.blocked).is_some() {
            return None;
        }
        match last {
            Step::Full(_) => Some(Route {
                from: None,
                steps: vec![last],
            }),
            Step::Delta(delta) => {
                let mut route = self.cheapest(delta.from)?;
                route.steps.push(last);
                Some(route)
            }
        }
    }

    fn cheapest(&self, to: u64) -> Option<Route<'a>> {
        let usable = |step: Step<'_>| unusable(step, self.graph(), &self.blocked).is_none();
        let own = [self.package.manifest.version];
        cheapest(self.manifest, to, &own, |step| {
            usable(step).then(|| step.size())
        })
    }

    /// The model at the end of a route.
    ///
    /// # Errors
    /// What is wrong with its files, or with the disk.
    pub async fn follow(&mut self, route: &Route<'_>) -> Result<Reached, Unreached> {
        let Some(last) = route.steps.last() else {
            return Ok(Reached {
                package: Arc::clone(&self.package),
                _folder: None,
            });
        };
        let disk = |e: std::io::Error| Unreached::Disk(e.to_string());
        let folder = tempfile::tempdir_in(&self.folder).map_err(disk)?;
        let mut files = Vec::new();
        for step in &route.steps {
            let part = folder.path().join(files.len().to_string());
            let fetched = self.mirrors.fetch(*step, step.urls(), &part, |_| {}).await;
            fetched.map_err(|error| match error {
                DownloadError::Disk(error) => disk(error),
                DownloadError::Mirrors(_) => self.block(step.sha256(), error.to_string()),
            })?;
            files.push((*step, part));
        }
        let base = route.from.map(|_| &*self.package);
        let out = folder.path().join("weights");
        let built = tokio::task::block_in_place(|| build(&self.package, base, &files, &out));
        built.map_err(|error| match error {
            BuildError::Disk { error, .. } => disk(error),
            BuildError::Unfit { sha256, why } => self.block(&sha256, why),
        })?;
        let made = tokio::task::block_in_place(|| {
            self.package
                .with_new_weights(self.manifest.live_version, out, last.canary())
        });
        let (package, _) = made.map_err(|e| Unreached::Disk(e.to_string()))?;
        Ok(Reached {
            package: Arc::new(package),
            _folder: Some(folder),
        })
    }

    fn block(&mut self, sha256: &str, why: String) -> Unreached {
        self.blocked.insert(sha256.to_owned(), why.clone());
        Unreached::File(why)
    }
}

/// The model at the end of a route.
#[derive(Debug)]
pub struct Reached {
    /// With the weights of the live version.
    pub package: Arc<Package>,
    /// Where they are.
    _folder: Option<TempDir>,
}

/// Why a route does not lead to its end.
#[derive(Debug)]
pub enum Unreached {
    /// A file cannot be fetched or used. No route goes over it any more.
    File(String),
    /// The disk fails.
    Disk(String),
}
