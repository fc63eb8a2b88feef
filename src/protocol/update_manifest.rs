//! The update manifest: which version of the weights is live, and the files that lead to it. It
//! comes from outside, so it is bounded, decoded strictly and checked before anything follows it.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::protocol::document::from_document;
use crate::protocol::encoding::Encoding;
use crate::protocol::job::{Compression, Format};
use crate::protocol::message::V1;
use crate::protocol::names::is_digest;

/// The most bytes of a manifest: some ten thousand entries.
pub const MAX_BYTES: u64 = 8 << 20;
/// Values in a manifest, keys included: those of some thirty thousand entries.
const MOST_VALUES: usize = 1 << 19;

/// `update_manifest.v1`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "update_manifest.v1")]
pub struct UpdateManifest {
    /// Always 1.
    pub v: V1,
    /// The model's name.
    #[schemars(regex(pattern = r"^[a-z0-9][a-z0-9_-]{0,63}$"))]
    pub name: String,
    /// The version that workers are to serve.
    pub live_version: u64,
    /// Whole weights.
    #[serde(default)]
    pub full: Vec<FullWeights>,
    /// Differences between two versions.
    #[serde(default)]
    pub updates: Vec<Delta>,
}

/// The weights of one version, a safetensors file for the graph of the package.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FullWeights {
    /// The version they are.
    pub version: u64,
    /// Where the file is: mirrors, tried in order. Relative ones start at the manifest.
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub urls: Vec<String>,
    /// SHA-256 of the file, 64 hex digits.
    #[schemars(regex(pattern = r"^[0-9a-f]{64}$"))]
    pub sha256: String,
    /// Bytes of the file.
    #[schemars(range(min = 1))]
    pub size: u64,
    /// SHA-256 of the graph they belong to, as the package's `model.json` has it.
    #[schemars(regex(pattern = r"^[0-9a-f]{64}$"))]
    pub graph_sha256: String,
    /// A known answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<Canary>,
}

/// A difference: added to the weights of one version it gives those of another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Delta {
    /// The version it is added to.
    pub from: u64,
    /// The version it gives; an older one is a way back.
    pub to: u64,
    /// Where the file is: mirrors, tried in order. Relative ones start at the manifest.
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub urls: Vec<String>,
    /// The container, one of a candidate's; the values are added.
    pub format: Format,
    /// How the whole file is compressed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<Compression>,
    /// SHA-256 of the file, 64 hex digits.
    #[schemars(regex(pattern = r"^[0-9a-f]{64}$"))]
    pub sha256: String,
    /// Bytes of the file.
    #[schemars(range(min = 1))]
    pub size: u64,
    /// A known answer of the version it gives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<Canary>,
}

/// Decodes a manifest and checks what holds for any worker. Whether it is for this model is the
/// caller's to compare.
///
/// # Errors
/// A sentence that names the field.
pub fn decode(bytes: &[u8]) -> Result<UpdateManifest, String> {
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format!("more than {MAX_BYTES} bytes"));
    }
    let document = Encoding::Json.decode_within(bytes, MOST_VALUES)?;
    let manifest: UpdateManifest = from_document(&document)?;
    manifest.check()?;
    Ok(manifest)
}

impl UpdateManifest {
    /// Every version that an entry leads to or from.
    pub fn versions(&self) -> BTreeSet<u64> {
        let full = self.full.iter().map(|full| full.version);
        let updates = self.updates.iter().flat_map(|delta| [delta.from, delta.to]);
        full.chain(updates).collect()
    }

    fn check(&self) -> Result<(), String> {
        if !crate::protocol::names::is_model_name(&self.name) {
            return Err(format!("name: {:?} is no model's name", self.name));
        }
        for (n, full) in self.full.iter().enumerate() {
            let entry = format!("full[{n}]");
            check_file(&entry, &full.urls, &full.sha256, full.size, full.canary)?;
            check_digest(&format!("{entry}.graph_sha256"), &full.graph_sha256)?;
        }
        for (n, delta) in self.updates.iter().enumerate() {
            let entry = format!("updates[{n}]");
            check_file(&entry, &delta.urls, &delta.sha256, delta.size, delta.canary)?;
            if delta.from == delta.to {
                return Err(format!("{entry}.to: the same as from, {}", delta.to));
            }
        }
        // A slip of the hand: no worker anywhere could get there, whatever it serves now.
        let versions = self.versions();
        if !versions.is_empty() && !versions.contains(&self.live_version) {
            return Err(format!(
                "live_version: no entry leads to or from {}",
                self.live_version
            ));
        }
        Ok(())
    }
}

