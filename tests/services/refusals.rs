//! Bad jobs that can be answered: the code, the field in the message, nothing parked, nothing lost.

use serde_json::{Value, json};
use testkit::case::honest;
use testkit::encoding::Encoding;
use testkit::package::MODEL;
use testkit::stack::Stack;
use testkit::wait::secs;

/// What a bent job must be answered with.
struct Bent {
    name: &'static str,
    /// Must be in the message.
    names: &'static str,
    bend: fn(&mut Value),
}

const INVALID: &[Bent] = &[
    Bent {
        name: "unknown-field",
        names: "colour",
        bend: |j| j["colour"] = json!("red"),
    },
    Bent {
        name: "unknown-in-candidate",
        names: "colour",
        bend: |j| j["candidate"]["colour"] = json!("red"),
    },
    Bent {
        name: "unknown-in-validation",
        names: "colour",
        bend: |j| j["validation"] = json!({"colour": "red"}),
    },
    Bent {
        name: "version-2",
        names: "v",
        bend: |j| j["v"] = json!(2),
    },
    Bent {
        name: "no-kind",
        names: "kind",
        bend: |j| drop(j.as_object_mut().map(|j| j.remove("kind"))),
    },
    Bent {
        name: "odd-kind",
        names: "kind",
        bend: |j| j["kind"] = json!("guess"),
    },
    Bent {
        name: "no-candidate",
        names: "candidate",
        bend: |j| drop(j.as_object_mut().map(|j| j.remove("candidate"))),
    },
    Bent {
        name: "negative-version",
        names: "model_version",
        bend: |j| j["model_version"] = json!(-1),
    },
    Bent {
        name: "odd-format",
        names: "format",
        bend: |j| j["candidate"]["format"] = json!("pickle"),
    },
    Bent {
        name: "odd-semantics",
        names: "semantics",
        bend: |j| j["candidate"]["semantics"] = json!("sum"),
    },
    Bent {
        name: "no-rate",
        names: "learning_rate",
        bend: |j| without_rate(j),
    },
    Bent {
        name: "zero-rate",
        names: "learning_rate",
        bend: |j| j["candidate"]["learning_rate"] = json!(0.0),
    },
    Bent {
        name: "negative-rate",
        names: "learning_rate",
        bend: |j| j["candidate"]["learning_rate"] = json!(-0.5),
    },
    Bent {
        name: "rate-of-a-diff",
        names: "learning_rate",
        bend: |j| j["candidate"]["semantics"] = json!("param_diff"),
    },
    Bent {
        name: "neither",
        names: "url",
        bend: |j| drop(candidate(j).remove("data")),
    },
    Bent {
        name: "both",
        names: "url",
        bend: |j| both(j),
    },
    Bent {
        name: "url-without-digest",
        names: "sha256",
        bend: |j| url_only(j, "sha256"),
    },
    Bent {
        name: "url-without-size",
        names: "size",
        bend: |j| url_only(j, "size"),
    },
    Bent {
        name: "short-digest",
        names: "sha256",
        bend: |j| j["candidate"]["sha256"] = json!("12"),
    },
    Bent {
        name: "repeated-shard",
        names: "shards",
        bend: |j| j["validation"] = json!({"shards": [1, 1]}),
    },
    Bent {
        name: "long-nonce",
        names: "nonce",
        bend: |j| j["validation"] = json!({"nonce": "n".repeat(65)}),
    },
    Bent {
        name: "context-list",
        names: "context",
        bend: |j| j["context"] = json!([1]),
    },
    Bent {
        name: "context-too-big",
        names: "context",
        bend: |j| j["context"] = json!({"long": "x".repeat(4200)}),
    },
    Bent {
        name: "text-deadline",
        names: "deadline_ms",
        bend: |j| j["deadline_ms"] = json!("tomorrow"),
    },
];

fn candidate(job: &mut Value) -> &mut serde_json::Map<String, Value> {
    job["candidate"]
        .as_object_mut()
        .expect("a candidate is a map")
}

fn without_rate(job: &mut Value) {
    candidate(job).remove("learning_rate");
}

fn both(job: &mut Value) {
    url_fields(job);
}

fn url_only(job: &mut Value, without: &str) {
    url_fields(job);
    candidate(job).remove("data");
    candidate(job).remove(without);
}

fn url_fields(job: &mut Value) {
    job["candidate"]["url"] = json!("file:///nowhere");
    job["candidate"]["sha256"] = json!("0".repeat(64));
    job["candidate"]["size"] = json!(10);
}

#[test]
fn a_job_that_breaks_the_schema_is_answered_naming_the_field() {
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    let worker = stack.worker("w1");
    worker.ready();
    aggregator.collect_results();
    for (n, bent) in INVALID.iter().enumerate() {
        let mut job = honest().job(bent.name);
        if bent.name != "context-list" && bent.name != "context-too-big" {
            job["context"] = json!({"miner": n});
        }
        (bent.bend)(&mut job);
        let encoding = if n % 2 == 0 {
            Encoding::MessagePack
        } else {
            Encoding::Json
        };
        aggregator.submit_as(&job, encoding, |properties| properties);
    }
    let ids: Vec<String> = INVALID.iter().map(|b| b.name.to_owned()).collect();
    aggregator.all_results(&ids, secs(60));
    for (n, bent) in INVALID.iter().enumerate() {
        let message = aggregator.result(bent.name);
        let (result, name) = (message.json(), bent.name);
        assert_eq!(
            (&result["status"], &result["error"]["code"]),
            (&json!("rejected"), &json!("invalid_job")),
            "{name}"
        );
        let said = result["error"]["message"].as_str().unwrap_or_default();
        assert!(
            said.contains(bent.names),
            "{name}: {said:?} does not name {}",
            bent.names
        );
        assert_eq!(result["error"]["retryable"], false, "{name}");
        if bent.names != "context" {
            assert_eq!(
                result["context"],
                json!({"miner": n}),
                "{name}: a sound context is echoed"
            );
        }
        assert_eq!(message.routing_key, format!("{MODEL}.rejected"), "{name}");
        assert!(
            message.id().starts_with(&format!("{name}:")) && message.id().ends_with(":rejected:"),
            "{}",
            message.id()
        );
    }
    worker.drain();
    aggregator.expect_empty(&stack.jobs_queue());
    assert_eq!(
        aggregator.depth(&stack.object(&format!("dead.{MODEL}"))),
        Some((0, 0)),
        "nothing parked"
    );
}
