//! The jobs that wait for the device, in order, and how long each will take. So it is known which
//! of them will not be done before a drain's deadline, and which have waited for too long while
//! other workers have nothing to do: those are sent back to the queue, uncomputed.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::engine::thread::{EngineHandle, Turn};

/// Nothing is sent back too late for having been a little slower than those before it.
const MARGIN: u32 = 4;
/// Jobs that tell what the next will take.
const RECENT: usize = 8;
/// The broker gives about every other job that is sent back to us again, since we have credit for
/// it. So it is tried again, at once, but not for ever.
const MOST_TIMES: usize = 4;
/// Times that jobs were sent back for their long wait, remembered by name.
const MOST_REMEMBERED: usize = 256;

/// The line of jobs before the device.
#[derive(Debug, Clone, Default)]
pub struct Waiting(Arc<Mutex<Line>>);

#[derive(Debug, Default)]
struct Line {
    places: VecDeque<Waiter>,
    next: u64,
    /// What recent jobs took per window, whatever passes they needed; the latest last.
    paces: VecDeque<Duration>,
    /// Whoever will not be done by then is sent back.
    until: Option<Instant>,
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

/// A job's place in the line. It leaves the line when this is dropped.
#[derive(Debug)]
pub struct Place {
    line: Waiting,
    number: u64,
    sent_back: CancellationToken,
}

impl Waiting {
    /// Goes to the end of the line.
    pub fn enter(&self, job: &str, windows: usize) -> Place {
        let sent_back = CancellationToken::new();
        let mut line = self.line();
        let number = line.next;
        line.next += 1;
        line.places.push_back(Waiter {
            number,
            job: job.to_owned(),
            windows: u32::try_from(windows).unwrap_or(u32::MAX),
            since: Instant::now(),
            computing_since: None,
            sent_back: sent_back.clone(),
        });
        line.send_back_late(Instant::now());
        Place {
            line: self.clone(),
            number,
            sent_back,
        }
    }

    /// What a window takes, before any job has told: measured by the warm-up.
    pub fn set_pace(&self, per_window: Duration) {
        self.line().paces = [per_window].into();
    }

    /// From now on only jobs that will be done by `until` wait; the others are sent back. Returns
    /// how many stay, and how many go.
    pub fn close(&self, until: Instant) -> (usize, usize) {
        let mut line = self.line();
        line.until = Some(until);
        let gone = line.send_back_late(Instant::now());
        (line.places.len() - gone, gone)
    }

    /// Everybody may wait again.
    pub fn open(&self) {
        self.line().until = None;
    }

    /// How many have waited for at least so long, or came back after they had.
    pub fn waited(&self, at_least: Duration) -> usize {
        self.line().waited(at_least, Instant::now()).count()
    }

    /// Sends up to `most` of those back, the longest wait first. Returns how many.
    pub fn send_back(&self, at_least: Duration, most: usize) -> usize {
        let mut line = self.line();
        let jobs: Vec<String> = line
            .waited(at_least, Instant::now())
            .take(most)
            .map(|waiter| {
                waiter.sent_back.cancel();
                waiter.job.clone()
            })
            .collect();
        let sent = jobs.len();
        line.remembered.extend(jobs);
        let surplus = line.remembered.len().saturating_sub(MOST_REMEMBERED);
        line.remembered.drain(..surplus);
        sent
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    fn cost(&self, waiter: &Waiter, now: Instant) -> Duration {
        // The slowest of them: what is handed back is done elsewhere, what is cut short is lost work.
        let pace = self.paces.iter().max().copied().unwrap_or_default();
        let whole = pace * waiter.windows;
        let whole = whole + whole / MARGIN;
        let done = waiter.computing_since.map(|since| now - since);
        whole.saturating_sub(done.unwrap_or_default())
    }

    /// Sends back who will not be done in time; who goes takes no time of those behind.
    fn send_back_late(&self, now: Instant) -> usize {
        let Some(until) = self.until else { return 0 };
        let (mut ends, mut gone) = (now, 0);
        for waiter in &self.places {
            let end = ends + self.cost(waiter, now);
            if end <= until || waiter.computing_since.is_some() {
                ends = end;
            } else {
                waiter.sent_back.cancel();
                gone += 1;
            }
        }
        gone
    }

    fn waited(&self, at_least: Duration, now: Instant) -> impl Iterator<Item = &Waiter> {
        self.places.iter().filter(move |waiter| {
            let remembered = self.remembered.iter();
            let times = remembered.filter(|job| **job == waiter.job).count();
            waiter.computing_since.is_none()
                && !waiter.sent_back.is_cancelled()
                && (now - waiter.since >= at_least || times > 0)
                && times < MOST_TIMES
        })
    }
}

impl Place {
    /// Waits until the device is this job's. `None` = it is sent back, or the device is lost.
    pub async fn turn<'e>(&self, engine: &'e EngineHandle) -> Option<Turn<'e>> {
        let turn = tokio::select! {
            biased;
            () = self.sent_back.cancelled() => return None,
            turn = engine.turn() => turn,
        };
        if engine.loss().is_some() {
            return None;
        }
        let now = Instant::now();
        let mut line = self.line.line();
        // Those before it may have taken longer than they were expected to.
        line.send_back_late(now);
        if self.sent_back.is_cancelled() {
            return None;
        }
        let mut places = line.places.iter_mut();
        if let Some(ours) = places.find(|waiter| waiter.number == self.number) {
            ours.computing_since = Some(now);
        }
        Some(turn)
    }

