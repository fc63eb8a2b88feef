//! The workers: what each was last, and what is remembered of it.

use std::collections::{BTreeMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use serde::Serialize;

use super::news::Change;
use super::text::cut;
use super::timeline::{STAGES, Sample, short, stage_times};
use super::verdict::Verdict;
use crate::fleet::observer::{View, Worker};
use crate::fleet::pace::{Pace, Paces};
use crate::protocol::heartbeat::{LastError, Record};
use crate::protocol::result::Timings;

/// Errors that are remembered of a worker.
const ERRORS: usize = 20;
/// Results that are remembered of a worker.
const RESULTS: usize = 20;
/// Results whose times are remembered of a worker.
const TIMES: usize = 64;
/// Workers that are remembered after they have gone.
const GONE: usize = 1000;
/// Bytes of a text that every page is told again and again.
const WORD: usize = 160;
/// Looks over which a worker's busy share is taken.
const BUSY_LOOKS: usize = 60;
/// Looks over which the fleet's busy share is taken.
const FLEET_LOOKS: usize = 10;

/// All workers by name: their id, unless two have the same.
#[derive(Debug, Default)]
pub(super) struct Roster {
    members: BTreeMap<Arc<str>, Member>,
    /// The names begin with the model's.
    several_models: bool,
    paces: Paces,
    looks: u64,
    /// Of the ready workers' devices, 0 to 1.
    busy: Option<f64>,
    /// Counts changes of what [`Names`] has.
    pub(super) rev: u64,
    /// Digest of that.
    names: u64,
}

#[derive(Debug, Default)]
struct Member {
    record: Record,
    age_ms: u64,
    /// By the board's clock.
    since_ms: Option<u64>,
    seen_ms: u64,
    alive: bool,
    errors: VecDeque<LastError>,
    results: VecDeque<Brief>,
    times: VecDeque<Timings>,
}

/// A result in the list of a worker.
#[derive(Debug, Clone, Serialize)]
struct Brief {
    at_ms: u64,
    submission_id: String,
    verdict: &'static str,
    delta: Option<f64>,
    total_ms: Option<f64>,
}

/// The names, and what changes seldom.
#[derive(Debug, Serialize)]
pub(super) struct Names<'a> {
    rev: u64,
    ids: Vec<&'a str>,
    hosts: Vec<&'a str>,
    /// The devices that there are.
    devices: Vec<&'a str>,
    /// Which of them a worker has; -1 = unknown.
    device: Vec<i64>,
}

/// What changes all the time, in columns.
#[derive(Debug, Serialize)]
pub(super) struct Columns<'a> {
    words: Vec<&'a str>,
    #[serde(rename = "workers")]
    columns: Table,
}

#[derive(Debug, Default, Serialize)]
struct Table {
    state: Vec<i64>,
    why: Vec<i64>,
    /// `1` or `0` for each worker, as `warn`.
    ready: String,
    for_s: Vec<Option<u64>>,
    version: Vec<Option<u64>>,
    rate: Vec<f64>,
    p95: Vec<Option<f64>>,
    /// Percent.
    busy: Vec<u8>,
    failed: Vec<u64>,
    warn: String,
}

/// Everything about one worker.
#[derive(Debug, Serialize)]
pub(super) struct Detail<'a> {
    at_ms: u64,
    id: &'a str,
    alive: bool,
    lost_at_ms: Option<u64>,
    age_ms: u64,
    since_ms: Option<u64>,
    record: &'a Record,
    rates: Vec<f64>,
    busy: Vec<u8>,
    stages: BTreeMap<&'static str, Stage>,
    errors: Vec<&'a LastError>,
    events: Vec<&'a Change>,
    results: Vec<&'a Brief>,
}

#[derive(Debug, Serialize)]
struct Stage {
    p50: f64,
    p95: f64,
    count: usize,
}

/// Texts, each once.
#[derive(Default)]
struct Words<'a> {
    places: BTreeMap<&'a str, i64>,
    list: Vec<&'a str>,
}

impl Roster {
    /// The workers as they are now.
    pub(super) fn see(&mut self, view: &View) {
        self.several_models = view.models().len() > 1;
        for member in self.members.values_mut() {
            member.alive = false;
        }
        for worker in &view.workers {
            let name = self.name(worker);
            self.members
                .entry(name)
                .or_default()
                .see(worker, view.at_ms);
        }
        self.forget();
        self.paces.see(view);
        self.looks += 1;
        self.busy = self.paces.busy(view, FLEET_LOOKS);
        let mut digest = DefaultHasher::new();
        for (name, member) in self.alive() {
            (name, member.host(), member.device()).hash(&mut digest);
        }
        let names = digest.finish();
        if self.names != names {
            (self.names, self.rev) = (names, self.rev + 1);
        }
    }

