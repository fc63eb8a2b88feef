//! A simulated fleet for those who have none: workers of which a fifth is sick, jobs that are late because
//! of it, and miners of whom some send copies. The same seed and times give the same fleet.

mod device;
mod job;
mod line;
mod merges;
mod miners;
mod opening;
mod part;
mod past;
mod record;
mod script;
#[cfg(test)]
mod tests;
mod tide;
mod verdicts;
mod worker;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::news::ParkedJob;
use super::timeline::Sample;
use super::verdict::SeenResult;
use crate::fleet::observer::{Queues, View};
use crate::protocol::result::{Body, ResultMessage};
use crate::store::StreamEntry;
use job::{Fate, Job};
use line::{Line, Taken};
use opening::plan;
use part::{Part, cast};
use past::{DEAD, Walk};
use script::{INCIDENTS, SMALL_INCIDENTS};
use tide::Tide;
use verdicts::Verdicts;
use worker::{Change, Worker};

/// Workers of the fleets that there are.
pub const SIZES: [usize; 3] = [3, 100, 1000];

/// The model.
const MODEL: &str = "demo-1b";
/// Fleets up to here are small: their jobs come slowly, and little happens.
const SMALL: usize = 20;
/// Milliseconds between two incidents, and in a small fleet.
const INCIDENT_MS: u64 = 40_000;
const SMALL_INCIDENT_MS: u64 = 90_000;
/// Most time that one step makes up for.
const LONGEST: f64 = 10.0;
/// Events that are known at the start.
const EVENTS: usize = 60;
/// How long a job is retried until it fails.
const RETRIED_S: f64 = 335.0;
const FIRST_JOB: u64 = 1_000_000;
/// Milliseconds between two merges, and in a small fleet, of which one takes much.
const MERGE_MS: u64 = 15_000;
const SMALL_MERGE_MS: u64 = 60_000;

/// The fleet at one moment, and what has happened since the last one.
#[derive(Debug)]
pub(super) struct Moment {
    pub(super) view: View,
    pub(super) events: Vec<StreamEntry>,
    pub(super) results: Vec<SeenResult>,
    pub(super) parked: Vec<ParkedJob>,
}

/// What a moment of the past was like.
#[derive(Debug)]
pub(super) struct Past {
    pub(super) at_ms: u64,
    pub(super) sample: Sample,
    /// A few of its results.
    pub(super) results: Vec<ResultMessage>,
}

/// The simulated fleet.
#[derive(Debug)]
pub(super) struct Demo {
    random: StdRng,
    tide: Tide,
    at_ms: u64,
    workers: Vec<Worker>,
    verdicts: Verdicts,
    line: Line,
    dead: u32,
    /// Number of the next job.
    next_job: u64,
    next_incident_ms: u64,
    /// Merges so far, and when the next one is sent.
    merges: u64,
    next_merge_ms: u64,
    /// Events so far.
    events: u64,
}

impl Demo {
    /// So many workers; the story starts at this time.
    pub(super) fn new(workers: usize, at_ms: u64) -> Self {
        let mut random = StdRng::seed_from_u64(workers as u64);
        let parts = cast(workers, &mut random).into_iter().enumerate();
        let parts: Vec<(usize, Part)> = parts.collect();
        let (tide, pace_ms) = plan(&parts, at_ms);
        let mut workers: Vec<Worker> = parts
            .into_iter()
            .map(|part| Worker::new(part, pace_ms, &tide, &mut random))
            .collect();
        workers.sort_by(|a, b| a.record.worker_id.cmp(&b.record.worker_id));
        let mut walk = Walk::new(tide);
        walk.to(0.0);
        let mut demo = Self {
            verdicts: Verdicts::new(&mut random),
            random,
            tide,
            at_ms,
            workers,
            line: walk.line,
            dead: DEAD as u32,
            next_job: FIRST_JOB,
            next_incident_ms: at_ms + 2_000,
            merges: 0,
            next_merge_ms: at_ms,
            events: 0,
        };
        demo.begin_retries();
        demo.deal();
        for worker in &mut demo.workers {
            let ms = worker.device.pace_ms * demo.random.random::<f64>();
            worker.device.began_earlier(ms);
        }
        demo
    }

    /// What the 24 hours before the start were like at these times, oldest first. To be asked before
    /// the first step.
    pub(super) fn past(&mut self, times: impl Iterator<Item = u64>) -> Vec<Past> {
        let mut walk = Walk::new(self.tide);
        let usual = self.usual();
        times
            .map(|at_ms| self.past_moment(at_ms, &mut walk, &usual))
            .collect()
    }

    /// The fleet at this time, a second after the last one.
    pub(super) fn step(&mut self, at_ms: u64) -> Moment {
        let first = self.events == 0;
        let since_s = at_ms.saturating_sub(self.at_ms) as f64 / 1000.0;
        self.at_ms = at_ms;
        let mut changes = if first {
            self.known_changes()
        } else {
            Vec::new()
        };
        let moment = self.tide.moment(at_ms);
        let jobs =
            self.tide.demand(moment) * since_s.min(LONGEST) * self.random.random_range(0.8..1.2);
        self.line.arrive(at_ms, jobs);
        self.line.turn(at_ms);
        self.happen();
        for worker in &mut self.workers {
            worker.live(at_ms, &mut self.random, &mut changes);
            if !worker.works() {
                worker
                    .device
                    .put_back()
                    .for_each(|job| self.line.give_back(job));
            }
        }
        let (results, parked) = self.finish();
        self.deal();
        Moment {
            view: self.view(),
            events: self.entries(changes),
            results,
            parked,
        }
    }

