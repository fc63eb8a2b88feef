//! Crash marks: which jobs were being scored when workers died. A job is marked before it
//! computes, and the mark goes when the attempt ends in any way but death. What stays behind tells
//! the next worker, which finds out whether the other still lives before it computes.
//!
//! A mark is a field `WORKER_ID/INCARNATION` with the value `STARTED_MS`. Who finds its incarnation
//! dead rewrites the value as `dead:STARTED_MS`; a job's deaths are its fields of that kind, so it
//! does not matter how many workers find out, or how often. An incarnation that was only frozen or
//! cut off removes its own mark when its attempt ends, whatever the value says by then. Counted
//! marks go when the job is answered, except as `poisoned`: then they keep it from being computed
//! until they expire.
//!
//! Any job with marks of others waits, not only one that the broker calls redelivered: the flag is
//! lost where a job is published anew, on the retry ladder or when it was returned too often, and
//! RabbitMQ's versions count returns differently. The mark itself tells that the job was out before.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::protocol::failure::{Code, Failure, Remedy};
use crate::store::{
    Claim, DEAD, Keep, JobRecord, LOOKUP_TIMEOUT, Release, Reply, STORE_TIMEOUT, Store,
};
use crate::telemetry::status::WorkerStatus;
use crate::util::backoff::Backoff;
use crate::util::clock::{steady_ms, unix_ms};

/// A record must be gone for this many lives of a record.
const GONE_FOR: u32 = 2;
/// No job waits longer than this many lives of a record: then it is scored, and nothing counted.
const MOST_LIVES: u32 = 20;
/// CrashMarks to be removed when Redis is back. They expire by themselves, so the oldest may be forgotten.
const MOST_LEFT: usize = 1000;
/// What the end of the worker leaves for removals: a little more than the breaker stays open.
const LAST_REMOVALS: Duration = Duration::from_millis(1500);

/// The marks of this incarnation.
#[derive(Debug, Clone)]
pub struct CrashMarks(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Store,
    own: String,
    poison_after: usize,
    ttl: Duration,
    poll: Duration,
    status: Arc<WorkerStatus>,
    left: Mutex<Vec<Left>>,
    more_left: Notify,
}

/// A removal that has not got through yet.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Left {
    job: String,
    started_ms: u64,
    counted: bool,
}

/// What a job meets on its way to the device.
#[derive(Debug)]
pub enum Passage {
    /// Its result is stored; if that cannot be read, it can still be attempted.
    Stored(String, Attempt),
    /// Too many workers died of it.
    Poisoned(Failure),
    /// The worker leaves, and it is not known yet what became of those who marked the job before.
    HandedBack,
    /// It may compute.
    Free(Attempt),
}

impl CrashMarks {
    /// Prepares the marks of an incarnation; [`CrashMarks::sweep`] is to run beside it.
    pub fn new(
        store: Store,
        config: &Config,
        incarnation: &str,
        status: Arc<WorkerStatus>,
    ) -> Self {
        let (most, least) = (Duration::from_millis(500), Duration::from_millis(50));
        Self(Arc::new(Inner {
            store,
            own: format!("{}/{incarnation}", config.worker_id()),
            poison_after: usize::try_from(config.amqp.poison_after).unwrap_or(usize::MAX),
            ttl: config.heartbeat.ttl,
            poll: (config.heartbeat.interval / 2).clamp(least, most),
            status,
            left: Mutex::default(),
            more_left: Notify::new(),
        }))
    }

    /// Removes what could not be removed at once, for ever.
    pub async fn sweep(self) {
        self.0.sweep().await;
    }

