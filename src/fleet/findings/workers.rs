//! What the records of the workers say.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use strum::{EnumMessage, IntoEnumIterator, VariantArray};

use super::{Finding, Lost, NAMED, Seen, Severity, brief, many, span};
use crate::fleet::observer::{View, Worker};
use crate::protocol::heartbeat::Record;
use crate::protocol::state::{Detail, State};

/// Warm-ups, updates, drains and the like are over by then, or hang.
const LONG_MS: u64 = 600_000;
/// So many warm-ups since it was last ready are no accident.
const WARM_UPS: u64 = 3;
/// A heartbeat is late after this many intervals, and never before this time.
const LATE_BEATS: f64 = 2.5;
const LATE_MS: u64 = 2500;

pub(super) fn nobody(seen: Seen<'_>) -> Vec<Finding> {
    let text = match (seen.view.workers.len(), seen.view.ready()) {
        (0, _) => "no worker is alive".to_owned(),
        (1, 0) => "the only worker takes no jobs".to_owned(),
        (alive, 0) => format!("none of {alive} workers takes jobs"),
        (_, _) => return Vec::new(),
    };
    vec![Finding::overall(
        Severity::Bad,
        text,
        seen.view.workers.len(),
    )]
}

pub(super) fn lost(seen: Seen<'_>) -> Vec<Finding> {
    let count = seen.lost.len();
    let vanished = many(count, "worker", "workers");
    let text = format!("{vanished} vanished: killed, frozen, or cut off from Redis");
    let names = seen.lost.iter().rev().take(NAMED);
    let workers = names.map(|Lost { id, .. }| id.clone()).collect();
    let finding = Finding {
        workers,
        ..Finding::overall(Severity::Bad, text, count)
    };
    (count > 0).then_some(finding).into_iter().collect()
}

/// Workers that take no jobs, by what they say of it.
pub(super) fn not_ready(seen: Seen<'_>) -> Vec<Finding> {
    let mut groups: BTreeMap<(Severity, &str, &str), Vec<&Worker>> = BTreeMap::new();
    for worker in &seen.view.workers {
        let Record {
            ready,
            state,
            state_detail,
            ..
        } = &worker.record;
        if !ready {
            let key = (sickness(worker), state.as_str(), state_detail.as_str());
            groups.entry(key).or_default().push(worker);
        }
    }
    let finding = |((severity, state, detail), workers): ((_, &str, &str), Vec<&Worker>)| {
        let text = why_not_ready(severity, state, detail, &workers);
        let word = if detail.is_empty() { state } else { detail };
        Finding::about(severity, text, workers).found_by(word)
    };
    groups.into_iter().map(finding).collect()
}

/// Workers that hold jobs which they may not compute before it is known whether somebody else is alive.
pub(super) fn waits(seen: Seen<'_>) -> Vec<Finding> {
    let waiting = |worker: &&Worker| worker.record.jobs.waiting > 0;
    let workers: Vec<&Worker> = seen.view.workers.iter().filter(waiting).collect();
    let jobs: u64 = workers
        .iter()
        .map(|worker| worker.record.jobs.waiting)
        .sum();
    let whom = workers
        .iter()
        .flat_map(|worker| &worker.record.jobs.waits_for);
    let whom: BTreeSet<&str> = whom.map(String::as_str).collect();
    let whom = whom
        .into_iter()
        .take(NAMED)
        .collect::<Vec<&str>>()
        .join(", ");
    let wait = match jobs {
        0 => return Vec::new(),
        1 => "1 job waits".to_owned(),
        jobs => format!("{jobs} jobs wait"),
    };
    let text = brief(&format!(
        "{wait} for the end of {whom}, or a sign of life; others are computed"
    ));
    vec![Finding::about(Severity::Note, text, workers)]
}

/// How bad it is that this worker takes no jobs.
pub(crate) fn sickness(worker: &Worker) -> Severity {
    let detail = worker.record.state_detail.as_str();
    let passing = match hangs(worker) {
        true => Severity::Warn,
        false => Severity::Note,
    };
    match state_of(&worker.record) {
        Some(State::Degraded) if detail == Detail::Paused.to_string() => Severity::Warn,
        Some(State::Degraded) => Severity::Bad,
        // Its consumer is not confirmed, or its computation makes no progress.
        Some(State::Ready) => Severity::Warn,
        Some(State::Starting | State::Warming | State::Updating) => passing,
        Some(State::Reloading | State::Draining | State::Stopped) => passing,
        // A word of a newer version, or none.
        None => Severity::Warn,
    }
}

fn state_of(record: &Record) -> Option<State> {
    let mut states = State::VARIANTS.iter().copied();
    states.find(|state| state.as_str() == record.state)
}

