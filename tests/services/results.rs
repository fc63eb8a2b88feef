//! Every case comes back through the broker with the verdict and the losses of the independent table.

use serde_json::{Value, json};

use crate::support::aggregator::{Message, snapshot};
use crate::support::jobs::{Case, Encoding, cases, digest, honest, honest_job, message_pack, pack};
use crate::support::package::{MODEL, VERSION};
use crate::support::stack::Stack;
use crate::support::wait::{SOON, eventually, now_ms, secs};

/// How far a loss may be from the generator's.
const TOLERANCE: f64 = 2e-6;

#[test]
fn every_case_comes_back_with_its_verdict_and_its_losses() {
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    let worker = stack.worker_with("w1", |s| s.set("amqp.retry_delays", r#"["50ms", "50ms", "50ms"]"#));
    worker.ready();
    aggregator.collect_results();
    let named: Vec<(String, &Case)> = cases().iter().enumerate().map(|(n, c)| (format!("case-{n}"), c)).collect();
    assert!(named.len() > 10, "cases.json is suspiciously short: {}", named.len());
    for (id, case) in &named {
        let bytes = case.file.is_some().then(|| case.bytes());
        if let (Some(bytes), Some(want)) = (&bytes, &case.sha256) {
            assert_eq!(&digest(bytes), want, "{}: not the file that the table is about", case.name);
        }
        aggregator.submit(&case.job(id));
    }
    let ids: Vec<String> = named.iter().map(|(id, _)| id.clone()).collect();
    aggregator.all_results(&ids, secs(90));
    let mut wrong = Vec::new();
    for (id, case) in &named {
        let result = aggregator.result(id);
        wrong.extend(differences(case, &result.json()).into_iter().map(|d| format!("{}: {d}", case.name)));
        check_envelope(&result, case);
    }
    assert!(wrong.is_empty(), "{} differences:\n{}", wrong.len(), wrong.join("\n"));
    worker.drain();
    assert_eq!(aggregator.depth(&stack.jobs_queue()), Some((0, 0)), "something was not acknowledged");
    assert_eq!(aggregator.results().len(), ids.len(), "a job was answered more than once");
}

/// What a result says differently from the table.
fn differences(case: &Case, result: &Value) -> Vec<String> {
    let (expected, mut found) = (&case.expect, Vec::new());
    if result["status"] != expected["status"] {
        return vec![format!("status {} instead of {}: {}", result["status"], expected["status"], result["error"])];
    }
    if let Some(code) = expected["code"].as_str()
        && result["error"]["code"] != code
    {
        found.push(format!("code {} instead of {code}", result["error"]["code"]));
    }
    for name in ["loss_before", "loss_after", "delta", "score", "stderr", "loss"] {
        let Some(want) = expected[name].as_f64() else { continue };
        match result[name].as_f64() {
            Some(got) if (got - want).abs() <= TOLERANCE => {}
            got => found.push(format!("{name} {got:?} instead of {want}")),
        }
    }
    for name in ["windows", "tokens", "plan"] {
        if !expected[name].is_null() && result[name] != expected[name] {
            found.push(format!("{name} {} instead of {}", result[name], expected[name]));
        }
    }
    found
}

/// The fields every result of contract 2 has, and what depends on its status.
fn check_envelope(message: &Message, case: &Case) {
    let (result, name) = (message.json(), &case.name);
    assert_eq!(message.content_type.as_deref(), Some("application/msgpack"), "{name}");
    let status = result["status"].as_str().expect("a status");
    assert_eq!(message.routing_key, format!("{MODEL}.{status}"), "{name}");
    assert_eq!(result["v"], 1, "{name}");
    assert_eq!(result["kind"], if case.is_validate() { "validate" } else { "score" }, "{name}");
    assert_eq!(result["model"], MODEL, "{name}");
    for field in ["model_version", "attempt", "scored_at_ms"] {
        assert!(result[field].is_u64(), "{name}: {field} is {}", result[field]);
    }
    for field in ["weights_id", "package_id"] {
        assert!(is_digest(&result[field]), "{name}: {field} is {}", result[field]);
    }
    assert_eq!(result["worker_id"], "w1", "{name}");
    assert!(result["incarnation"].as_str().is_some_and(|i| uuid::Uuid::parse_str(i).is_ok()), "{name}");
    let parts: Vec<&str> = message.id().rsplitn(4, ':').collect();
    let [key, said, _version, id] = parts[..] else { panic!("{name}: message_id {}", message.id()) };
    assert_eq!((said, id), (status, result["submission_id"].as_str().expect("an id")), "{name}");
    match (status, case.is_validate()) {
        ("scored", false) => check_scored(&result, name, key),
        ("scored", true) => {
            assert!(result["loss"].is_f64() && result["windows"].is_u64() && result["tokens"].is_u64(), "{name}");
            assert!(is_digest(&result["plan"]), "{name}");
        }
        _ => {
            let error = &result["error"];
            assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()), "{name}: {error}");
            assert!(error["retryable"].is_boolean() && error["code"].is_string(), "{name}: {error}");
        }
    }
}

