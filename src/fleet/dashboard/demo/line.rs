//! The jobs that wait: in the queue, first come, first served, and in the retry queues.

use std::collections::VecDeque;

use super::job::Job;

/// Delays of the retry queues, milliseconds.
pub(super) const RETRY_DELAYS: [u64; 3] = [5_000, 30_000, 300_000];

/// Jobs that came at the same time; or one that came back.
#[derive(Debug)]
struct Batch {
    at_ms: u64,
    count: u64,
    back: Option<Job>,
}

/// One that is taken: the time at which it came, or the job that came back.
#[derive(Debug)]
pub(super) enum Taken {
    Fresh { at_ms: u64 },
    Back(Job),
}

/// All jobs that wait.
#[derive(Debug, Default)]
pub(super) struct Line {
    batches: VecDeque<Batch>,
    waiting: u64,
    /// The part of a job that has come so far.
    part: f64,
    /// Jobs to be retried, and when.
    retry: Vec<(u64, Job)>,
}

impl Line {
    /// So many jobs come; a part of one adds to those that come later.
    pub(super) fn arrive(&mut self, at_ms: u64, jobs: f64) {
        self.part += jobs;
        let count = self.part as u64;
        self.part -= count as f64;
        if count > 0 {
            let back = None;
            self.batches.push_back(Batch { at_ms, count, back });
            self.waiting += count;
        }
    }

    /// The first of the line.
    pub(super) fn take(&mut self) -> Option<Taken> {
        let batch = self.batches.front_mut()?;
        let (at_ms, back) = (batch.at_ms, batch.back.take());
        batch.count -= 1;
        if batch.count == 0 {
            self.batches.pop_front();
        }
        self.waiting -= 1;
        Some(back.map_or(Taken::Fresh { at_ms }, Taken::Back))
    }

    /// As many as there are of so many; whoever wants them knows nothing of them.
    pub(super) fn take_many(&mut self, jobs: u64) -> u64 {
        let mut missing = jobs.min(self.waiting);
        let taken = missing;
        while let Some(batch) = self.batches.front_mut().filter(|_| missing > 0) {
            let some = batch.count.min(missing);
            batch.count -= some;
            missing -= some;
            if batch.count == 0 {
                self.batches.pop_front();
            }
        }
        self.waiting -= taken;
        taken
    }

    /// A worker hands a job back: it is the first in the line.
    pub(super) fn give_back(&mut self, job: Job) {
        let batch = Batch {
            at_ms: job.arrived_ms,
            count: 1,
            back: Some(job),
        };
        self.batches.push_front(batch);
        self.waiting += 1;
    }

    /// A job waits for its next try. It comes back if there is none.
    pub(super) fn retry(&mut self, job: Job, at_ms: u64) -> Result<(), Job> {
        match RETRY_DELAYS.get(job.attempt as usize - 1) {
            Some(delay) => {
                self.retry.push((at_ms + delay, job));
                Ok(())
            }
            None => Err(job),
        }
    }

    /// A job that waits for its next try already.
    pub(super) fn retry_at(&mut self, job: Job, due_ms: u64) {
        self.retry.push((due_ms, job));
    }

    /// Jobs whose time has come join the end of the line.
    pub(super) fn turn(&mut self, now_ms: u64) {
        let (due, rest) = std::mem::take(&mut self.retry)
            .into_iter()
            .partition(|(at_ms, _)| *at_ms <= now_ms);
        self.retry = rest;
        let due: Vec<(u64, Job)> = due;
        for (at_ms, job) in due {
            let attempt = job.attempt + 1;
            let arrived_ms = at_ms;
            let back = Some(Job {
                attempt,
                arrived_ms,
                ..job
            });
            self.batches.push_back(Batch {
                at_ms,
                count: 1,
                back,
            });
            self.waiting += 1;
        }
    }

    /// Jobs in the queue.
    pub(super) fn waiting(&self) -> u32 {
        u32::try_from(self.waiting).unwrap_or(u32::MAX)
    }

    /// Jobs in the retry queues.
    pub(super) fn retrying(&self) -> u32 {
        u32::try_from(self.retry.len()).unwrap_or(u32::MAX)
    }

    /// How long the first of the line has waited.
    pub(super) fn oldest_ms(&self, now_ms: u64) -> Option<u64> {
        let first = self.batches.front()?;
        Some(now_ms.saturating_sub(first.at_ms))
    }
}