    /// Looks up the job's result and marks the job, in one round trip. Where others have marked it,
    /// waits until it is known of each whether it lives; `leaving` ends the wait. `job` is
    /// `SUBMISSION:VERSION`. While Redis fails the job goes on without a mark.
    pub async fn enter(&self, result: &str, job: String, leaving: &CancellationToken) -> Passage {
        let inner = &self.0;
        let mut attempt = Attempt::new(Arc::clone(inner), result, job);
        let Some(mut known) = attempt.claim(false, LOOKUP_TIMEOUT).await else {
            return Passage::Free(attempt);
        };
        let mut watch = Watch::new(inner.ttl, Instant::now());
        loop {
            if let Some(stored) = known.stored {
                attempt.late = true;
                return Passage::Stored(stored, attempt);
            }
            attempt.late = known.marks.iter().any(|(field, _)| *field != inner.own);
            let open = match standing(&known.marks, &inner.own, &watch.alive, inner.poison_after) {
                Standing::Clear => return Passage::Free(attempt),
                Standing::Poisoned(workers) => return Passage::Poisoned(poisoned(&workers)),
                Standing::Open(open) => open,
            };
            if inner.count_deaths(&attempt.job, &open, &mut watch).await {
                // What is counted now is read below.
            } else if watch.gives_up(Instant::now()) {
                tracing::warn!(
                    job = attempt.job,
                    "scored although it is unknown what became of others"
                );
                return Passage::Free(attempt);
            } else {
                tokio::select! {
                    () = tokio::time::sleep(inner.poll) => {}
                    () = leaving.cancelled() => return Passage::HandedBack,
                }
            }
            known = match attempt.claim(false, STORE_TIMEOUT).await {
                Some(now) => now,
                None => JobRecord {
                    stored: None,
                    marks: known.marks,
                },
            };
        }
    }

    /// Removes what is left to be removed, if Redis takes it soon.
    pub async fn settle(&self) {
        let removing = async {
            while !self.0.remove_left().await {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        if tokio::time::timeout(LAST_REMOVALS, removing).await.is_err() {
            tracing::warn!("crash marks stay behind: Redis does not take their removal");
        }
    }
}

impl Inner {
    /// Finds out about the incarnations behind open marks; true = some were counted dead.
    async fn count_deaths(&self, job: &str, open: &[String], watch: &mut Watch) -> bool {
        let Some(seqs) = self.store.last_seqs(open).await.answer() else {
            return false;
        };
        let beaten = self.status.beaten_ms.load(Ordering::Relaxed);
        let since_beat = Duration::from_millis(steady_ms().saturating_sub(beaten));
        let dead = watch.look(open, &seqs, since_beat, Instant::now());
        if dead.is_empty() {
            return false;
        }
        tracing::warn!(job, ?dead, "workers died while they were scoring this job");
        self.store.count_deaths(job, &dead).await.answer().is_some()
    }

    fn left(&self) -> MutexGuard<'_, Vec<Left>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn sweep(&self) {
        self.store.connect().await;
        let mut backoff = Backoff::new();
        loop {
            self.more_left.notified().await;
            while !self.remove_left().await {
                tokio::time::sleep(backoff.next_delay()).await;
            }
            backoff.reset();
        }
    }

    /// True = nothing is left.
    async fn remove_left(&self) -> bool {
        loop {
            let Some(next) = self.left().first().cloned() else {
                return true;
            };
            // It stays in the list until it is removed: the end of the worker waits for that.
            if !self.remove(&next).await {
                return false;
            }
            self.left().retain(|left| *left != next);
        }
    }

    async fn remove(&self, left: &Left) -> bool {
        let release = self.release(left);
        let removed = self.store.release(&release, None);
        removed.await.answer().is_some()
    }

    fn release<'a>(&'a self, left: &'a Left) -> Release<'a> {
        Release {
            job: &left.job,
            own: &self.own,
            started_ms: left.started_ms,
            counted: left.counted,
        }
    }
}

/// One attempt at a job. Its mark is removed when this ends or is dropped.
#[derive(Debug)]
pub struct Attempt {
    inner: Arc<Inner>,
    result: String,
    job: String,
    started_ms: u64,
    /// A mark of ours may be in Redis.
    marked: bool,
    /// The job is answered: marks that count as deaths go too.
    answered: bool,
    /// Others marked the job before: see [`Attempt::is_suspect`].
    late: bool,
}

impl Attempt {
    fn new(inner: Arc<Inner>, result: &str, job: String) -> Self {
        Self {
            inner,
            result: result.to_owned(),
            job,
            started_ms: unix_ms(),
            marked: false,
            answered: false,
            late: false,
        }
    }

