//! A simulated worker.

use std::collections::{BTreeMap, VecDeque};

use rand::Rng;
use rand::rngs::StdRng;

use super::device::Device;
use super::job::Job;
use super::part::Part;
use super::record;
use super::script::{NEW, OLD, SWAP, Script, Step};
use super::tide::Tide;
use super::verdicts::{Answered, normal};
use crate::fleet::observer;
use crate::protocol::failure::Status;
use crate::protocol::heartbeat::Record;
use crate::protocol::state::{Detail, State};
use crate::store::LiveRecord;

/// Jobs of which a worker knows how long they took.
const REMEMBERED: usize = 64;
/// Since when the results of one of them are blocked.
const BLOCKED_MS: u64 = 180_000;
/// Micro-batches of a job.
const MICRO_BATCHES: u64 = 8;
/// A record expires so long after a heartbeat.
const TTL_MS: u64 = 5_000;
/// How often a warm-up is tried again.
const AGAIN_MS: u64 = 30_000;
/// The roll-out began at this moment, and how long it takes, seconds: it is over for 7 of 10.
const ROLL_OUT: (f64, f64) = (-3_600.0, 5_143.0);
/// How long an update is downloaded, and its bytes.
const DOWNLOAD_MS: u64 = 45_000;
const UPDATE_BYTES: u64 = 612_000_000;

/// A worker.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) record: Record,
    pub(super) part: Part,
    pub(super) state: State,
    pub(super) device: Device,
    /// Whether its process runs.
    pub(super) present: bool,
    /// When its turn in the roll-out comes.
    pub(super) swap_ms: u64,
    /// When it vanishes.
    silent_ms: Option<u64>,
    script: Script,
    /// How long the last jobs took.
    totals: VecDeque<f64>,
}

/// An entry of the stream of events: when, and its fields.
pub(super) type Change = (u64, BTreeMap<String, String>);

impl Worker {
    /// The worker at a place, when the story starts. It does a job in so many milliseconds as a rule.
    pub(super) fn new(
        (place, part): (usize, Part),
        pace_ms: f64,
        tide: &Tide,
        random: &mut StdRng,
    ) -> Self {
        let start_ms = tide.start_ms;
        let pace_ms = pace_ms * record::gpu(place, part).1;
        let (from, long) = ROLL_OUT;
        let swap_ms = tide.at_ms(from + long * random.random::<f64>());
        let (state, detail, since) = part.opening(random);
        let since_ms = tide.at_ms(since);
        let vanishes = part == Part::Vanishing;
        let mut worker = Self {
            record: record::record(place, part, start_ms, random),
            part,
            state,
            device: Device::new(pace_ms),
            present: true,
            swap_ms,
            silent_ms: vanishes.then(|| start_ms + random.random_range(5_000..20_000)),
            script: Script::of(part, start_ms, since_ms),
            totals: VecDeque::with_capacity(REMEMBERED),
        };
        let known = (part != Part::Warming).then(|| record::version(part, swap_ms, start_ms));
        worker.record.model = record::model(known);
        worker.remember(since_ms, pace_ms, start_ms, random);
        worker.turn(state, detail, since_ms);
        worker
    }

    /// What it did before the story starts.
    fn remember(&mut self, since_ms: u64, pace_ms: f64, start_ms: u64, random: &mut StdRng) {
        if self.part == Part::Warming {
            return;
        }
        let until_ms = match self.state {
            State::Ready if self.part == Part::Blocked => start_ms - BLOCKED_MS,
            State::Ready | State::Draining => start_ms,
            State::Starting | State::Warming | State::Updating | State::Reloading => since_ms,
            State::Degraded | State::Stopped => since_ms,
        };
        self.record.jobs = record::jobs(&self.record, until_ms, 1000.0 / pace_ms, random);
        self.record.progress = record::progress(&self.record.jobs, until_ms);
        let total = |_| 1.7 * pace_ms * (0.25 * normal(random)).exp();
        self.totals = (0..REMEMBERED).map(total).collect();
        self.record.last_ready_at_ms = Some(self.record.started_at_ms + 20_000);
        self.time();
    }

    /// Goes on to now. What changes is added to the changes.
    pub(super) fn live(&mut self, now_ms: u64, random: &mut StdRng, changes: &mut Vec<Change>) {
        if self.silent_ms.is_some_and(|at| now_ms > at + TTL_MS) {
            self.present = false;
        }
        if self.is_idle() && self.record.model.version == Some(OLD) && now_ms >= self.swap_ms {
            self.script.add(now_ms, SWAP);
        }
        while let Some(step) = self.script.due(now_ms) {
            self.enter(step, random, changes);
        }
    }

