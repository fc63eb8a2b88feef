//! What the store keeps of a job: its result, and the crash marks of the workers that hold it.

use std::time::Duration;

use super::health::Errand;
use super::{LOOKUP_TIMEOUT, Reply, STORE_TIMEOUT, Store};

/// When a mark expires.
const MARK_LIFE: Duration = Duration::from_secs(24 * 3600);
/// The value of a mark begins like this once its worker was counted dead.
pub const DEAD: &str = "dead:";

/// What a job asks of the store before it runs.
#[derive(Debug, Clone, Copy)]
pub struct Claim<'a> {
    /// Key of its result.
    pub result: &'a str,
    /// `SUBMISSION:VERSION`.
    pub job: &'a str,
    /// Field of our mark.
    pub own: &'a str,
    /// Its value.
    pub started_ms: u64,
    /// Whether to mark the job even beside marks of other workers.
    pub anyway: bool,
    /// How long the job may be delayed.
    pub limit: Duration,
}

/// What the store knows of a job.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JobRecord {
    /// Its result, JSON. Then there are no marks, and none was written.
    pub stored: Option<String>,
    /// Field and value of each mark that was there before ours.
    pub marks: Vec<(String, String)>,
}

/// A mark to remove.
#[derive(Debug, Clone, Copy)]
pub struct Release<'a> {
    /// `SUBMISSION:VERSION`.
    pub job: &'a str,
    /// Field of our mark.
    pub own: &'a str,
    /// Its value.
    pub started_ms: u64,
    /// Whether marks that count as deaths are removed too.
    pub counted: bool,
}

/// What is added to a mark.
#[derive(Debug, Clone, Copy)]
pub struct Note<'a> {
    /// `SUBMISSION:VERSION`.
    pub job: &'a str,
    /// Field of our mark.
    pub own: &'a str,
    /// Its value.
    pub started_ms: u64,
    /// A word; none takes the last one back.
    pub doing: Option<&'a str>,
}

/// A result to store.
#[derive(Debug, Clone, Copy)]
pub struct Keep<'a> {
    /// Its key.
    pub key: &'a str,
    /// The result, JSON.
    pub text: &'a str,
    /// When it expires.
    pub ttl: Duration,
}

impl Store {
    /// Looks up a result and marks its job.
    pub async fn claim(&self, claim: &Claim<'_>) -> Reply<JobRecord> {
        let mut call = self.scripts.claim.key(self.keys.result(claim.result));
        call.key(self.keys.crash(claim.job))
            .arg(claim.own)
            .arg(claim.started_ms)
            .arg(MARK_LIFE.as_secs())
            .arg(u8::from(claim.anyway));
        let claimed = self.script(Errand::Claim, claim.limit, call).await;
        claimed.map(|(stored, marks)| JobRecord { stored, marks })
    }

    /// Removes a mark and stores the job's result, if there is one to keep. Returns the result that
    /// was stored before, which is then the one to publish.
    pub async fn release(
        &self,
        release: &Release<'_>,
        keep: Option<&Keep<'_>>,
    ) -> Reply<Option<String>> {
        let mut call = self.scripts.release.key(self.keys.crash(release.job));
        if let Some(keep) = keep {
            call.key(self.keys.result(keep.key));
        }
        call.arg(release.own)
            .arg(release.started_ms)
            .arg(u8::from(release.counted));
        if let Some(keep) = keep {
            call.arg(keep.text).arg(keep.ttl.as_secs().max(1));
        }
        let errand = match keep {
            Some(_) => Errand::Keep,
            None => Errand::Release,
        };
        self.script(errand, STORE_TIMEOUT, call).await
    }

    /// Adds to a mark of ours what the worker is about to do, in place of what was added before.
    pub async fn note(&self, note: &Note<'_>) -> Reply<()> {
        let mut call = self.scripts.note.key(self.keys.crash(note.job));
        call.arg(note.own)
            .arg(note.started_ms)
            .arg(note.doing.unwrap_or_default());
        self.script(Errand::Note, LOOKUP_TIMEOUT, call).await
    }

    /// Counts the workers behind these marks as dead; counting twice changes nothing.
    pub async fn count_deaths(&self, job: &str, fields: &[String]) -> Reply<()> {
        let mut call = self.scripts.count.key(self.keys.crash(job));
        call.arg(fields);
        self.script(Errand::Count, STORE_TIMEOUT, call).await
    }
}