    async fn claim(&mut self, anyway: bool, limit: Duration) -> Option<JobRecord> {
        let claim = Claim {
            result: &self.result,
            job: &self.job,
            own: &self.inner.own,
            started_ms: self.started_ms,
            anyway,
            limit,
        };
        // Before the call: it may be dropped, or time out, when Redis has done it.
        let before = std::mem::replace(&mut self.marked, true);
        let reply = self.inner.store.claim(&claim).await;
        match &reply {
            Reply::Answer(known) => {
                let alone = known
                    .marks
                    .iter()
                    .all(|(field, _)| *field == self.inner.own);
                self.marked = before || (known.stored.is_none() && (anyway || alone));
            }
            Reply::Skipped => self.marked = before,
            Reply::Failed => {}
        }
        reply.answer()
    }

    /// Whether somebody died, or may have died, while this job was held. Such a job is decoded and
    /// computed while it has the device, and is marked only then: waiting beside another that
    /// kills the worker must not count against it a second time.
    pub fn is_suspect(&self) -> bool {
        self.late
    }

    /// CrashMarks a suspect that has the device; any other is marked already.
    ///
    /// # Errors
    /// `poisoned`, when others have died of it while it waited for the device.
    pub async fn mark(&mut self) -> Result<(), Failure> {
        if !self.late {
            return Ok(());
        }
        if !self.marked {
            self.started_ms = unix_ms();
        }
        let Some(known) = self.claim(true, LOOKUP_TIMEOUT).await else {
            return Ok(());
        };
        let inner = &self.inner;
        match standing(
            &known.marks,
            &inner.own,
            &HashSet::new(),
            inner.poison_after,
        ) {
            Standing::Clear | Standing::Open(_) => Ok(()),
            Standing::Poisoned(workers) => Err(poisoned(&workers)),
        }
    }

    /// The job has its verdict: removes the mark, and with it those that count as deaths where the
    /// job is answered without another death. Stores the result that is to be kept, in the same
    /// round trip; returns the one that was stored before, if there was one.
    pub async fn end(
        mut self,
        code: Option<Code>,
        keep: Option<(&str, Duration)>,
    ) -> Option<String> {
        self.answered = self.late
            && match code.map(Code::remedy) {
                None | Some(Remedy::Answer) => true,
                Some(Remedy::Retry | Remedy::Park) => false,
            };
        if !(self.marked || self.answered || keep.is_some()) {
            return None;
        }
        let left = self.as_left();
        let keep = keep.map(|(text, ttl)| Keep {
            key: &self.result,
            text,
            ttl,
        });
        let release = self.inner.release(&left);
        let released = self.inner.store.release(&release, keep.as_ref());
        let stored = released.await.answer()?;
        (self.marked, self.answered) = (false, false);
        stored
    }

    fn as_left(&self) -> Left {
        Left {
            job: self.job.clone(),
            started_ms: self.started_ms,
            counted: self.answered,
        }
    }

