//! The queue of jobs before the device: in order, and with an estimate of how long each will take. The
//! estimates tell which jobs cannot finish before a drain's deadline, and the waits tell which are better
//! off with an idle worker. Those are sent back to the broker without having run.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::engine::Evaluation;
use crate::engine::patch::Patches;
use crate::engine::thread::{EngineHandle, Turn};
use crate::model::plan::Plan;
use crate::protocol::failure::Failure;

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

/// The job must not run here: it was sent back while it waited, or the device is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("sent back")]
pub struct SentBack;

impl DeviceQueue {
    /// Waits until the device is this job's. A job that gives up waiting leaves the queue.
    ///
    /// # Errors
    /// When the job must not run here.
    pub async fn acquire<'e>(
        &self,
        engine: &'e EngineHandle,
        job: &str,
        windows: usize,
    ) -> Result<DevicePermit<'e>, SentBack> {
        let ticket = self.enter(job, windows);
        let turn = tokio::select! {
            biased;
            () = ticket.sent_back.cancelled() => return Err(SentBack),
            turn = engine.turn() => turn,
        };
        if engine.loss().is_some() || !self.line().begin(ticket.number, Instant::now()) {
            return Err(SentBack);
        }
        Ok(DevicePermit { turn, ticket })
    }

    fn enter(&self, job: &str, windows: usize) -> Ticket {
        let (number, sent_back) = self.line().enter(job, windows, Instant::now());
        Ticket {
            queue: self.clone(),
            number,
            sent_back,
        }
    }

    /// Sets the time per window until jobs have told it: the warm-up has measured it.
    pub fn set_pace(&self, per_window: Duration) {
        self.line().paces = [per_window].into();
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
        limit: Duration,
    ) -> Result<Evaluation, Failure> {
        let evaluation = self.turn.score(patches, plan, limit).await?;
        self.ticket.computed();
        Ok(evaluation)
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
        let losses = self.turn.validate(plan, limit).await?;
        self.ticket.computed();
        Ok(losses)
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
    /// Time per window of recent jobs, with whatever passes they needed; the latest last.
    paces: VecDeque<Duration>,
    /// Jobs that will not finish by then are sent back.
    deadline: Option<Instant>,
    /// Jobs that were sent back for their long wait, once for each time.
    remembered: VecDeque<String>,
}

#[derive(Debug)]
struct Waiter {
    number: u64,
    job: String,
    windows: u32,
    since: Instant,
    computing_since: Option<Instant>,
    sent_back: CancellationToken,
}