    /// The job was computed: what it took tells what the next will take.
    pub fn computed(self) {
        let mut line = self.line.line();
        let ours = line.places.iter().find(|w| w.number == self.number);
        let Some((since, windows)) = ours.and_then(|w| Some((w.computing_since?, w.windows)))
        else {
            return;
        };
        let latest = since.elapsed() / windows.max(1);
        if line.paces.len() == RECENT {
            line.paces.pop_front();
        }
        line.paces.push_back(latest);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.line.line().places.retain(|w| w.number != self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Four jobs of 10, 1, 10 and 1 windows, a second each window with the margin.
    fn line() -> (Waiting, Vec<Place>) {
        let waiting = Waiting::default();
        waiting.set_pace(SECOND * 4 / 5);
        let windows = [10, 1, 10, 1];
        let places = windows
            .map(|n| waiting.enter(&format!("job-{n}"), n))
            .into();
        (waiting, places)
    }

    fn sent_back(places: &[Place]) -> Vec<bool> {
        let gone = places.iter().map(|place| place.sent_back.is_cancelled());
        gone.collect()
    }

    fn begins(waiting: &Waiting, place: usize, ago: Duration) {
        let since = Instant::now().checked_sub(ago);
        waiting.line().places[place].computing_since = since;
    }

    #[test]
    fn those_who_fit_into_the_time_left_stay_and_the_others_are_sent_back() {
        let (waiting, places) = line();
        // 10 + 1, then 10 do not fit any more, but 1 does.
        assert_eq!(waiting.close(Instant::now() + 15 * SECOND), (3, 1));
        assert_eq!(sent_back(&places), [false, false, true, false]);
        let late = waiting.enter("late", 10);
        assert!(
            late.sent_back.is_cancelled(),
            "nor does one that comes late"
        );
        let short = waiting.enter("short", 1);
        assert!(!short.sent_back.is_cancelled());
    }

    #[test]
    fn what_computes_counts_with_what_is_left_of_it_and_is_never_sent_back() {
        let (waiting, places) = line();
        begins(&waiting, 0, 9 * SECOND);
        waiting.close(Instant::now() + 3 * SECOND);
        assert_eq!(sent_back(&places), [false, false, true, false]);
        let (waiting, places) = line();
        begins(&waiting, 0, SECOND);
        waiting.close(Instant::now());
        assert_eq!(sent_back(&places), [false, true, true, true]);
        waiting.open();
        assert!(!waiting.enter("again", 10).sent_back.is_cancelled());
    }

    #[test]
    fn without_a_measure_everybody_fits_until_the_time_is_over() {
        let waiting = Waiting::default();
        let place = waiting.enter("a", 1000);
        assert_eq!(waiting.close(Instant::now() + SECOND), (1, 0));
        assert!(!place.sent_back.is_cancelled());
    }

    #[test]
    fn the_longest_wait_goes_first_and_who_comes_back_goes_again_but_not_for_ever() {
        let (waiting, mut places) = line();
        begins(&waiting, 0, SECOND);
        assert_eq!(waiting.waited(Duration::ZERO), 3);
        assert_eq!(waiting.send_back(Duration::ZERO, 1), 1);
        assert_eq!(sent_back(&places), [false, true, false, false]);
        drop(places.drain(..));
        for _ in 1..MOST_TIMES {
            let _new = waiting.enter("new", 1);
            let again = waiting.enter("job-1", 1);
            assert_eq!(waiting.send_back(SECOND, 9), 1, "at once");
            assert!(again.sent_back.is_cancelled());
        }
        let again = waiting.enter("job-1", 1);
        assert_eq!(waiting.send_back(Duration::ZERO, 9), 0);
        assert!(!again.sent_back.is_cancelled());
    }

    #[test]
    fn the_slowest_of_recent_jobs_tells_what_the_next_will_take() {
        let (waiting, mut places) = line();
        begins(&waiting, 0, 50 * SECOND);
        places.remove(0).computed();
        let slowest = || waiting.line().paces.iter().max().copied().unwrap();
        assert!(
            (slowest().as_secs_f64() - 5.0).abs() < 0.1,
            "{:?}",
            slowest()
        );
        places.remove(0).computed();
        assert_eq!(waiting.line().paces.len(), 2, "it was never begun");
        assert_eq!(waiting.line().places.len(), 2);
        for _ in 0..RECENT {
            let place = waiting.enter("quick", 1);
            begins(&waiting, 2, Duration::ZERO);
            place.computed();
        }
        assert!(slowest() < SECOND, "what was slow is forgotten");
    }
}
