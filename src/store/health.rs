//! Whether Redis does what jobs ask of it. Jobs go on without it; the log says once what does not work.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::connection::CallError;
use crate::telemetry::metrics::{self, StoreCall};

/// A failure that persists is logged again after this.
const SAY_AGAIN: Duration = Duration::from_secs(600);

/// What is asked of Redis, by what does not work while it fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Errand {
    /// To look a result up and mark its job.
    Claim,
    /// To add to a mark.
    Note,
    /// To remove a mark.
    Release,
    /// To remove a mark and store a result.
    Keep,
    /// To count deaths.
    Count,
    /// To see which workers are alive, and which are idle.
    Look,
    /// To let one worker at a time swap weights.
    Lease,
}

impl Errand {
    fn without(self) -> &'static str {
        match self {
            Self::Claim => "stored results are not found, and jobs are not marked",
            Self::Note => "crash marks of merges do not name the member that is measured",
            Self::Release => "crash marks are not removed",
            Self::Keep => "results are not stored",
            Self::Count => "deaths are not counted",
            Self::Look => "workers cannot see each other",
            Self::Lease => "workers do not take turns to swap weights",
        }
    }
}

/// The outcome of the calls for jobs.
#[derive(Debug, Default)]
pub struct Health(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// Why Redis answers nothing at all, if so.
    away: Option<String>,
    /// What Redis refuses, and why.
    refused: BTreeMap<Errand, String>,
    /// What was logged, and when.
    said: BTreeMap<String, Instant>,
}

impl Health {
    /// Why Redis does not do all that jobs ask of it, if so.
    pub fn trouble(&self) -> Option<String> {
        self.known().trouble()
    }

    pub(super) fn answered(&self, errand: Errand) {
        metrics::store_call(StoreCall::Answered);
        let mut known = self.known();
        let troubled = known.trouble().is_some();
        known.away = None;
        known.refused.remove(&errand);
        if troubled && known.trouble().is_none() {
            tracing::info!("Redis does what jobs ask of it again");
        }
    }

    pub(super) fn failed(&self, errand: Errand, error: &CallError) {
        let (outcome, why) = match error {
            CallError::Refused(why) => (StoreCall::Refused, why),
            CallError::Away(why) => (StoreCall::Failed, why),
        };
        metrics::store_call(outcome);
        let mut known = self.known();
        let without = match error {
            CallError::Refused(_) => {
                known.away = None;
                known.refused.insert(errand, why.clone());
                errand.without()
            }
            CallError::Away(_) => {
                known.away = Some(why.clone());
                "stored results and crash marks are off"
            }
        };
        let text = format!("{without}: {why}");
        let is_news = |at: &Instant| at.elapsed() > SAY_AGAIN;
        if known.said.get(&text).is_none_or(is_news) {
            tracing::warn!("Redis does not do what jobs ask of it; they go on, but {text}");
            known.said.retain(|_, at| at.elapsed() <= SAY_AGAIN);
            known.said.insert(text, Instant::now());
        } else {
            tracing::debug!("Redis: {text}");
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn trouble(&self) -> Option<String> {
        let refused = self.refused.iter();
        let mut refused = refused.map(|(errand, why)| format!("{}: {why}", errand.without()));
        self.away.clone().or_else(|| refused.next())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_stands_until_the_same_call_succeeds() {
        let health = Health::default();
        assert_eq!(health.trouble(), None);
        health.failed(Errand::Keep, &CallError::Refused("OOM".into()));
        health.answered(Errand::Claim);
        let said = health.trouble().unwrap();
        assert!(said.contains("results are not stored: OOM"), "{said}");
        health.failed(Errand::Claim, &CallError::Away("no answer".into()));
        assert_eq!(health.trouble().as_deref(), Some("no answer"));
        // Any answer shows that Redis is there, and no more than that.
        health.answered(Errand::Look);
        assert_eq!(health.trouble(), Some(said));
        health.answered(Errand::Keep);
        assert_eq!(health.trouble(), None);
    }
}
