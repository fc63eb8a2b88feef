//! Jobs of the hazard model, whose candidates say how much it computes: see `tests/model/README.md`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::archive::zlib;
use crate::package::VERSION;

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
