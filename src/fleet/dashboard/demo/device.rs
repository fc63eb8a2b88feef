//! What computes: the jobs that a worker holds, and how long each takes.

use rand::Rng;
use rand::rngs::StdRng;

use super::job::{Fate, Job};
use super::merges;
use super::verdicts::{Answered, WINDOWS, normal};
use crate::protocol::result::Timings;

/// Jobs that a worker holds at most.
const PREFETCH: usize = 2;
/// One of so many fetches takes seconds.
const SLOW_FETCH: f64 = 0.02;
/// How long a candidate is tried to be fetched that is not there.
const GONE_MS: f64 = 4_000.0;

/// A job that a worker holds.
#[derive(Debug)]
struct Held {
    job: Job,
    delivered_ms: f64,
    /// How long each stage will take.
    stages: Timings,
}

impl Held {
    /// When its candidate is decoded.
    fn decoded_ms(&self) -> f64 {
        self.delivered_ms + self.stages.fetch + self.stages.decode
    }

    fn computing_ms(&self) -> f64 {
        self.stages.apply + self.stages.forward + self.stages.restore
    }
}

/// A device.
#[derive(Debug)]
pub(super) struct Device {
    held: Vec<Held>,
    /// When its last computation ended.
    free_ms: f64,
    /// How long a computation takes as a rule.
    pub(super) pace_ms: f64,
}

impl Device {
    pub(super) fn new(pace_ms: f64) -> Self {
        Self {
            held: Vec::with_capacity(PREFETCH),
            free_ms: 0.0,
            pace_ms,
        }
    }

    pub(super) fn has_room(&self) -> bool {
        self.held.len() < PREFETCH
    }

    /// Jobs that are held.
    pub(super) fn held(&self) -> usize {
        self.held.len()
    }

    pub(super) fn receive(&mut self, job: Job, now_ms: u64, random: &mut StdRng) {
        let stages = stages(job.fate, self.pace_ms, random);
        self.held.push(Held {
            job,
            delivered_ms: now_ms as f64,
            stages,
        });
    }

    /// What it holds was delivered so much earlier.
    pub(super) fn began_earlier(&mut self, ms: f64) {
        for held in &mut self.held {
            held.delivered_ms -= ms;
        }
    }

    /// The jobs that are handed back.
    pub(super) fn put_back(&mut self) -> impl Iterator<Item = Job> {
        let jobs = std::mem::take(&mut self.held).into_iter();
        jobs.map(|held| Job {
            redelivered: true,
            ..held.job
        })
    }

    /// The place of the next job to be computed, and when it begins.
    fn next(&self) -> Option<(usize, f64)> {
        let held = self.held.iter().enumerate();
        let (place, next) =
            held.min_by(|(_, a), (_, b)| a.decoded_ms().total_cmp(&b.decoded_ms()))?;
        Some((place, next.decoded_ms().max(self.free_ms)))
    }

    /// The next job that is done by now.
    pub(super) fn done(&mut self, now_ms: u64) -> Option<(Job, Answered)> {
        let (place, begun_ms) = self.next()?;
        let next = &self.held[place];
        let done_ms = begun_ms + next.computing_ms();
        if done_ms > now_ms as f64 {
            return None;
        }
        let computes = next.computing_ms() > 0.0;
        let next = self.held.remove(place);
        let timings = Timings {
            queued: if computes {
                begun_ms - next.decoded_ms()
            } else {
                0.0
            },
            total: done_ms - next.delivered_ms,
            ..next.stages
        };
        if computes {
            self.free_ms = done_ms;
        }
        let at_ms = done_ms as u64;
        Some((next.job, Answered { at_ms, timings }))
    }

    /// How long the current computation has taken; 0 = idle.
    pub(super) fn busy_ms(&self, now_ms: u64) -> u64 {
        self.next().map_or(0, |(_, begun_ms)| {
            (now_ms as f64 - begun_ms).max(0.0) as u64
        })
    }
}

/// How long each stage of a job takes; the sum and the wait are not known yet.
pub(super) fn stages(fate: Fate, pace_ms: f64, random: &mut StdRng) -> Timings {
    let mut spread = |median: f64, spread: f64| median * (spread * normal(random)).exp();
    let (decode, apply, restore) = (spread(62.0, 0.25), spread(6.1, 0.1), spread(4.8, 0.1));
    let (fetch, forward) = (spread(170.0, 0.6), spread(pace_ms, 0.05));
    let slow = random.random_bool(SLOW_FETCH);
    let fetch = fetch
        + if slow {
            random.random_range(1e3..7e3)
        } else {
            0.0
        };
    let none = Timings::default();
    match fate {
        Fate::Measured => Timings { forward, ..none },
        Fate::Scored => Timings {
            fetch,
            decode,
            apply,
            forward,
            restore,
            ..none
        },
        Fate::Merged(scene) => {
            let windows = merges::WINDOWS as f64 / WINDOWS as f64;
            Timings {
                fetch,
                decode,
                forward: forward * windows * scene.passes() as f64,
                ..none
            }
        }
        Fate::Ended(_) => Timings {
            fetch,
            decode,
            ..none
        },
        Fate::Unavailable => Timings {
            fetch: GONE_MS,
            ..none
        },
    }
}