    /// Of two with one id, the second has a name that no other has.
    fn name(&self, worker: &Worker) -> Arc<str> {
        let Record {
            worker_id,
            incarnation,
            ..
        } = &worker.record;
        let name = match self.several_models {
            true => format!("{}/{worker_id}", worker.record.model.name),
            false => worker_id.clone(),
        };
        let taken = self
            .members
            .get(name.as_str())
            .is_some_and(|member| member.alive);
        match taken {
            true => format!("{name}~{}", incarnation.chars().take(8).collect::<String>()).into(),
            false => name.into(),
        }
    }

    /// Those that have gone for longest, beyond what is kept.
    fn forget(&mut self) {
        let gone = || self.members.iter().filter(|(_, member)| !member.alive);
        let surplus = gone().count().saturating_sub(GONE);
        if surplus > 0 {
            let mut oldest: Vec<_> = gone()
                .map(|(name, m)| (m.seen_ms, Arc::clone(name)))
                .collect();
            oldest.sort();
            for (_, name) in oldest.into_iter().take(surplus) {
                self.members.remove(&name);
            }
        }
    }

    fn alive(&self) -> impl Iterator<Item = (&str, &Member)> {
        let alive = self.members.iter().filter(|(_, member)| member.alive);
        alive.map(|(name, member)| (&**name, member))
    }

    /// How fast it is, while it is alive.
    fn pace(&self, member: &Member) -> Option<&Pace> {
        self.paces.of(&member.record.incarnation)
    }

    /// The name of a worker by that name or by its id, which is all that results and events have.
    fn named(&self, name: &str) -> Option<&Arc<str>> {
        let exact = self.members.get_key_value(name);
        let of_id = || {
            let members = self.members.iter();
            let of_id = members.filter(|(_, member)| member.record.worker_id == name);
            of_id.max_by_key(|(_, member)| (member.alive, member.seen_ms))
        };
        let found = match self.several_models {
            true => exact.filter(|(_, member)| member.alive).or_else(of_id),
            false => exact,
        };
        found.map(|(name, _)| name)
    }

    /// Notes a result of a worker.
    pub(super) fn judge(&mut self, submission_id: &str, verdict: &Verdict) {
        let name = self.named(&verdict.worker).cloned();
        let Some(member) = name.and_then(|name| self.members.get_mut(&name)) else {
            return;
        };
        member.results.push_back(Brief {
            at_ms: verdict.at_ms,
            submission_id: submission_id.to_owned(),
            verdict: verdict.verdict,
            delta: verdict.delta,
            total_ms: verdict.timings_ms.map(|timings| short(timings.total)),
        });
        keep(&mut member.results, RESULTS);
        member.times.extend(verdict.timings_ms);
        keep(&mut member.times, TIMES);
    }

    /// The fleet in numbers, but for the queue.
    pub(super) fn sample(&self) -> Sample {
        let ready = self.alive().filter(|(_, member)| member.record.ready);
        let jobs = |(_, member): (_, &Member)| member.record.jobs.p50_ms;
        let mut middles: Vec<f64> = self.alive().filter_map(jobs).collect();
        middles.sort_by(f64::total_cmp);
        let slowest = self.alive().filter_map(|(_, m)| m.record.jobs.p95_ms);
        let mut versions = BTreeMap::new();
        for (_, member) in self.alive() {
            *versions.entry(member.record.model.version).or_default() += 1;
        }
        Sample {
            alive: self.alive().count(),
            ready: ready.count(),
            jobs_per_s: (self.looks > 1).then(|| self.paces.rate()),
            busy: self.busy,
            workers_p50: middles.get(middles.len() / 2).copied(),
            workers_p95: slowest.reduce(f64::max),
            versions,
            ..Sample::default()
        }
    }