/// Whether a state that should pass does not.
fn hangs(worker: &Worker) -> bool {
    let Record {
        warm, last_error, ..
    } = &worker.record;
    let failed_ms = last_error.as_ref().map_or(0, |error| error.at_ms);
    let since_ready = worker
        .record
        .last_ready_at_ms
        .is_none_or(|at| failed_ms > at);
    worker.state_ms().is_some_and(|ms| ms > LONG_MS) || since_ready && warm.attempt > WARM_UPS
}

fn why_not_ready(severity: Severity, state: &str, detail: &str, workers: &[&Worker]) -> String {
    let are = many(workers.len(), "worker is", "workers are");
    let state = if state.is_empty() {
        "in no known state"
    } else {
        state
    };
    let mut text = format!("{are} {state}");
    if state == State::Ready.as_str() {
        text.push_str(", but RabbitMQ has not confirmed a consumer, or a computation hangs");
        return text;
    }
    if !detail.is_empty() {
        text.push_str(&format!(": {detail}"));
    }
    let longest = workers.iter().filter_map(|worker| worker.state_ms()).max();
    match (severity, longest) {
        (Severity::Warn, Some(ms)) if ms > LONG_MS => {
            text.push_str(&format!(", for up to {}", span(ms)));
        }
        (Severity::Bad | Severity::Warn, _) => text.push_str(&meaning(detail)),
        (Severity::Note, _) => {}
    }
    brief(&text)
}

/// What a detail means.
fn meaning(detail: &str) -> String {
    let mut known = Detail::iter().filter(|known| known.to_string() == detail);
    let said = known.next().and_then(|known| known.get_documentation());
    said.map_or_else(String::new, |said| {
        format!(". {}", said.trim_end_matches('.').replace('`', ""))
    })
}

pub(super) fn blocked(seen: Seen<'_>) -> Vec<Finding> {
    some(
        seen,
        Severity::Bad,
        |r| r.broker.blocked,
        |count| {
            let blocks = many(count, "worker", "workers");
            format!(
                "RabbitMQ lets {blocks} publish nothing (memory or disk alarm): results do not get out"
            )
        },
    )
}

/// Heartbeats that are late, but not so late that the records have run out.
pub(super) fn silent(seen: Seen<'_>) -> Vec<Finding> {
    let late: Vec<&Worker> = seen.view.workers.iter().filter(|w| is_late(w)).collect();
    let longest = late.iter().map(|worker| worker.live.age_ms).max();
    let finding = longest.map(|ms| {
        let are = many(late.len(), "worker has", "workers have");
        let text = format!("{are} been silent for up to {}", span(ms));
        Finding::about(Severity::Warn, text, late)
    });
    finding.into_iter().collect()
}

/// How often a worker beats is not in its record, but how long it has run and how many beats it made.
#[expect(clippy::cast_precision_loss, reason = "times")]
fn is_late(worker: &Worker) -> bool {
    let Record {
        seq,
        at_ms,
        started_at_ms,
        ..
    } = worker.record;
    let interval = at_ms.saturating_sub(started_at_ms) as f64 / seq.max(1) as f64;
    let age = worker.live.age_ms;
    age > LATE_MS && age as f64 > LATE_BEATS * interval
}

pub(super) fn store(seen: Seen<'_>) -> Vec<Finding> {
    let why = |record: &Record| {
        let why = record.store.last_error.clone().unwrap_or_default();
        (!record.store.ok).then_some(((), why))
    };
    by_reason(seen, why, |(), count, why| {
        let have = many(count, "worker has", "workers have");
        format!("{have} trouble with Redis, so that results or crash marks are missing: {why}")
    })
}

pub(super) fn update(seen: Seen<'_>) -> Vec<Finding> {
    by_reason(seen, why_not_updated, |live, count, why| match live {
        Some(live) => {
            let serve = many(count, "worker does", "workers do");
            format!("{serve} not serve the live version {live}: {why}")
        }
        None => {
            let follow = many(count, "worker cannot", "workers cannot");
            format!("{follow} follow the model's versions: {why}")
        }
    })
}

/// The version that should be served, if it is known and is not; and why.
fn why_not_updated(record: &Record) -> Option<(Option<u64>, String)> {
    let update = record.update.as_ref()?;
    let live = update.live_version;
    let other = live.filter(|_| live != record.model.version);
    let refused = update.refused.as_ref();
    let refused = refused.filter(|refused| other == Some(refused.version));
    let why = update.failure.as_ref();
    let why = why.or(refused.map(|refused| &refused.why))?;
    Some((other, why.clone()))
}

