//! The scored candidates that stand for an interval: its best, its worst and its last. Outliers are what
//! somebody looks for, so they are never among those that are left out.

use std::sync::Arc;

use serde::{Serialize, Serializer};

use crate::fleet::dashboard::verdict::Verdict;

/// A point of the chart of deltas.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Candidate {
    at_ms: u64,
    delta: f64,
    ci95: Option<[f64; 2]>,
    submission_id: String,
    worker: String,
}

/// Those of one interval.
#[derive(Debug, Clone, Default)]
pub(super) struct Few {
    worst: Option<Arc<Candidate>>,
    best: Option<Arc<Candidate>>,
    last: Option<Arc<Candidate>>,
}

impl Candidate {
    /// None: the result has no delta.
    pub(super) fn of(submission_id: &str, verdict: &Verdict) -> Option<Self> {
        verdict.delta.map(|delta| Self {
            at_ms: verdict.at_ms,
            delta,
            ci95: verdict.ci95,
            submission_id: submission_id.to_owned(),
            worker: (*verdict.worker).to_owned(),
        })
    }
}

impl Few {
    pub(super) fn note(&mut self, candidate: &Arc<Candidate>) {
        let new = || Some(Arc::clone(candidate));
        let delta = candidate.delta;
        if self.worst.as_ref().is_none_or(|worst| delta < worst.delta) {
            self.worst = new();
        }
        if self.best.as_ref().is_none_or(|best| delta > best.delta) {
            self.best = new();
        }
        self.last = new();
    }

    /// Each once, oldest first.
    pub(super) fn list(&self) -> Vec<Arc<Candidate>> {
        let all = [&self.worst, &self.best, &self.last].into_iter().flatten();
        let mut all: Vec<_> = all.map(Arc::clone).collect();
        all.sort_by_key(|candidate| (candidate.at_ms, Arc::as_ptr(candidate)));
        all.dedup_by(|a, b| Arc::ptr_eq(a, b));
        all
    }
}

/// A row without names: there are many.
impl Serialize for Candidate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let [low, high] = self.ci95.map_or([None, None], |ci| ci.map(Some));
        let Self {
            at_ms,
            delta,
            submission_id,
            worker,
            ..
        } = self;
        (at_ms, delta, low, high, submission_id, worker).serialize(serializer)
    }
}
