//! The queue of jobs before the device: in order, and with an estimate of how long each will take. The
//! estimates tell which jobs cannot finish before a drain's deadline, and the waits tell which are better
//! off with an idle worker. Those are sent back to the broker without having run. A job that would need
//! longer than the broker waits for it does not enter.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::engine::coalition::Member;
use crate::engine::merge::{Merge, Passes};
use crate::engine::patch::Patches;
use crate::engine::sequential;
use crate::engine::thread::{EngineHandle, Turn};
use crate::engine::{Early, Evaluation};
use crate::model::plan::Plan;
use crate::protocol::failure::{Code, Failure};
use crate::protocol::merge::OnRejected;

/// Estimates are inflated by 1/MARGIN, so that a job slightly slower than predicted is still sent back
/// in time.
const MARGIN: u32 = 4;
/// The estimate rests on this many recent jobs.
const RECENT: usize = 8;
/// The broker returns about every other job to the worker that sent it back, because that worker has
/// credit for it. Such a job is sent back again at once, but not for ever.
const MOST_TIMES: usize = 4;
/// How many names of jobs that were sent back for their long wait are remembered.
const MOST_REMEMBERED: usize = 256;

/// The queue, which outlives engines and consumers.
#[derive(Debug, Clone, Default)]
pub struct DeviceQueue(Arc<Mutex<Line>>);

/// How many windows a job computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Length {
    /// Of each pass, if it is decided as early as it may be.
    least: u32,
    /// Of each pass.
    most: u32,
    passes: u32,
}

impl Length {
    /// Of a plan of so many windows, whose evaluation may end early or not.
    pub fn of(windows: usize, may_stop: bool) -> Self {
        let least = match may_stop {
            true => sequential::earliest(windows),
            false => windows,
        };
        Self {
            least: count(least),
            most: count(windows),
            passes: 1,
        }
    }

    /// Of a merge on a plan of so many windows.
    pub fn of_merge(windows: usize, passes: u32) -> Self {
        Self {
            passes,
            ..Self::of(windows, false)
        }
    }
}

fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Why a job does not run here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoTurn {
    /// It was sent back while it waited, or the device is lost.
    SentBack,
    /// With the jobs before it, it would need this long, which is too long.
    TooLong(Duration),
}

impl DeviceQueue {
    /// Waits until the device is this job's. A job that gives up waiting leaves the queue. One that would
    /// need more than `longest`, with those before it, does not wait at all.
    ///
    /// # Errors
    /// When the job must not run here.
    pub async fn acquire<'e>(
        &self,
        engine: &'e EngineHandle,
        job: &str,
        length: Length,
        longest: Duration,
    ) -> Result<DevicePermit<'e>, NoTurn> {
        let ticket = self.enter(job, length, longest)?;
        let turn = tokio::select! {
            biased;
            () = ticket.sent_back.cancelled() => return Err(NoTurn::SentBack),
            turn = engine.turn() => turn,
        };
        if engine.loss().is_some() || !self.line().begin(ticket.number, Instant::now()) {
            return Err(NoTurn::SentBack);
        }
        Ok(DevicePermit { turn, ticket })
    }

    fn enter(&self, job: &str, length: Length, longest: Duration) -> Result<Ticket, NoTurn> {
        let (mut line, now) = (self.line(), Instant::now());
        let needed = line.needs(length, now);
        if needed > longest {
            return Err(NoTurn::TooLong(needed));
        }
        let (number, sent_back) = line.enter(job, length, now);
        Ok(Ticket {
            queue: self.clone(),
            number,
            sent_back,
        })
    }

    /// Sets the time per window until jobs have told it: the warm-up has measured it.
    pub fn set_pace(&self, per_window: Duration) {
        self.line().set_pace(per_window);
    }

    /// From now on only jobs that will finish by `deadline` wait; the others are sent back. Returns how
    /// many stay, and how many go.
    pub fn close(&self, deadline: Instant) -> (usize, usize) {
        let mut line = self.line();
        line.deadline = Some(deadline);
        let gone = line.send_back_late(Instant::now());
        (line.waiters.len() - gone, gone)
    }

    /// Every job may wait again.
    pub fn open(&self) {
        self.line().deadline = None;
    }

    /// Whether a job has waited for at least so long, or was sent back for that before.
    pub fn has_stalled(&self, at_least: Duration) -> bool {
        let now = Instant::now();
        self.line().stalled(at_least, now).next().is_some()
    }

    /// Sends up to `most` of those back, the longest wait first. Returns how many.
    pub fn send_back(&self, at_least: Duration, most: usize) -> usize {
        self.line().send_back(at_least, most, Instant::now())
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A job's place in the queue, which it leaves when this is dropped.
#[derive(Debug)]
struct Ticket {
    queue: DeviceQueue,
    number: u64,
    sent_back: CancellationToken,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.queue.line().leave(self.number);
    }
}

/// The device is this job's until what it computes is done.
#[derive(Debug)]
pub struct DevicePermit<'e> {
    turn: Turn<'e>,
    ticket: Ticket,
}

