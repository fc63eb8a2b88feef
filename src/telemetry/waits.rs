//! The jobs that wait until it is known what became of other workers that held them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Names of workers that are told.
const MOST_TOLD: usize = 8;

/// The waiting jobs, by whom each waits for.
#[derive(Debug, Default)]
pub struct Waits {
    known: Mutex<Known>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Known {
    next: u64,
    jobs: BTreeMap<u64, Vec<String>>,
}

/// A job waits until this is dropped.
#[derive(Debug)]
pub struct Wait<'a> {
    waits: &'a Waits,
    number: u64,
}

impl Waits {
    /// A job begins to wait for news of these workers.
    pub fn begin(&self, workers: Vec<String>) -> Wait<'_> {
        let mut known = self.known();
        let number = known.next;
        known.next += 1;
        known.jobs.insert(number, workers);
        drop(known);
        self.changed.notify_one();
        Wait {
            waits: self,
            number,
        }
    }

    /// How many jobs wait.
    pub fn count(&self) -> u64 {
        self.known().jobs.len() as u64
    }

    /// Some of the workers that they wait for, in order, each once.
    pub fn workers(&self) -> Vec<String> {
        let known = self.known();
        let workers: BTreeSet<&String> = known.jobs.values().flatten().collect();
        workers.into_iter().take(MOST_TOLD).cloned().collect()
    }

    /// Resolves when another job waits, or one fewer; for one listener. A change before the call counts.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.waits.known().jobs.remove(&self.number);
        self.waits.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_is_waited_for_is_told_once_and_no_longer_than_that() {
        let waits = Waits::default();
        let both = waits.begin(vec!["w2".into(), "w1".into()]);
        waits.changed().await;
        let one = waits.begin(vec!["w1".into()]);
        assert_eq!(
            (waits.count(), waits.workers()),
            (2, vec!["w1".into(), "w2".into()])
        );
        drop(both);
        waits.changed().await;
        assert_eq!((waits.count(), waits.workers()), (1, vec!["w1".into()]));
        drop(one);
        assert_eq!((waits.count(), waits.workers()), (0, Vec::new()));
        let many = (0..20).map(|n| format!("w{n}")).collect();
        let _many = waits.begin(many);
        assert_eq!(waits.workers().len(), MOST_TOLD);
    }
}
