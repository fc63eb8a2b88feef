//! Jobs of the hazard model, whose candidates say how much it computes: see `tests/model/README.md`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::archive::zlib;
use crate::package::{Package, VERSION};
use crate::worker::Settings;

/// Turns of the loop for each window of an enduring job: about a second, and less than the ten after which a worker that
/// makes no progress counts as stuck, be the machine ten times slower.
const ENDURING: f32 = -1e6;

/// A candidate that sets the size of the model's large node, which the package has at 1.
pub fn hazard_candidate(size: f32) -> Vec<u8> {
    let mut packed = (size - 1.0).to_le_bytes().to_vec();
    packed.extend(0_i32.to_le_bytes());
    let data = BASE64.encode(zlib(&packed));
    let candidate = json!({"size.weight": {"shape": [1], "k": 1, "data": data}});
    candidate.to_string().into_bytes()
}

/// The job that submits it.
pub fn hazard_job(submission_id: &str, size: f32) -> Value {
    json!({
        "v": 1, "kind": "score", "submission_id": submission_id, "model_version": VERSION,
        "candidate": {
            "format": "binary_v2", "semantics": "param_diff",
            "data": BASE64.encode(hazard_candidate(size)),
        },
    })
}

/// A job that computes for minutes, makes progress with every window and can be ended at any time: for a test that ends it,
/// and does not wait for its end. For a worker of [`patient`] settings.
pub fn enduring_job(submission_id: &str) -> Value {
    hazard_job(submission_id, ENDURING)
}

/// The package for enduring jobs: of many windows.
pub fn enduring_package() -> Package {
    Package::hazard_of(64)
}

/// Settings of a worker of that package, which takes one window at a time.
pub fn patient(settings: Settings, package: &Package) -> Settings {
    settings
        .set("model.dir", package.path().display())
        .set("engine.micro_batch", 1)
}
