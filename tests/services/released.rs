//! Clients of released versions: the jobs that they sent have the answers that they had.

use std::path::{Path, PathBuf};

use lapin::BasicProperties;
use serde_json::Value;
use testkit::encoding::Encoding;
use testkit::package::{Package, fixtures};
use testkit::stack::Stack;

/// Jobs of all released versions, each with its result of that time.
fn jobs() -> Vec<(PathBuf, PathBuf)> {
    let released = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/released");
    let entries = |folder: &Path| std::fs::read_dir(folder).expect("a folder");
    let versions = entries(&released).map(|entry| entry.expect("an entry").path());
    let mut found = Vec::new();
    for version in versions.filter(|path| path.is_dir()) {
        for entry in entries(&version.join("messages")) {
            let job = entry.expect("an entry").path();
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
