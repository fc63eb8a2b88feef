//! Update manifests as the training side writes and signs them.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use serde_json::{Value, json};

use crate::digest::digest;
use crate::package::MODEL;
use crate::trainer::Trainer;

/// A manifest in the making. A test that changes an entry makes it with [`full`] or [`delta`] and
/// adds what came of it.
pub struct ManifestBuilder(Value);

impl ManifestBuilder {
    /// An empty manifest whose live version is this one.
    pub fn new(live_version: u64) -> Self {
        Self(json!({
            "v": 1, "name": MODEL, "live_version": live_version, "full": [], "updates": [],
        }))
    }

    /// Adds an entry to `full`.
    pub fn full(self, entry: Value) -> Self {
        self.add("full", entry)
    }

    /// Adds an entry to `updates`.
    pub fn update(self, entry: Value) -> Self {
        self.add("updates", entry)
    }

    fn add(mut self, list: &str, entry: Value) -> Self {
        let list = self.0[list].as_array_mut().expect("a list from the start");
        list.push(entry);
        self
    }

    /// The bytes to serve, and to sign.
    pub fn bytes(&self) -> Vec<u8> {
        self.0.to_string().into_bytes()
    }
}

/// The entry of a version's whole weights.
pub fn full(trainer: &Trainer, version: u64, urls: &[&str]) -> Value {
    let bytes = trainer.full(version);
    json!({
        "version": version, "urls": urls, "sha256": digest(&bytes), "size": bytes.len(),
        "graph_sha256": trainer.graph_sha256(),
    })
}

/// The entry of the difference between two neighbours.
pub fn delta(trainer: &Trainer, from: u64, to: u64, urls: &[&str]) -> Value {
    let bytes = trainer.delta(from, to);
    json!({
        "from": from, "to": to, "urls": urls, "format": "binary_v2",
        "sha256": digest(&bytes), "size": bytes.len(),
    })
}

/// An entry with a known answer.
pub fn with_canary(mut entry: Value, loss: f64, tolerance: f64) -> Value {
    entry["canary"] = json!({"loss": loss, "tolerance": tolerance});
    entry
}

/// The detached signature that lies at the manifest's URL + `.sig`.
pub fn sign(bytes: &[u8]) -> String {
    BASE64.encode(key().sign(bytes))
}

/// What `model.update_key` must be for it.
pub fn public_key() -> String {
    BASE64.encode(key().public_key())
}

/// The private key as `openssl genpkey -algorithm ed25519` writes one: PKCS#8 in PEM.
pub fn private_key() -> String {
    let head = b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20";
    let key = BASE64.encode([head.as_slice(), SEED].concat());
    format!("-----BEGIN PRIVATE KEY-----\n{key}\n-----END PRIVATE KEY-----\n")
}

/// The same key in every run: nothing here is secret.
const SEED: &[u8] = b"the seed of the tests, no secret";

fn key() -> Ed25519KeyPair {
    let key = Ed25519KeyPair::from_seed_unchecked(SEED);
    key.expect("any 32 bytes are a seed")
}