impl Line {
    fn enter(&mut self, job: &str, windows: usize, now: Instant) -> (u64, CancellationToken) {
        let (number, sent_back) = (self.next, CancellationToken::new());
        self.next += 1;
        self.waiters.push_back(Waiter {
            number,
            job: job.to_owned(),
            windows: u32::try_from(windows).unwrap_or(u32::MAX),
            since: now,
            computing_since: None,
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

    /// The job is done: the time it took improves the estimate.
    fn computed(&mut self, number: u64, now: Instant) {
        let mut waiters = self.waiters.iter();
        let Some(waiter) = waiters.find(|waiter| waiter.number == number) else {
            return;
        };
        let Some(since) = waiter.computing_since else {
            return;
        };
        let pace = (now - since) / waiter.windows.max(1);
        if self.paces.len() == RECENT {
            self.paces.pop_front();
        }
        self.paces.push_back(pace);
    }

    /// How much longer a job will need the device. By the slowest of recent jobs: what is sent back runs
    /// elsewhere, but what is cut short is lost work.
    fn estimate(&self, waiter: &Waiter, now: Instant) -> Duration {
        let pace = self.paces.iter().max().copied().unwrap_or_default();
        let whole = pace * waiter.windows;
        let whole = whole + whole / MARGIN;
        let done = waiter.computing_since.map(|since| now - since);
        whole.saturating_sub(done.unwrap_or_default())
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
            if end <= deadline || waiter.computing_since.is_some() {
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
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A line in which each window takes a second with the margin, and the jobs' numbers are 0, 1, ...
    fn line(windows: &[usize], now: Instant) -> Line {
        let mut line = Line {
            paces: [SECOND * 4 / 5].into(),
            ..Line::default()
        };
        for (number, windows) in windows.iter().enumerate() {
            line.enter(&format!("job-{number}"), *windows, now);
        }
        line
    }

    /// The numbers of those that were sent back.
    fn sent_back(line: &Line) -> Vec<u64> {
        let gone = line.waiters.iter().filter(|w| w.sent_back.is_cancelled());
        gone.map(|waiter| waiter.number).collect()
    }

    #[test]
    fn jobs_that_cannot_finish_by_the_deadline_are_sent_back() {
        // Windows of the jobs, seconds that the first has computed for, seconds left; who is sent back.
        type Case = (&'static [usize], Option<u32>, u32, &'static [u64]);
        let table: &[Case] = &[
            (&[], None, 0, &[]),
            (&[10], None, 10, &[]),
            (&[10], None, 9, &[0]),
            // The third does not fit, and leaves its time to the fourth.
            (&[10, 1, 10, 1], None, 15, &[2]),
            (&[10, 1, 10, 1], None, 0, &[0, 1, 2, 3]),
            // What computes counts with what is left of it, and is never sent back.
            (&[10, 1, 10, 1], Some(9), 3, &[2]),
            (&[10, 1, 10, 1], Some(1), 0, &[1, 2, 3]),
            // It takes longer than estimated: it may be done at any moment.
            (&[10, 1, 10, 1], Some(99), 1, &[2, 3]),
        ];
        for (windows, computed_for, left, expected) in table {
            let began = Instant::now();
            let mut line = line(windows, began);
            if computed_for.is_some() {
                assert!(line.begin(0, began));
            }
            let now = began + SECOND * computed_for.unwrap_or(0);
            line.deadline = Some(now + SECOND * *left);
            assert_eq!(line.send_back_late(now), expected.len());
            assert_eq!(sent_back(&line), *expected, "{windows:?}, {left} s left");
        }
    }

    #[test]
    fn a_job_that_comes_after_the_queue_was_closed_waits_only_if_it_fits() {
        let queue = DeviceQueue::default();
        queue.set_pace(SECOND);
        let first = queue.enter("first", 10);
        assert_eq!(queue.close(Instant::now() + SECOND * 15), (1, 0));
        let (long, short) = (queue.enter("long", 10), queue.enter("short", 1));
        assert!(long.sent_back.is_cancelled() && !short.sent_back.is_cancelled());
        assert!(!first.sent_back.is_cancelled());
        queue.open();
        assert!(!queue.enter("again", 10).sent_back.is_cancelled());
        drop((first, long, short));
        assert_eq!(
            queue.line().waiters.len(),
            0,
            "whoever goes leaves the line"
        );
    }

    #[test]
    fn a_job_does_not_begin_when_those_before_it_took_its_time() {
        let now = Instant::now();
        let mut line = line(&[1, 10], now);
        line.deadline = Some(now + SECOND * 12);
        assert!(line.begin(0, now));
        let late = now + SECOND * 5;
        line.leave(0);
        assert!(!line.begin(1, late));
        assert_eq!(sent_back(&line), [1]);
    }

    #[test]
    fn without_a_measure_every_job_fits_until_the_time_is_over() {
        let now = Instant::now();
        let mut line = line(&[1000], now);
        line.paces.clear();
        line.deadline = Some(now + SECOND);
        assert_eq!(line.send_back_late(now), 0);
        assert_eq!(line.send_back_late(now + SECOND * 2), 1);
    }

    #[test]
    fn a_job_stalls_when_it_has_waited_for_long_or_comes_back_after_that_but_not_for_ever() {
        let now = Instant::now();
        // Seconds that it has waited, how often it was sent back for that, whether it computes or was
        // sent back already; whether it has stalled.
        for (waited, times, computes, gone, expected) in [
            (0, 0, false, false, false),
            (1, 0, false, false, true),
            (9, 0, false, false, true),
            (0, 1, false, false, true),
            (0, MOST_TIMES - 1, false, false, true),
            (9, MOST_TIMES, false, false, false),
            (9, 1, true, false, false),
            (9, 1, false, true, false),
        ] {
            let mut line = line(&[1], now);
            line.remembered = vec!["job-0".to_owned(); times].into();
            line.remembered.push_back("another".into());
            if computes {
                assert!(line.begin(0, now));
            }
            if gone {
                line.waiters[0].sent_back.cancel();
            }
            let stalled = line.stalled(SECOND, now + SECOND * waited).count();
            let case = (waited, times, computes, gone);
            assert_eq!(stalled == 1, expected, "{case:?}");
        }
    }

    #[test]
    fn the_longest_wait_is_sent_back_first_and_remembered() {
        let now = Instant::now();
        let mut line = line(&[1, 1, 1], now);
        assert!(line.begin(0, now));
        assert_eq!(line.send_back(Duration::ZERO, 1, now), 1);
        assert_eq!(sent_back(&line), [1]);
        assert_eq!(line.remembered, ["job-1"]);
        line.remembered = vec!["another".to_owned(); MOST_REMEMBERED].into();
        assert_eq!(line.send_back(Duration::ZERO, 9, now), 1);
        assert_eq!(line.remembered.len(), MOST_REMEMBERED);
        assert_eq!(line.remembered.back().map(String::as_str), Some("job-2"));
    }

    #[test]
    fn the_slowest_of_recent_jobs_is_the_estimate() {
        let now = Instant::now();
        let mut line = line(&[10, 1], now);
        line.computed(1, now + SECOND);
        assert_eq!(line.paces, [SECOND * 4 / 5], "it never began");
        assert!(line.begin(0, now));
        line.computed(0, now + SECOND * 50);
        assert_eq!(line.paces, [SECOND * 4 / 5, SECOND * 5]);
        line.leave(0);
        let next = |line: &Line| line.estimate(&line.waiters[0], now);
        assert_eq!(next(&line), SECOND * 25 / 4, "with the margin");
        for _ in 0..RECENT {
            let (number, _) = line.enter("quick", 1, now);
            assert!(line.begin(number, now));
            line.computed(number, now);
            line.leave(number);
        }
        assert_eq!(next(&line), Duration::ZERO, "what was slow is forgotten");
    }
}
