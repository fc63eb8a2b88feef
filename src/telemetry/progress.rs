//! Progress of the computing thread, and when it counts as stuck. Measured by the monotonic clock; only
//! the record has the time of day.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::util::clock::{millis, steady_ms, unix_ms};

/// Patience with the first micro-batch of a session: a provider may compile its kernels then.
const FIRST_PATIENCE: Duration = Duration::from_secs(300);
/// Minimum patience after a warm-up; otherwise this many times its slowest micro-batch.
const LEAST_PATIENCE: Duration = Duration::from_secs(10);
const MOST_TIMES_SLOWER: u64 = 10;
/// The same for a proof, which also works on whole tensors on the host: it may pause this long at least,
/// or that many times longer than the warm-up did.
const LEAST_PROOF_PATIENCE: Duration = Duration::from_secs(30);
/// How often progress is checked.
const LOOK: Duration = Duration::from_millis(250);
/// If nothing was checked for this long, the process itself was stopped.
const ABSENT: Duration = Duration::from_secs(2);

/// Written by the computing thread; read by everything else.
#[derive(Debug, Default)]
pub struct Progress {
    /// Micro-batches done since the start.
    pub counter: AtomicU64,
    /// When the last one was done, unix milliseconds; for people.
    pub at_ms: AtomicU64,
    /// Counts of micro-batches between which the current warm-up lies, approximately; equal = no warm-up.
    pub warm_from: AtomicU64,
    /// See [`Progress::warm_from`].
    pub warm_until: AtomicU64,
    /// Baselines kept.
    pub baselines: AtomicU64,
    /// Values between the parts of the graph.
    pub activations: Activations,
    /// Time the computing thread has worked, microseconds.
    pub worked_us: AtomicU64,
    /// When the current work began, by the monotonic clock; 0 = idle.
    busy_since_ms: AtomicU64,
    /// When it last made progress, by the monotonic clock.
    moved_ms: AtomicU64,
    /// Of a micro-batch.
    pace: Pace,
    /// Of a proof, between two signs of progress.
    proof_pace: Pace,
    /// The work under way is a proof.
    proving: AtomicBool,
    /// A graph is compiled, or runs for the first time.
    compiling: AtomicBool,
    presence: Mutex<Presence>,
}

/// What is kept between the parts of the graph, and whether candidates start from it. Only those count that
/// leave the first part alone.
#[derive(Debug, Default)]
pub struct Activations {
    /// Bytes kept.
    pub bytes: AtomicU64,
    /// Micro-batches that began at the first part with another weight.
    pub hits: AtomicU64,
    /// Micro-batches that began earlier, because what enters that part was not kept.
    pub misses: AtomicU64,
}

/// Since when the process has not been stopped, by the monotonic clock.
#[derive(Debug, Default)]
struct Presence {
    since_ms: u64,
    looked_ms: u64,
}

/// Current work, and when it began; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Busy(Option<(Arc<Progress>, u64)>);

impl Drop for Busy {
    fn drop(&mut self) {
        let Some((progress, since)) = &self.0 else {
            return;
        };
        // Unless another session has taken over.
        let (busy, order) = (&progress.busy_since_ms, Ordering::Relaxed);
        if busy.compare_exchange(*since, 0, order, order).is_ok() {
            progress.proving.store(false, Ordering::Relaxed);
        }
    }
}

/// The graph is being compiled until this is dropped.
#[derive(Debug)]
pub(crate) struct Compiling<'a>(&'a AtomicBool);

impl Drop for Compiling<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// How long one kind of pause may be, as warm-ups have measured it.
#[derive(Debug, Default)]
struct Pace {
    /// The longest of the warm-up under way, milliseconds.
    seen_ms: AtomicU64,
    /// What the last one has led to, milliseconds; 0 = there was none.
    patience_ms: AtomicU64,
}

impl Pace {
    fn note(&self, pause_ms: u64) {
        self.seen_ms.fetch_max(pause_ms, Ordering::Relaxed);
    }

