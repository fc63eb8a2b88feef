//! How long the oldest waiting job has waited, without a look at any message.
//!
//! The queue is first in, first out: if D jobs have left it, the oldest is the one that arrived as number
//! D + 1. What has left is what workers have answered and hold, and what waits in the retry queues. What has
//! arrived is that and what waits. So the age is the time since the count of arrivals first exceeded D.
//!
//! The age is exact within a look and the jobs that went through within a heartbeat, because records are a
//! little older than the depth of the queue. A job that comes back, because its worker died, keeps its place:
//! until the worker's record has run out the age may be too small. A job that goes to a retry queue while
//! another comes back from it, within one look, is not seen. Errors last as long as jobs wait that were there
//! when they were made.

use std::collections::{BTreeMap, VecDeque};

use serde::Serialize;

use crate::fleet::observer::{Queues, View, Worker};

/// When more are kept, they are thinned out.
const MOST_RISES: usize = 4000;
/// Thinned out, the distance of two is this part of their age.
const RESOLUTION: u64 = 200;
/// A count of arrivals that was not reached again within so many looks was wrong. A few are lower because
/// jobs are on their way from the queue into a record.
const SETTLED: usize = 10;
/// When more incarnations are known, those that are gone are forgotten.
const MOST_INCARNATIONS: usize = 10_000;

/// How long the oldest job has waited, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(tag = "bound", content = "ms", rename_all = "snake_case")]
pub enum Oldest {
    /// As well as it can be known.
    About(u64),
    /// It waited already when the watch began.
    AtLeast(u64),
}

impl Oldest {
    /// The milliseconds, whatever they mean.
    pub fn millis(self) -> u64 {
        match self {
            Self::About(ms) | Self::AtLeast(ms) => ms,
        }
    }
}

/// Watches the queue of one model.
#[derive(Debug, Default)]
pub struct Waiting {
    model: Option<String>,
    /// When workers were first looked at.
    since_ms: Option<u64>,
    /// By incarnation: what it had answered, and when it said so.
    answered: BTreeMap<String, (u64, u64)>,
    /// Jobs answered since the beginning, and those that came back from the retry queues.
    gone: u64,
    retry: Option<u64>,
    /// What had arrived when the watch of the queue began, or when the queue was last empty.
    began: Option<Rise>,
    /// When the count of arrivals rose, oldest first.
    rises: VecDeque<Rise>,
    /// Counts at the last looks.
    lately: VecDeque<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Rise {
    at_ms: u64,
    arrived: u64,
}

impl Waiting {
    /// Takes a look; how long the oldest job has waited. None: nothing waits, or the queue is unknown.
    pub fn see(&mut self, view: &View) -> Option<Oldest> {
        if self.model != view.model {
            *self = Self {
                model: view.model.clone(),
                ..Self::default()
            };
        }
        self.count_answers(view);
        let Some(Ok(queues)) = &view.queues else {
            return None;
        };
        self.count_returns(queues);
        let held = held(view);
        let depth = u64::from(queues.jobs);
        let now = Rise {
            at_ms: view.at_ms,
            arrived: self.gone + held + u64::from(queues.retry) + depth,
        };
        if depth == 0 {
            // Nobody waits: whatever was counted wrong no longer matters.
            self.began = Some(now);
            self.rises = [now].into();
            self.lately.clear();
            return None;
        }
        let began = *self.began.get_or_insert(now);
        self.note(now);
        self.oldest(began, depth, held, view.at_ms)
    }

