use super::super::context::MAX_BYTES;
use serde_json::json;

use super::*;
use crate::protocol::encoding::Encoding;
use crate::protocol::job::tests::{
    BOTH, Fields, decoded, holder, put, refusal, remove, sound, value,
};
use crate::protocol::job::{Kind, Source};

/// Both encodings must refuse the bent job with a message that begins with the name.
#[track_caller]
fn refused(named: &str, bend: impl Fn(&mut Fields)) {
    for encoding in BOTH {
        refused_in(encoding, named, &bend);
    }
}

#[track_caller]
fn refused_in(encoding: Encoding, named: &str, bend: impl Fn(&mut Fields)) {
    let mut job = sound(encoding);
    bend(&mut job);
    let (_, message) = refusal(job, encoding);
    assert!(
        message.starts_with(named),
        "{encoding:?}: {message:?} does not begin with {named:?}"
    );
}

#[track_caller]
fn accepted(bend: impl Fn(&mut Fields)) -> [Job; 2] {
    BOTH.map(|encoding| {
        let mut job = sound(encoding);
        bend(&mut job);
        decoded(job, encoding).unwrap()
    })
}

#[track_caller]
fn all_refused(path: &str, wrong: serde_json::Value) {
    for wrong in wrong.as_array().unwrap() {
        refused(path, |job| put(job, path, value(wrong.clone())));
    }
}

#[test]
fn every_broken_field_of_a_job_is_named() {
    all_refused("v", json!([2, 1.5, "1", -1, [1]]));
    all_refused("kind", json!(["guess", null, 0, ["score"]]));
    all_refused("model", json!([5, ["m"]]));
    all_refused(
        "model_version",
        json!([-1, 7.5, "7", 18446744073709551616.0, 1e300]),
    );
    all_refused("deadline_ms", json!([-1, 1.5, "tomorrow"]));
    all_refused("context", json!([[1], "x", 1, {"long": "x".repeat(4200)}]));
    let list = json!([
        "binary_v2",
        null,
        "param_diff",
        null,
        "https://h/x",
        null,
        "0".repeat(64),
        9
    ]);
    all_refused("candidate", json!(["x", list]));
    all_refused("validation", json!([[[3], "n"], "n", 3]));
}

#[test]
fn every_broken_field_of_a_candidate_is_named() {
    let format = json!(["pickle", "BINARY_V2", 0, {"binary_v2": null}]);
    all_refused("candidate.format", format);
    all_refused("candidate.compression", json!(["gzip", "", 0]));
    all_refused("candidate.semantics", json!(["sum", 0, ["gradient"]]));
    let rate = json!([0, 0.0, -0.0, -0.5, "0.5", null, [0.5]]);
    all_refused("candidate.learning_rate", rate);
    all_refused("candidate.url", json!(["file:///x", 5]));
    all_refused("candidate.data", json!([[1, 2], {}, 5, true]));
    let digest = json!(["12", "g".repeat(64), "0".repeat(66), "", 0]);
    all_refused("candidate.sha256", digest);
    all_refused("candidate.size", json!([-1, 2.5, "2"]));
    refused_in(Encoding::Json, "candidate.data", |job| {
        put(job, "candidate.data", "%%".into());
    });
    refused_in(Encoding::MessagePack, "candidate.data", |job| {
        put(job, "candidate.data", "e30=".into());
    });
}

#[test]
fn every_broken_field_of_a_validation_is_named() {
    let shards = json!([[3, 3], [1, 2, 1.0], [], [1.5], [-1], [null], 3, {"0": 3}]);
    all_refused("validation.shards", shards);
    let nonce = json!(["x".repeat(65), "é".repeat(65), 5, ["n"]]);
    all_refused("validation.nonce", nonce);
    let stop = json!([0.01, [0.01, 0.0, false], true, {"alpha": 0.01, "beta": 0.1}, {}]);
    all_refused("validation.stop", stop);
    let alpha = json!([0.0, -0.01, 0.5, 1, "0.01", [0.01]]);
    for (name, wrong) in [
        ("alpha", alpha),
        ("margin", json!([-1e-9, "0", [0]])),
        ("proven", json!([0, "yes"])),
    ] {
        for wrong in wrong.as_array().unwrap() {
            let path = format!("validation.stop.{name}");
            refused(&path, |job| {
                put(job, "validation.stop", value(json!({"alpha": 0.01})));
                put(job, &path, value(wrong.clone()));
            });
        }
    }
}

