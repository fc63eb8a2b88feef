//! What the day before the story was like.

use std::collections::BTreeMap;

use super::Sample;
use super::line::Line;
use super::tide::{DAY, RACK_LOST, Tide};
use crate::fleet::observer::Queues;

/// The jobs done per second are a mean of about so many seconds.
const SMOOTH: f64 = 10.0;

/// Goes through the past, second by second, with the jobs that come and are done in it.
#[derive(Debug)]
pub(super) struct Walk {
    tide: Tide,
    second: i64,
    pub(super) line: Line,
    /// The part of a job that is done so far.
    part: f64,
    per_s: f64,
    busy: f64,
}

impl Walk {
    /// Begins a day before the story.
    pub(super) fn new(tide: Tide) -> Self {
        Self {
            tide,
            second: -(DAY as i64),
            line: Line::default(),
            part: 0.0,
            per_s: tide.rate / 2.0,
            busy: 0.5,
        }
    }

    /// Goes on to this moment.
    pub(super) fn to(&mut self, moment: f64) {
        while ((self.second + 1) as f64) <= moment {
            self.second += 1;
            self.step();
        }
    }

    fn step(&mut self) {
        let moment = self.second as f64;
        self.line
            .arrive(self.tide.at_ms(moment), self.tide.demand(moment));
        let capacity = self.tide.capacity(moment);
        let could = self.part + capacity;
        let done = self.line.take_many(could as u64) as f64;
        self.part = (could - done).min(1.0);
        self.per_s += (done - self.per_s) / SMOOTH;
        self.busy += ((done / capacity).min(1.0) - self.busy) / SMOOTH;
    }
}

/// What a worker of the past is known by: when it fell ill, and when its turn in the roll-out came.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known {
    /// Infinite = it is well.
    pub(super) ill: f64,
    pub(super) swapped: f64,
    pub(super) version: Option<u64>,
}

/// How long the jobs took that are done while the fleet has this pace, and the dice for it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    pub(super) pace_ms: f64,
    pub(super) dice: f64,
}

/// The fleet as it was at the moment that the walk has reached.
pub(super) fn sample(walk: &Walk, fleet: &[Known], Pace { pace_ms, dice }: Pace) -> Sample {
    let moment = walk.second as f64;
    let at_ms = walk.tide.at_ms(moment);
    let left = walk.tide.capacity(moment) / walk.tide.capable;
    // The rack is among those that are ill.
    let others = left
        + if moment >= RACK_LOST {
            walk.tide.rack
        } else {
            0.0
        };
    let well = fleet.iter().filter(|worker| worker.ill > moment).count() as f64;
    let ready = ((well - 2.0 * dice) * others).round().max(0.0) as usize;
    let total_ms = pace_ms * (1.0 + 0.8 * walk.busy) * (0.97 + 0.06 * dice);
    Sample {
        alive: fleet.len() - usize::from(fleet.len() > 10 && dice > 0.7),
        ready,
        jobs_per_s: walk.per_s,
        busy: Some(walk.busy.clamp(0.0, 1.0)),
        queues: Some(Queues {
            jobs: walk.line.waiting(),
            retry: (walk.per_s * 1.5) as u32,
            dead: (moment / DAY * 20.0 + 20.0) as u32,
            consumers: u32::try_from(ready).unwrap_or(u32::MAX),
        }),
        oldest_ms: walk.line.oldest_ms(at_ms),
        workers_p50: Some(total_ms),
        workers_p95: Some(total_ms * 2.3),
        versions: versions(fleet, moment),
    }
}

fn versions(fleet: &[Known], moment: f64) -> BTreeMap<Option<u64>, usize> {
    let mut versions = BTreeMap::new();
    for worker in fleet {
        let version = worker.version.map(|known| worker.at(known, moment));
        *versions.entry(version).or_default() += 1;
    }
    versions
}

impl Known {
    /// The version that it had, given the one that it has.
    fn at(&self, known: u64, moment: f64) -> u64 {
        use super::script::{NEW, OLD};
        if known == NEW && self.swapped <= moment.min(0.0) {
            NEW
        } else {
            OLD
        }
    }
}
