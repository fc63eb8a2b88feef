//! What is wrong with a fleet, at a glance: for the dashboard and for `scorer status`.

mod losses;
mod queues;
mod workers;

use std::cmp::Reverse;

use serde::Serialize;

use crate::fleet::observer::{View, Worker};
use crate::fleet::waiting::Oldest;

pub use losses::{Losses, Lost};
pub(crate) use workers::{Versions, sickness};

/// More are summed up in the last one.
const MOST: usize = 12;
/// Workers that a finding names.
const NAMED: usize = 3;
/// Characters of a text that comes from a record.
const LONGEST: usize = 160;

/// How bad a finding is, the worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, strum::Display)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub enum Severity {
    /// Results are missing or late: somebody must act.
    Bad,
    /// Something does not work as it should.
    Warn,
    /// Worth knowing.
    Note,
}

/// One fact about the fleet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is and what it means, in one line.
    pub text: String,
    /// How many workers or jobs it concerns.
    pub count: usize,
    /// The first of these workers, by name as they were written: any text.
    pub workers: Vec<String>,
    /// A word of the records of these workers, to find them by.
    pub filter: Option<String>,
}

/// All that findings are made from.
#[derive(Clone, Copy)]
struct Seen<'a> {
    view: &'a View,
    oldest: Option<Oldest>,
    lost: &'a [Lost],
}

/// Every kind of finding. Of those that are equally bad the first two come first: a death is easily missed.
const KINDS: [fn(Seen<'_>) -> Vec<Finding>; 15] = [
    workers::nobody,
    workers::lost,
    workers::not_ready,
    workers::blocked,
    workers::waits,
    workers::silent,
    workers::store,
    workers::update,
    workers::software,
    workers::versions,
    workers::inert,
    queues::unknown,
    queues::waiting,
    queues::dead,
    queues::retry,
];

/// What there is to say about a fleet: the worst first, then what concerns most. Nothing: all is well.
pub fn findings(view: &View, oldest: Option<Oldest>, lost: &[Lost]) -> Vec<Finding> {
    at_most(MOST, view, oldest, lost)
}

/// The same in at most so many.
pub(crate) fn at_most(
    most: usize,
    view: &View,
    oldest: Option<Oldest>,
    lost: &[Lost],
) -> Vec<Finding> {
    let seen = Seen { view, oldest, lost };
    let kinds = KINDS.iter().enumerate();
    let found = kinds.flat_map(|(at, kind)| kind(seen).into_iter().map(move |found| (at, found)));
    let mut found: Vec<(usize, Finding)> = found.collect();
    found.sort_by_key(|(at, finding)| (finding.severity, (*at).min(2), Reverse(finding.count)));
    let mut found: Vec<Finding> = found.into_iter().map(|(_, finding)| finding).collect();
    if found.len() > most {
        let rest = found.split_off(most.saturating_sub(1));
        found.extend(summed_up(&rest));
    }
    found
}

/// One for all that are not shown, as bad as the worst of them.
fn summed_up(rest: &[Finding]) -> Option<Finding> {
    let severity = rest.first()?.severity;
    let of = |severity: Severity| rest.iter().filter(|f| f.severity == severity).count();
    let counts = [Severity::Bad, Severity::Warn, Severity::Note];
    let counts = counts.map(|severity| (of(severity), severity));
    let counts = counts.iter().filter(|(count, _)| *count > 0);
    let counts: Vec<String> = counts
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
    Some(Finding {
        severity,
        text: format!("{} more findings: {}", rest.len(), counts.join(", ")),
        count: rest.len(),
        workers: Vec::new(),
        filter: None,
    })
}

impl Finding {
    /// About some workers.
    fn about<'a>(
        severity: Severity,
        text: String,
        workers: impl IntoIterator<Item = &'a Worker>,
    ) -> Self {
        let mut names = workers.into_iter().map(|worker| &worker.record.worker_id);
        let first: Vec<String> = names.by_ref().take(NAMED).cloned().collect();
        Self {
            severity,
            text,
            count: first.len() + names.count(),
            workers: first,
            filter: None,
        }
    }

    /// About the fleet or its queues.
    fn overall(severity: Severity, text: String, count: usize) -> Self {
        Self {
            severity,
            text,
            count,
            workers: Vec::new(),
            filter: None,
        }
    }

    fn found_by(mut self, word: &str) -> Self {
        let typed = !word.is_empty() && word == brief(word);
        self.filter = typed.then(|| word.to_owned());
        self
    }
}

/// A number of things, with the form of what follows: `1 worker is`, `2 workers are`.
fn many(count: usize, one: &str, more: &str) -> String {
    match count {
        1 => format!("1 {one}"),
        _ => format!("{count} {more}"),
    }
}

/// A text from a record, in one line of bounded length.
fn brief(text: &str) -> String {
    let shown = |c: char| if c.is_control() { ' ' } else { c };
    let mut brief: String = text.chars().take(LONGEST).map(shown).collect();
    if text.chars().nth(LONGEST).is_some() {
        brief.push_str("...");
    }
    brief
}

/// A time as people say it.
pub(crate) fn span(ms: u64) -> String {
    match ms / 1000 {
        seconds @ 0..90 => format!("{seconds} s"),
        seconds @ 90..5400 => format!("{} min", seconds / 60),
        seconds @ 5400..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests;
