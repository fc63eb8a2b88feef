//! Watches the broker's count of consumers and the heartbeat side by side.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually};

/// One look at both.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    pub(crate) at: Instant,
    /// `state/detail` before and after the broker was asked; empty without a record.
    pub(crate) states: [String; 2],
    /// What `ready` said before and after.
    pub(crate) ready: [bool; 2],
    pub(crate) consumers: u32,
    pub(crate) waiting: u32,
}

/// A thread that looks many times a second until it is stopped.
pub(crate) struct Watch {
    stop: Arc<AtomicBool>,
    samples: Arc<Mutex<Vec<Sample>>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches a worker and the jobs queue; the queue need not exist yet.
    pub(crate) fn start(stack: &Stack, worker_id: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let samples: Arc<Mutex<Vec<Sample>>> = Arc::default();
        let seen = Arc::clone(&samples);
        let aggregator = stack.aggregator();
        let redis = Arc::clone(&stack.redis);
        let (queue, key) = (
            stack.jobs_queue(),
            stack.key(&format!("worker:{worker_id}")),
        );
        let thread = std::thread::spawn(move || {
            let mut redis = redis.connection();
            let mut look = move || -> Value {
                let text: Option<String> =
                    redis::Commands::get(&mut redis, &key).unwrap_or_default();
                text.and_then(|t| serde_json::from_str(&t).ok())
                    .unwrap_or_default()
            };
            while !stopping.load(Ordering::Relaxed) {
                let before = look();
                let (waiting, consumers) = aggregator.depth(&queue).unwrap_or_default();
                let after = look();
                let states = [&before, &after].map(name);
                let ready = [&before, &after].map(|r| r["ready"] == true);
                let sample = Sample {
                    at: Instant::now(),
                    states,
                    ready,
                    consumers,
                    waiting,
                };
                seen.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(sample);
                std::thread::sleep(Duration::from_millis(30));
            }
        });
        Self {
            stop,
            samples,
            thread: Some(thread),
        }
    }

    /// Waits until it has seen such a moment.
    #[track_caller]
    pub(crate) fn sees(&self, what: &str, moment: impl Fn(&Sample) -> bool) {
        eventually(SOON, &format!("the watch saw it {what}"), || {
            let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
            samples.iter().any(&moment)
        });
    }

    /// Ends the watch.
    pub(crate) fn stop(mut self) -> Vec<Sample> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .take()
            .expect("a watch is stopped once")
            .join()
            .expect("the watching thread");
        std::mem::take(&mut *self.samples.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn name(record: &Value) -> String {
    match (record["state"].as_str(), record["state_detail"].as_str()) {
        (Some(state), Some(detail)) => format!("{state}/{detail}"),
        _ => String::new(),
    }
}

/// The longest stretch during which the broker had a consumer although the record said not ready.
/// Short ones are the time between the broker's answer and the beat that tells of it.
pub(crate) fn longest_unready_consumer(samples: &[Sample]) -> Duration {
    let mut longest = Duration::ZERO;
    let mut since: Option<Instant> = None;
    for sample in samples {
        if sample.consumers > 0 && sample.ready == [false, false] {
            longest = longest.max(sample.at - *since.get_or_insert(sample.at));
        } else {
            since = None;
        }
    }
    longest
}