#[test]
fn every_missing_field_is_named() {
    for (path, named) in [
        ("v", "missing field `v`"),
        ("kind", "kind: missing"),
        ("submission_id", "submission_id: "),
        ("model_version", "missing field `model_version`"),
        ("candidate", "missing field `candidate`"),
        ("candidate.format", "candidate: missing field `format`"),
        (
            "candidate.semantics",
            "candidate: missing field `semantics`",
        ),
        (
            "candidate.learning_rate",
            "candidate.learning_rate: missing",
        ),
        ("candidate.data", "candidate.url, candidate.data: neither"),
    ] {
        refused(named, |job| remove(job, path));
        refused(named, |job| put(job, path, Value::Nil));
    }
}

#[test]
fn an_unknown_field_is_refused_at_every_level_but_in_the_context() {
    for (path, named) in [
        ("colour", "colour: "),
        ("candidate.colour", "candidate.colour: "),
        ("validation.colour", "validation.colour: "),
        ("V", "V: "),
    ] {
        refused(named, |job| put(job, path, "red".into()));
    }
    accepted(|job| put(job, "context.colour", "red".into()));
}

#[test]
fn a_field_that_is_given_twice_is_refused_at_every_level() {
    for (path, named) in [
        ("v", "\"v\" is given twice"),
        ("kind", "\"kind\" is given twice"),
        ("candidate", "\"candidate\" is given twice"),
        ("context", "\"context\" is given twice"),
        ("candidate.format", "candidate: \"format\" is given twice"),
        ("candidate.data", "candidate: \"data\" is given twice"),
        ("validation.nonce", "validation: \"nonce\" is given twice"),
        ("validation.shards", "validation: \"shards\" is given twice"),
        ("context.miner_id", "context: \"miner_id\" is given twice"),
        ("context.deep.a", "context.deep: \"a\" is given twice"),
    ] {
        refused(named, |job| {
            put(job, "context.deep", value(json!({"a": 1})));
            let (fields, name) = holder(job, path);
            let twice = fields.iter().find(|(key, _)| key.as_str() == Some(name));
            let twice = twice.unwrap().clone();
            fields.push(twice);
        });
    }
}

#[test]
fn null_is_as_good_as_leaving_it_out() {
    for path in [
        "model",
        "deadline_ms",
        "context",
        "validation",
        "validation.shards",
        "validation.nonce",
        "validation.stop",
        "candidate.compression",
        "candidate.url",
        "candidate.sha256",
        "candidate.size",
    ] {
        let null = accepted(|job| put(job, path, Value::Nil));
        assert_eq!(null, accepted(|job| remove(job, path)), "{path}");
    }
}

#[test]
fn the_bounds_themselves_are_allowed() {
    for (path, value) in [
        ("submission_id", json!("Az9._:-".repeat(18) + "xx")),
        ("model_version", json!(u64::MAX)),
        ("deadline_ms", json!(0)),
        ("validation.nonce", json!("")),
        ("validation.nonce", json!("é".repeat(64))),
        ("validation.shards", json!([u64::MAX, 0])),
        ("validation.stop", json!({"alpha": 5e-324})),
        (
            "validation.stop",
            json!({"alpha": 0.4999999, "margin": 0, "proven": true}),
        ),
        ("candidate.learning_rate", json!(1)),
        ("candidate.learning_rate", json!(5e-324)),
        ("candidate.sha256", json!("aB".repeat(32))),
        ("candidate.size", json!(0)),
        ("v", json!(1.0)),
        ("model_version", json!(7.0)),
        ("deadline_ms", json!(4_102_444_800_000.0)),
        ("validation.shards", json!([3.0, -0.0])),
        ("candidate.size", json!(2.0)),
    ] {
        accepted(|job| put(job, path, crate::protocol::job::tests::value(value.clone())));
    }
    // A map of one, a key of one letter and the head of a long text are six bytes.
    for (length, fits) in [(MAX_BYTES - 6, true), (MAX_BYTES - 5, false)] {
        for encoding in BOTH {
            let mut job = sound(encoding);
            put(&mut job, "context", value(json!({"a": "x".repeat(length)})));
            assert_eq!(decoded(job, encoding).is_ok(), fits);
        }
    }
}

