//! When who took no jobs: the broker's count of consumers, many times a second, and from the event
//! stream how long each worker was away for an update.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use testkit::stack::Stack;

/// A thread that counts consumers.
pub(crate) struct Gaps {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<u32>>,
}

/// What it saw.
pub(crate) struct Report {
    looks: usize,
    /// Looks that found no consumer.
    pub(crate) without_consumer: usize,
    /// By number of consumers, looks that found so many.
    consumers: [usize; 4],
    /// Milliseconds from `ready` to `ready`, of each update of each worker.
    away: Vec<u64>,
}

impl Gaps {
    pub(crate) fn watch(stack: &Stack) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let (aggregator, queue) = (stack.aggregator(), stack.jobs_queue());
        let thread = std::thread::spawn(move || {
            let mut seen = Vec::new();
            while !stopping.load(Ordering::Relaxed) {
                let (_, consumers) = aggregator.depth(&queue).expect("the jobs queue");
                seen.push(consumers);
                std::thread::sleep(Duration::from_millis(5));
            }
            seen
        });
        Self { stop, thread }
    }

    pub(crate) fn stop(self, stack: &Stack, ids: &[&str]) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        let seen = self.thread.join().expect("the counting thread");
        let count = |n: u32| seen.iter().filter(|c| **c == n).count();
        Report {
            looks: seen.len(),
            without_consumer: count(0),
            consumers: [0, 1, 2, 3].map(count),
            away: ids.iter().flat_map(|id| away(stack, id)).collect(),
        }
    }
}

/// From leaving for an update to taking jobs again.
fn away(stack: &Stack, id: &str) -> Vec<u64> {
    let mut left = None;
    let mut gaps = Vec::new();
    for event in stack.events(id) {
        let at: u64 = event["at"].parse().expect("a time");
        match event["to"].as_str() {
            "updating" => left = left.or(Some(at)),
            "ready" => gaps.extend(left.take().map(|left| at - left)),
            // A new process: what it does is no update.
            "starting" => left = None,
            _ => {}
        }
    }
    gaps
}

impl Report {
    pub(crate) fn print(&self) {
        eprintln!("consumers on the queue, in {} looks:", self.looks);
        for (n, looks) in self.consumers.iter().enumerate() {
            eprintln!("  {n}  {looks}");
        }
        eprintln!("a worker away for an update, {} times:", self.away.len());
        let bounds = [50, 100, 200, 400, 800, 1600, 3200, u64::MAX];
        let mut from = 0;
        for to in bounds {
            let within = self
                .away
                .iter()
                .filter(|ms| (from..to).contains(*ms))
                .count();
            match to {
                u64::MAX => eprintln!("  from {from} ms  {within}"),
                to => eprintln!("  {from} to {to} ms  {within}"),
            }
            from = to;
        }
    }
}
