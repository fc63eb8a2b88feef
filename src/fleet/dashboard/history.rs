//! What the page shows: the fleet now, and what the dashboard has seen since it started. No I/O.

use std::collections::{BTreeMap, VecDeque};

use serde::Serialize;

use crate::fleet::observer::{Queues, View};
use crate::protocol::failure::Code;
use crate::protocol::heartbeat::Record;
use crate::protocol::result::ResultMessage;
use crate::store::StreamEntry;

/// Interval between two points of the curves.
const POINT_MS: u64 = 10_000;
/// Half an hour.
const POINTS: usize = 180;
/// Looks in a worker's sparkline.
const LOOKS: usize = 60;
const DELTAS: usize = 500;
const EVENTS: usize = 200;
const PARKED: usize = 50;

/// Everything the page needs, as sent to it.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Page {
    /// By Redis' clock; 0 = not looked yet.
    at_ms: u64,
    /// Why the fleet is unknown.
    unknown: Option<String>,
    model: Option<String>,
    queues: Option<Queues>,
    /// Why they are unknown.
    queues_unknown: Option<String>,
    workers: Vec<Row>,
    points: VecDeque<Point>,
    /// Since when results and dead-lettered jobs are received.
    watching_since_ms: Option<u64>,
    /// Why they are not.
    unwatched: Option<String>,
    verdicts: BTreeMap<String, u64>,
    deltas: VecDeque<f64>,
    events: VecDeque<Change>,
    parked: VecDeque<Parked>,
}

#[derive(Debug, Clone, Default, Serialize)]
struct Row {
    id: String,
    model: Option<String>,
    state: Option<String>,
    detail: Option<String>,
    ready: bool,
    /// By Redis' clock.
    since_ms: Option<u64>,
    version: Option<u64>,
    scored: u64,
    rejected: u64,
    failed: u64,
    p50_ms: Option<f64>,
    p95_ms: Option<f64>,
    /// Jobs per second, oldest first.
    rates: VecDeque<f64>,
    error: Option<String>,
}

/// The fleet at one moment.
#[derive(Debug, Clone, Default, Serialize)]
struct Point {
    at_ms: u64,
    jobs_per_s: f64,
    /// Median of the workers' p50.
    p50_ms: Option<f64>,
    p95_ms: Option<f64>,
    waiting: Option<u32>,
    /// Workers by the version that they have.
    versions: BTreeMap<u64, usize>,
}

#[derive(Debug, Clone, Serialize)]
struct Change {
    #[serde(skip)]
    id: String,
    at_ms: u64,
    worker: String,
    text: String,
    to: String,
}

/// A job that was dead-lettered while the dashboard was connected.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Parked {
    pub(super) submission_id: String,
    pub(super) code: String,
    pub(super) message: String,
    pub(super) worker: String,
    pub(super) at_ms: u64,
}

/// What is remembered between two looks.
#[derive(Debug, Default)]
pub(super) struct History {
    page: Page,
    /// By incarnation: when it was seen, and what it had answered.
    answered: BTreeMap<String, (u64, u64)>,
}

impl History {
    pub(super) fn page(&self) -> &Page {
        &self.page
    }

    /// The model that is looked at, once it is known.
    pub(super) fn model(&self) -> Option<String> {
        self.page.model.clone()
    }

    /// The last event that is known.
    pub(super) fn last_event(&self) -> Option<String> {
        self.page.events.back().map(|change| change.id.clone())
    }

    /// Notes that the fleet is unknown. The page keeps the last look, marked as old.
    pub(super) fn lose_sight(&mut self, why: String) {
        self.page.unknown = Some(why);
    }