#[test]
fn what_a_stop_leaves_out_is_nothing() {
    for job in accepted(|job| put(job, "validation.stop", value(json!({"alpha": 0.25})))) {
        let Task::Score { stop, .. } = job.task else {
            panic!("another task")
        };
        let expected = Stop {
            alpha: 0.25,
            margin: 0.0,
            proven: false,
        };
        assert_eq!(stop, Some(expected));
    }
}

#[test]
fn a_url_needs_digest_and_size_and_a_difference_no_rate() {
    let fetched = |job: &mut Fields| {
        remove(job, "candidate.data");
        put(job, "candidate.url", "https://h/x".into());
        put(job, "candidate.sha256", "0".repeat(64).into());
        put(job, "candidate.size", 9.into());
    };
    for job in accepted(fetched) {
        let Task::Score { candidate, .. } = job.task else {
            panic!("another task")
        };
        assert_eq!(candidate.source, Source::Url("https://h/x".into()));
        assert_eq!((candidate.sha256, candidate.size), (Some([0; 32]), Some(9)));
    }
    for name in ["candidate.sha256", "candidate.size"] {
        refused(name, |job| {
            fetched(job);
            remove(job, name);
        });
    }
    refused("candidate.learning_rate: not allowed", |job| {
        put(job, "candidate.semantics", "param_diff".into());
    });
    accepted(|job| {
        put(job, "candidate.semantics", "param_diff".into());
        remove(job, "candidate.learning_rate");
    });
}