    /// The last changes before the start.
    fn known_changes(&self) -> Vec<Change> {
        let mut changes: Vec<Change> = self.workers.iter().map(Worker::last_change).collect();
        changes.sort_by_key(|(at_ms, _)| *at_ms);
        changes.split_off(changes.len().saturating_sub(EVENTS))
    }

    fn is_small(&self) -> bool {
        self.workers.len() < SMALL
    }

    /// Now and then something happens to a healthy worker.
    fn happen(&mut self) {
        if self.at_ms < self.next_incident_ms {
            return;
        }
        let (every_ms, kinds) = match self.is_small() {
            true => (SMALL_INCIDENT_MS, SMALL_INCIDENTS),
            false => (INCIDENT_MS, INCIDENTS.len()),
        };
        self.next_incident_ms =
            self.at_ms + self.random.random_range(every_ms / 2..every_ms * 3 / 2);
        let healthy = |worker: &&mut Worker| worker.part == Part::Healthy && worker.is_idle();
        let mut healthy: Vec<&mut Worker> = self.workers.iter_mut().filter(healthy).collect();
        let place = self.random.random_range(0..healthy.len().max(1));
        let scene = INCIDENTS[self.random.random_range(0..kinds)];
        if let Some(worker) = healthy.get_mut(place) {
            worker.script().add(self.at_ms, scene);
        }
    }

    /// What is done by now.
    fn finish(&mut self) -> (Vec<SeenResult>, Vec<ParkedJob>) {
        let (mut results, mut parked) = (Vec::new(), Vec::new());
        let Self {
            workers,
            line,
            verdicts,
            random,
            at_ms,
            dead,
            ..
        } = self;
        for worker in workers.iter_mut().filter(|worker| worker.works()) {
            while let Some((job, answered)) = worker.done(*at_ms) {
                let job = match job.fate {
                    Fate::Unavailable => line.retry(job, answered.at_ms),
                    Fate::Measured | Fate::Scored | Fate::Merged(_) | Fate::Ended(_) => Err(job),
                };
                let Err(job) = job else { continue };
                let seen = verdicts.answer(&job, &worker.record, answered, random);
                worker.count(seen.result.status, answered);
                if job.fate == Fate::Unavailable {
                    *dead += 1;
                    parked.extend(park(&seen));
                }
                results.push(seen);
            }
        }
        results.sort_by_key(|seen| seen.at_ms);
        (results, parked)
    }

    /// Gives jobs to those that want some, one each in turn, beginning with another one each time.
    fn deal(&mut self) {
        let begin = self.random.random_range(0..self.workers.len().max(1));
        let every_ms = if self.is_small() {
            SMALL_MERGE_MS
        } else {
            MERGE_MS
        };
        let Self {
            workers,
            line,
            verdicts,
            random,
            tide,
            at_ms,
            next_job,
            merges,
            next_merge_ms,
            ..
        } = self;
        let (before, after) = workers.split_at_mut(begin);
        let mut wanting: Vec<&mut Worker> = after
            .iter_mut()
            .chain(before)
            .filter(|worker| worker.wants_job(*at_ms))
            .collect();
        while !wanting.is_empty() {
            for worker in &mut wanting {
                let job = match line.take() {
                    Some(Taken::Back(job)) => job,
                    Some(Taken::Fresh { at_ms: arrived_ms }) => {
                        *next_job += 1;
                        let arrival = (arrived_ms, tide.epoch(tide.moment(arrived_ms)));
                        if *at_ms >= *next_merge_ms {
                            *next_merge_ms = *at_ms + every_ms;
                            *merges += 1;
                            Job::merge(*next_job, arrival, *merges - 1)
                        } else {
                            Job::new(*next_job, arrival, &verdicts.miners, random)
                        }
                    }
                    None => return,
                };
                worker.receive(job, *at_ms, random);
            }
            wanting.retain(|worker| worker.wants_job(*at_ms));
        }
    }

    fn view(&mut self) -> View {
        let at_ms = self.at_ms;
        let workers = self.workers.iter_mut().enumerate();
        let seen =
            workers.filter_map(|(place, worker)| worker.seen(at_ms, place as u64 * 37 % 1000));
        let workers: Vec<_> = seen.collect();
        let consumers = workers
            .iter()
            .filter(|worker| worker.record.broker.consuming);
        let queues = Queues {
            jobs: self.line.waiting(),
            retry: self.line.retrying(),
            dead: self.dead,
            consumers: u32::try_from(consumers.count()).unwrap_or(u32::MAX),
        };
        View {
            at_ms,
            workers,
            model: Some(MODEL.to_owned()),
            queues: Some(Ok(queues)),
        }
    }

    /// The changes as Redis has them in its stream.
    fn entries(&mut self, mut changes: Vec<Change>) -> Vec<StreamEntry> {
        changes.sort_by_key(|(at_ms, _)| *at_ms);
        let number = |(at_ms, fields)| {
            self.events += 1;
            // Redis numbers them by its own time, at which they come.
            let at_ms: u64 = at_ms;
            StreamEntry {
                id: format!("{at_ms}-{}", self.events),
                fields,
            }
        };
        changes.into_iter().map(number).collect()
    }
}

/// The copy of a job that failed at the end of its retries.
fn park(seen: &SeenResult) -> Option<ParkedJob> {
    let result = &seen.result;
    let Body::Error { error } = &result.body else {
        return None;
    };
    Some(ParkedJob {
        submission_id: result.submission_id.clone(),
        code: error.code.as_str().to_owned(),
        message: error.message.clone(),
        worker: result.worker_id.clone(),
        at_ms: seen.at_ms,
        trace_id: seen.trace_id.clone(),
    })
}
