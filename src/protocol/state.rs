//! The states of a worker and the reasons for them: the words of the heartbeat.

use strum::{EnumIter, EnumMessage};

use super::word::words;
use crate::util::clock::{steady_ms, unix_ms};

words! {
    /// What a worker is doing, in the order of a worker's life.
    pub enum State {
        /// The process has begun.
        Starting,
        /// A model is being loaded or proven.
        Warming,
        /// Jobs are taken.
        Ready,
        /// Something is wrong or held; no jobs are taken.
        Degraded,
        /// New weights are being swapped in.
        Updating,
        /// The package is being read again.
        Reloading,
        /// Running jobs end, no new ones are taken.
        Draining,
        /// The process is about to exit.
        Stopped,
    }
}

impl State {
    /// Whether a worker may go from here to there.
    pub fn may_become(self, next: Self) -> bool {
        match (self, next) {
            (Self::Stopped, _) => false,
            (Self::Draining, next) => next == Self::Stopped,
            (_, Self::Draining) => true,
            (_, Self::Stopped) => false,
            (_, Self::Starting) => false,
            (_, Self::Ready) => matches!(self, Self::Warming | Self::Degraded),
            (Self::Starting, next) => matches!(next, Self::Warming | Self::Degraded),
            (_, Self::Warming | Self::Degraded) => true,
            (_, Self::Updating | Self::Reloading) => matches!(self, Self::Ready | Self::Degraded),
        }
    }
}

/// Why a worker is in its state: the stable words of `state_detail`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::Display, EnumIter, EnumMessage)]
#[strum(serialize_all = "snake_case")]
pub enum Detail {
    /// The process has begun; it waits up to 3 s for RabbitMQ before it loads the model.
    Initializing,
    /// The package and the session are being loaded.
    LoadingModel,
    /// The first warm-up measures the unchanged model and proves the session.
    StartupBaseline,
    /// The worker takes jobs.
    Serving,
    /// `scorer ctl pause` was called; it lasts until `resume` or a restart.
    Paused,
    /// The session is being proven again.
    Rewarm,
    /// The worker is changing to version N: first the last jobs end (`updating`), then the new weights are proven (`warming`).
    #[strum(to_string = "update_to_v{0}")]
    UpdateTo(u64),
    /// The package directory was read again and replaces the model.
    ReloadRequest,
    /// The model failed a proof of the warm-up, or ONNX Runtime failed during it.
    WarmFailed,
    /// The package cannot be read, or ONNX Runtime does not load it.
    ModelLoadFailed,
    /// The execution provider that was asked for is not available.
    EpUnavailable,
    /// There is no connection to RabbitMQ.
    BrokerDisconnected,
    /// RabbitMQ does not let the worker publish results.
    PublishForbidden,
    /// RabbitMQ no longer has the worker's consumer, or no longer delivers to it.
    ConsumerLost,
    /// Another live worker has the same id or the same state folder.
    DuplicateId,
    /// A file of the package no longer has the digest that it was loaded with.
    PackageChanged,
    /// The weights on the device are not those of the baseline.
    RestoreMismatch,
    /// The loss is not the canary's or, at an audit, not the one of the warm-up.
    CanaryMismatch,
    /// The warm-up does not fit the device.
    OutOfMemory,
    /// A computation makes no progress.
    Stuck,
    /// The computing thread ended because of a bug; the model is loaded again.
    EngineLost,
    /// A part of the worker ended because of a bug; the process drains and exits with 70.
    PartLost,
    /// A signal asked the worker to drain.
    DrainSignal,
    /// `scorer ctl drain` asked the worker to drain.
    DrainControl,
    /// The drain is complete, and the process exits.
    Drained,
}

/// A state, why, and since when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Phase {
    /// What the worker is doing.
    pub state: State,
    /// Why.
    pub detail: Detail,
    /// Unix milliseconds.
    pub since_ms: u64,
    /// The same by the steady clock.
    pub since: u64,
    /// When `ready` was last entered; 0 = never.
    pub last_ready_at_ms: u64,
    /// Counts changes, so that none is overlooked.
    pub changes: u64,
}

impl Phase {
    /// A process that has just begun.
    pub fn starting() -> Self {
        Self {
            state: State::Starting,
            detail: Detail::Initializing,
            since_ms: unix_ms(),
            since: steady_ms(),
            last_ready_at_ms: 0,
            changes: 0,
        }
    }

    /// What follows it, from now on.
    #[must_use]
    pub fn followed_by(self, state: State, detail: Detail) -> Self {
        let now = unix_ms();
        let is_ready = state == State::Ready;
        Self {
            state,
            detail,
            since_ms: now,
            since: steady_ms(),
            last_ready_at_ms: if is_ready { now } else { self.last_ready_at_ms },
            changes: self.changes + 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use strum::{IntoEnumIterator, VariantArray};

    #[test]
    fn the_words_are_the_heartbeats() {
        for state in State::VARIANTS {
            assert_eq!(serde_json::to_value(state).unwrap(), state.as_str());
        }
        let words: Vec<String> = Detail::iter().map(|detail| detail.to_string()).collect();
        let expected = "initializing loading_model startup_baseline serving paused rewarm update_to_v0 \
             reload_request warm_failed model_load_failed ep_unavailable broker_disconnected \
             publish_forbidden consumer_lost duplicate_id package_changed restore_mismatch \
             canary_mismatch out_of_memory stuck engine_lost part_lost drain_signal drain_control drained";
        assert_eq!(words.join(" "), expected);
    }

    #[test]
    fn only_a_warm_or_recovered_worker_becomes_ready() {
        for state in [
            State::Starting,
            State::Updating,
            State::Reloading,
            State::Draining,
            State::Stopped,
        ] {
            assert!(!state.may_become(State::Ready), "{state:?}");
        }
        assert!(State::Warming.may_become(State::Ready));
    }

    #[test]
    fn a_drain_cannot_be_undone() {
        for next in [
            State::Starting,
            State::Warming,
            State::Ready,
            State::Degraded,
            State::Updating,
            State::Reloading,
        ] {
            assert!(!State::Draining.may_become(next));
            assert!(!State::Stopped.may_become(next));
        }
        assert!(State::Draining.may_become(State::Stopped));
    }
}
