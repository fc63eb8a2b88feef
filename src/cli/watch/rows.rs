//! Which workers the table shows, and in which order.

use std::cmp::Reverse;

use crate::fleet::findings::sickness;
use crate::fleet::observer::Worker;
use crate::fleet::pace::{Pace, Paces};
use crate::protocol::heartbeat::Record;

/// What is shown, and how.
#[derive(Debug)]
pub(super) struct Rows {
    pub(super) order: Order,
    pub(super) shown: Shown,
    /// A part of what a row says; empty = every row.
    pub(super) text: String,
}

impl Rows {
    pub(super) fn new() -> Self {
        Self {
            order: Order::State,
            shown: Shown::All,
            text: String::new(),
        }
    }

    /// The workers that are shown, in order.
    pub(super) fn of<'a>(&self, workers: &'a [Worker], paces: &Paces) -> Vec<&'a Worker> {
        let text = self.text.to_lowercase();
        let mut rows: Vec<&Worker> = workers.iter().collect();
        rows.retain(|w| self.shown.takes(&w.record) && says(&w.record, &text));
        let rate = |worker: &Worker| {
            let pace = paces.of(&worker.record.incarnation);
            pace.map_or(0.0, Pace::rate)
        };
        let p95 = |worker: &Worker| worker.record.jobs.p95_ms.unwrap_or(0.0);
        match self.order {
            Order::Name => {}
            Order::State => rows.sort_by_key(|worker| sickest(worker)),
            Order::Rate => rows.sort_by(|a, b| rate(b).total_cmp(&rate(a))),
            Order::Slowest => rows.sort_by(|a, b| p95(b).total_cmp(&p95(a))),
        }
        rows
    }
}

/// Who takes no jobs comes first, the worst of them and those that have lasted longest before the others.
fn sickest(worker: &Worker) -> impl Ord {
    let sick = (!worker.record.ready).then(|| (sickness(worker), Reverse(worker.state_ms())));
    (sick.is_none(), sick)
}

/// Whether a record says this anywhere that a row or a finding would.
fn says(record: &Record, text: &str) -> bool {
    let version = record.model.version.map(|version| version.to_string());
    let version = version.unwrap_or_default();
    let (host, device) = (&record.host, &record.engine.device);
    let (state, why) = (&record.state, &record.state_detail);
    let mut said = [&record.worker_id, state, why, &version, host, device].into_iter();
    said.any(|said| said.to_lowercase().contains(text))
}

/// What the rows are sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::Display)]
#[strum(serialize_all = "lowercase")]
pub(super) enum Order {
    Name,
    State,
    #[strum(serialize = "jobs/s")]
    Rate,
    #[strum(serialize = "p95")]
    Slowest,
}

impl Order {
    pub(super) fn next(self) -> Self {
        match self {
            Self::Name => Self::State,
            Self::State => Self::Rate,
            Self::Rate => Self::Slowest,
            Self::Slowest => Self::Name,
        }
    }
}

/// Which rows are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::Display)]
#[strum(serialize_all = "lowercase")]
pub(super) enum Shown {
    All,
    Ready,
    #[strum(serialize = "not ready")]
    NotReady,
}

impl Shown {
    pub(super) fn next(self) -> Self {
        match self {
            Self::All => Self::NotReady,
            Self::NotReady => Self::Ready,
            Self::Ready => Self::All,
        }
    }

    fn takes(self, record: &Record) -> bool {
        match self {
            Self::All => true,
            Self::Ready => record.ready,
            Self::NotReady => !record.ready,
        }
    }
}
