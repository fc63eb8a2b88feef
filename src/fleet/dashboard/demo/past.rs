//! What the day before the story was like.

use std::collections::BTreeMap;

use rand::Rng;
use rand::seq::IndexedRandom;

use super::job::Job;
use super::line::Line;
use super::script::{NEW, OLD};
use super::tide::{DAY, RACK_LOST, Tide};
use super::verdicts::Answered;
use super::worker::Worker;
use super::{Demo, Past, RETRIED_S, Sample, device, miners};
use crate::fleet::observer::Queues;
use crate::protocol::result::{ResultMessage, Timings};

/// Dead-lettered jobs at the end.
pub(super) const DEAD: f64 = 20.0;
/// The jobs done per second are a mean of about so many seconds.
const SMOOTH: f64 = 10.0;

/// Workers of a hundred that come and go.
const RESTLESS: f64 = 0.03;
/// Results that are given for each moment of the past.
const PAST_RESULTS: usize = 4;

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
    /// Means of both since the moment before.
    mean: (f64, f64),
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
            mean: (tide.rate / 2.0, 0.5),
        }
    }

    /// Goes on to this moment.
    pub(super) fn to(&mut self, moment: f64) {
        let (mut seconds, mut sum) = (0.0, (0.0, 0.0));
        while ((self.second + 1) as f64) <= moment {
            self.second += 1;
            self.step();
            seconds += 1.0;
            sum = (sum.0 + self.per_s, sum.1 + self.busy);
        }
        if seconds > 0.0 {
            self.mean = (sum.0 / seconds, sum.1 / seconds);
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
struct Known {
    /// Infinite = it is well.
    pub(super) ill: f64,
    pub(super) swapped: f64,
    /// Whether it took the new version then.
    pub(super) follows: bool,
}

/// What the fleet is like while it is busy.
#[derive(Debug, Clone)]
pub(super) struct Usual {
    workers: Vec<Known>,
    /// How long the jobs of its workers take.
    pub(super) p50_ms: f64,
    pub(super) p95_ms: f64,
    /// The part of the jobs that waits to be retried, times how long they do, seconds.
    pub(super) retried_s: f64,
    /// Workers that come and go.
    pub(super) restless: f64,
}

/// The fleet as it was at the moment that the walk has reached; `dice` from 0 to 1.
fn sample(walk: &Walk, usual: &Usual, dice: f64) -> Sample {
    let moment = walk.second as f64;
    let left = walk.tide.capacity(moment) / walk.tide.capable;
    // The rack is among those that are ill.
    let left = left
        + if moment >= RACK_LOST {
            walk.tide.rack
        } else {
            0.0
        };
    let workers = &usual.workers;
    let well = workers.iter().filter(|worker| worker.ill > moment).count() as f64;
    let away = usual.restless * dice;
    let ready = ((well - away) * left).round() as usize;
    let loaded = (0.5 + 0.5 * walk.busy) * (0.97 + 0.06 * dice);
    Sample {
        alive: workers.len() - (away / 2.0).round() as usize,
        ready,
        jobs_per_s: Some(walk.mean.0),
        busy: Some(walk.mean.1.clamp(0.0, 1.0)),
        queues: Some(Queues {
            jobs: walk.line.waiting(),
            retry: (walk.per_s * usual.retried_s) as u32,
            dead: (DEAD * (1.0 + moment / DAY)) as u32,
            consumers: u32::try_from(ready).unwrap_or(u32::MAX),
        }),
        oldest_ms: walk.line.oldest_ms(walk.tide.at_ms(moment)),
        workers_p50: Some(usual.p50_ms * loaded),
        workers_p95: Some(usual.p95_ms * loaded),
        versions: versions(workers, moment),
    }
}

fn versions(workers: &[Known], moment: f64) -> BTreeMap<Option<u64>, usize> {
    let mut versions = BTreeMap::new();
    for worker in workers {
        let swapped = worker.follows && worker.swapped <= moment;
        let version = if swapped { NEW } else { OLD };
        *versions.entry(Some(version)).or_default() += 1;
    }
    versions
}

impl Demo {
    /// What it is like when the story starts.
    pub(super) fn usual(&self) -> Usual {
        let gone = miners::gone(&self.verdicts.miners);
        let records = || self.workers.iter().map(|worker| &worker.record);
        let mut p50: Vec<f64> = records().filter_map(|record| record.jobs.p50_ms).collect();
        p50.sort_by(f64::total_cmp);
        let restless = if self.is_small() { 0.0 } else { RESTLESS };
        Usual {
            workers: self
                .workers
                .iter()
                .map(|worker| self.known(worker))
                .collect(),
            p50_ms: p50.get(p50.len() / 2).copied().unwrap_or_default(),
            p95_ms: records().filter_map(|r| r.jobs.p95_ms).fold(0.0, f64::max),
            retried_s: gone.map_or(0.0, |(_, share)| share * RETRIED_S),
            restless: self.workers.len() as f64 * restless,
        }
    }

    fn known(&self, worker: &Worker) -> Known {
        let record = &worker.record;
        let since = self.tide.moment(record.last_state_change_at_ms);
        Known {
            ill: if record.ready { f64::INFINITY } else { since },
            swapped: self.tide.moment(worker.swap_ms),
            follows: record.model.version != Some(OLD),
        }
    }

    pub(super) fn past_moment(&mut self, at_ms: u64, walk: &mut Walk, usual: &Usual) -> Past {
        let moment = self.tide.moment(at_ms);
        walk.to(moment);
        let sample = sample(walk, usual, self.random.random());
        let oldest = sample.oldest_ms.unwrap_or_default();
        let epoch = self.tide.epoch(moment - oldest as f64 / 1000.0);
        let results = (0..PAST_RESULTS).filter_map(|_| self.past_result(at_ms, epoch));
        Past {
            at_ms,
            results: results.collect(),
            sample,
        }
    }

    fn past_result(&mut self, at_ms: u64, epoch: u64) -> Option<ResultMessage> {
        let Self {
            random,
            workers,
            verdicts,
            next_job,
            ..
        } = self;
        let worker = workers
            .choose(random)
            .filter(|worker| worker.record.ready)?;
        *next_job += 1;
        let job = Job::new(*next_job, (at_ms, epoch), &verdicts.miners, random);
        let stages = device::stages(job.fate, worker.device.pace_ms, random);
        let queued = random.random_range(0.0..0.9) * stages.forward;
        let timings = Timings {
            queued,
            total: queued
                + stages.fetch
                + stages.decode
                + stages.apply
                + stages.forward
                + stages.restore,
            ..stages
        };
        let answered = Answered { at_ms, timings };
        Some(
            verdicts
                .answer(&job, &worker.record, answered, random)
                .result,
        )
    }
}