    fn left(&self) -> Option<Left> {
        (self.marked || self.answered).then(|| self.as_left())
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if let Some(left) = self.left() {
            let mut all = self.inner.left();
            if all.len() >= MOST_LEFT {
                all.remove(0);
            }
            all.push(left);
            self.inner.more_left.notify_one();
        }
    }
}

/// What a job's marks say.
#[derive(Debug, PartialEq, Eq)]
enum Standing {
    /// Nobody else marked it, or it is known what became of them.
    Clear,
    /// Of these it is not known whether they live.
    Open(Vec<String>),
    /// Enough of them died.
    Poisoned(Vec<String>),
}

/// The counting rule: a death is a mark of another incarnation that says `dead:`.
fn standing(
    marks: &[(String, String)],
    own: &str,
    alive: &HashSet<String>,
    poison_after: usize,
) -> Standing {
    let foreign = marks.iter().filter(|(field, _)| field != own);
    let (dead, open): (Vec<_>, Vec<_>) = foreign.partition(|(_, value)| value.starts_with(DEAD));
    let name = |(field, _): &(String, String)| field.clone();
    if dead.len() >= poison_after {
        return Standing::Poisoned(dead.into_iter().map(name).collect());
    }
    let open: Vec<String> = open
        .into_iter()
        .map(name)
        .filter(|field| !alive.contains(field))
        .collect();
    if open.is_empty() {
        Standing::Clear
    } else {
        Standing::Open(open)
    }
}

fn poisoned(workers: &[String]) -> Failure {
    let mut ids: Vec<&str> = workers
        .iter()
        .map(|field| field.rsplit_once('/').map_or(field.as_str(), |(id, _)| id))
        .collect();
    ids.sort_unstable();
    let message = format!(
        "{} workers died while they were scoring this job: {}",
        ids.len(),
        ids.join(", ")
    );
    Failure::new(Code::Poisoned, message)
        .with("deaths", ids.len())
        .with("workers", json!(ids))
}

/// What a waiting job has seen of the incarnations behind its open marks. Pure.
#[derive(Debug)]
struct Watch {
    ttl: Duration,
    began: Instant,
    /// The last look that can be relied on.
    looked: Instant,
    seen: HashMap<String, Seen>,
    alive: HashSet<String>,
}

#[derive(Debug)]
struct Seen {
    /// At the first look; 0 = there was no record.
    first_seq: u64,
    gone_since: Option<Instant>,
}

impl Watch {
    fn new(ttl: Duration, now: Instant) -> Self {
        Self {
            ttl,
            began: now,
            looked: now,
            seen: HashMap::new(),
            alive: HashSet::new(),
        }
    }

    /// Notes the `seq` of each; returns those that are dead. Who writes a newer one is alive. Who
    /// has no record for twice the life of one is dead, as far as we were there to see it: had our
    /// own beats not got through, or had we not looked for so long, theirs may be gone for our reason.
    fn look(
        &mut self,
        open: &[String],
        seqs: &[Option<u64>],
        since_beat: Duration,
        now: Instant,
    ) -> Vec<String> {
        if since_beat > self.ttl || now.duration_since(self.looked) > self.ttl {
            for seen in self.seen.values_mut() {
                seen.gone_since = None;
            }
        }
        self.looked = now;
        let mut dead = Vec::new();
        for (field, seq) in open.iter().zip(seqs) {
            let seen = self.seen.entry(field.clone()).or_insert(Seen {
                first_seq: seq.unwrap_or(0),
                gone_since: None,
            });
            match seq {
                Some(seq) if *seq > seen.first_seq => {
                    self.alive.insert(field.clone());
                }
                Some(_) => seen.gone_since = None,
                None => {
                    let since = *seen.gone_since.get_or_insert(now);
                    if now.duration_since(since) >= self.ttl * GONE_FOR {
                        dead.push(field.clone());
                    }
                }
            }
        }
        dead
    }