impl DevicePermit<'_> {
    /// Measures a candidate; see [`Turn::score`].
    ///
    /// # Errors
    /// A typed refusal.
    pub async fn score(
        self,
        patches: Arc<Patches>,
        plan: Arc<Plan>,
        early: Option<Early>,
        limit: Duration,
    ) -> Result<Evaluation, Failure> {
        let evaluation = self.turn.score(patches, plan, early, limit).await?;
        // One that started late or ended early tells nothing of a whole pass, which the next one may need.
        if evaluation.is_whole() {
            self.ticket.computed();
        }
        Ok(evaluation)
    }

    /// Says how long the job is, where that was not known when it entered.
    ///
    /// # Errors
    /// When that would be too long.
    pub fn resize(&self, length: Length, longest: Duration) -> Result<(), NoTurn> {
        let mut line = self.ticket.queue.line();
        let needed = line.resize(self.ticket.number, length);
        match needed > longest {
            true => Err(NoTurn::TooLong(needed)),
            false => Ok(()),
        }
    }

    /// Measures a merge; see [`Turn::merge`]. It may be sent back between two passes.
    ///
    /// # Errors
    /// A typed refusal; the outer one where it was sent back.
    pub async fn merge(
        self,
        members: Arc<[Member]>,
        on_rejected: OnRejected,
        plan: Arc<Plan>,
        limit: Duration,
        mut between: impl FnMut(Passes, &[&Member]) -> Result<(), Failure> + Send + 'static,
    ) -> Result<Result<Merge, Failure>, NoTurn> {
        let Self { turn, ticket } = self;
        let (queue, number) = (ticket.queue.clone(), ticket.number);
        let between = move |passes, members: &[&Member]| {
            if !queue.line().passed(number, passes, Instant::now()) {
                return Err(Failure::new(Code::InferenceFailed, "sent back"));
            }
            between(passes, members)
        };
        let merge = turn.merge(members, on_rejected, plan, limit, between).await;
        match merge {
            Err(_) if ticket.sent_back.is_cancelled() => Err(NoTurn::SentBack),
            merge => Ok(merge),
        }
    }

    /// Measures the current model; see [`Turn::validate`].
    ///
    /// # Errors
    /// A typed refusal.
    pub async fn validate(
        self,
        plan: Arc<Plan>,
        limit: Duration,
    ) -> Result<Arc<Vec<f64>>, Failure> {
        // The losses may have been cached: this tells nothing of the pace.
        self.turn.validate(plan, limit).await
    }
}

impl Ticket {
    fn computed(&self) {
        self.queue.line().computed(self.number, Instant::now());
    }
}

/// Who waits, and what is known of how long jobs take. Pure.
#[derive(Debug, Default)]
struct Line {
    waiters: VecDeque<Waiter>,
    next: u64,
    /// Of recent jobs, the latest last; at first of the warm-up.
    paces: VecDeque<Pace>,
    /// Time per window of a pass of the warm-up; zero while nothing is known.
    warm: Duration,
    /// Jobs that will not finish by then are sent back.
    deadline: Option<Instant>,
    /// Jobs that were sent back for their long wait, once for each time.
    remembered: VecDeque<String>,
}

/// How fast a job was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pace {
    /// The length of its plan.
    windows: u32,
    /// Time per window, with whatever passes it needed.
    per_window: Duration,
}

#[derive(Debug)]
struct Waiter {
    number: u64,
    job: String,
    length: Length,
    since: Instant,
    computing_since: Option<Instant>,
    /// How long all of its passes take, once some have run.
    paced: Option<Duration>,
    sent_back: CancellationToken,
}

impl Waiter {
    fn computed_for(&self, now: Instant) -> Duration {
        let since = self.computing_since;
        since.map(|since| now - since).unwrap_or_default()
    }
}

impl Line {
    fn set_pace(&mut self, per_window: Duration) {
        // Of a plan of any length, because it has full micro-batches.
        let windows = u32::MAX;
        self.warm = per_window;
        self.paces = [Pace {
            windows,
            per_window,
        }]
        .into();
    }

    fn enter(&mut self, job: &str, length: Length, now: Instant) -> (u64, CancellationToken) {
        let (number, sent_back) = (self.next, CancellationToken::new());
        self.next += 1;
        self.waiters.push_back(Waiter {
            number,
            job: job.to_owned(),
            length,
            since: now,
            computing_since: None,
            paced: None,
            sent_back: sent_back.clone(),
        });
        self.send_back_late(now);
        (number, sent_back)
    }

    fn leave(&mut self, number: u64) {
        self.waiters.retain(|waiter| waiter.number != number);
    }

    /// The device is this job's, unless it turns out now that it will not finish in time.
    fn begin(&mut self, number: u64, now: Instant) -> bool {
        // The jobs before it may have taken longer than expected.
        self.send_back_late(now);
        let mut waiters = self.waiters.iter_mut();
        match waiters.find(|waiter| waiter.number == number) {
            Some(waiter) if !waiter.sent_back.is_cancelled() => {
                waiter.computing_since = Some(now);
                true
            }
            Some(_) | None => false,
        }
    }

