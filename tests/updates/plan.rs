//! The updates that the fleet is to follow, and what is wrong with them.

use std::collections::BTreeMap;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use testkit::digest::digest;
use testkit::http::Route;
use testkit::manifest::{self, ManifestBuilder, sign, with_canary};
use testkit::package::VERSION;
use testkit::site::{Site, path};
use testkit::stack::Stack;

/// What is wrong with an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// Nothing; it is whole weights.
    Full,
    /// The first mirror of whole weights ends half-way.
    DyingMirror,
    /// The delta's contents are nonsense; whole weights are there, too.
    BrokenDelta,
    /// The known answer is wrong.
    Canary,
    /// The signature is that of something else.
    Unsigned,
    /// A worker is killed in the middle.
    Kill,
}

impl Fault {
    /// Of the n-th update.
    pub(crate) fn of(n: usize) -> Self {
        match n % 10 {
            2 => Self::Full,
            4 => Self::DyingMirror,
            5 => Self::BrokenDelta,
            6 => Self::Canary,
            8 => Self::Unsigned,
            9 => Self::Kill,
            _ => Self::None,
        }
    }
}

/// The training side, and the version that is live.
pub(crate) struct Publisher {
    pub(crate) site: Site,
    pub(crate) live: u64,
    unsigned: Option<ManifestBuilder>,
}

impl Publisher {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            site: Site::new(seed),
            live: VERSION,
            unsigned: None,
        }
    }

    pub(crate) fn begin(&self) {
        self.site.publish(&ManifestBuilder::new(VERSION));
    }

    /// Publishes the next version. It is live then, unless its canary is wrong.
    pub(crate) fn publish(&mut self, fault: Fault) {
        let before = self.live;
        // After a refused version there is one to go past.
        while self.site.trainer.version() <= before {
            self.site.trainer.advance();
        }
        let next = before + 1;
        let delta = self.site.delta(before, next);
        let manifest = ManifestBuilder::new(next);
        let manifest = match fault {
            Fault::None | Fault::Unsigned | Fault::Kill => manifest.update(delta),
            Fault::Full => manifest.full(self.site.full(next)),
            Fault::DyingMirror => manifest.full(self.dying(next)),
            Fault::BrokenDelta => manifest
                .update(self.nonsense(delta))
                .full(self.site.full(next)),
            Fault::Canary => manifest.update(with_canary(delta, 0.5, 0.001)),
        };
        match fault {
            Fault::Unsigned => {
                self.site
                    .publish_signed_by(&manifest, Some(&sign(b"something else")));
                self.unsigned = Some(manifest);
            }
            Fault::None
            | Fault::Full
            | Fault::DyingMirror
            | Fault::BrokenDelta
            | Fault::Canary
            | Fault::Kill => self.site.publish(&manifest),
        }
        if fault != Fault::Canary {
            self.live = next;
        }
    }

    /// Publishes what was unsigned once more.
    pub(crate) fn sign(&mut self) {
        let manifest = self.unsigned.take().expect("something is unsigned");
        self.site.publish(&manifest);
    }

    fn dying(&self, version: u64) -> Value {
        let bytes = self.site.trainer.full(version);
        let (dying, sound) = (format!("dying-{version}"), format!("sound-{version}"));
        let half = bytes.len() / 2;
        self.site
            .server
            .put(&path(&dying), Route::Breaking(bytes.clone(), half));
        self.site.server.put(&path(&sound), Route::Mirror(bytes));
        manifest::full(&self.site.trainer, version, &[&dying, &sound])
    }

    fn nonsense(&self, mut delta: Value) -> Value {
        let (name, bytes) = (format!("nonsense-{}", delta["to"]), b"{}".to_vec());
        delta["urls"] = json!([name]);
        delta["sha256"] = json!(digest(&bytes));
        delta["size"] = json!(bytes.len());
        self.site.server.put(&path(&name), Route::Mirror(bytes));
        delta
    }

    /// What each worker keeps of the live version is, bit for bit, what training has.
    pub(crate) fn check_disks(&self, stack: &Stack, ids: &[&str]) {
        for id in ids {
            let folder = stack.state_dir().join(id);
            let text = std::fs::read(folder.join("journal.json")).expect("a journal");
            let journal: Value = serde_json::from_slice(&text).expect("JSON");
            let current = &journal["current"];
            assert_eq!(current["version"], self.live, "{id}");
            let file = folder.join(current["file"].as_str().expect("a file"));
            let bytes = std::fs::read(file).expect("kept weights");
            let views = SafeTensors::deserialize(&bytes).expect("safetensors");
            let kept: BTreeMap<String, Vec<u32>> = views
                .tensors()
                .into_iter()
                .map(|(name, view)| (name, bits(view.data())))
                .collect();
            let trained = self.site.trainer.weights(self.live).iter();
            let trained: BTreeMap<String, Vec<u32>> = trained
                .map(|(name, values)| (name.clone(), values.iter().map(|v| v.to_bits()).collect()))
                .collect();
            assert!(kept == trained, "{id} keeps other weights");
        }
    }
}

fn bits(bytes: &[u8]) -> Vec<u32> {
    let (elements, _) = bytes.as_chunks();
    elements.iter().map(|b| u32::from_le_bytes(*b)).collect()
}