pub(super) fn software(seen: Seen<'_>) -> Vec<Finding> {
    some(
        seen,
        Severity::Warn,
        |r| r.engine.software_device,
        |count| {
            let compute = many(count, "worker computes", "workers compute");
            format!("{compute} on a device in software, which is meant for tests")
        },
    )
}

/// More than one version is served.
pub(super) fn versions(seen: Seen<'_>) -> Vec<Finding> {
    let served = Versions::of(seen.view);
    let total = served.0.iter().map(|(_, workers)| workers).sum();
    let text = format!("several versions are served: {served}");
    let found = served
        .are_several()
        .then(|| Finding::overall(Severity::Note, text, total));
    found.into_iter().collect()
}

/// The versions that ready workers serve where those of a model serve several, and how many serve each, most first.
pub(crate) struct Versions(Vec<(String, usize)>);

impl Versions {
    pub(crate) fn of(view: &View) -> Self {
        let ready = view.workers.iter().filter(|worker| worker.record.ready);
        let mut models: BTreeMap<&str, BTreeMap<u64, usize>> = BTreeMap::new();
        for model in ready.map(|worker| &worker.record.model) {
            if let Some(version) = model.version {
                *models
                    .entry(&model.name)
                    .or_default()
                    .entry(version)
                    .or_default() += 1;
            }
        }
        let alone = models.len() == 1;
        models.retain(|_, versions| versions.len() > 1);
        let mut counts = Vec::new();
        for (model, versions) in models {
            let named = |version| match alone {
                true => format!("{version}"),
                false => format!("{} {version}", brief(model)),
            };
            counts.extend(
                versions
                    .into_iter()
                    .rev()
                    .map(|(version, workers)| (named(version), workers)),
            );
        }
        counts.sort_by_key(|(_, workers)| Reverse(*workers));
        Self(counts)
    }

    pub(crate) fn are_several(&self) -> bool {
        !self.0.is_empty()
    }
}

impl std::fmt::Display for Versions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let named = self.0.iter().take(NAMED).enumerate();
        let named = named.map(|(at, (version, workers))| match at {
            0 => format!("{version} by {}", many(*workers, "worker", "workers")),
            _ => format!("{version} by {workers}"),
        });
        f.write_str(&named.collect::<Vec<_>>().join(", "))?;
        match self.0.iter().skip(NAMED).map(|(_, workers)| workers).sum() {
            0_usize => Ok(()),
            others => write!(f, ", others by {others}"),
        }
    }
}

pub(super) fn inert(seen: Seen<'_>) -> Vec<Finding> {
    let has = |record: &Record| record.warm.inert_count > 0;
    let named = seen.view.workers.iter().find(|worker| has(&worker.record));
    let name = named.and_then(|worker| worker.record.warm.inert.first());
    let name = name.map_or_else(String::new, |name| format!(", such as {name}"));
    some(seen, Severity::Note, has, |count| {
        let serve = many(count, "worker saw", "workers saw");
        brief(&format!(
            "{serve} no effect of some tensors on the loss{name}"
        ))
    })
}

/// One finding about the workers of which something holds.
fn some(
    seen: Seen<'_>,
    severity: Severity,
    holds: impl Fn(&Record) -> bool,
    text: impl FnOnce(usize) -> String,
) -> Vec<Finding> {
    let workers = seen.view.workers.iter();
    let workers: Vec<&Worker> = workers.filter(|worker| holds(&worker.record)).collect();
    match workers.len() {
        0 => Vec::new(),
        count => vec![Finding::about(severity, text(count), workers)],
    }
}

/// A warning for each group of workers, with the reason that most of it have.
fn by_reason<K: Ord + Copy>(
    seen: Seen<'_>,
    why: impl Fn(&Record) -> Option<(K, String)>,
    text: impl Fn(K, usize, String) -> String,
) -> Vec<Finding> {
    let mut groups: BTreeMap<K, (Vec<&Worker>, BTreeMap<String, usize>)> = BTreeMap::new();
    for worker in &seen.view.workers {
        if let Some((key, why)) = why(&worker.record) {
            let (workers, reasons) = groups.entry(key).or_default();
            workers.push(worker);
            *reasons.entry(why).or_default() += 1;
        }
    }
    let finding = |(key, (workers, reasons)): (K, (Vec<&Worker>, BTreeMap<String, usize>))| {
        let most = reasons.iter().min_by_key(|(_, count)| Reverse(**count));
        let mut why = most.map_or_else(String::new, |(why, _)| brief(why));
        if reasons.len() > 1 {
            why.push_str(" (others give other reasons)");
        }
        Finding::about(Severity::Warn, text(key, workers.len(), why), workers)
    };
    groups.into_iter().map(finding).collect()
}