    fn count_answers(&mut self, view: &View) {
        let since_ms = *self.since_ms.get_or_insert(view.at_ms);
        let watched_ms = view.at_ms.saturating_sub(since_ms);
        for worker in &view.workers {
            let (incarnation, now) = (&worker.record.incarnation, worker.record.jobs.answered());
            let new = match self.answered.get_mut(incarnation) {
                // Records without an incarnation: the first counts.
                Some((_, at_ms)) if *at_ms == view.at_ms => 0,
                Some(known) => {
                    let (before, _) = std::mem::replace(known, (now, view.at_ms));
                    now.saturating_sub(before)
                }
                None => {
                    self.answered.insert(incarnation.clone(), (now, view.at_ms));
                    match started_ms_ago(worker) {
                        Some(age_ms) if age_ms < watched_ms => now,
                        Some(_) | None => 0,
                    }
                }
            };
            self.gone += sane(new);
        }
        if self.answered.len() > MOST_INCARNATIONS {
            self.answered.retain(|_, (_, at_ms)| *at_ms == view.at_ms);
        }
    }

    /// A job that comes back from a retry queue has arrived once more.
    fn count_returns(&mut self, queues: &Queues) {
        let retry = u64::from(queues.retry);
        let before = self.retry.replace(retry).unwrap_or(retry);
        self.gone += before.saturating_sub(retry);
    }

    fn note(&mut self, now: Rise) {
        self.lately.push_back(now.arrived);
        if self.lately.len() > SETTLED {
            self.lately.pop_front();
            self.take_back();
        }
        if self.arrived() < now.arrived || self.rises.is_empty() {
            self.rises.push_back(now);
        }
        if self.rises.len() > MOST_RISES {
            self.thin_out(now.at_ms);
        }
    }

    /// Takes back arrivals that were no such thing: jobs of a worker that died were counted as held and as
    /// waiting, or the queue was purged.
    fn take_back(&mut self) {
        let most = self.lately.iter().max().copied().unwrap_or_default();
        let mut first = None;
        while let Some(rise) = self.rises.pop_back_if(|rise| rise.arrived > most) {
            first = Some(rise.at_ms);
        }
        if let Some(at_ms) = first
            && (self.arrived() < most || self.rises.is_empty())
        {
            let arrived = most;
            self.rises.push_back(Rise { at_ms, arrived });
        }
    }

    fn thin_out(&mut self, now_ms: u64) {
        let mut kept: Option<u64> = None;
        self.rises.retain(|rise| {
            let age = now_ms.saturating_sub(rise.at_ms);
            let keep = kept.is_none_or(|kept| rise.at_ms.saturating_sub(kept) > age / RESOLUTION);
            if keep {
                kept = Some(rise.at_ms);
            }
            keep
        });
    }

    /// Jobs that have arrived, as far as counted.
    fn arrived(&self) -> u64 {
        self.rises.back().map_or(0, |rise| rise.arrived)
    }

    fn oldest(&mut self, began: Rise, depth: u64, held: u64, now_ms: u64) -> Option<Oldest> {
        let left = self.arrived().saturating_sub(depth);
        // As many may come back as are held.
        let lasting = |rise: &mut Rise| rise.arrived.saturating_add(held) <= left;
        while self.rises.len() > 1 && self.rises.pop_front_if(lasting).is_some() {}
        if left < began.arrived {
            return Some(Oldest::AtLeast(now_ms.saturating_sub(began.at_ms)));
        }
        let first = self.rises.partition_point(|rise| rise.arrived <= left);
        let rise = self.rises.get(first)?;
        Some(Oldest::About(now_ms.saturating_sub(rise.at_ms)))
    }
}

/// Jobs that workers hold.
fn held(view: &View) -> u64 {
    let jobs = view.workers.iter().map(|worker| &worker.record.jobs);
    jobs.map(|jobs| sane(jobs.in_flight.saturating_add(jobs.buffered)))
        .sum()
}

/// How long the process has run; both times are by the worker's own clock.
fn started_ms_ago(worker: &Worker) -> Option<u64> {
    let record = &worker.record;
    let known = record.at_ms > 0 && record.started_at_ms > 0;
    known.then(|| {
        let age_ms = record.at_ms.saturating_sub(record.started_at_ms);
        age_ms.saturating_add(worker.live.age_ms)
    })
}

/// A count of jobs in a record, which may be anything: with this bound sums of them do not overflow.
fn sane(count: u64) -> u64 {
    count.min(u32::MAX.into())
}

#[cfg(test)]
mod tests;
