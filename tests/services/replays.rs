//! Stored results: a redelivery is answered from Redis, and only what the candidate itself proves is stored.

use redis::Commands as _;
use serde_json::{Value, json};
use testkit::case::{cases, honest, honest_job};
use testkit::encoding::Encoding;
use testkit::package::VERSION;
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually, now_ms};

const SCORES: [&str; 9] = [
    "status",
    "score",
    "delta",
    "stderr",
    "ci95",
    "loss_before",
    "loss_after",
    "plan",
    "candidate",
];

#[test]
fn a_job_that_comes_again_is_answered_from_the_store_without_computing() {
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    let worker = stack.worker("w1");
    worker.ready();
    aggregator.collect_results();
    let mut job = honest().job("again");
    job["context"] = json!({"round": 1});
    aggregator.submit(&job);
    let first = aggregator.result("again");
    worker.heartbeat_when(SOON, "the job is counted", |r| r["jobs"]["scored"] == 1);
    let before = worker.next_heartbeat();
    assert_eq!(before["jobs"]["duplicates"], 0, "{}", before["jobs"]);

    job["context"] = json!({"round": 2});
    aggregator.submit_as(&job, Encoding::Json, |properties| properties);
    let second = aggregator.nth_result("again", 2);
    worker.heartbeat_when(SOON, "the duplicate is counted", |r| {
        r["jobs"]["duplicates"] == 1
    });
    let after = worker.next_heartbeat();
    assert_eq!(
        before["progress"]["counter"], after["progress"]["counter"],
        "it was computed again"
    );
    assert_eq!(second.message_id, first.message_id);
    assert_eq!(
        second.content_type.as_deref(),
        Some("application/json"),
        "re-encoded for its own job"
    );
    let (first, second) = (first.json(), second.json());
    for field in SCORES {
        assert_eq!(first[field], second[field], "{field}");
    }
    assert_eq!(
        (&first["context"], &second["context"]),
        (&json!({"round": 1}), &json!({"round": 2}))
    );

    // Another worker answers from the same store.
    worker.drain();
    let other = stack.worker("w2");
    other.ready();
    aggregator.submit(&job);
    let third = aggregator.nth_result("again", 3);
    assert_eq!(third.json()["delta"], first["delta"]);
    other.heartbeat_when(SOON, "the duplicate is counted there", |r| {
        r["jobs"]["duplicates"] == 1
    });
}

#[test]
fn the_stored_value_is_the_result_without_its_context_and_expires() {
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    let worker = stack.worker_with("w1", |s| s.set("results.ttl", "10m"));
    worker.ready();
    aggregator.collect_results();
    let mut job = honest().job("kept");
    job["context"] = json!({"secret_of_the_aggregator": true});
    aggregator.submit(&job);
    let result = aggregator.result("kept");
    let key = result.id().rsplit(':').next().expect("a KEY").to_owned();
    assert_eq!(
        stack.keys("result:*"),
        [stack.key(&format!("result:{key}"))]
    );
    let mut redis = stack.redis.connection();
    let stored: Vec<u8> = redis
        .get(stack.key(&format!("result:{key}")))
        .expect("the stored result");
    let found = |needle: &[u8]| stored.windows(needle.len()).any(|w| w == needle);
    assert!(found(b"kept") && found(b"delta"), "it is the result");
    assert!(!found(b"secret_of_the_aggregator"), "the context is stored");
    let ttl: i64 = redis
        .ttl(stack.key(&format!("result:{key}")))
        .expect("an expiry");
    assert!((500..=600).contains(&ttl), "EX is results.ttl: {ttl}");
    // Another plan is another question, and so is another submission.
    aggregator.submit(&honest_job("kept", "another nonce"));
    aggregator.nth_result("kept", 2);
    aggregator.submit(&honest().job("other"));
    aggregator.result("other");
    assert_eq!(stack.keys("result:*").len(), 3);
    assert_eq!(
        stack.keys("crash:*"),
        Vec::<String>::new(),
        "no mark outlives its attempt"
    );
}

#[test]
fn what_depends_on_the_worker_or_on_chance_is_not_stored() {
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    let malformed = cases()
        .iter()
        .find(|c| c.expect["code"] == "candidate_malformed" && c.file.is_some());
    let malformed = malformed.expect("cases.json has a malformed candidate");
    let limit = honest().bytes().len().max(malformed.bytes().len());
    let worker = stack.worker_with("w1", |s| s.set("candidates.max_inline_bytes", limit));
    worker.ready();
    aggregator.collect_results();
    let submit = |id: &str, bend: &dyn Fn(&mut Value)| {
        let mut job = honest().job(id);
        bend(&mut job);
        aggregator.submit(&job);
        let result = aggregator.result(id);
        (
            result.json()["error"]["code"]
                .as_str()
                .unwrap_or("")
                .to_owned(),
            result,
        )
    };
    let url = |j: &mut Value| {
        j["candidate"] = honest().job_by_url("x", "file:///etc/passwd")["candidate"].clone();
    };
    assert_eq!(
        submit("late", &|j| j["deadline_ms"] = json!(now_ms() - 1)).0,
        "deadline_exceeded"
    );
    assert_eq!(submit("forbidden", &url).0, "candidate_url_forbidden");
    assert_eq!(
        submit("older", &|j| j["model_version"] = json!(VERSION - 1)).0,
        "model_version_mismatch"
    );
    assert_eq!(
        submit("shard", &|j| j["validation"] = json!({"shards": [99_999]})).0,
        "unknown_shard"
    );
    let data = base64::Engine::encode(
        &base64::engine::general_purpose::STANDARD,
        vec![b' '; limit + 1],
    );
    assert_eq!(
        submit("large", &|j| j["candidate"]["data"] = json!(data)).0,
        "candidate_too_large"
    );
    assert_eq!(
        stack.keys("result:*"),
        Vec::<String>::new(),
        "something was stored"
    );

    // What the bytes prove is.
    let job = malformed.job("malformed");
    aggregator.submit(&job);
    let message = aggregator.result("malformed");
    assert_eq!(message.json()["error"]["code"], "candidate_malformed");
    let key = message.id().rsplit(':').next().expect("a KEY").to_owned();
    eventually(SOON, "the proof is stored", || {
        stack.keys("result:*") == [stack.key(&format!("result:{key}"))]
    });
    aggregator.submit(&job);
    let copy = aggregator.nth_result("malformed", 2);
    assert_eq!(copy.message_id, message.message_id);
    worker.heartbeat_when(SOON, "the duplicate is counted", |r| {
        r["jobs"]["duplicates"] == 1
    });
}
