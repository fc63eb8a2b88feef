//! The jobs whose results were seen, by name.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use super::verdict::{Class, Verdict};

/// Results that are remembered, a few hundred bytes each.
const KEPT: usize = 50_000;

/// Results by submission id.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    verdicts: HashMap<Arc<str>, VecDeque<Verdict>>,
    /// Names in the order in which results came.
    order: VecDeque<Arc<str>>,
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
        let name = match self.verdicts.get_key_value(submission_id) {
            Some((name, _)) => Arc::clone(name),
            None => submission_id.into(),
        };
        self.verdicts
            .entry(Arc::clone(&name))
            .or_default()
            .push_back(verdict);
        self.order.push_back(name);
        if self.order.len() > KEPT {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        let Some(oldest) = self.order.pop_front() else {
            return;
        };
        if let Some(verdicts) = self.verdicts.get_mut(&oldest) {
            verdicts.pop_front();
            if verdicts.is_empty() {
                self.verdicts.remove(&oldest);
            }
        }
    }

    /// What was seen of a job, oldest first.
    pub(super) fn of(&self, submission_id: &str) -> impl DoubleEndedIterator<Item = &Verdict> {
        self.verdicts.get(submission_id).into_iter().flatten()
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
        assert_eq!(jobs.verdicts.len(), jobs.order.len());
    }
}