    pub(super) fn names(&self) -> Names<'_> {
        let mut devices = Words::default();
        let mut names = Names {
            rev: self.rev,
            ids: Vec::new(),
            hosts: Vec::new(),
            devices: Vec::new(),
            device: Vec::new(),
        };
        for (name, member) in self.alive() {
            names.ids.push(name);
            names.hosts.push(cut(member.host(), WORD));
            names.device.push(devices.place(member.device()));
        }
        names.devices = devices.list;
        names
    }

    pub(super) fn columns(&self, at_ms: u64) -> Columns<'_> {
        let (mut words, mut columns) = (Words::default(), Table::default());
        for (_, member) in self.alive() {
            let (record, pace) = (&member.record, self.pace(member));
            columns.state.push(words.place(&record.state));
            columns.why.push(words.place(&record.state_detail));
            columns.ready.push(flag(record.ready));
            let since = member.since_ms;
            columns
                .for_s
                .push(since.map(|since| at_ms.saturating_sub(since) / 1000));
            columns.version.push(record.model.version);
            columns.rate.push(short(pace.map_or(0.0, Pace::rate)));
            columns.p95.push(record.jobs.p95_ms.map(short));
            let busy = pace.map_or(0.0, |pace| pace.busy(BUSY_LOOKS));
            columns.busy.push(percent(busy));
            columns.failed.push(record.jobs.failed);
            columns.warn.push(flag(member.warns()));
        }
        Columns {
            words: words.list,
            columns,
        }
    }

    /// All that is known of a worker, and what `events` has of it.
    pub(super) fn detail<'a>(
        &'a self,
        name: &str,
        at_ms: u64,
        events: impl Iterator<Item = &'a Change>,
    ) -> Option<Detail<'a>> {
        let (id, member) = self.members.get_key_value(self.named(name)?)?;
        let pace = || self.pace(member).into_iter();
        let of_it = events.filter(|event| event.worker == member.record.worker_id);
        Some(Detail {
            at_ms,
            id,
            alive: member.alive,
            lost_at_ms: (!member.alive).then_some(member.seen_ms),
            age_ms: at_ms.saturating_sub(member.seen_ms) + member.age_ms,
            since_ms: member.since_ms,
            record: &member.record,
            rates: pace().flat_map(Pace::rates).map(short).collect(),
            busy: pace().flat_map(Pace::busy_looks).map(u8::from).collect(),
            stages: member.stages(),
            errors: member.errors.iter().rev().collect(),
            events: of_it.collect(),
            results: member.results.iter().rev().collect(),
        })
    }
}

impl Member {
    fn see(&mut self, worker: &Worker, at_ms: u64) {
        let record = &worker.record;
        if let Some(error) = &record.last_error
            && self.errors.back() != Some(error)
        {
            self.errors.push_back(error.clone());
            keep(&mut self.errors, ERRORS);
        }
        self.since_ms = worker.state_ms().map(|ms| at_ms.saturating_sub(ms));
        (self.age_ms, self.seen_ms, self.alive) = (worker.live.age_ms, at_ms, true);
        self.record = record.clone();
    }

    fn host(&self) -> &str {
        &self.record.host
    }

    fn device(&self) -> &str {
        let gpu = self.record.host_info.gpu_model.as_deref();
        gpu.filter(|gpu| !gpu.is_empty())
            .unwrap_or(&self.record.engine.device)
    }

    /// Whether something is wrong although the worker takes jobs.
    fn warns(&self) -> bool {
        let Record {
            broker,
            store,
            update,
            engine,
            ..
        } = &self.record;
        let behind = update
            .as_ref()
            .is_some_and(|update| update.failure.is_some());
        broker.blocked || !store.ok || behind || engine.software_device
    }

    fn stages(&self) -> BTreeMap<&'static str, Stage> {
        let stage = |(at, name): (usize, &&'static str)| {
            let mut times: Vec<f64> = self.times.iter().map(|t| stage_times(t)[at]).collect();
            times.sort_by(f64::total_cmp);
            let last = times.len().checked_sub(1)?;
            let stage = Stage {
                p50: short(times[last / 2]),
                p95: short(times[last * 95 / 100]),
                count: times.len(),
            };
            Some((*name, stage))
        };
        STAGES.iter().enumerate().filter_map(stage).collect()
    }
}

impl<'a> Words<'a> {
    /// Where a text is; -1 = it is empty.
    fn place(&mut self, text: &'a str) -> i64 {
        let text = cut(text, WORD);
        if text.is_empty() {
            return -1;
        }
        let next = i64::try_from(self.list.len()).unwrap_or(i64::MAX);
        let place = *self.places.entry(text).or_insert(next);
        if place == next {
            self.list.push(text);
        }
        place
    }
}

fn flag(set: bool) -> char {
    match set {
        true => '1',
        false => '0',
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a share of 0 to 1"
)]
fn percent(share: f64) -> u8 {
    (share * 100.0).round() as u8
}

/// The newest of a list.
pub(super) fn keep<T>(queue: &mut VecDeque<T>, most: usize) {
    let surplus = queue.len().saturating_sub(most);
    queue.drain(..surplus);
}