    /// A job is of another length; returns how long that takes at least.
    fn resize(&mut self, number: u64, length: Length) -> Duration {
        let waiter = self.waiters.iter_mut().find(|w| w.number == number);
        if let Some(waiter) = waiter {
            waiter.length = length;
        }
        self.at_least(length.most, length.passes)
    }

    /// A job is between two passes. Whether it goes on: otherwise it would not be done in time.
    fn passed(&mut self, number: u64, passes: Passes, now: Instant) -> bool {
        let waiter = self.waiters.iter_mut().find(|w| w.number == number);
        if let Some(waiter) = waiter
            && let (Ok(done @ 1..), Ok(most)) =
                (u32::try_from(passes.done), u32::try_from(passes.most))
        {
            waiter.paced = Some(waiter.computed_for(now) / done * most);
        }
        self.send_back_late(now);
        let mut waiters = self.waiters.iter();
        waiters.any(|waiter| waiter.number == number && !waiter.sent_back.is_cancelled())
    }

    /// The job is done: the time it took improves the estimate.
    fn computed(&mut self, number: u64, now: Instant) {
        let mut waiters = self.waiters.iter();
        let Some(waiter) = waiters.find(|waiter| waiter.number == number) else {
            return;
        };
        let Some(since) = waiter.computing_since else {
            return;
        };
        let windows = waiter.length.most;
        let per_window = (now - since) / windows.max(1);
        if self.paces.len() == RECENT {
            self.paces.pop_front();
        }
        self.paces.push_back(Pace {
            windows,
            per_window,
        });
    }

    /// How much longer a job will need the device. By the slowest of recent jobs: what is sent back runs
    /// elsewhere, but what is cut short is lost work. So one that may end early counts as whole.
    fn estimate(&self, waiter: &Waiter, now: Instant) -> Duration {
        let whole = waiter.paced.unwrap_or_else(|| {
            let paces = self.paces.iter().map(|pace| pace.per_window);
            let pass = paces.max().unwrap_or_default() * waiter.length.most;
            pass.saturating_mul(waiter.length.passes)
        });
        (whole + whole / MARGIN).saturating_sub(waiter.computed_for(now))
    }

    /// How long a job that enters now would need at least, with those before it, which may end early. Zero while nothing is
    /// known.
    fn needs(&self, length: Length, now: Instant) -> Duration {
        let stay = self.waiters.iter().filter(|w| !w.sent_back.is_cancelled());
        let left = stay.map(|w| {
            let whole = self.at_least(w.length.least, w.length.passes);
            let whole = w.paced.map_or(whole, |paced| paced.min(whole));
            whole.saturating_sub(w.computed_for(now))
        });
        left.sum::<Duration>() + self.at_least(length.most, length.passes)
    }

    /// How long so many passes of a plan take at least. By the fastest of recent jobs, because whoever does not enter has
    /// failed; and only by those that were no shorter, because a short job is slow for its length.
    fn at_least(&self, windows: u32, passes: u32) -> Duration {
        let no_shorter = self.paces.iter().filter(|pace| pace.windows >= windows);
        let fastest = no_shorter.map(|pace| pace.per_window).min();
        let pass = fastest.unwrap_or(self.warm) * windows;
        pass.saturating_mul(passes)
    }

    /// Sends back the jobs that will not finish in time, which leaves their time to those behind. Returns
    /// how many.
    fn send_back_late(&self, now: Instant) -> usize {
        let Some(deadline) = self.deadline else {
            return 0;
        };
        let (mut free_at, mut gone) = (now, 0);
        for waiter in &self.waiters {
            let end = free_at + self.estimate(waiter, now);
            // A merge can be left between two passes; what it did is lost, but it would be all the same.
            let stays = waiter.computing_since.is_some() && waiter.length.passes == 1;
            if end <= deadline || stays {
                free_at = end;
            } else {
                waiter.sent_back.cancel();
                gone += 1;
            }
        }
        gone
    }

    /// The jobs that have waited for at least so long, or were sent back for that before.
    fn stalled(&self, at_least: Duration, now: Instant) -> impl Iterator<Item = &Waiter> {
        self.waiters.iter().filter(move |waiter| {
            let remembered = self.remembered.iter();
            let times = remembered.filter(|job| **job == waiter.job).count();
            waiter.computing_since.is_none()
                && !waiter.sent_back.is_cancelled()
                && (now - waiter.since >= at_least || times > 0)
                && times < MOST_TIMES
        })
    }

    fn send_back(&mut self, at_least: Duration, most: usize, now: Instant) -> usize {
        let stalled = self.stalled(at_least, now).take(most);
        let jobs: Vec<String> = stalled
            .map(|waiter| {
                waiter.sent_back.cancel();
                waiter.job.clone()
            })
            .collect();
        let sent = jobs.len();
        self.remembered.extend(jobs);
        let surplus = self.remembered.len().saturating_sub(MOST_REMEMBERED);
        self.remembered.drain(..surplus);
        sent
    }
}

#[cfg(test)]
mod tests;
