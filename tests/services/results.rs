//! Every case comes back through the broker with the verdict and the losses of the independent table.

use serde_json::json;
use testkit::aggregator::snapshot;
use testkit::case::{Case, cases, honest, honest_job};
use testkit::digest::digest;
use testkit::encoding::{Encoding, message_pack, pack};
use testkit::message::Message;
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually, secs};

use super::verdict::{check_envelope, differences};

#[test]
fn every_case_comes_back_with_its_verdict_and_its_losses() {
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    let worker = stack.worker_with("w1", |s| {
        s.set("amqp.retry_delays", r#"["50ms", "60ms", "70ms"]"#)
    });
    worker.ready();
    aggregator.collect_results();
    let named: Vec<(String, &Case)> = cases()
        .iter()
        .enumerate()
        .map(|(n, c)| (format!("case-{n}"), c))
        .collect();
    assert!(
        named.len() > 10,
        "cases.json is suspiciously short: {}",
        named.len()
    );
    for (id, case) in &named {
        let bytes = case.file.is_some().then(|| case.bytes());
        let claim_is_false = case.name == "malformed-digest";
        if let (Some(bytes), Some(want), false) = (&bytes, &case.sha256, claim_is_false) {
            assert_eq!(
                &digest(bytes),
                want,
                "{}: not the file that the table is about",
                case.name
            );
        }
        aggregator.submit(&case.job(id));
    }
    let ids: Vec<String> = named.iter().map(|(id, _)| id.clone()).collect();
    aggregator.all_results(&ids, secs(90));
    let mut wrong = Vec::new();
    for (id, case) in &named {
        let result = aggregator.result(id);
        wrong.extend(
            differences(case, &result.json())
                .into_iter()
                .map(|d| format!("{}: {d}", case.name)),
        );
        check_envelope(&result, case);
    }
    assert!(
        wrong.is_empty(),
        "{} differences:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    worker.drain();
    aggregator.expect_empty(&stack.jobs_queue());
    assert_eq!(
        aggregator.results().len(),
        ids.len(),
        "a job was answered more than once"
    );
}

#[test]
fn a_json_job_is_answered_in_json_with_equal_numbers() {
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    let worker = stack.worker("w1");
    worker.ready();
    aggregator.collect_results();
    aggregator.submit(&honest().job("packed"));
    aggregator.submit_as(&honest().job("json"), Encoding::Json, |properties| {
        properties
    });
    let (packed, json) = (aggregator.result("packed"), aggregator.result("json"));
    assert_eq!(json.content_type.as_deref(), Some("application/json"));
    assert_eq!(packed.content_type.as_deref(), Some("application/msgpack"));
    let (packed, json) = (packed.json(), json.json());
    for field in [
        "status",
        "score",
        "delta",
        "loss_before",
        "loss_after",
        "stderr",
        "ci95",
        "plan",
        "candidate",
    ] {
        assert_eq!(packed[field], json[field], "{field}");
    }
    assert_eq!(json["status"], "scored", "{json}");
}

#[test]
fn a_reply_queue_gets_a_second_copy_with_the_correlation_id() {
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    let worker = stack.worker("w1");
    worker.ready();
    aggregator.collect_results();
    let (queue, inbox) = aggregator.reply_queue();
    aggregator.submit_as(
        &honest().job("asked"),
        Encoding::MessagePack,
        |properties| {
            properties
                .with_reply_to(queue.as_str().into())
                .with_correlation_id("number 5".into())
        },
    );
    // Nobody listens here: the copy is lost, the durable one is not, and the job is done with.
    aggregator.submit_as(
        &honest().job("unheard"),
        Encoding::MessagePack,
        |properties| {
            properties
                .with_reply_to("nobody.is.here".into())
                .with_correlation_id("number 6".into())
        },
    );
    let durable = aggregator.result("asked");
    eventually(SOON, "the reply arrives", || !snapshot(&inbox).is_empty());
    let reply = snapshot(&inbox).remove(0);
    assert_eq!(reply.correlation_id.as_deref(), Some("number 5"));
    assert_eq!(reply.message_id, durable.message_id);
    assert_eq!(reply.body, durable.body, "both copies are the same result");
    assert_eq!(aggregator.result("unheard").json()["status"], "scored");
    worker.drain();
    aggregator.expect_empty(&stack.jobs_queue());
    assert_eq!(snapshot(&inbox).len(), 1, "one reply for one job");
}

#[test]
fn the_context_is_echoed_untouched_in_both_encodings() {
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    let worker = stack.worker("w1");
    worker.ready();
    aggregator.collect_results();
    let context = json!({"miner_id": "m-1", "epoch_id": 18_446_744_073_709_551_615_u64, "shard_id": -3,
                         "unknown": {"deep": [1, 2.5, null, true, "ü"]}, "": ""});
    let mut job = honest_job("in-json", "context");
    job["context"] = context.clone();
    aggregator.submit_as(&job, Encoding::Json, |properties| properties);
    assert_eq!(aggregator.result("in-json").json()["context"], context);
    // MessagePack can say more than JSON: bytes, and keys that are no text. From here on results are
    // not read as JSON.
    let odd = rmpv::Value::Map(vec![
        ("bytes".into(), rmpv::Value::Binary(vec![0, 255, 7])),
        (5.into(), "five".into()),
        ("f32".into(), rmpv::Value::F32(0.1)),
    ]);
    job["submission_id"] = json!("in-msgpack");
    let rmpv::Value::Map(mut fields) = message_pack(&job) else {
        panic!("a job is a map")
    };
    fields.retain(|(key, _)| key.as_str() != Some("context"));
    fields.push(("context".into(), odd.clone()));
    aggregator.publish(
        &pack(&rmpv::Value::Map(fields)),
        lapin::BasicProperties::default(),
    );
    let find = |results: Vec<Message>| {
        results
            .into_iter()
            .find(|m| m.message_pack()["submission_id"] == "in-msgpack".into())
    };
    eventually(SOON, "the result of in-msgpack", || {
        let packed = aggregator
            .results()
            .into_iter()
            .filter(|m| m.content_type.as_deref() == Some("application/msgpack"));
        find(packed.collect()).is_some_and(|m| m.message_pack()["context"] == odd)
    });
}