    /// Redis tells nothing any more, or what it tells leads nowhere.
    fn gives_up(&self, now: Instant) -> bool {
        now.duration_since(self.looked) > self.ttl
            || now.duration_since(self.began) > self.ttl * MOST_LIVES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(5);
    const FRESH: Duration = Duration::from_millis(500);

    fn marks(marks: &[(&str, &str)]) -> Vec<(String, String)> {
        marks
            .iter()
            .map(|(field, value)| ((*field).to_owned(), (*value).to_owned()))
            .collect()
    }

    fn stands(found: &[(&str, &str)], alive: &[&str]) -> Standing {
        let alive = alive.iter().map(|field| (*field).to_owned()).collect();
        standing(&marks(found), "me/1", &alive, 2)
    }

    /// Looks every half second at one incarnation, and says when it was found dead.
    fn dies_at(
        watch: &mut Watch,
        began: Instant,
        looks: impl Iterator<Item = (f64, Option<u64>, Duration)>,
    ) -> Option<f64> {
        let open = ["w/1".to_owned()];
        for (at, seq, since_beat) in looks {
            let now = began + Duration::from_secs_f64(at);
            if !watch.look(&open, &[seq], since_beat, now).is_empty() {
                return Some(at);
            }
        }
        None
    }

    fn every_half_second(until: u32) -> impl Iterator<Item = f64> {
        (0..until * 2).map(|n| f64::from(n) / 2.0)
    }

    #[test]
    fn only_foreign_marks_that_say_dead_are_deaths() {
        assert_eq!(stands(&[], &[]), Standing::Clear);
        assert_eq!(stands(&[("me/1", "7")], &[]), Standing::Clear);
        assert_eq!(
            stands(&[("me/1", "dead:7"), ("w/1", "dead:7")], &[]),
            Standing::Clear,
            "we live, whoever counted us"
        );
        assert_eq!(
            stands(&[("w/1", "dead:7"), ("w/2", "8")], &[]),
            Standing::Open(vec!["w/2".into()])
        );
        assert_eq!(
            stands(&[("w/1", "dead:7"), ("w/2", "8")], &["w/2"]),
            Standing::Clear
        );
        assert_eq!(
            stands(
                &[("w/1", "dead:7"), ("w/2", "dead:8"), ("v/3", "9")],
                &["v/3"]
            ),
            Standing::Poisoned(vec!["w/1".into(), "w/2".into()])
        );
    }

    #[test]
    fn a_newer_seq_is_a_sign_of_life_and_the_same_one_is_not() {
        let began = Instant::now();
        let mut watch = Watch::new(TTL, began);
        let open = ["w/1".to_owned()];
        for seq in [7, 7] {
            watch.look(&open, &[Some(seq)], FRESH, began);
            assert!(watch.alive.is_empty());
        }
        watch.look(&open, &[Some(8)], FRESH, began);
        assert!(watch.alive.contains("w/1"));
        // A record that was gone and is there again was written since.
        let mut watch = Watch::new(TTL, began);
        watch.look(&open, &[None], FRESH, began);
        watch.look(&open, &[Some(1)], FRESH, began);
        assert!(watch.alive.contains("w/1"));
    }

    #[test]
    fn a_record_that_is_gone_for_twice_its_life_is_a_death() {
        let began = Instant::now();
        let there_for =
            |secs: f64| every_half_second(60).map(move |at| (at, (at < secs).then_some(7), FRESH));
        let mut watch = Watch::new(TTL, began);
        assert_eq!(dies_at(&mut watch, began, there_for(0.0)), Some(10.0));
        let mut watch = Watch::new(TTL, began);
        assert_eq!(dies_at(&mut watch, began, there_for(4.5)), Some(14.5));
        assert!(!watch.gives_up(began + Duration::from_secs(14)));
    }

    #[test]
    fn nobody_is_dead_while_our_own_beats_or_looks_fail() {
        let began = Instant::now();
        let mut watch = Watch::new(TTL, began);
        let away = every_half_second(60).map(|at| (at, None, TTL * 2));
        assert_eq!(dies_at(&mut watch, began, away), None);
        // Beats are lost from the 3rd second to the 12th: the wait begins anew.
        let mut watch = Watch::new(TTL, began);
        let gap = every_half_second(60).map(|at| {
            let since_beat = if (3.0..12.0).contains(&at) {
                TTL * 2
            } else {
                FRESH
            };
            (at, None, since_beat)
        });
        assert_eq!(dies_at(&mut watch, began, gap), Some(21.5));
        // We were frozen from the 3rd second to the 20th.
        let mut watch = Watch::new(TTL, began);
        let frozen = every_half_second(60)
            .filter(|at| !(3.0..20.0).contains(at))
            .map(|at| (at, None, FRESH));
        assert_eq!(dies_at(&mut watch, began, frozen), Some(30.0));
    }

    #[test]
    fn no_job_waits_for_ever() {
        let began = Instant::now();
        let mut watch = Watch::new(TTL, began);
        let same = every_half_second(100).map(|at| (at, Some(7), FRESH));
        assert_eq!(dies_at(&mut watch, began, same), None);
        assert!(!watch.gives_up(began + TTL * 20));
        assert!(watch.gives_up(began + TTL * 20 + FRESH));
        assert!(
            Watch::new(TTL, began).gives_up(began + TTL + FRESH),
            "Redis does not answer any more"
        );
    }
}
