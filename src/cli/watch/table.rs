//! The table of workers.

use std::collections::BTreeMap;

use ratatui::layout::{Constraint, Rect};
use ratatui::style::{Color, Modifier};
use ratatui::widgets::{Cell, Row, Table};

use super::head::colour;
use super::sparkline::sparkline;
use crate::fleet::findings::sickness;
use crate::fleet::observer::Worker;
use crate::fleet::pace::{Pace, Paces};

/// Widths of the name and the trend on 80 columns. A wider screen widens the trend first, then the name.
const NAME: u16 = 11;
const TREND: u16 = 5;
const COLUMNS: u16 = 9;
/// The most looks that the trend shows.
const LOOKS: u16 = 12;

/// The workers in this order, as many as there is room for.
pub(super) fn table(mut workers: Vec<&Worker>, paces: &Paces, area: Rect) -> Table<'static> {
    let room = usize::from(area.height.saturating_sub(1));
    let hidden = match workers.len() > room {
        true => workers.split_off(room.saturating_sub(1)),
        false => Vec::new(),
    };
    let extra = area.width.saturating_sub(80);
    let trend = TREND + extra.min(LOOKS - TREND);
    let name = NAME + extra.saturating_sub(trend - TREND);
    let rows = workers.into_iter().map(|worker| {
        let pace = paces.of(&worker.record.incarnation);
        row(worker, pace, name, trend)
    });
    let widths = [name, 9, 4, 19, 6, 6, 6, 6, trend].map(Constraint::Length);
    let head = Row::new([
        "WORKER", "STATE", "FOR", "WHY", "VER", "JOBS/S", "P50", "P95", "TREND",
    ]);
    let more = left_out(&hidden).map(|text| Row::new([Cell::new(text).column_span(COLUMNS)]));
    Table::new(rows.chain(more), widths).header(head.style(Modifier::BOLD))
}

/// What is not shown, if anything.
fn left_out(hidden: &[&Worker]) -> Option<String> {
    let mut states: BTreeMap<&str, usize> = BTreeMap::new();
    for Worker { record, .. } in hidden {
        let state = match (record.ready, record.state.as_str()) {
            (true, _) => "ready",
            (false, "ready") => "not ready",
            (false, state) => known(state),
        };
        *states.entry(state).or_default() += 1;
    }
    let count = hidden.len();
    match (count, states.len()) {
        (0, _) => None,
        (_, 1) => states
            .keys()
            .next()
            .map(|state| format!("... {count} more, all {state}")),
        (_, _) => {
            let states: Vec<String> = states
                .iter()
                .map(|(state, n)| format!("{n} {state}"))
                .collect();
            Some(format!("... {count} more: {}", states.join(", ")))
        }
    }
}

fn row(worker: &Worker, pace: Option<&Pace>, name: u16, trend: u16) -> Row<'static> {
    let record = &worker.record;
    let or_unknown = |text: Option<String>| text.unwrap_or_else(|| "?".to_owned());
    let number = |n: Option<f64>| n.map_or_else(|| "-".to_owned(), |n| format!("{n:.1}"));
    let version = record.model.version;
    // Before the second look there is none.
    let rate = pace.and_then(|pace| pace.rates().next().map(|_| pace.rate()));
    let bars = pace.map(|pace| sparkline(pace.rates(), trend));
    let colour = match record.ready {
        true => Color::Green,
        false => colour(sickness(worker)),
    };
    Row::new([
        Cell::new(end_of(known(&record.worker_id), name.into())),
        Cell::new(known(&record.state).to_owned()).style(colour),
        Cell::new(or_unknown(worker.state_ms().map(age))),
        Cell::new(known(&record.state_detail).to_owned()),
        Cell::new(or_unknown(version.map(|version| version.to_string()))),
        Cell::new(number(rate)),
        Cell::new(number(record.jobs.p50_ms)),
        Cell::new(number(record.jobs.p95_ms)),
        Cell::new(bars.unwrap_or_default()),
    ])
}

fn known(text: &str) -> &str {
    match text {
        "" => "?",
        known => known,
    }
}

/// A time in at most four characters.
fn age(millis: u64) -> String {
    match millis / 1000 {
        seconds @ 0..60 => format!("{seconds}s"),
        seconds @ 60..3600 => format!("{}m", seconds / 60),
        seconds @ 3600..86_400 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

/// The end of a name that is too long: the names of one fleet begin alike.
fn end_of(name: &str, width: usize) -> String {
    let surplus = name.chars().count().saturating_sub(width);
    if surplus == 0 {
        return name.to_owned();
    }
    let end: String = name.chars().skip(surplus + 2).collect();
    format!("..{end}")
}
