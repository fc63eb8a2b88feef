//! Sound jobs that this worker cannot take: each with its own code, and only what may heal is retried.

use serde_json::{Value, json};
use testkit::case::honest;
use testkit::package::{MODEL, VERSION};
use testkit::stack::Stack;
use testkit::wait::now_ms;

#[test]
fn a_sound_job_that_this_worker_cannot_take_is_answered_with_its_own_code() {
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    let worker = stack.worker_with("w1", |s| {
        s.set("amqp.retry_delays", r#"["100ms", "200ms", "300ms"]"#)
    });
    worker.ready();
    aggregator.collect_results();
    let submit = |id: &str, bend: &dyn Fn(&mut Value)| {
        let mut job = honest().job(id);
        bend(&mut job);
        aggregator.submit(&job);
    };
    submit("other-model", &|j| j["model"] = json!("another"));
    submit("right-model", &|j| j["model"] = json!(MODEL));
    submit("older", &|j| j["model_version"] = json!(VERSION - 1));
    submit("newer", &|j| j["model_version"] = json!(VERSION + 1));
    submit("newer-in-a-hurry", &|j| {
        j["model_version"] = json!(VERSION + 1);
        j["deadline_ms"] = json!(now_ms() + 20);
    });
    submit("no-such-shard", &|j| {
        j["validation"] = json!({"shards": [987_654]})
    });
    submit("late", &|j| j["deadline_ms"] = json!(now_ms() - 1000));
    submit("in-time", &|j| j["deadline_ms"] = json!(now_ms() + 600_000));
    submit("wrong-digest", &|j| {
        j["candidate"]["sha256"] = json!("0".repeat(64))
    });
    submit("wrong-size", &|j| j["candidate"]["size"] = json!(3));

    let answer = |id: &str| {
        let result = aggregator.result(id).json();
        (
            result["status"].as_str().unwrap_or("").to_owned(),
            result["error"].clone(),
        )
    };
    let expect = |id: &str, status: &str, code: &str| {
        let (got, error) = answer(id);
        assert_eq!(
            (got.as_str(), error["code"].as_str()),
            (status, Some(code)),
            "{id}: {error}"
        );
        error
    };
    expect("other-model", "rejected", "model_mismatch");
    let older = expect("older", "rejected", "model_version_mismatch");
    assert_eq!(
        older["detail"],
        json!({"worker": VERSION, "job": VERSION - 1})
    );
    let shard = expect("no-such-shard", "rejected", "unknown_shard");
    assert_eq!(shard["detail"]["missing"], json!([987_654]));
    assert!(
        shard["detail"]["available"]
            .as_array()
            .is_some_and(|ids| !ids.is_empty()),
        "{shard}"
    );
    expect("late", "failed", "deadline_exceeded");
    expect("newer-in-a-hurry", "failed", "deadline_exceeded");
    expect("wrong-digest", "rejected", "candidate_digest_mismatch");
    expect("wrong-size", "rejected", "candidate_digest_mismatch");
    assert_eq!(answer("right-model").0, "scored");
    assert_eq!(answer("in-time").0, "scored");

    expect("newer", "failed", "model_version_unavailable");
    assert_eq!(
        aggregator.result("newer").json()["attempt"],
        4,
        "three rungs after the first try"
    );
    let parked = aggregator.take_parked();
    assert_eq!(
        parked.headers.get("x-error-code").map(String::as_str),
        Some("model_version_unavailable")
    );
    assert_eq!(
        parked.message_pack()["submission_id"],
        "newer".into(),
        "the parked copy is the job"
    );
    worker.drain();
    aggregator.expect_empty(&stack.jobs_queue());
    assert_eq!(
        aggregator.depth(&stack.object(&format!("dead.{MODEL}"))),
        Some((0, 0)),
        "nothing else parked"
    );
}