    /// Whether it serves and nothing else is about to happen to it.
    pub(super) fn is_idle(&self) -> bool {
        self.state == State::Ready && self.script.next().is_none() && self.silent_ms.is_none()
    }

    /// Something happens to it.
    pub(super) fn script(&mut self) -> &mut Script {
        &mut self.script
    }

    fn enter(&mut self, step: Step, random: &mut StdRng, changes: &mut Vec<Change>) {
        let Step { at_ms, to, detail } = step;
        if to == State::Starting {
            self.restart(at_ms, random);
        } else {
            changes.push((at_ms, self.change(to, detail, at_ms)));
        }
        if (self.part, to) == (Part::Rack, State::Degraded) {
            self.script.find(at_ms);
        }
        self.present = to != State::Stopped;
        self.turn(to, detail, at_ms);
    }

    /// The event of a change, as a worker writes it.
    fn change(&self, to: State, detail: Detail, at_ms: u64) -> BTreeMap<String, String> {
        let fields = [
            ("worker_id", self.record.worker_id.clone()),
            ("incarnation", self.record.incarnation.clone()),
            ("from", self.state.as_str().to_owned()),
            ("to", to.as_str().to_owned()),
            ("detail", detail.to_string()),
            ("at", at_ms.to_string()),
        ];
        let fields = fields.into_iter();
        fields
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }

    /// Its last change before the story started.
    pub(super) fn last_change(&self) -> Change {
        let at_ms = self.record.last_state_change_at_ms;
        let from = match self.state {
            State::Ready | State::Starting => State::Warming,
            State::Warming => State::Starting,
            State::Degraded | State::Updating | State::Reloading | State::Draining => State::Ready,
            State::Stopped => State::Draining,
        };
        let mut fields = self.change(self.state, Detail::Serving, at_ms);
        fields.insert("from".to_owned(), from.as_str().to_owned());
        fields.insert("detail".to_owned(), self.record.state_detail.clone());
        (at_ms, fields)
    }

    fn restart(&mut self, at_ms: u64, random: &mut StdRng) {
        let fresh = &mut self.record;
        fresh.incarnation = record::incarnation(random);
        fresh.pid = random.random_range(300..60_000);
        (fresh.seq, fresh.started_at_ms) = (0, at_ms);
        (fresh.last_ready_at_ms, fresh.last_error) = (None, None);
        fresh.warm = Default::default();
        fresh.jobs = Default::default();
        fresh.progress = Default::default();
        fresh.model = record::model(None);
        self.totals.clear();
    }

    /// Takes a state on.
    fn turn(&mut self, state: State, detail: Detail, at_ms: u64) {
        let warmed = self.state == State::Warming && state == State::Ready;
        let record = &mut self.record;
        if state == State::Warming && self.state != State::Warming {
            record.warm.attempt += 1;
        }
        if warmed {
            record.warm.last_at_ms = Some(at_ms);
            record.warm.last_ms = Some(at_ms.saturating_sub(record.last_state_change_at_ms));
            record.warm.baseline_loss = Some(super::verdicts::LOSS);
            let version = if at_ms >= self.swap_ms { NEW } else { OLD };
            if record.model.version != Some(version) {
                record.model = record::model(Some(version));
            }
        }
        self.state = state;
        record.state = state.as_str().into();
        record.state_detail = detail.to_string();
        record.last_state_change_at_ms = at_ms;
        record.ready = state == State::Ready;
        record.broker.consuming = record.ready;
        record.broker.connected = detail != Detail::BrokerDisconnected;
        record.warm.next_retry_at_ms = None;
        if record.ready {
            record.last_ready_at_ms = Some(at_ms);
        }
        if let Some(error) = record::last_error(state, detail, at_ms) {
            record.last_error = Some(error);
        }
    }

    /// Whether it works on what it holds. One that does not hands it back.
    pub(super) fn works(&self) -> bool {
        let works = match self.state {
            State::Ready | State::Updating | State::Draining => true,
            State::Starting | State::Warming | State::Degraded | State::Reloading => false,
            State::Stopped => false,
        };
        works && self.present
    }

    pub(super) fn wants_job(&self, now_ms: u64) -> bool {
        let speaks = self.silent_ms.is_none_or(|at| now_ms < at);
        self.present && speaks && self.record.ready && self.device.has_room()
    }

    pub(super) fn receive(&mut self, job: Job, now_ms: u64, random: &mut StdRng) {
        self.record.jobs.redelivered += u64::from(job.redelivered);
        self.device.receive(job, now_ms, random);
    }

