//! A manifest looked at as a worker would that serves the package, without a worker: `scorer manifest check`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::build::{self, build};
use super::download::Mirrors;
use super::prepare::{BlockedFiles, no_route, unusable};
use super::route::{Route, Step, cheapest};
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
        }
    }

    /// Fetches a step's file from each of its mirrors, and checks that it is what the manifest says and that a worker
    /// could use it. Returns what is wrong with each, if anything is.
    pub async fn look_at(&mut self, step: Step<'_>) -> Vec<Option<String>> {
        let mut wrong = Vec::new();
        for url in step.urls() {
            wrong.push(self.mirror(step, url).await.err());
        }
        if wrong.iter().all(Option::is_some)
            && let Some(Some(why)) = wrong.first()
        {
            self.blocked.insert(step.sha256().to_owned(), why.clone());
        }
        wrong
    }

    async fn mirror(&self, step: Step<'_>, url: &String) -> Result<(), String> {
        let part = self.folder.join("looked-at");
        let fetched = self
            .mirrors
            .fetch(step, std::slice::from_ref(url), &part, |_| {});
        fetched.await.map_err(|e| e.to_string())?;
        // Reads and decodes: not on a thread that others wait for.
        let fits = tokio::task::block_in_place(|| match self.passed_over(step) {
            None => build::check(&self.package, step, &part),
            Some(_) => Ok(()),
        });
        std::fs::remove_file(&part).map_err(|e| format!("{}: {e}", part.display()))?;
        fits
    }

    /// Why workers with this package pass a step over whose files are sound, if they do.
    pub fn passed_over(&self, step: Step<'_>) -> Option<String> {
        unusable(step, self.graph(), &BlockedFiles::new())
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
        let usable = |step: Step<'_>| unusable(step, self.graph(), &self.blocked).is_none();
        cheapest(self.manifest, &own, |step| {
            usable(step).then(|| step.size())
        })
        .ok_or_else(|| no_route(self.manifest, &own, self.graph(), &self.blocked))
    }

    /// The model at the end of a route.
    ///
    /// # Errors
    /// What is wrong with its files, or with the disk.
    pub async fn follow(&self, route: &Route<'_>) -> Result<Arc<Package>, String> {
        let Some(last) = route.steps.last() else {
            return Ok(Arc::clone(&self.package));
        };
        let mut files = Vec::new();
        for step in &route.steps {
            let part = self.folder.join(step.sha256());
            let fetched = self.mirrors.fetch(*step, step.urls(), &part, |_| {});
            fetched.await.map_err(|e| e.to_string())?;
            files.push((*step, part));
        }
        let (package, out) = (&self.package, self.folder.join("weights"));
        let base = route.from.map(|_| &**package);
        tokio::task::block_in_place(|| {
            build(package, base, &files, &out).map_err(|e| e.to_string())?;
            let made = package.with_new_weights(self.manifest.live_version, out, last.canary());
            made.map(|(made, _)| Arc::new(made))
                .map_err(|e| e.to_string())
        })
    }
}