    /// The fleet as it is now.
    pub(super) fn see(&mut self, view: &View) {
        let before = std::mem::take(&mut self.page.workers).into_iter();
        let mut rates: BTreeMap<_, _> = before.map(|row| (row.id, row.rates)).collect();
        for worker in &view.workers {
            let state_ms = worker.state_ms();
            let mut row = Row::of(&worker.record);
            row.since_ms = state_ms.map(|state_ms| view.at_ms.saturating_sub(state_ms));
            row.rates = rates.remove(&row.id).unwrap_or_default();
            row.rates.push_back(self.rate(&worker.record, view.at_ms));
            keep(&mut row.rates, LOOKS);
            self.page.workers.push(row);
        }
        self.answered.retain(|_, (seen, _)| *seen == view.at_ms);
        self.page.model = view.model.clone();
        (self.page.queues, self.page.queues_unknown) = match &view.queues {
            Some(Ok(queues)) => (Some(*queues), None),
            Some(Err(why)) => (None, Some(why.clone())),
            None => (None, None),
        };
        (self.page.at_ms, self.page.unknown) = (view.at_ms, None);
        self.add_point();
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "jobs and milliseconds between two looks"
    )]
    fn rate(&mut self, record: &Record, at_ms: u64) -> f64 {
        let now = (at_ms, record.jobs.answered());
        match self.answered.insert(record.incarnation.clone(), now) {
            Some((then, before)) if at_ms > then => {
                now.1.saturating_sub(before) as f64 * 1e3 / (at_ms - then) as f64
            }
            Some(_) | None => 0.0,
        }
    }

    fn add_point(&mut self) {
        let page = &mut self.page;
        let due = page
            .points
            .back()
            .is_none_or(|point| page.at_ms >= point.at_ms + POINT_MS);
        if !due {
            return;
        }
        let latest = |row: &Row| row.rates.back().copied().unwrap_or_default();
        let mut middles: Vec<f64> = page.workers.iter().filter_map(|row| row.p50_ms).collect();
        middles.sort_by(f64::total_cmp);
        let mut versions = BTreeMap::new();
        for version in page.workers.iter().filter_map(|row| row.version) {
            *versions.entry(version).or_default() += 1;
        }
        let point = Point {
            at_ms: page.at_ms,
            jobs_per_s: page.workers.iter().map(latest).sum(),
            p50_ms: middles.get(middles.len() / 2).copied(),
            p95_ms: page
                .workers
                .iter()
                .filter_map(|row| row.p95_ms)
                .reduce(f64::max),
            waiting: page.queues.map(|queues| queues.jobs),
            versions,
        };
        page.points.push_back(point);
        keep(&mut page.points, POINTS);
    }

    /// Changes of state, oldest first.
    pub(super) fn add_events(&mut self, events: Vec<StreamEntry>) {
        self.page.events.extend(events.into_iter().map(Change::of));
        keep(&mut self.page.events, EVENTS);
    }

    /// Notes that results and dead-lettered jobs are received from now on, or why not.
    pub(super) fn watches(&mut self, since_ms: Result<u64, String>) {
        (self.page.watching_since_ms, self.page.unwatched) = match since_ms {
            Ok(since_ms) => (Some(since_ms), None),
            Err(why) => (None, Some(why)),
        };
    }

    /// Adds a result.
    pub(super) fn judge(&mut self, result: &ResultMessage) {
        let word = result.code().map_or("scored", Code::as_str);
        *self.page.verdicts.entry(word.to_owned()).or_default() += 1;
        if let Some(delta) = result.delta() {
            self.page.deltas.push_back(delta);
            keep(&mut self.page.deltas, DELTAS);
        }
    }

    /// Adds a dead-lettered job.
    pub(super) fn park(&mut self, parked: Parked) {
        self.page.parked.push_back(parked);
        keep(&mut self.page.parked, PARKED);
    }
}

fn keep<T>(queue: &mut VecDeque<T>, most: usize) {
    let surplus = queue.len().saturating_sub(most);
    queue.drain(..surplus);
}