    /// The next job that is done by now.
    pub(super) fn done(&mut self, now_ms: u64) -> Option<(Job, Answered)> {
        let stopped_ms = self.silent_ms.unwrap_or(u64::MAX);
        let answers = self.part != Part::Blocked;
        answers.then(|| self.device.done(now_ms.min(stopped_ms)))?
    }

    /// Counts an answer.
    pub(super) fn count(&mut self, status: Status, answered: Answered) {
        let jobs = &mut self.record.jobs;
        match status {
            Status::Scored => jobs.scored += 1,
            Status::Rejected => jobs.rejected += 1,
            Status::Failed => jobs.failed += 1,
        }
        jobs.last_scored_at_ms = Some(answered.at_ms);
        if answered.timings.forward > 0.0 {
            self.record.progress.counter += MICRO_BATCHES;
        }
        if self.totals.len() == REMEMBERED {
            self.totals.pop_front();
        }
        self.totals.push_back(answered.timings.total);
        self.time();
    }

    /// How long its jobs take.
    fn time(&mut self) {
        let mut sorted: Vec<f64> = self.totals.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let share = |share: f64| sorted.get((sorted.len() as f64 * share) as usize).copied();
        let jobs = &mut self.record.jobs;
        jobs.avg_ms =
            (!sorted.is_empty()).then(|| sorted.iter().sum::<f64>() / sorted.len() as f64);
        (jobs.p50_ms, jobs.p95_ms) = (share(0.5), share(0.95));
    }

    /// As it is seen by others; none while it is gone. `late_ms` is the age of its heartbeat.
    pub(super) fn seen(&mut self, now_ms: u64, late_ms: u64) -> Option<observer::Worker> {
        if !self.present {
            return None;
        }
        let beaten_ms = now_ms.saturating_sub(late_ms);
        if self.silent_ms.is_none_or(|at| beaten_ms < at) {
            self.beat(beaten_ms, now_ms);
        }
        let record = self.record.clone();
        let live = LiveRecord {
            age_ms: now_ms.saturating_sub(record.at_ms),
            text: serde_json::to_string(&record).unwrap_or_default(),
        };
        Some(observer::Worker { record, live })
    }

    /// What changes with every heartbeat.
    fn beat(&mut self, beaten_ms: u64, now_ms: u64) {
        let held = self.device.held() as u64;
        let record = &mut self.record;
        (record.seq, record.at_ms) = (record.seq + 1, beaten_ms);
        record.accepting = record.ready && self.device.has_room();
        record.jobs.in_flight = held.min(1);
        record.jobs.buffered = held.saturating_sub(1);
        self.progress(now_ms);
        self.try_again(now_ms);
        self.follow(now_ms);
    }

    /// What its device does.
    fn progress(&mut self, now_ms: u64) {
        let works = self.works() && self.device.held() > 0;
        let record = &mut self.record;
        if self.part == Part::Stuck {
            record.jobs.in_flight = 1;
            record.progress.busy_ms = now_ms.saturating_sub(record.progress.at_ms);
        } else if self.part != Part::Blocked {
            record.progress.busy_ms = self.device.busy_ms(now_ms);
            if works {
                record.progress.at_ms = record.at_ms;
            }
        }
    }

    /// One that could not be warmed tries it again and again.
    fn try_again(&mut self, now_ms: u64) {
        if self.state != State::Degraded || self.part == Part::Paused {
            return;
        }
        let warm = &mut self.record.warm;
        let since_ms = now_ms.saturating_sub(self.record.last_state_change_at_ms);
        let next_ms = now_ms - since_ms % AGAIN_MS + AGAIN_MS;
        let known = warm.next_retry_at_ms.replace(next_ms);
        warm.attempt += u64::from(known.is_some_and(|known| known != next_ms));
    }

    /// The update that it downloads.
    fn follow(&mut self, now_ms: u64) {
        let waits = self.record.model.version == Some(OLD) && self.state == State::Ready;
        let left_ms = self.swap_ms.saturating_sub(now_ms);
        let here = UPDATE_BYTES * DOWNLOAD_MS.saturating_sub(left_ms) / DOWNLOAD_MS;
        let loads = waits && here > 0;
        if let Some(update) = &mut self.record.update {
            update.looked_at_ms = Some(now_ms - now_ms % 60_000);
            update.bytes_here = if loads { here } else { 0 };
            update.bytes_wanted = if loads { UPDATE_BYTES } else { 0 };
        }
    }
}