    fn patience(&self) -> Duration {
        let known = match self.patience_ms.load(Ordering::Relaxed) {
            0 => millis(FIRST_PATIENCE),
            known => known,
        };
        let seen = self.seen_ms.load(Ordering::Relaxed) * MOST_TIMES_SLOWER;
        Duration::from_millis(known.max(seen))
    }

    fn settle(&self, least: Duration) {
        let seen = self.seen_ms.swap(0, Ordering::Relaxed) * MOST_TIMES_SLOWER;
        self.patience_ms
            .store(seen.max(millis(least)), Ordering::Relaxed);
    }

    fn forget(&self) {
        self.seen_ms.store(0, Ordering::Relaxed);
        self.patience_ms.store(0, Ordering::Relaxed);
    }
}

impl Progress {
    /// Whether something is computed or written.
    pub fn is_busy(&self) -> bool {
        self.busy_since_ms.load(Ordering::Relaxed) != 0
    }

    /// For how long something has been computed or written; zero = idle.
    pub fn busy_for(&self) -> Duration {
        match self.busy_since_ms.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since => Duration::from_millis(steady_ms().saturating_sub(since)),
        }
    }

    /// When work last made progress, by the monotonic clock.
    pub fn moved_at(&self) -> u64 {
        self.moved_ms.load(Ordering::Relaxed)
    }

    /// How long the current work, or the next job, may make no progress before it counts as stuck.
    pub fn patience(&self) -> Duration {
        let paced = match self.proving.load(Ordering::Relaxed) {
            true => self.proof_pace.patience(),
            false => self.pace.patience(),
        };
        match self.compiling.load(Ordering::Relaxed) {
            true => paced.max(FIRST_PATIENCE),
            false => paced,
        }
    }

    /// Whether the current work has made no progress for too long. Time in which the process was stopped
    /// does not count, provided that [`Progress::watch`] is running.
    pub fn is_stuck(&self) -> bool {
        let (now, there_since) = self.look();
        let busy_since = self.busy_since_ms.load(Ordering::Relaxed);
        let moved = self.moved_ms.load(Ordering::Relaxed);
        let last = moved.max(busy_since).max(there_since);
        busy_since != 0 && now.saturating_sub(last) > millis(self.patience())
    }

    /// Resolves when the current work is stuck.
    pub async fn stuck(&self) {
        while !self.is_stuck() {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Checks continually, so that a stop of the process is noticed.
    pub async fn watch(&self) {
        loop {
            self.look();
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The time, and since when the process has been running without a stop.
    fn look(&self) -> (u64, u64) {
        let mut presence = self.presence.lock().unwrap_or_else(PoisonError::into_inner);
        let now = steady_ms();
        if now.saturating_sub(presence.looked_ms) > millis(ABSENT) {
            presence.since_ms = now;
        }
        presence.looked_ms = now;
        (now, presence.since_ms)
    }

    /// Micro-batches that the current warm-up has done, and about how many it has in all.
    pub fn warming(&self) -> Option<(u64, u64)> {
        let from = self.warm_from.load(Ordering::Relaxed);
        let all = self.warm_until.load(Ordering::Relaxed).checked_sub(from)?;
        let done = self.counter.load(Ordering::Relaxed).saturating_sub(from);
        (all > 0).then_some((done.min(all), all))
    }

    /// Begins work, unless it is part of the current work.
    pub(crate) fn begin(self: &Arc<Self>) -> Busy {
        if self.is_busy() {
            return Busy(None);
        }
        let now = steady_ms();
        self.busy_since_ms.store(now, Ordering::Relaxed);
        Busy(Some((Arc::clone(self), now)))
    }

    /// Begins a proof, as [`Progress::begin`] does.
    pub(crate) fn begin_proof(self: &Arc<Self>) -> Busy {
        let busy = self.begin();
        if busy.0.is_some() {
            self.proving.store(true, Ordering::Relaxed);
        }
        busy
    }

    /// Notes that a graph is compiled and runs for the first time, which no pace of a warm-up measures.
    pub(crate) fn compiling(&self) -> Compiling<'_> {
        self.compiling.store(true, Ordering::Relaxed);
        Compiling(&self.compiling)
    }

    /// Notes progress of the current work.
    pub(crate) fn moved(&self) {
        let now = steady_ms();
        let before = self.moved_ms.swap(now, Ordering::Relaxed);
        let before = before.max(self.busy_since_ms.load(Ordering::Relaxed));
        if self.proving.load(Ordering::Relaxed) {
            self.proof_pace.note(now.saturating_sub(before));
        }
    }

    /// Counts a finished micro-batch.
    pub(crate) fn step(&self) {
        self.counter.fetch_add(1, Ordering::Relaxed);
        self.at_ms.store(unix_ms(), Ordering::Relaxed);
        self.moved();
    }

    /// Resets everything for another session: its pace is unknown, and work that the previous session may
    /// still finish does not count.
    pub(crate) fn forget_pace(&self) {
        self.busy_since_ms.store(0, Ordering::Relaxed);
        self.proving.store(false, Ordering::Relaxed);
        self.compiling.store(false, Ordering::Relaxed);
        self.pace.forget();
        self.proof_pace.forget();
    }

    /// Notes how long a micro-batch of the warm-up took.
    pub(crate) fn note_pace(&self, took: Duration) {
        self.pace.note(millis(took));
    }

    /// Ends a warm-up: its times set the patience from now on.
    pub(crate) fn settle_pace(&self) {
        self.pace.settle(LEAST_PATIENCE);
        self.proof_pace.settle(LEAST_PROOF_PATIENCE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets time pass, looking as often as a worker does.
    async fn looks_for(progress: &Progress, time: Duration) {
        drop(tokio::time::timeout(time, progress.watch()).await);
    }

    #[tokio::test(start_paused = true)]
    async fn work_is_stuck_after_ten_times_the_slowest_micro_batch_or_ten_seconds() {
        let secs = Duration::from_secs;
        for (slowest, patience) in [
            (secs(0), secs(10)),
            (secs(1), secs(10)),
            (secs(3), secs(30)),
        ] {
            let progress = Arc::new(Progress::default());
            progress.note_pace(slowest);
            progress.settle_pace();
            looks_for(&progress, secs(60)).await;
            assert!(!progress.is_stuck(), "idle is not stuck");
            let work = progress.begin();
            let part = progress.begin();
            looks_for(&progress, patience).await;
            drop(part);
            assert!(progress.is_busy() && !progress.is_stuck());
            progress.moved();
            looks_for(&progress, patience).await;
            assert!(!progress.is_stuck(), "it got on");
            looks_for(&progress, secs(1)).await;
            assert!(progress.is_stuck(), "{patience:?}");
            drop(work);
            assert!(!progress.is_stuck() && !progress.is_busy());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_first_proof_may_compile_and_the_next_is_measured_by_it() {
        let secs = Duration::from_secs;
        for (pause, patience) in [(1, LEAST_PROOF_PATIENCE), (8, secs(80))] {
            let progress = Arc::new(Progress::default());
            let work = progress.begin_proof();
            looks_for(&progress, secs(pause)).await;
            progress.moved();
            assert_eq!(progress.patience(), FIRST_PATIENCE);
            progress.settle_pace();
            drop(work);
            assert_eq!(progress.patience(), LEAST_PATIENCE, "of a job");
            let work = progress.begin_proof();
            looks_for(&progress, patience).await;
            assert!(!progress.is_stuck(), "{pause}");
            looks_for(&progress, secs(1)).await;
            assert!(progress.is_stuck(), "{pause}");
            progress.forget_pace();
            assert!(!progress.is_stuck());
            drop(work);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn time_in_which_the_process_was_stopped_does_not_count() {
        let progress = Arc::new(Progress::default());
        progress.settle_pace();
        let _work = progress.begin();
        looks_for(&progress, Duration::from_secs(9)).await;
        // Nobody looks: neither the thread that beats nor whoever waits.
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert!(!progress.is_stuck());
        looks_for(&progress, Duration::from_secs(9)).await;
        assert!(!progress.is_stuck(), "its time begins anew");
        looks_for(&progress, Duration::from_secs(2)).await;
        assert!(progress.is_stuck());
    }
}
