//! Versions beside each other: jobs of released clients have the answers that they had, and today's client minds what the
//! other workers know.

use std::path::{Path, PathBuf};

use lapin::BasicProperties;
use redis::Commands as _;
use scorer::fleet::client::{Client, Outcome};
use scorer::protocol::message::{JobMessage, V1, ValidateMessage};
use serde_json::{Value, json};
use testkit::aggregator::runtime;
use testkit::encoding::Encoding;
use testkit::package::{MODEL, Package, VERSION, fixtures};
use testkit::stack::Stack;
use testkit::wait::{now_ms, secs};

use super::client::{config, empty};

/// The folders of all released versions.
fn versions() -> Vec<PathBuf> {
    let released = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/released");
    let mut found = paths(&released);
    found.retain(|path| path.is_dir());
    found
}

fn paths(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    entries
        .map(|entry| entry.expect("an entry").path())
        .collect()
}

/// Jobs of all released versions, each with its result of that time.
fn jobs() -> Vec<(PathBuf, PathBuf)> {
    let mut found = Vec::new();
    for version in versions() {
        for job in paths(&version.join("messages")) {
            let name = job.file_name().expect("a name").to_string_lossy();
            let result = job.with_file_name(name.replace("score_job", "score_result"));
            // Examples of the schemas have none.
            if name.starts_with("score_job") && result.is_file() {
                found.push((job, result));
            }
        }
    }
    found
}

fn encoding_of(path: &Path) -> Encoding {
    match path.extension().is_some_and(|end| end == "json") {
        true => Encoding::Json,
        false => Encoding::MessagePack,
    }
}

fn decoded(encoding: Encoding, body: &[u8]) -> Value {
    match encoding {
        Encoding::Json => serde_json::from_slice(body).expect("JSON"),
        Encoding::MessagePack => rmp_serde::from_slice(body).expect("MessagePack"),
    }
}

#[test]
fn jobs_of_released_versions_are_answered_as_they_were() {
    let objective = ["--objective", "graph_loss"];
    let from = fixtures().join("digits");
    let package = Package::made(&from, "graph.onnx", "checkpoint.safetensors", &objective);
    let stack = Stack::shared();
    let worker = stack.worker_on("w1", &package.path());
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let jobs = jobs();
    assert!(jobs.len() > 10, "{jobs:?}");
    for (job, result) in jobs {
        let encoding = encoding_of(&job);
        let read = |path: &Path| std::fs::read(path).expect("a file");
        let then: Value = decoded(encoding, &read(&result));
        let properties =
            BasicProperties::default().with_content_type(encoding.content_type().into());
        aggregator.publish(&read(&job), properties);
        let id = then["submission_id"].as_str().expect("a name");
        let answer = aggregator.result(id);
        assert_eq!(
            answer.content_type.as_deref(),
            Some(encoding.content_type())
        );
        let now = answer.json();
        let same = [
            "v",
            "kind",
            "context",
            "model",
            "model_version",
            "package_id",
            "weights_id",
            "status",
            "plan",
            "windows",
            "tokens",
        ];
        for field in same {
            assert_eq!(now[field], then[field], "{}: {field}", job.display());
        }
        assert_eq!(
            now["error"]["code"],
            then["error"]["code"],
            "{}",
            job.display()
        );
        assert_eq!(now["candidate"]["sha256"], then["candidate"]["sha256"]);
        let sign = |result: &Value| result["delta"].as_f64().map(|delta| delta > 0.0);
        assert_eq!(sign(&now), sign(&then), "{}", job.display());
    }
}

/// Makes a record live beside the real ones, for as long as the test takes.
fn add(stack: &Stack, id: &str, record: &Value) {
    let mut redis = stack.redis.connection();
    let _: () = redis
        .set(stack.key(&format!("worker:{id}")), record.to_string())
        .expect("a record");
    let _: () = redis
        .zadd(stack.key("workers"), id, now_ms() + 300_000)
        .expect("a beat");
}

/// The name of the job that is answered next.
fn answered(client: &mut Client) -> String {
    let next = runtime().block_on(async { tokio::time::timeout(secs(60), client.next()).await });
    match next.expect("in time") {
        Some(Outcome::Answered(result)) => result.submission_id,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_client_asks_for_what_every_live_worker_knows_and_for_nothing_else() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    let mut record = worker.ready();
    for (n, version) in versions().iter().enumerate() {
        let kept = std::fs::read(version.join("messages/heartbeat.v1-ready.json"));
        let kept = serde_json::from_slice(&kept.expect("a file")).expect("JSON");
        add(&stack, &format!("released-{n}"), &kept);
    }
    let mut client = Client::new(config(&stack), MODEL);
    let validate = |name: &str| {
        JobMessage::Validate(ValidateMessage {
            v: V1,
            submission_id: name.to_owned(),
            model: None,
            model_version: Some(VERSION),
            validation: None,
            deadline_ms: None,
            context: None,
        })
    };
    client.submit(&validate("first")).expect("a job");
    assert_eq!(answered(&mut client), "first");
    runtime().block_on(async {
        // The answer is acknowledged when the next one is asked for.
        assert_eq!(client.next().await, None);
        client.close().await;
    });

    record["accepts"] = json!(["score"]);
    add(&stack, "foreign", &record);
    let mut client = Client::new(config(&stack), MODEL);
    client.submit(&validate("held")).expect("a job");
    client.submit(&empty("later")).expect("a job");
    assert_eq!(answered(&mut client), "later");
    let _: () = stack
        .redis
        .connection()
        .zrem(stack.key("workers"), "foreign")
        .expect("it is gone");
    assert_eq!(answered(&mut client), "held");
}

#[test]
fn a_worker_says_all_that_released_workers_knew() {
    let stack = Stack::shared();
    let record = stack.worker("w1").ready();
    let says = record["accepts"].as_array().expect("a list").clone();
    for version in versions() {
        let knew = std::fs::read(version.join("accepts.json")).expect("a file");
        let knew: Vec<Value> = serde_json::from_slice(&knew).expect("words");
        assert!(knew.iter().all(|word| says.contains(word)), "{knew:?}");
    }
}
