//! `ops/gpu-check` on the provider that is here: the same proofs and the same benchmark as on a GPU.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::json;
use testkit::folder::Folder;
use testkit::package::{Package, sound};
use testkit::program::scorer;

fn script(name: &str, arguments: &[&str]) -> Output {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("ops").join(name))
        .args(arguments)
        .env("SCORER", scorer())
        .output()
        .expect("the script starts")
}

fn gpu_check(model: &Path) -> Output {
    let model = model.display().to_string();
    let arguments = [
        "--provider",
        "cpu",
        "--only-model",
        "--seconds",
        "1",
        "--graphs",
        "llama/unfolded",
        "--model",
        &model,
    ];
    script("gpu-check", &arguments)
}

#[test]
fn a_sound_package_passes_every_proof_and_is_measured() {
    let output = gpu_check(sound());
    let printed = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{printed}{said}");
    assert_eq!(printed.matches("\nholds  ").count(), 7, "{printed}");
    for line in [
        "restored bit for bit",
        "ended on demand",
        "out of memory",
        "\nllama/unfolded ",
        "bare session",
        "patch + restore",
    ] {
        assert!(printed.contains(line), "{line}: {printed}");
    }
}

#[test]
fn a_proof_that_fails_ends_with_1() {
    let package = Package::copy();
    package.edit(|manifest| manifest["canary"] = json!({"loss": 0.5, "tolerance": 1e-6}));
    let output = gpu_check(&package.path());
    let printed = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{printed}");
    assert!(printed.contains("FAILS  warm-up and probe"), "{printed}");
    assert!(printed.contains("canary"), "{printed}");
}

#[test]
fn libraries_travel_in_pieces_and_a_damaged_piece_is_named() {
    let folder = Folder::new("pieces");
    let (from, pieces, to) = (
        folder.join("from"),
        folder.join("pieces"),
        folder.join("to"),
    );
    std::fs::create_dir(&from).expect("a folder");
    let library: Vec<u8> = (0..40_000_u32)
        .flat_map(|n| n.wrapping_mul(2_654_435_769).to_le_bytes())
        .collect();
    std::fs::write(from.join("libcuda-like.so.1"), &library).expect("a file");
    std::fs::write(from.join("installed"), "pinned").expect("a file");
    let [from, pieces, to] = [from, pieces, to].map(|path| path.display().to_string());
    let split = script("gpu-libraries", &["split", &from, &pieces, "50K"]);
    assert!(
        split.status.success(),
        "{}",
        String::from_utf8_lossy(&split.stderr)
    );
    let join = script("gpu-libraries", &["join", &pieces, &to]);
    assert!(
        join.status.success(),
        "{}",
        String::from_utf8_lossy(&join.stderr)
    );
    let arrived = std::fs::read(Path::new(&to).join("libcuda-like.so.1")).expect("it arrived");
    assert!(arrived == library, "the library is another one");

    std::fs::write(Path::new(&pieces).join("gpu-libraries.001"), "short").expect("a file");
    let damaged = script("gpu-libraries", &["join", &pieces, &to]);
    let said = String::from_utf8_lossy(&damaged.stderr);
    assert_eq!(damaged.status.code(), Some(1), "{said}");
    assert!(said.contains("gpu-libraries.001"), "{said}");
}
