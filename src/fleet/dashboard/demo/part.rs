//! What is the matter with each worker: the cast of the story.

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use super::tide::RACK_LOST;
use crate::protocol::state::{Detail, State};

/// What a worker plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// Nothing is wrong with it.
    Healthy,
    /// Its rack has lost the GPUs.
    Rack,
    /// The new version did not prove itself.
    Canary,
    /// Its device hangs.
    Stuck,
    /// The model does not fit its device.
    Memory,
    /// It cannot read the package.
    Unloadable,
    /// It has no connection to RabbitMQ.
    Cut,
    /// An operator has paused it.
    Paused,
    /// An operator drains it; it comes back.
    Draining,
    /// It has just started.
    Warming,
    /// RabbitMQ blocks its results, though it is ready.
    Blocked,
    /// Redis does not store its results, though it is ready.
    Storeless,
    /// Tensors of its model have no effect, though it is ready.
    Inert,
    /// Its device is software, though it is ready.
    Software,
    /// It vanishes without a word.
    Vanishing,
}

/// The fewest workers among whom every part is played.
const WHOLE_CAST: usize = 50;
/// More are a large fleet.
const LARGE: usize = 400;
/// Workers of a host.
pub(super) const PER_HOST: usize = 8;
/// Of how many workers one belongs to the rack.
const RACK: usize = 12;
/// How many play each part in a fleet, and in a large one. The others are healthy.
const CAST: [(Part, usize, usize); 13] = [
    (Part::Canary, 2, 20),
    (Part::Stuck, 1, 6),
    (Part::Memory, 1, 12),
    (Part::Unloadable, 1, 8),
    (Part::Cut, 1, 10),
    (Part::Paused, 1, 9),
    (Part::Draining, 1, 4),
    (Part::Warming, 3, 24),
    (Part::Blocked, 1, 2),
    (Part::Storeless, 1, 3),
    (Part::Inert, 1, 3),
    (Part::Software, 1, 1),
    (Part::Vanishing, 1, 2),
];

/// The part of each worker.
pub(super) fn cast(workers: usize, random: &mut StdRng) -> Vec<Part> {
    let mut parts = vec![Part::Healthy; workers];
    if workers < WHOLE_CAST {
        if let Some(last) = parts.last_mut().filter(|_| workers > 1) {
            *last = Part::Rack;
        }
        return parts;
    }
    // Whole hosts.
    let rack = workers.div_ceil(RACK) / PER_HOST * PER_HOST;
    let first = workers / 3 / PER_HOST * PER_HOST;
    parts[first..first + rack].fill(Part::Rack);
    let mut free: Vec<usize> = (0..first).chain(first + rack..workers).collect();
    free.shuffle(random);
    let actors = CAST.iter().flat_map(|(part, few, many)| {
        let actors = if workers < LARGE { *few } else { *many };
        std::iter::repeat_n(*part, actors)
    });
    for (place, part) in free.into_iter().zip(actors) {
        parts[place] = part;
    }
    parts
}

impl Part {
    /// The state in which the worker is when the story starts, and since which moment.
    pub(super) fn opening(self, random: &mut StdRng) -> (State, Detail, f64) {
        let about =
            |minutes: f64, random: &mut StdRng| -60.0 * minutes * random.random_range(0.8..1.2);
        let ill = |detail, minutes, random: &mut StdRng| {
            (State::Degraded, detail, about(minutes, random))
        };
        match self {
            Self::Rack => {
                let late = random.random_range(0.0..3.0);
                (State::Degraded, Detail::EpUnavailable, RACK_LOST + late)
            }
            Self::Canary => ill(Detail::CanaryMismatch, 35.0, random),
            Self::Stuck => ill(Detail::Stuck, 11.0, random),
            Self::Memory => ill(Detail::OutOfMemory, 150.0, random),
            Self::Unloadable => ill(Detail::ModelLoadFailed, 320.0, random),
            Self::Cut => ill(Detail::BrokerDisconnected, 4.0, random),
            Self::Paused => ill(Detail::Paused, 900.0, random),
            Self::Draining => (State::Draining, Detail::DrainControl, -15.0),
            Self::Warming => {
                let since = random.random_range(-9.0..-1.0);
                (State::Warming, Detail::StartupBaseline, since)
            }
            Self::Healthy
            | Self::Blocked
            | Self::Storeless
            | Self::Inert
            | Self::Software
            | Self::Vanishing => (State::Ready, Detail::Serving, about(600.0, random)),
        }
    }

    /// Whether the worker's work counts when the fleet's capacity is planned.
    pub(super) fn is_counted(self) -> bool {
        match self {
            Self::Healthy | Self::Rack | Self::Storeless | Self::Inert | Self::Vanishing => true,
            Self::Canary
            | Self::Stuck
            | Self::Memory
            | Self::Unloadable
            | Self::Cut
            | Self::Paused
            | Self::Draining
            | Self::Warming
            | Self::Blocked
            | Self::Software => false,
        }
    }
}