#[test]
fn a_float_without_a_fraction_is_its_integer_and_the_context_keeps_it() {
    for job in accepted(|job| {
        put(job, "model_version", Value::F64(9_007_199_254_740_994.0));
        put(
            job,
            "validation.shards",
            Value::Array(vec![Value::F64(3.0)]),
        );
        put(job, "candidate.size", Value::F32(16_777_216.0));
        put(
            job,
            "context",
            value(json!({"nothing": null, "share": 7.0})),
        );
    }) {
        assert_eq!(job.task.model_version(), Some(9_007_199_254_740_994));
        assert_eq!(job.validation.shards, Some(vec![3]));
        let expected = match job.context.unwrap() {
            Context::Packed(value) => serde_json::to_string(&value),
            Context::Text(text) => serde_json::to_string(&text),
        };
        assert_eq!(expected.unwrap(), r#"{"nothing":null,"share":7.0}"#);
    }
}

#[test]
fn a_number_beyond_all_floats_is_no_learning_rate() {
    let text = br#"{"v":1,"kind":"score","submission_id":"s","model_version":7,
        "candidate":{"format":"binary_v2","semantics":"gradient","data":"","learning_rate":1e400}}"#;
    let refused = crate::protocol::job::decode(text, Encoding::Json);
    let Err(crate::protocol::job::Undecodable::Named { failure, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(
        failure.message,
        "candidate.learning_rate: must be a finite number"
    );
}

#[test]
fn a_context_may_be_written_longer_in_json_but_not_without_end() {
    #[expect(clippy::result_large_err, reason = "as the function it calls")]
    let job = |context: &str| {
        let body =
            format!(r#"{{"v":1,"kind":"validate","submission_id":"s","context":{context}}}"#);
        crate::protocol::job::decode(body.as_bytes(), Encoding::Json)
    };
    let escaped = "\\u0001".repeat(MAX_BYTES - 6);
    assert!(job(&format!(r#"{{"a":"{escaped}"}}"#)).is_ok());
    assert!(job(&format!(r#"{{"a":{}1}}"#, " ".repeat(100_000))).is_ok());
    let refused = job(&format!(r#"{{"a":0.{}}}"#, "1".repeat(33_000)));
    let Err(crate::protocol::job::Undecodable::Named {
        failure,
        context: None,
        ..
    }) = refused
    else {
        panic!("{refused:?}")
    };
    assert!(failure.message.starts_with("context: "), "{failure}");
}

#[test]
fn a_validate_job_has_no_candidate_and_need_not_name_a_version() {
    let validate = |job: &mut Fields| {
        put(job, "kind", "validate".into());
        remove(job, "candidate");
    };
    for job in accepted(validate) {
        assert_eq!(
            (job.task.kind(), job.task.model_version()),
            (Kind::Validate, Some(7))
        );
    }
    for job in accepted(|job| {
        validate(job);
        remove(job, "model_version");
    }) {
        assert_eq!(job.task.model_version(), None);
    }
    refused("candidate: ", |job| put(job, "kind", "validate".into()));
    refused("validation.stop: ", |job| {
        validate(job);
        put(job, "validation.stop", value(json!({"alpha": 0.01})));
    });
}

#[test]
fn what_only_messagepack_can_say_is_refused_where_json_could_not_say_it() {
    let bytes = |text: &str| Value::Binary(text.as_bytes().to_vec());
    for (path, wrong) in [
        ("candidate.learning_rate", Value::F64(f64::NAN)),
        ("candidate.learning_rate", Value::F32(f32::INFINITY)),
        ("candidate.learning_rate", Value::F64(f64::NEG_INFINITY)),
        ("candidate.format", bytes("binary_v2")),
        ("candidate.url", bytes("https://h/x")),
        ("candidate.sha256", bytes(&"0".repeat(64))),
        ("model", bytes("tinylm")),
        ("model_version", Value::Ext(1, vec![7])),
        ("validation.nonce", bytes("n")),
        ("kind", bytes("score")),
    ] {
        refused_in(Encoding::MessagePack, path, |job| {
            put(job, path, wrong.clone());
        });
    }
    for (path, key) in [("candidate.x", 0.into()), ("validation.x", bytes("nonce"))] {
        let named = path.trim_end_matches(".x");
        refused_in(Encoding::MessagePack, named, |job| {
            let (fields, _) = holder(job, path);
            fields.push((key.clone(), Value::Nil));
        });
    }
}

#[test]
fn text_that_is_not_utf_8_cannot_be_echoed_and_is_refused() {
    let body = Encoding::MessagePack
        .encode(&Value::Map(sound(Encoding::MessagePack)))
        .unwrap();
    let at = body.windows(8).position(|w| w == b"miner_id").unwrap();
    let bent = [&body[..at], b"\xffiner_id", &body[at + 8..]].concat();
    let refused = crate::protocol::job::decode(&bent, Encoding::MessagePack);
    let Err(crate::protocol::job::Undecodable::Named {
        context: None,
        failure,
        ..
    }) = refused
    else {
        panic!("{refused:?}")
    };
    assert!(failure.message.starts_with("context"), "{failure}");
}

#[test]
fn a_context_of_messagepack_comes_through_as_it_is() {
    let context = Value::Map(vec![
        (1.into(), Value::Binary(vec![0xff])),
        ("time".into(), Value::Ext(-1, vec![0; 4])),
        ("float".into(), Value::F32(0.1)),
    ]);
    let mut job = sound(Encoding::MessagePack);
    put(&mut job, "context", context.clone());
    let job = decoded(job, Encoding::MessagePack).unwrap();
    assert_eq!(job.context, Some(context.into()));
}
