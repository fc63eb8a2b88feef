//! What happened, newest last: changes of state and dead-lettered jobs. A page asks for what is newer than
//! what it has.

use std::collections::VecDeque;

use serde::Serialize;

use super::roster::keep;
use super::text::{MESSAGE, cut};
use crate::store::StreamEntry;

/// Events that are kept, as many as Redis keeps.
const EVENTS: usize = 2000;
const PARKED: usize = 1000;
/// The most that one answer has of events and of dead-lettered jobs.
const EVENTS_TOLD: usize = 200;
const PARKED_TOLD: usize = 50;

/// A numbered list of the newest.
#[derive(Debug)]
pub(super) struct Numbered<T> {
    /// Of the last one; 0 = there was none.
    seq: u64,
    items: VecDeque<T>,
    kept: usize,
    told: usize,
}

/// All lists.
#[derive(Debug)]
pub(super) struct News {
    pub(super) events: Numbered<Change>,
    pub(super) parked: Numbered<ParkedJob>,
}

/// Numbers of the last ones of each list, of which the first 0 means none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(default)]
pub(super) struct Marks {
    events: u64,
    parked: u64,
}

/// An event of a worker.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Change {
    #[serde(skip)]
    pub(super) id: String,
    pub(super) at_ms: u64,
    pub(super) worker: String,
    pub(super) text: String,
}

/// A job that was dead-lettered while the dashboard was connected.
#[derive(Debug, Clone, Serialize)]
pub(super) struct ParkedJob {
    pub(super) submission_id: String,
    pub(super) code: String,
    pub(super) message: String,
    pub(super) worker: String,
    pub(super) at_ms: u64,
    pub(super) trace_id: Option<String>,
}

/// What a page does not have yet.
#[derive(Debug, Serialize)]
pub(super) struct Told<'a> {
    events: Part<'a, Change>,
    parked: Part<'a, ParkedJob>,
}

#[derive(Debug, Serialize)]
struct Part<'a, T> {
    seq: u64,
    items: Vec<&'a T>,
}

impl Default for News {
    fn default() -> Self {
        Self {
            events: Numbered::new(EVENTS, EVENTS_TOLD),
            parked: Numbered::new(PARKED, PARKED_TOLD),
        }
    }
}

impl<T> Numbered<T> {
    fn new(kept: usize, told: usize) -> Self {
        Self {
            seq: 0,
            items: VecDeque::new(),
            kept,
            told,
        }
    }

    pub(super) fn push(&mut self, item: T) {
        self.seq += 1;
        self.items.push_back(item);
        keep(&mut self.items, self.kept);
    }

    /// Oldest first.
    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = &T> {
        self.items.iter()
    }

    /// The newest of those after a number.
    fn after(&self, seq: u64) -> Part<'_, T> {
        // A page that knows more saw another process: it gets what there is.
        let newer = self.seq.checked_sub(seq).unwrap_or(self.seq);
        let newer = usize::try_from(newer).unwrap_or(usize::MAX);
        let skipped = self.items.len() - newer.min(self.told).min(self.items.len());
        Part {
            seq: self.seq,
            items: self.items.iter().skip(skipped).collect(),
        }
    }
}

impl News {
    pub(super) fn marks(&self) -> Marks {
        Marks {
            events: self.events.seq,
            parked: self.parked.seq,
        }
    }

    pub(super) fn after(&self, marks: Marks) -> Told<'_> {
        Told {
            events: self.events.after(marks.events),
            parked: self.parked.after(marks.parked),
        }
    }
}

impl Change {
    pub(super) fn of(entry: StreamEntry) -> Self {
        let field = |name: &str| entry.fields.get(name).cloned().unwrap_or_default();
        let text = match entry.fields.get("command") {
            Some(command) => format!("{command}: {} {}", field("outcome"), field("message")),
            None => change(&field("from"), &field("to"), &field("detail")),
        };
        Self {
            at_ms: field("at").parse().unwrap_or_default(),
            worker: field("worker_id"),
            text: cut(&text, MESSAGE).to_owned(),
            id: entry.id,
        }
    }
}

/// A change of state in words; of a worker that was missed by others the state before is not known.
fn change(from: &str, to: &str, detail: &str) -> String {
    let states = match from {
        "" => to.to_owned(),
        from if from == to => to.to_owned(),
        from => format!("{from} → {to}"),
    };
    match detail {
        "" => states,
        detail => format!("{states} ({detail})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_names_what_is_known_of_it() {
        let known = change("warming", "ready", "serving");
        assert_eq!(known, "warming → ready (serving)");
        assert_eq!(change("ready", "ready", "paused"), "ready (paused)");
        assert_eq!(
            change("", "lost", "record_expired"),
            "lost (record_expired)"
        );
        assert_eq!(change("ready", "lost", ""), "ready → lost");
    }

    #[test]
    fn a_page_is_told_what_it_does_not_have_and_everything_by_another_process() {
        let mut list = Numbered::new(5, 3);
        (1..=10).for_each(|item| list.push(item));
        for (seq, told) in [
            (0, vec![&8, &9, &10]),
            (8, vec![&9, &10]),
            (10, vec![]),
            (99, vec![&8, &9, &10]),
        ] {
            let part = list.after(seq);
            assert_eq!((part.seq, part.items), (10, told), "{seq}");
        }
        assert_eq!(list.iter().count(), 5);
    }
}
