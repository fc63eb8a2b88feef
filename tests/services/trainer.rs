//! The training side of the tests is right: the binary, asked offline, comes to the same weights.

use std::path::Path;
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::signature::{ED25519, UnparsedPublicKey};
use serde_json::{Value, json};
use testkit::digest::digest;
use testkit::folder::Folder;
use testkit::manifest::{ManifestBuilder, delta, full, public_key, sign, with_canary};
use testkit::package::{VERSION, sound};
use testkit::program::scorer;
use testkit::trainer::Trainer;
use testkit::worker::Settings;

/// What a command that needs no services prints.
#[track_caller]
fn offline(arguments: &[&str], model: &Path) -> Value {
    let mut command = Command::new(scorer());
    command.args(arguments).arg("--model").arg(model);
    let settings = Settings::new(&[]).set("engine.execution_provider", "cpu");
    let output = settings.apply(&mut command).output();
    let output = output.expect("the binary runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    serde_json::from_slice(&output.stdout).expect("JSON on standard output")
}

/// The loss of a package's weights plus a delta.
#[track_caller]
fn loss_after(model: &Path, delta: &[u8]) -> Value {
    let folder = Folder::new("delta");
    let file = folder.join("delta.json");
    std::fs::write(&file, delta).expect("a writable folder");
    let file = file.display().to_string();
    let arguments = [
        "score",
        "--format",
        "binary_v2",
        "--semantics",
        "param_diff",
        "--candidate",
        &file,
    ];
    offline(&arguments, model)["loss_after"].clone()
}

#[test]
fn the_binary_comes_to_the_same_weights_whichever_way() {
    let mut trainer = Trainer::new(1);
    let next = trainer.advance();
    assert_eq!((next, trainer.version()), (VERSION + 1, VERSION + 1));
    let package = trainer.package(next);
    let before = offline(&["validate"], sound());
    let after = offline(&["validate"], &package.path());
    for (answer, version) in [(&before, VERSION), (&after, next)] {
        assert_eq!(answer["model_version"], version);
        assert_eq!(answer["weights_id"], trainer.weights_id(version));
    }
    assert_eq!(before["package_id"], after["package_id"]);
    let (loss, moved) = (before["loss"].as_f64(), after["loss"].as_f64());
    let moved = moved.zip(loss).map(|(a, b)| (a - b).abs());
    assert!(
        moved.is_some_and(|m| m > 1e-6 && m < 0.1),
        "a version moves the loss slightly: {moved:?}"
    );
    // The engine adds the delta, the trainer did; the losses are of the same bits.
    let forth = loss_after(sound(), &trainer.delta(VERSION, next));
    assert_eq!(forth, after["loss"]);
    let back = loss_after(&package.path(), &trainer.delta(next, VERSION));
    assert_eq!(back, before["loss"]);
}

#[test]
fn a_seed_repeats_its_versions() {
    let made = |seed| {
        let mut trainer = Trainer::new(seed);
        let (a, b) = (trainer.advance(), trainer.advance());
        let (old, new) = (trainer.weights(a), trainer.weights(b));
        let pairs = old.values().flatten().zip(new.values().flatten());
        let changed = pairs.filter(|(old, new)| old != new).count();
        assert!((200..=2000).contains(&changed), "{changed} changed");
        (trainer.delta(a, b), trainer.full(b))
    };
    assert_eq!(made(1), made(1));
    assert_ne!(made(1), made(2));
}

#[test]
fn a_manifest_describes_its_files_and_is_signed() {
    let mut trainer = Trainer::new(1);
    let next = trainer.advance();
    let urls = ["http://one/f", "http://two/f"];
    let known = with_canary(full(&trainer, next, &urls), 2.5, 0.01);
    let manifest = ManifestBuilder::new(next)
        .full(known)
        .update(delta(&trainer, VERSION, next, &urls));
    let bytes = manifest.bytes();
    let read: Value = serde_json::from_slice(&bytes).expect("a manifest is JSON");
    let (whole, step) = (trainer.full(next), trainer.delta(VERSION, next));
    assert_eq!(
        read,
        json!({
            "v": 1, "name": "tinylm", "live_version": 8,
            "full": [{
                "version": 8, "urls": urls, "sha256": digest(&whole), "size": whole.len(),
                "graph_sha256": trainer.graph_sha256(),
                "canary": {"loss": 2.5, "tolerance": 0.01},
            }],
            "updates": [{
                "from": 7, "to": 8, "urls": urls, "format": "binary_v2",
                "sha256": digest(&step), "size": step.len(),
            }],
        })
    );
    let decode = |text: String| BASE64.decode(text).expect("base64");
    let key = UnparsedPublicKey::new(&ED25519, decode(public_key()));
    let signature = decode(sign(&bytes));
    assert!(key.verify(&bytes, &signature).is_ok());
    assert!(key.verify(&bytes[1..], &signature).is_err());
}
