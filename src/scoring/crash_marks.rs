//! Crash marks tell which jobs were running when workers died. A job is marked in Redis before it runs,
//! and its mark is removed when the attempt ends in any way other than the death of the worker. A mark
//! that stays behind warns the next worker, which finds out whether the other one is alive before it
//! runs the job.
//!
//! A mark is a field `WORKER_ID/INCARNATION` with the value `STARTED_MS`; while a member of a merge is worked on by itself,
//! its id follows after a space. Whoever finds that incarnation dead puts `dead:` before the value. A job's deaths are its fields of that kind, so it does
//! not matter how many workers find out, or how often. An incarnation that was only frozen or cut off
//! removes its own mark when its attempt ends, whatever the value is by then. Deaths are removed when
//! the job is answered, unless as `poisoned`: then they keep it from running until they expire.
//!
//! Every job with marks of others waits, not only one that the broker calls redelivered: that flag is
//! lost where a job is published again, on the retry ladder or after too many returns, and versions of
//! RabbitMQ count returns differently. The mark itself proves that the job was delivered before.

mod rule;

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::config::Config;
use crate::protocol::failure::{Code, Failure, Remedy};
use crate::store::{Claim, JobRecord, Keep, LOOKUP_TIMEOUT, Note, Release, Reply, Store};
use crate::telemetry::status::WorkerStatus;
use crate::util::backoff::Backoff;
use crate::util::clock::{steady_ms, unix_ms};
pub(super) use rule::{Rule, Watch};

/// How many marks are remembered for removal while Redis is away. Marks expire, so the oldest may be
/// forgotten.
const MOST_REMOVALS: usize = 1000;
/// How long the end of the worker waits for removals: a little longer than the store's breaker stays open.
const LAST_REMOVALS: Duration = Duration::from_millis(1500);

/// The marks of this incarnation.
#[derive(Debug, Clone)]
pub struct CrashMarks(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Store,
    rule: Rule,
    ttl: Duration,
    poll: Duration,
    status: Arc<WorkerStatus>,
    removals: Mutex<Vec<Removal>>,
    more_removals: Notify,
}

/// A removal that Redis has not confirmed yet.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Removal {
    job: String,
    started_ms: u64,
    /// Deaths are removed too.
    counted: bool,
}

impl CrashMarks {
    /// Prepares the marks of an incarnation; [`CrashMarks::sweep`] must run beside it.
    pub fn new(
        store: Store,
        config: &Config,
        incarnation: &str,
        status: Arc<WorkerStatus>,
    ) -> Self {
        let (most, least) = (Duration::from_millis(500), Duration::from_millis(50));
        Self(Arc::new(Inner {
            store,
            rule: Rule {
                own: format!("{}/{incarnation}", config.worker_id()),
                poison_after: usize::try_from(config.amqp.poison_after).unwrap_or(usize::MAX),
            },
            ttl: config.heartbeat.ttl,
            poll: (config.heartbeat.interval / 2).clamp(least, most),
            status,
            removals: Mutex::default(),
            more_removals: Notify::new(),
        }))
    }

    /// The mark of an attempt at a job, not written yet. `result` is the key of the job's result, `job`
    /// is `SUBMISSION:VERSION`.
    pub(super) fn mark(&self, result: &str, job: String) -> CrashMark {
        CrashMark {
            inner: Arc::clone(&self.0),
            result: result.to_owned(),
            job,
            started_ms: unix_ms(),
            written: false,
            answered: false,
            suspect: false,
        }
    }

    /// Removes what could not be removed at once, for ever.
    pub async fn sweep(self) {
        self.0.store.connect().await;
        let mut backoff = Backoff::new();
        loop {
            self.0.more_removals.notified().await;
            while !self.0.remove_all().await {
                tokio::time::sleep(backoff.next_delay()).await;
            }
            backoff.reset();
        }
    }