fn check_scored(result: &Value, name: &str, key: &str) {
    let number = |field: &str| result[field].as_f64().unwrap_or_else(|| panic!("{name}: {field} is {}", result[field]));
    let delta = number("delta");
    assert!((number("loss_before") - number("loss_after") - delta).abs() < 1e-9, "{name}: delta {delta}");
    assert_eq!(number("score"), delta.max(0.0), "{name}: score");
    assert_eq!(result["model_version"], VERSION, "{name}");
    assert!(is_digest(&json!(key)), "{name}: KEY of the message_id is {key}");
    assert!(is_digest(&result["plan"]) && is_digest(&result["candidate"]["sha256"]), "{name}");
    let windows = result["windows"].as_u64().expect("windows");
    assert!(windows > 0 && result["tokens"].as_u64() >= Some(windows), "{name}");
    if windows >= 2 {
        let (low, high) = (result["ci95"][0].as_f64(), result["ci95"][1].as_f64());
        assert!(number("stderr") >= 0.0 && low <= Some(delta) && high >= Some(delta), "{name}: {}", result["ci95"]);
    }
    for field in ["tensors", "entries", "effective_entries"] {
        assert!(result["candidate"][field].is_u64(), "{name}: candidate.{field}");
    }
    assert!(result["candidate"]["l2_norm"].is_number(), "{name}: candidate.l2_norm");
    assert_eq!(result["execution_provider"], "CPUExecutionProvider", "{name}");
    assert!(result["device"].is_string() && result["precision"].is_string(), "{name}");
    for stage in ["queued", "fetch", "decode", "apply", "forward", "restore", "total"] {
        assert!(result["timings_ms"][stage].is_number(), "{name}: timings_ms.{stage}");
    }
    let scored_at = result["scored_at_ms"].as_u64().expect("scored_at_ms");
    assert!(scored_at <= now_ms() && scored_at + 300_000 > now_ms(), "{name}: scored_at_ms {scored_at}");
}

fn is_digest(value: &Value) -> bool {
    value.as_str().is_some_and(|s| s.len() == 64 && s.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[test]
fn a_json_job_is_answered_in_json_with_equal_numbers() {
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    let worker = stack.worker("w1");
    worker.ready();
    aggregator.collect_results();
    aggregator.submit(&honest().job("packed"));
    aggregator.submit_as(&honest().job("json"), Encoding::Json, |properties| properties);
    let (packed, json) = (aggregator.result("packed"), aggregator.result("json"));
    assert_eq!(json.content_type.as_deref(), Some("application/json"));
    assert_eq!(packed.content_type.as_deref(), Some("application/msgpack"));
    let (packed, json) = (packed.json(), json.json());
    for field in ["status", "score", "delta", "loss_before", "loss_after", "stderr", "ci95", "plan", "candidate"] {
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
    aggregator.submit_as(&honest().job("asked"), Encoding::MessagePack, |properties| {
        properties.with_reply_to(queue.as_str().into()).with_correlation_id("number 5".into())
    });
    // Nobody listens here: the copy is lost, the durable one is not, and the job is done with.
    aggregator.submit_as(&honest().job("unheard"), Encoding::MessagePack, |properties| {
        properties.with_reply_to("nobody.is.here".into()).with_correlation_id("number 6".into())
    });
    let durable = aggregator.result("asked");
    eventually(SOON, "the reply arrives", || !snapshot(&inbox).is_empty());
    let reply = snapshot(&inbox).remove(0);
    assert_eq!(reply.correlation_id.as_deref(), Some("number 5"));
    assert_eq!(reply.message_id, durable.message_id);
    assert_eq!(reply.body, durable.body, "both copies are the same result");
    assert_eq!(aggregator.result("unheard").json()["status"], "scored");
    worker.drain();
    assert_eq!(aggregator.depth(&stack.jobs_queue()), Some((0, 0)));
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
    // MessagePack can say more than JSON: bytes, and keys that are no text.
    let odd = rmpv::Value::Map(vec![
        ("bytes".into(), rmpv::Value::Binary(vec![0, 255, 7])),
        (5.into(), "five".into()),
        ("f32".into(), rmpv::Value::F32(0.1)),
    ]);
    job["submission_id"] = json!("in-msgpack");
    let rmpv::Value::Map(mut fields) = message_pack(&job) else { panic!("a job is a map") };
    fields.retain(|(key, _)| key.as_str() != Some("context"));
    fields.push(("context".into(), odd.clone()));
    aggregator.publish(&pack(&rmpv::Value::Map(fields)), lapin::BasicProperties::default());
    assert_eq!(aggregator.result("in-json").json()["context"], context);
    let find = |results: Vec<Message>| results.into_iter().find(|m| m.message_pack()["submission_id"] == "in-msgpack".into());
    eventually(SOON, "the result of in-msgpack", || {
        let packed = aggregator.results().into_iter().filter(|m| m.content_type.as_deref() == Some("application/msgpack"));
        find(packed.collect()).is_some_and(|m| m.message_pack()["context"] == odd)
    });
}
