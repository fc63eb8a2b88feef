//! What was submitted, and what came back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use testkit::message::Message;

/// What a job is meant to meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// A sound candidate.
    Sound,
    /// One that is refused.
    Refused,
    /// The model's own loss is asked for.
    Validate,
    /// The candidate cannot be fetched for a while.
    Flaky,
    /// The candidate is never there.
    Gone,
    /// Whoever computes it dies.
    Killer,
}

/// A job and its answers.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    pub(crate) round: u64,
    pub(crate) body: Vec<u8>,
    /// The broker has confirmed it.
    pub(crate) confirmed: bool,
    /// It may have been in a queue that was deleted.
    pub(crate) exposed: bool,
    /// Submitted again after that.
    pub(crate) resubmitted: bool,
    /// Found to be lost, and reported.
    pub(crate) lost: bool,
    /// By `message_id`.
    pub(crate) answers: BTreeMap<String, Answer>,
    pub(crate) parked: u32,
}

/// One answer, of which there may be copies.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The first copy.
    pub(crate) result: Value,
    body: Vec<u8>,
    /// Copies that were published, the first included.
    pub(crate) copies: u32,
    /// Of these, equal to the first in every byte.
    pub(crate) identical: u32,
    /// What the broker delivered again: the same copy, perhaps, read twice.
    pub(crate) reread: u32,
    pub(crate) attempts: BTreeSet<u64>,
}

impl Entry {
    pub(crate) fn is_settled(&self) -> bool {
        !self.answers.is_empty() || self.parked > 0
    }
}

/// Everything that was submitted, by submission id.
#[derive(Default)]
pub(crate) struct Ledger {
    entries: Mutex<BTreeMap<String, Entry>>,
    /// Copies that contradict each other, and answers that nobody asked for.
    contradictions: Mutex<Vec<String>>,
}

impl Ledger {
    pub(crate) fn entries(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a job before it is published: its result may come before its confirm.
    pub(crate) fn intend(&self, id: &str, kind: Kind, round: u64, body: &[u8]) {
        let entry = Entry {
            kind,
            round,
            body: body.to_owned(),
            confirmed: false,
            exposed: false,
            resubmitted: false,
            lost: false,
            answers: BTreeMap::new(),
            parked: 0,
        };
        self.entries().insert(id.to_owned(), entry);
    }

    /// The broker has it: from now on it must not be lost.
    pub(crate) fn confirm(&self, id: &str) {
        if let Some(entry) = self.entries().get_mut(id) {
            entry.confirmed = true;
        }
    }

    /// A queue is being deleted: whatever is not settled may have been in it.
    pub(crate) fn expose(&self) {
        let mut entries = self.entries();
        let open = entries.values_mut().filter(|entry| !entry.is_settled());
        open.for_each(|entry| entry.exposed = true);
    }

    /// Takes a result.
    pub(crate) fn answer(&self, message: &Message, redelivered: bool) {
        let result = message.json();
        let id = result["submission_id"].as_str().unwrap_or_default();
        let mut entries = self.entries();
        let Some(entry) = entries.get_mut(id) else {
            return self.contradict(format!("nobody submitted {id:?}: {result}"));
        };
        let attempt = result["attempt"].as_u64().unwrap_or_default();
        let answer = entry
            .answers
            .entry(message.id().to_owned())
            .or_insert_with(|| Answer::new(result.clone(), &message.body));
        answer.attempts.insert(attempt);
        if redelivered {
            answer.reread += 1;
        } else {
            answer.copies += 1;
        }
        answer.identical += u32::from(!redelivered && answer.body == message.body);
        let (first, now) = (judgement(&answer.result), judgement(&result));
        if first != now {
            self.contradict(format!("copies of {id} differ: {first} and {now}"));
        }
    }

    /// Takes a parked job; it is named by its own `message_id`.
    pub(crate) fn park(&self, message: &Message, redelivered: bool) {
        let id = message.message_id.as_deref().unwrap_or_default();
        match self.entries().get_mut(id) {
            Some(entry) if redelivered => entry.parked = entry.parked.max(1),
            Some(entry) => entry.parked += 1,
            None => self.contradict(format!("nobody submitted what is parked: {id:?}")),
        }
    }

    /// Confirmed jobs that are neither answered nor parked nor known to be lost.
    pub(crate) fn open(&self) -> Vec<String> {
        let entries = self.entries();
        let open = entries
            .iter()
            .filter(|(_, e)| e.confirmed && !e.lost && !e.is_settled());
        open.map(|(id, _)| id.clone()).collect()
    }

    pub(crate) fn is_settled(&self, id: &str) -> bool {
        self.entries().get(id).is_some_and(Entry::is_settled)
    }

    /// The contradictions since the last call.
    pub(crate) fn contradictions(&self) -> Vec<String> {
        std::mem::take(&mut self.contradicted())
    }

    fn contradict(&self, what: String) {
        self.contradicted().push(what);
    }

    fn contradicted(&self) -> MutexGuard<'_, Vec<String>> {
        let list = self.contradictions.lock();
        list.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Answer {
    fn new(result: Value, body: &[u8]) -> Self {
        Self {
            result,
            body: body.to_owned(),
            copies: 0,
            identical: 0,
            reread: 0,
            attempts: BTreeSet::new(),
        }
    }
}

/// What all copies of a result must agree on: everything but who answered and when, which differ
/// where Redis was away and the job was computed twice. Of a failure it is the code: who died of a
/// job, or why it could not be fetched, may be told differently.
fn judgement(result: &Value) -> Value {
    let mut result = result.clone();
    if let Some(fields) = result.as_object_mut() {
        for who_and_when in [
            "worker_id",
            "incarnation",
            "attempt",
            "scored_at_ms",
            "timings_ms",
        ] {
            fields.remove(who_and_when);
        }
    }
    if result["status"] == "failed" {
        result["error"] = result["error"]["code"].clone();
    }
    result
}
