//! Where the training side publishes: versions, their files and the manifest on a web server.

use serde_json::Value;

use crate::http::{Route, Server};
use crate::manifest::{self, ManifestBuilder, sign};
use crate::trainer::Trainer;
use crate::worker::Settings;

/// Where the manifest is.
pub const MANIFEST: &str = "/model/manifest.json";
const SIGNATURE: &str = "/model/manifest.json.sig";

/// A web server with the versions of one training.
pub struct Site {
    /// Where the files are served.
    pub server: Server,
    /// Who makes the versions.
    pub trainer: Trainer,
}

impl Site {
    /// A site with the first version only; the seed chooses the later ones.
    pub fn new(seed: u64) -> Self {
        Self {
            server: Server::start(),
            trainer: Trainer::new(seed),
        }
    }

    /// Makes a worker follow it, looking twice a second at most.
    pub fn followed(&self, settings: Settings) -> Settings {
        settings
            .set("model.update_url", self.server.url(MANIFEST))
            .set("model.update_interval", "1s")
    }

    /// Puts a delta on the server; its entry.
    pub fn delta(&self, from: u64, to: u64) -> Value {
        let name = delta_name(from, to);
        let bytes = self.trainer.delta(from, to);
        self.server.put(&path(&name), Route::Mirror(bytes));
        manifest::delta(&self.trainer, from, to, &[&name])
    }

    /// Puts whole weights on the server; their entry.
    pub fn full(&self, version: u64) -> Value {
        let name = full_name(version);
        let bytes = self.trainer.full(version);
        self.server.put(&path(&name), Route::Mirror(bytes));
        manifest::full(&self.trainer, version, &[&name])
    }

    /// Publishes a manifest, signed.
    pub fn publish(&self, manifest: &ManifestBuilder) {
        let bytes = manifest.bytes();
        let signature = sign(&bytes).into_bytes();
        self.server.put(SIGNATURE, Route::Bytes(signature));
        self.server.put(MANIFEST, Route::Mirror(bytes));
    }

    /// Publishes one that lacks a valid signature.
    pub fn publish_signed_by(&self, manifest: &ManifestBuilder, signature: Option<&str>) {
        let route = signature.map_or(Route::Status(404), |s| Route::Bytes(s.into()));
        self.server.put(SIGNATURE, route);
        self.server.put(MANIFEST, Route::Mirror(manifest.bytes()));
    }

    /// Makes the next version and publishes the delta that leads to it; its number.
    pub fn advance(&mut self) -> u64 {
        let before = self.trainer.version();
        let version = self.trainer.advance();
        let manifest = ManifestBuilder::new(version).update(self.delta(before, version));
        self.publish(&manifest);
        version
    }
}

/// The name of a delta's file, beside the manifest.
pub fn delta_name(from: u64, to: u64) -> String {
    format!("{from}-{to}.json")
}

/// The name of a version's file, beside the manifest.
pub fn full_name(version: u64) -> String {
    format!("full-{version}.safetensors")
}

/// Where a file beside the manifest is.
pub fn path(name: &str) -> String {
    format!("/model/{name}")
}