fn check_file(
    entry: &str,
    urls: &[String],
    sha256: &str,
    size: u64,
    canary: Option<Canary>,
) -> Result<(), String> {
    if urls.is_empty() || urls.iter().any(String::is_empty) {
        return Err(format!("{entry}.urls: at least one, none of them empty"));
    }
    check_digest(&format!("{entry}.sha256"), sha256)?;
    if size == 0 {
        return Err(format!("{entry}.size: a file has at least one byte"));
    }
    match canary {
        Some(canary) => canary.check().map_err(|why| format!("{entry}.{why}")),
        None => Ok(()),
    }
}

fn check_digest(field: &str, digest: &str) -> Result<(), String> {
    if is_digest(digest) {
        Ok(())
    } else {
        Err(format!("{field}: not 64 lower-case hex digits"))
    }
}

/// The loss a healthy worker measures on all windows with an empty nonce.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Canary {
    /// Nats per target.
    pub loss: f64,
    /// Largest accepted difference.
    #[schemars(range(min = 0.0))]
    pub tolerance: f64,
}

impl Canary {
    /// Whether it can be met at all.
    ///
    /// # Errors
    /// Names the field.
    pub fn check(self) -> Result<(), String> {
        match self.tolerance >= 0.0 {
            true => Ok(()),
            false => Err("canary.tolerance: must be at least 0".into()),
        }
    }

    /// Whether a worker that measures this loss is healthy.
    pub fn is_met_by(self, loss: f64) -> bool {
        (loss - self.loss).abs() <= self.tolerance
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn sound() -> Value {
        json!({
            "v": 1, "name": "tiny", "live_version": 8,
            "full": [{
                "version": 7, "urls": ["full-7.safetensors"], "sha256": "a".repeat(64), "size": 10,
                "graph_sha256": "b".repeat(64), "canary": {"loss": 2.5, "tolerance": 0.01},
            }],
            "updates": [{
                "from": 7, "to": 8, "urls": ["https://mirror/7-8", "7-8"], "format": "binary_v2",
                "sha256": "c".repeat(64), "size": 3,
            }],
        })
    }

    fn refusal(spoil: impl FnOnce(&mut Value)) -> String {
        let mut manifest = sound();
        spoil(&mut manifest);
        decode(manifest.to_string().as_bytes()).unwrap_err()
    }

    #[test]
    fn a_sound_manifest_is_read() {
        let manifest = decode(sound().to_string().as_bytes()).unwrap();
        assert_eq!(manifest.updates[0].urls.len(), 2);
        let nothing_yet = br#"{"v":1,"name":"tiny","live_version":1}"#;
        assert!(decode(nothing_yet).is_ok());
    }

    #[test]
    fn what_is_wrong_is_named_by_its_field() {
        let says = |message: String, field: &str| assert!(message.contains(field), "{message}");
        says(refusal(|m| m["v"] = json!(2)), "v: version 2");
        says(refusal(|m| m["name"] = json!("../x")), "name");
        says(refusal(|m| m["live_version"] = json!(9)), "live_version");
        says(refusal(|m| m["lives"] = json!(9)), "lives");
        says(
            refusal(|m| m["full"][0]["urls"] = json!([])),
            "full[0].urls",
        );
        says(
            refusal(|m| m["full"][0]["sha256"] = json!("A".repeat(64))),
            "full[0].sha256",
        );
        says(
            refusal(|m| m["full"][0]["graph_sha256"] = json!("b")),
            "full[0].graph_sha256",
        );
        says(refusal(|m| m["full"][0]["size"] = json!(0)), "full[0].size");
        says(
            refusal(|m| m["full"][0]["canary"]["tolerance"] = json!(-1.0)),
            "full[0].canary",
        );
        says(
            refusal(|m| m["updates"][0]["to"] = json!(7)),
            "updates[0].to",
        );
        says(
            refusal(|m| m["updates"][0]["format"] = json!("pickle")),
            "updates[0].format",
        );
        says(
            refusal(|m| m["updates"][0]["semantics"] = json!("gradient")),
            "semantics",
        );
    }

    #[test]
    fn nothing_may_follow_and_nothing_may_be_endless() {
        let twice = [sound().to_string(), sound().to_string()].concat();
        assert!(decode(twice.as_bytes()).is_err());
        let endless = vec![b' '; usize::try_from(MAX_BYTES).unwrap() + 1];
        assert!(decode(&endless).unwrap_err().contains("bytes"));
    }
}