impl Row {
    fn of(record: &Record) -> Self {
        let (jobs, error) = (&record.jobs, record.last_error.as_ref());
        let known = |text: &String| (!text.is_empty()).then(|| text.clone());
        Self {
            id: record.worker_id.clone(),
            model: known(&record.model.name),
            state: known(&record.state),
            detail: known(&record.state_detail),
            ready: record.ready,
            since_ms: None,
            version: record.model.version,
            scored: jobs.scored,
            rejected: jobs.rejected,
            failed: jobs.failed,
            p50_ms: jobs.p50_ms,
            p95_ms: jobs.p95_ms,
            rates: VecDeque::new(),
            error: error.map(|error| error.message.clone()),
        }
    }
}

impl Change {
    fn of(entry: StreamEntry) -> Self {
        let field = |name: &str| entry.fields.get(name).cloned().unwrap_or_default();
        let text = match entry.fields.get("command") {
            Some(command) => format!("{command}: {} {}", field("outcome"), field("message")),
            None if field("from") == field("to") => {
                format!("{} ({})", field("to"), field("detail"))
            }
            None => format!("{} → {} ({})", field("from"), field("to"), field("detail")),
        };
        Self {
            at_ms: field("at").parse().unwrap_or_default(),
            worker: field("worker_id"),
            to: field("to"),
            text,
            id: entry.id,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::observer::Worker;
    use crate::store::LiveRecord;
    use serde_json::json;

    fn view(at_ms: u64, scored: u64) -> View {
        let record = json!({
            "worker_id": "w", "incarnation": "i", "ready": true, "state": "ready",
            // By a clock of its own.
            "at_ms": 9_100_000, "last_state_change_at_ms": 9_040_000,
            "model": {"name": "m", "version": 7}, "jobs": {"scored": scored, "p50_ms": 2.0, "p95_ms": 5.0},
        });
        View {
            model: Some("m".into()),
            at_ms,
            workers: vec![Worker {
                record: Record::read(&record.to_string()).unwrap(),
                live: LiveRecord::default(),
            }],
            queues: Some(Err("RabbitMQ: away".into())),
        }
    }

    #[test]
    fn rates_come_from_two_looks_and_curves_have_a_point_every_ten_seconds() {
        let mut history = History::default();
        for second in 0..=20 {
            history.see(&view(1_000_000 + second * 1000, second * 3));
        }
        let page = history.page();
        assert_eq!(page.workers[0].rates.back(), Some(&3.0));
        assert_eq!(page.workers[0].since_ms, Some(1_020_000 - 60_000));
        let points: Vec<u64> = page.points.iter().map(|point| point.at_ms).collect();
        assert_eq!(points, [1_000_000, 1_010_000, 1_020_000]);
        let last = page.points.back().unwrap();
        assert!((last.jobs_per_s - 3.0).abs() < 1e-9, "{last:?}");
        assert_eq!(last.versions, [(7, 1)].into());
        assert_eq!(page.queues_unknown.as_deref(), Some("RabbitMQ: away"));
    }

    #[test]
    fn a_fleet_that_is_out_of_sight_is_unknown_until_it_is_seen_again() {
        let mut history = History::default();
        history.see(&view(1000, 0));
        history.lose_sight("Redis: away".into());
        assert_eq!(history.page().unknown.as_deref(), Some("Redis: away"));
        history.see(&view(2000, 0));
        assert_eq!(history.page().unknown, None);
    }

    #[test]
    fn nothing_grows_without_end() {
        let mut history = History::default();
        for n in 0..2000 {
            history.see(&view(n * POINT_MS, n));
            history.add_events(vec![StreamEntry {
                id: n.to_string(),
                fields: BTreeMap::new(),
            }]);
        }
        let page = history.page();
        let sizes = (
            page.points.len(),
            page.events.len(),
            page.workers[0].rates.len(),
        );
        assert_eq!(sizes, (POINTS, EVENTS, LOOKS));
        assert_eq!(history.last_event().as_deref(), Some("1999"));
    }
}
