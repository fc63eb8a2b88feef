//! The jobs whose results were seen, by name.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use super::verdict::{Class, Verdict};

/// Results that are remembered, about half a kilobyte each.
const KEPT: usize = 50_000;

/// The last results.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    /// In the order in which they came.
    results: VecDeque<(Arc<str>, Verdict)>,
    /// How many are forgotten: the number of the first of `results`.
    forgotten: usize,
    /// The numbers of each job's results.
    numbers: HashMap<Arc<str>, VecDeque<usize>>,
    /// Results by class or code.
    counts: BTreeMap<&'static str, u64>,
    classes: BTreeMap<Class, u64>,
}

impl Jobs {
    /// Whether this is another copy of a result that was seen: delivery is at least once.
    pub(super) fn has(&self, submission_id: &str, verdict: &Verdict) -> bool {
        let same = |seen: &Verdict| {
            (seen.model_version, seen.status, &seen.key)
                == (verdict.model_version, verdict.status, &verdict.key)
        };
        self.of(submission_id).any(same)
    }

    pub(super) fn add(&mut self, submission_id: &str, verdict: Verdict) {
        *self.counts.entry(verdict.verdict).or_default() += 1;
        *self.classes.entry(verdict.class).or_default() += 1;
        let known = self.numbers.get_key_value(submission_id);
        let name = known.map_or_else(|| submission_id.into(), |(name, _)| Arc::clone(name));
        let number = self.forgotten + self.results.len();
        let numbers = self.numbers.entry(Arc::clone(&name)).or_default();
        numbers.push_back(number);
        self.results.push_back((name, verdict));
        if self.results.len() > KEPT {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        let Some((name, _)) = self.results.pop_front() else {
            return;
        };
        self.forgotten += 1;
        if let Some(numbers) = self.numbers.get_mut(&name) {
            numbers.pop_front();
            if numbers.is_empty() {
                self.numbers.remove(&name);
            }
        }
    }

    /// What was seen of a job, oldest first.
    pub(super) fn of(&self, submission_id: &str) -> impl DoubleEndedIterator<Item = &Verdict> {
        let numbers = self.numbers.get(submission_id).into_iter().flatten();
        let result = |number: &usize| self.results.get(number.checked_sub(self.forgotten)?);
        numbers.filter_map(result).map(|(_, verdict)| verdict)
    }

    pub(super) fn classes(&self) -> &BTreeMap<Class, u64> {
        &self.classes
    }

    pub(super) fn counts(&self) -> &BTreeMap<&'static str, u64> {
        &self.counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::dashboard::made::scored;
    use serde_json::json;

    #[test]
    fn the_oldest_results_are_forgotten_one_by_one() {
        let mut jobs = Jobs::default();
        let result = Verdict::of(&scored(1, json!({})));
        for version in 1..=2 {
            let verdict = Verdict {
                model_version: version,
                ..result.clone()
            };
            assert!(!jobs.has("first", &verdict));
            jobs.add("first", verdict);
        }
        let seen = |jobs: &Jobs| {
            jobs.of("first")
                .map(|v| v.model_version)
                .collect::<Vec<_>>()
        };
        for n in 3..=KEPT {
            jobs.add(&n.to_string(), result.clone());
        }
        assert_eq!(seen(&jobs), [1, 2]);
        jobs.add("new", result.clone());
        assert_eq!(seen(&jobs), [2]);
        jobs.add("newer", result);
        assert!(seen(&jobs).is_empty());
        assert_eq!(jobs.numbers.len(), KEPT);
    }
}
