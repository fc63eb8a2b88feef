//! Constant load: jobs for the version that is live when they are submitted, and what must become
//! of each.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::{Value, json};
use testkit::aggregator::Aggregator;
use testkit::case::honest;
use testkit::package::VERSION;
use testkit::stack::Stack;
use testkit::wait::{eventually, secs};

use crate::plan::Publisher;

/// Between two jobs.
const PAUSE: Duration = Duration::from_millis(100);

/// A thread that submits.
pub(crate) struct Load {
    live: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(Aggregator, Vec<(String, u64)>)>,
}

/// Everything that was submitted.
pub(crate) struct Jobs {
    aggregator: Aggregator,
    /// Name, and the version that it named.
    submitted: Vec<(String, u64)>,
}

impl Load {
    pub(crate) fn start(stack: &Stack) -> Self {
        let aggregator = stack.aggregator();
        aggregator.collect_results();
        let (live, stop) = (
            Arc::new(AtomicU64::new(VERSION)),
            Arc::new(AtomicBool::new(false)),
        );
        let (named, stopping) = (Arc::clone(&live), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut submitted = Vec::new();
            while !stopping.load(Ordering::Relaxed) {
                // Every fifth is for the version to come, which may never be.
                let n = submitted.len() as u64;
                let version = named.load(Ordering::Relaxed) + u64::from(n % 5 == 4);
                let name = format!("job-{n}");
                let mut job = honest().job(&name);
                job["model_version"] = json!(version);
                aggregator.submit(&job);
                submitted.push((name, version));
                std::thread::sleep(PAUSE);
            }
            (aggregator, submitted)
        });
        Self { live, stop, thread }
    }

    /// From now on jobs are for this version.
    pub(crate) fn now_live(&self, version: u64) {
        self.live.store(version, Ordering::Relaxed);
    }

    pub(crate) fn stop(self) -> Jobs {
        self.stop.store(true, Ordering::Relaxed);
        let (aggregator, submitted) = self.thread.join().expect("the submitting thread");
        Jobs {
            aggregator,
            submitted,
        }
    }
}

impl Jobs {
    /// Every job has one verdict, and it is of the version that the job named.
    pub(crate) fn check(&self, stack: &Stack, publisher: &Publisher) {
        let answered = || self.verdicts().len();
        let all = self.submitted.len();
        eventually(secs(120), &format!("{all} verdicts"), || answered() >= all);
        let verdicts = self.verdicts();
        let mut offline: BTreeMap<u64, Value> = BTreeMap::new();
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for (name, version) in &self.submitted {
            let verdict = &verdicts[name];
            let code = verdict["error"]["code"].as_str();
            *counts
                .entry(code.unwrap_or("scored").to_owned())
                .or_default() += 1;
            match code {
                None => {
                    let expected = offline
                        .entry(*version)
                        .or_insert_with(|| recomputed(stack, publisher, *version));
                    is_of(verdict, expected, publisher, *version);
                }
                Some("model_version_mismatch") => {
                    let worker = verdict["error"]["detail"]["worker"].as_u64();
                    assert!(worker > Some(*version), "{verdict}");
                }
                // Only for what is not live at the end.
                Some("model_version_unavailable") => {
                    assert!(*version > publisher.live, "{verdict}");
                }
                Some(_) => panic!("{verdict}"),
            }
        }
        eprintln!(
            "{all} jobs, each with one verdict: {counts:?}; {} versions recomputed offline",
            offline.len()
        );
        assert!(
            offline.len() > 1,
            "jobs of several versions are scored: {counts:?}"
        );
    }

    /// By job; copies of one verdict are the same.
    fn verdicts(&self) -> BTreeMap<String, Value> {
        let mut verdicts: BTreeMap<String, (String, Value)> = BTreeMap::new();
        for message in self.aggregator.results() {
            let verdict = message.json();
            let name = verdict["submission_id"]
                .as_str()
                .expect("a name")
                .to_owned();
            let known = verdicts
                .entry(name)
                .or_insert((message.id().to_owned(), verdict.clone()));
            assert_eq!(
                known.0,
                message.id(),
                "two verdicts: {} and {verdict}",
                known.1
            );
            for field in ["status", "delta", "weights_id"] {
                assert_eq!(known.1[field], verdict[field]);
            }
        }
        verdicts
            .into_iter()
            .map(|(name, (_, verdict))| (name, verdict))
            .collect()
    }
}

fn recomputed(stack: &Stack, publisher: &Publisher, version: u64) -> Value {
    let package = publisher.site.trainer.package(version);
    stack.offline(honest(), &package.path())
}

#[track_caller]
fn is_of(verdict: &Value, expected: &Value, publisher: &Publisher, version: u64) {
    assert_eq!(verdict["model_version"], version);
    assert_eq!(
        verdict["weights_id"],
        publisher.site.trainer.weights_id(version)
    );
    for field in [
        "delta",
        "stderr",
        "loss_before",
        "loss_after",
        "plan",
        "weights_id",
    ] {
        assert_eq!(verdict[field], expected[field], "{field}: {verdict}");
    }
}
