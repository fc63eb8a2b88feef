//! Holds a result to the committed table and to the fields of contract 2.

use serde_json::{Value, json};
use testkit::case::Case;
use testkit::message::Message;
use testkit::package::{MODEL, VERSION};
use testkit::wait::now_ms;

/// How far a loss may be from the generator's.
const TOLERANCE: f64 = 2e-6;

/// What a result says differently from the table.
pub(crate) fn differences(case: &Case, result: &Value) -> Vec<String> {
    let (expected, mut found) = (&case.expect, Vec::new());
    if result["status"] != expected["status"] {
        return vec![format!(
            "status {} instead of {}: {}",
            result["status"], expected["status"], result["error"]
        )];
    }
    if let Some(code) = expected["code"].as_str()
        && result["error"]["code"] != code
    {
        found.push(format!(
            "code {} instead of {code}",
            result["error"]["code"]
        ));
    }
    for name in [
        "loss_before",
        "loss_after",
        "delta",
        "score",
        "stderr",
        "loss",
    ] {
        let Some(want) = expected[name].as_f64() else {
            continue;
        };
        match result[name].as_f64() {
            Some(got) if (got - want).abs() <= TOLERANCE => {}
            got => found.push(format!("{name} {got:?} instead of {want}")),
        }
    }
    for name in ["windows", "tokens", "plan"] {
        if !expected[name].is_null() && result[name] != expected[name] {
            found.push(format!(
                "{name} {} instead of {}",
                result[name], expected[name]
            ));
        }
    }
    found
}

/// The fields every result of contract 2 has, and what depends on its status.
pub(crate) fn check_envelope(message: &Message, case: &Case) {
    let (result, name) = (message.json(), &case.name);
    assert_eq!(
        message.content_type.as_deref(),
        Some("application/msgpack"),
        "{name}"
    );
    let status = result["status"].as_str().expect("a status");
    assert_eq!(message.routing_key, format!("{MODEL}.{status}"), "{name}");
    assert_eq!(result["v"], 1, "{name}");
    assert_eq!(
        result["kind"],
        if case.is_validate() {
            "validate"
        } else {
            "score"
        },
        "{name}"
    );
    assert_eq!(result["model"], MODEL, "{name}");
    for field in ["model_version", "attempt", "scored_at_ms"] {
        assert!(
            result[field].is_u64(),
            "{name}: {field} is {}",
            result[field]
        );
    }
    for field in ["weights_id", "package_id"] {
        assert!(
            is_digest(&result[field]),
            "{name}: {field} is {}",
            result[field]
        );
    }
    assert_eq!(result["worker_id"], "w1", "{name}");
    assert!(
        result["incarnation"]
            .as_str()
            .is_some_and(|i| uuid::Uuid::parse_str(i).is_ok()),
        "{name}"
    );
    let parts: Vec<&str> = message.id().rsplitn(4, ':').collect();
    let [key, said, _version, id] = parts[..] else {
        panic!("{name}: message_id {}", message.id())
    };
    assert_eq!(
        (said, id),
        (status, result["submission_id"].as_str().expect("an id")),
        "{name}"
    );
    match (status, case.is_validate()) {
        ("scored", false) => check_scored(&result, name, key),
        ("scored", true) => {
            assert!(
                result["loss"].is_f64() && result["windows"].is_u64() && result["tokens"].is_u64(),
                "{name}"
            );
            assert!(is_digest(&result["plan"]), "{name}");
        }
        _ => {
            let error = &result["error"];
            assert!(
                error["message"].as_str().is_some_and(|m| !m.is_empty()),
                "{name}: {error}"
            );
            assert!(
                error["retryable"].is_boolean() && error["code"].is_string(),
                "{name}: {error}"
            );
        }
    }
}

fn check_scored(result: &Value, name: &str, key: &str) {
    let number = |field: &str| {
        result[field]
            .as_f64()
            .unwrap_or_else(|| panic!("{name}: {field} is {}", result[field]))
    };
    let delta = number("delta");
    assert!(
        (number("loss_before") - number("loss_after") - delta).abs() < 1e-9,
        "{name}: delta {delta}"
    );
    assert_eq!(number("score"), delta.max(0.0), "{name}: score");
    assert_eq!(result["model_version"], VERSION, "{name}");
    assert!(
        is_digest(&json!(key)),
        "{name}: KEY of the message_id is {key}"
    );
    assert!(
        is_digest(&result["plan"]) && is_digest(&result["candidate"]["sha256"]),
        "{name}"
    );
    let windows = result["windows"].as_u64().expect("windows");
    assert!(
        windows > 0 && result["tokens"].as_u64() >= Some(windows),
        "{name}"
    );
    if windows >= 2 {
        let (low, high) = (result["ci95"][0].as_f64(), result["ci95"][1].as_f64());
        assert!(
            number("stderr") >= 0.0 && low <= Some(delta) && high >= Some(delta),
            "{name}: {}",
            result["ci95"]
        );
    }
    for field in ["tensors", "entries", "effective_entries"] {
        assert!(
            result["candidate"][field].is_u64(),
            "{name}: candidate.{field}"
        );
    }
    assert!(
        result["candidate"]["l2_norm"].is_number(),
        "{name}: candidate.l2_norm"
    );
    assert_eq!(
        result["execution_provider"], "CPUExecutionProvider",
        "{name}"
    );
    assert!(
        result["device"].is_string() && result["precision"].is_string(),
        "{name}"
    );
    for stage in [
        "queued", "fetch", "decode", "apply", "forward", "restore", "total",
    ] {
        assert!(
            result["timings_ms"][stage].is_number(),
            "{name}: timings_ms.{stage}"
        );
    }
    let scored_at = result["scored_at_ms"].as_u64().expect("scored_at_ms");
    assert!(
        scored_at <= now_ms() && scored_at + 300_000 > now_ms(),
        "{name}: scored_at_ms {scored_at}"
    );
}

fn is_digest(value: &Value) -> bool {
    value
        .as_str()
        .is_some_and(|s| s.len() == 64 && s.bytes().all(|b| b.is_ascii_hexdigit()))
}
