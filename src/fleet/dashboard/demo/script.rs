//! What happens to a worker next: changes of its state, and when.

use std::collections::VecDeque;

use super::part::Part;
use super::tide::{RACK_AGAIN, RACK_AWAY};
use crate::protocol::state::{Detail, State};

/// The version before the roll-out, and the one that it brings.
pub(super) const OLD: u64 = 41;
pub(super) const NEW: u64 = 42;

/// A change of state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) at_ms: u64,
    pub(super) to: State,
    pub(super) detail: Detail,
}

/// Milliseconds since its beginning, and the state then.
type Scene = &'static [(u64, State, Detail)];

/// The new version replaces the old one.
pub(super) const SWAP: Scene = &[
    (0, State::Updating, Detail::UpdateTo(NEW)),
    (6_000, State::Warming, Detail::UpdateTo(NEW)),
    (15_000, State::Ready, Detail::Serving),
];
const START: Scene = &[
    (0, State::Starting, Detail::Initializing),
    (2_000, State::Warming, Detail::LoadingModel),
    (10_000, State::Warming, Detail::StartupBaseline),
    (22_000, State::Ready, Detail::Serving),
];
const WARMED: Scene = &[(12_000, State::Ready, Detail::Serving)];
/// The worker drains and comes back.
const LEAVE: Scene = &[
    (0, State::Draining, Detail::DrainControl),
    (8_000, State::Stopped, Detail::Drained),
    (65_000, State::Starting, Detail::Initializing),
    (67_000, State::Warming, Detail::LoadingModel),
    (75_000, State::Warming, Detail::StartupBaseline),
    (87_000, State::Ready, Detail::Serving),
];
const DRAINED: Scene = &[(25_000, State::Stopped, Detail::Drained)];
const UNCONSUMED: Scene = &[
    (0, State::Degraded, Detail::ConsumerLost),
    (3_000, State::Ready, Detail::Serving),
];
const RECONNECT: Scene = &[
    (0, State::Degraded, Detail::BrokerDisconnected),
    (9_000, State::Ready, Detail::Serving),
];
const REWARM: Scene = &[
    (0, State::Warming, Detail::Rewarm),
    (6_000, State::Ready, Detail::Serving),
];
const CROWDED: Scene = &[
    (0, State::Degraded, Detail::OutOfMemory),
    (20_000, State::Warming, Detail::Rewarm),
    (31_000, State::Ready, Detail::Serving),
];
const LOST: Scene = &[(0, State::Degraded, Detail::EpUnavailable)];
const FOUND: Scene = &[
    (0, State::Warming, Detail::LoadingModel),
    (14_000, State::Ready, Detail::Serving),
];

/// What happens now and then to any healthy worker; in small fleets only the first ones.
pub(super) const INCIDENTS: [Scene; 6] = [UNCONSUMED, REWARM, RECONNECT, LEAVE, LEAVE, CROWDED];
pub(super) const SMALL_INCIDENTS: usize = 2;

/// What will happen to a worker, soonest first.
#[derive(Debug, Default)]
pub(super) struct Script(VecDeque<Step>);

impl Script {
    /// What happens to a worker that plays a part, whatever happens to others.
    pub(super) fn of(part: Part, start_ms: u64, since_ms: u64) -> Self {
        let mut script = Self::default();
        match part {
            Part::Rack => script.find(since_ms),
            Part::Draining => {
                script.add(start_ms, DRAINED);
                script.add(start_ms + 90_000, START);
            }
            Part::Warming => script.add(since_ms, WARMED),
            Part::Healthy
            | Part::Canary
            | Part::Stuck
            | Part::Memory
            | Part::Unloadable
            | Part::Cut
            | Part::Paused
            | Part::Blocked
            | Part::Storeless
            | Part::Inert
            | Part::Software
            | Part::Vanishing => {}
        }
        script
    }

    /// A worker's rack has lost its GPUs: it finds them again, and loses them again.
    pub(super) fn find(&mut self, lost_ms: u64) {
        self.add(lost_ms + ms(RACK_AWAY), FOUND);
        self.add(lost_ms + ms(RACK_AGAIN), LOST);
    }

    /// A scene begins.
    pub(super) fn add(&mut self, at_ms: u64, scene: Scene) {
        let steps = scene.iter().map(|(after, to, detail)| Step {
            at_ms: at_ms + after,
            to: *to,
            detail: *detail,
        });
        self.0.extend(steps);
    }

    /// The next step, once it is due.
    pub(super) fn due(&mut self, now_ms: u64) -> Option<Step> {
        self.0.pop_front_if(|step| step.at_ms <= now_ms)
    }

    /// The next step.
    pub(super) fn next(&self) -> Option<&Step> {
        self.0.front()
    }
}

fn ms(seconds: f64) -> u64 {
    (seconds * 1000.0) as u64
}

/// What a worker says of the state that it is in; none where nothing is wrong.
pub(super) fn trouble(detail: Detail) -> Option<&'static str> {
    let known = TROUBLES.iter().find(|(known, _)| *known == detail);
    known.map(|(_, text)| *text)
}

const TROUBLES: [(Detail, &str); 7] = [
    (
        Detail::EpUnavailable,
        "CUDAExecutionProvider: CUDA error 100: no CUDA-capable device is detected",
    ),
    (
        Detail::CanaryMismatch,
        "version 42: canary: the update manifest says loss 2.8714 +- 0.001, this worker measures 2.9027",
    ),
    (
        Detail::Stuck,
        "no micro-batch has ended for 31 s; the slowest of the warm-up took 210 ms",
    ),
    (
        Detail::OutOfMemory,
        "the warm-up does not fit the device: failed to allocate 5368709120 bytes; is the GPU shared?",
    ),
    (
        Detail::ModelLoadFailed,
        "/models/demo-1b/weights.safetensors: input/output error (os error 5)",
    ),
    (
        Detail::BrokerDisconnected,
        "RabbitMQ: connection refused (os error 111)",
    ),
    (
        Detail::ConsumerLost,
        "RabbitMQ has cancelled the consumer of scorer.jobs.demo-1b",
    ),
];