    /// Removes what is left to be removed, if Redis takes it soon.
    pub async fn settle(&self) {
        let removing = async {
            while !self.0.remove_all().await {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        if tokio::time::timeout(LAST_REMOVALS, removing).await.is_err() {
            tracing::warn!("crash marks are left behind: Redis does not remove them");
        }
    }
}

impl Inner {
    fn removals(&self) -> MutexGuard<'_, Vec<Removal>> {
        self.removals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nothing is left to remove.
    async fn remove_all(&self) -> bool {
        loop {
            let Some(next) = self.removals().first().cloned() else {
                return true;
            };
            // It stays in the list until it is removed: the end of the worker waits for that.
            let removed = self.store.release(&self.release(&next), None).await;
            if removed.answer().is_none() {
                return false;
            }
            self.removals().retain(|removal| *removal != next);
        }
    }

    fn release<'a>(&'a self, removal: &'a Removal) -> Release<'a> {
        Release {
            job: &removal.job,
            own: &self.rule.own,
            started_ms: removal.started_ms,
            counted: removal.counted,
        }
    }
}

/// The mark of one attempt at a job. It is removed when the attempt ends or this is dropped.
#[derive(Debug)]
pub struct CrashMark {
    inner: Arc<Inner>,
    result: String,
    /// `SUBMISSION:VERSION`.
    job: String,
    started_ms: u64,
    /// The mark may be in Redis.
    written: bool,
    /// The job is answered, so its deaths are removed too.
    answered: bool,
    suspect: bool,
}

impl CrashMark {
    /// `SUBMISSION:VERSION`.
    pub(super) fn job(&self) -> &str {
        &self.job
    }

    /// Looks up the job's result and marks the job, in one round trip. Beside marks of others ours is
    /// not written yet.
    pub(super) async fn look_up(&mut self, limit: Duration) -> Option<JobRecord> {
        self.claim(false, limit).await
    }

    async fn claim(&mut self, anyway: bool, limit: Duration) -> Option<JobRecord> {
        let claim = Claim {
            result: &self.result,
            job: &self.job,
            own: &self.inner.rule.own,
            started_ms: self.started_ms,
            anyway,
            limit,
        };
        // Before the call: it may be dropped, or time out, after Redis has written the mark.
        let before = std::mem::replace(&mut self.written, true);
        let reply = self.inner.store.claim(&claim).await;
        match &reply {
            Reply::Answer(record) => {
                let alone = !self.inner.rule.has_foreign(&record.marks);
                self.written = before || (record.stored.is_none() && (anyway || alone));
            }
            Reply::Skipped => self.written = before,
            Reply::Failed => {}
        }
        reply.answer()
    }

    /// Whether a worker died, or may have died, while it held this job. A suspect is decoded and scored
    /// while it has the device, and is marked only then: otherwise it would collect a death for waiting
    /// beside another job that kills the worker.
    pub fn is_suspect(&self) -> bool {
        self.suspect
    }

    /// Notes by the job's record whether it is a suspect.
    pub(super) fn suspect(&mut self, record: &JobRecord) {
        self.suspect = record.stored.is_some() || self.inner.rule.has_foreign(&record.marks);
    }

    /// Where it is told that the job waits.
    pub(super) fn status(&self) -> Arc<WorkerStatus> {
        Arc::clone(&self.inner.status)
    }

    /// The counting rule.
    pub(super) fn rule(&self) -> &Rule {
        &self.inner.rule
    }

    /// What is to be seen of the workers behind open marks, from now on.
    pub(super) fn watch(&self) -> Watch {
        Watch::new(self.inner.ttl, Instant::now())
    }

    /// How often to look at them.
    pub(super) fn poll(&self) -> Duration {
        self.inner.poll
    }

    /// Looks at the workers behind open marks, and counts the dead. Whether any were counted.
    pub(super) async fn count_deaths(&self, open: &[String], watch: &mut Watch) -> bool {
        let Inner { store, status, .. } = &*self.inner;
        let Some(seqs) = store.last_seqs(open).await.answer() else {
            return false;
        };
        let beaten = status.beaten_ms.load(Ordering::Relaxed);
        let since_beat = Duration::from_millis(steady_ms().saturating_sub(beaten));
        let dead = watch.look(open, &seqs, since_beat, Instant::now());
        if dead.is_empty() {
            return false;
        }
        let job = &self.job;
        tracing::warn!(job, ?dead, "workers died while they were scoring this job");
        store.count_deaths(job, &dead).await.answer().is_some()
    }

    /// Marks a suspect that has the device now; any other job is marked already.
    ///
    /// # Errors
    /// `poisoned`, when others have died of it while it waited for the device.
    pub async fn mark_suspect(&mut self) -> Result<(), Failure> {
        if !self.suspect {
            return Ok(());
        }
        if !self.written {
            self.started_ms = unix_ms();
        }
        let Some(record) = self.claim(true, LOOKUP_TIMEOUT).await else {
            return Ok(());
        };
        let open = self.inner.rule.open_marks(&record.marks, &HashSet::new());
        open.map(drop)
    }

    /// Names the member of a merge that is worked on, and nobody else.
    pub fn pen(&self) -> Pen {
        Pen {
            inner: Arc::clone(&self.inner),
            job: self.job.clone(),
            started_ms: self.started_ms,
        }
    }

    /// The job has its verdict: removes the mark, and the deaths too where the job is answered without
    /// another one. Stores the result that is to be kept, in the same round trip; returns the one that
    /// was stored before, if there was one.
    pub async fn end(
        mut self,
        code: Option<Code>,
        keep: Option<(&str, Duration)>,
    ) -> Option<String> {
        self.answered = self.suspect
            && match code.map(Code::remedy) {
                None | Some(Remedy::Answer) => true,
                Some(Remedy::Retry | Remedy::Park) => false,
            };
        if !(self.written || self.answered || keep.is_some()) {
            return None;
        }
        let removal = self.removal();
        let keep = keep.map(|(text, ttl)| Keep {
            key: &self.result,
            text,
            ttl,
        });
        let release = self.inner.release(&removal);
        let released = self.inner.store.release(&release, keep.as_ref());
        let stored = released.await.answer()?;
        (self.written, self.answered) = (false, false);
        stored
    }

    fn removal(&self) -> Removal {
        Removal {
            job: self.job.clone(),
            started_ms: self.started_ms,
            counted: self.answered,
        }
    }
}

/// Writes into the mark which member of a merge is worked on.
#[derive(Debug, Clone)]
pub struct Pen {
    inner: Arc<Inner>,
    job: String,
    started_ms: u64,
}

impl Pen {
    /// This one by itself, or none in particular. The note is in Redis when this returns, unless Redis does not answer.
    pub async fn note(&self, member: Option<&str>) {
        let note = Note {
            job: &self.job,
            own: &self.inner.rule.own,
            started_ms: self.started_ms,
            doing: member,
        };
        // Without it the job runs, as without a mark.
        self.inner.store.note(&note).await.answer();
    }
}

impl Drop for CrashMark {
    fn drop(&mut self) {
        if !(self.written || self.answered) {
            return;
        }
        let mut removals = self.inner.removals();
        if removals.len() >= MOST_REMOVALS {
            removals.remove(0);
        }
        removals.push(self.removal());
        self.inner.more_removals.notify_one();
    }
}
