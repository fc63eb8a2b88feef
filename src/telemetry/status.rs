//! What the worker's parts report about themselves: the source of the heartbeat, the metrics and the
//! health check.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::progress::Progress;
use super::waits::Waits;
use crate::protocol::heartbeat::{
    EngineFacts, JobFacts, LastError, ModelFacts, Record, UpdateFacts, WarmFacts,
};
use crate::protocol::state::{Phase, State};
use crate::util::clock::{steady_ms, unix_ms};

/// How long before a change of state its reason may have been noted.
const JUST_BEFORE_MS: u64 = 1000;
/// Durations kept for the percentiles.
const KEPT: usize = 256;

/// The fields that the worker's parts set and the heartbeat publishes.
#[derive(Debug, Default)]
pub struct StatusFields {
    /// The last warm-up.
    pub warm: WarmFacts,
    /// The model that is served.
    pub model: ModelFacts,
    /// The device and library that run it.
    pub engine: EngineFacts,
    /// Jobs since the start, without the derived values.
    pub jobs: JobFacts,
    /// The broker's node that is connected: host and port.
    pub node: Option<String>,
    /// How the worker follows its model, if it does.
    pub update: Option<UpdateFacts>,
    /// The last error of each code, and when it happened by the monotonic clock.
    errors: BTreeMap<String, (u64, LastError)>,
    durations_ms: std::collections::VecDeque<f64>,
}

/// Shared between the worker's parts.
#[derive(Debug, Default)]
pub struct WorkerStatus {
    facts: Mutex<StatusFields>,
    /// Advanced by the computing thread.
    pub progress: Arc<Progress>,
    /// Both connections are up.
    pub connected: AtomicBool,
    /// The broker has confirmed the consumer.
    pub consuming: AtomicBool,
    /// The broker blocks publishing.
    pub(crate) blocked: Mutex<Arc<AtomicBool>>,
    /// How often a connection was made.
    pub generation: AtomicU64,
    /// Jobs held.
    pub in_flight: AtomicU64,
    /// Jobs that may be held.
    pub slots: AtomicU64,
    /// Those of them that wait for news of other workers.
    pub waits: Waits,
    /// When a heartbeat was last written, by the monotonic clock.
    pub beaten_ms: AtomicU64,
    record: Mutex<Option<Arc<Record>>>,
}

impl WorkerStatus {
    /// The fields, for changing.
    pub fn facts(&self) -> MutexGuard<'_, StatusFields> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last record that was made, whether Redis took it or not.
    pub fn record(&self) -> Option<Arc<Record>> {
        let record = self.record.lock();
        record.unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_record(&self, record: Arc<Record>) {
        let known = self.record.lock();
        *known.unwrap_or_else(PoisonError::into_inner) = Some(record);
    }

    /// Sets the flag that says whether the broker blocks publishing.
    pub fn holds_back(&self, blocked: Arc<AtomicBool>) {
        let known = self.blocked.lock();
        *known.unwrap_or_else(PoisonError::into_inner) = blocked;
    }

    /// Notes what went wrong, for the record.
    pub fn error(&self, code: &str, message: &str) {
        let error = LastError {
            code: code.to_owned(),
            message: message.to_owned(),
            at_ms: unix_ms(),
        };
        let noted = (steady_ms(), error);
        self.facts().errors.insert(code.to_owned(), noted);
    }

    /// Whether the worker takes jobs: warm, with a confirmed consumer, and not stuck.
    pub fn ready(&self, phase: Phase) -> bool {
        phase.state == State::Ready
            && self.consuming.load(Ordering::Relaxed)
            && !self.progress.is_stuck()
    }
}

impl StatusFields {
    /// The last error. While the worker is degraded, the error that degraded it: other errors, however
    /// frequent, must not hide the reason.
    pub(crate) fn last_error(&self, phase: Phase) -> Option<&LastError> {
        let of_the_state = self.errors.get(&phase.detail.to_string());
        // The error is noted just before the state changes.
        let is_new = |(at, _): &&(u64, LastError)| at + JUST_BEFORE_MS >= phase.since;
        let of_the_state = of_the_state.filter(is_new);
        let found = of_the_state
            .filter(|_| phase.state == State::Degraded)
            .or_else(|| self.errors.values().max_by_key(|(at, _)| *at));
        found.map(|(_, error)| error)
    }

    /// Adds a finished job's time.
    pub fn finished(&mut self, millis: f64) {
        if self.durations_ms.len() == KEPT {
            self.durations_ms.pop_front();
        }
        self.durations_ms.push_back(millis);
        self.jobs.last_scored_at_ms = Some(unix_ms());
    }

    #[expect(clippy::cast_precision_loss, reason = "at most 256 durations")]
    pub(crate) fn jobs(&self) -> JobFacts {
        let mut sorted: Vec<f64> = self.durations_ms.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let percentile = |percent: usize| {
            sorted
                .get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1)))
                .copied()
        };
        let average =
            (!sorted.is_empty()).then(|| sorted.iter().sum::<f64>() / sorted.len() as f64);
        JobFacts {
            avg_ms: average,
            p50_ms: percentile(50),
            p95_ms: percentile(95),
            ..self.jobs.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use strum::VariantArray as _;

    use super::*;
    use crate::protocol::state::Detail;

    #[test]
    fn a_worker_is_ready_in_that_state_and_with_a_confirmed_consumer_alone() {
        let status = WorkerStatus::default();
        for state in State::VARIANTS {
            for consuming in [false, true] {
                status.consuming.store(consuming, Ordering::Relaxed);
                let phase = Phase::starting().followed_by(*state, Detail::Serving);
                let expected = *state == State::Ready && consuming;
                assert_eq!(status.ready(phase), expected, "{state:?} {consuming}");
            }
        }
    }

    fn error(code: &str, at: u64) -> (u64, LastError) {
        let error = LastError {
            code: code.into(),
            message: String::new(),
            // A clock that is set says nothing of what came first.
            at_ms: 1_000_000 - at,
        };
        (at, error)
    }

    #[test]
    fn what_degraded_a_worker_is_not_hidden_by_what_fails_beside_it() {
        let mut facts = StatusFields::default();
        let mut phase = Phase {
            state: State::Degraded,
            detail: Detail::WarmFailed,
            since_ms: 0,
            since: 10_000,
            last_ready_at_ms: 0,
            changes: 1,
        };
        assert_eq!(facts.last_error(phase), None);
        for (code, at_ms) in [("warm_failed", 9_990), ("broker_disconnected", 12_000)] {
            facts.errors.insert(code.into(), error(code, at_ms));
        }
        let code = |facts: &StatusFields, phase| facts.last_error(phase).map(|e| e.code.clone());
        assert_eq!(code(&facts, phase).as_deref(), Some("warm_failed"));
        // Of another time, or no reason of the state at all.
        phase.since = 20_000;
        assert_eq!(code(&facts, phase).as_deref(), Some("broker_disconnected"));
        (phase.since, phase.state) = (10_000, State::Warming);
        assert_eq!(code(&facts, phase).as_deref(), Some("broker_disconnected"));
    }
}
