//! Whether Redis does what jobs ask of it. Jobs go on without; people are told once what is off.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::connection::CallError;
use crate::telemetry::metrics::{self, StoreCall};

/// What does not change is said again after this.
const SAY_AGAIN: Duration = Duration::from_secs(600);

/// What is asked of Redis, by what is off while it does not do it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Errand {
    /// To look a result up and mark its job.
    Claim,
    /// To remove a mark.
    Release,
    /// To remove a mark and store a result.
    Keep,
    /// To count deaths.
    Count,
    /// To tell who lives, and who has nothing to do.
    Look,
    /// To keep one worker at a time swapping.
    Lease,
}

impl Errand {
    fn without(self) -> &'static str {
        match self {
            Self::Claim => "stored results are not found, and jobs are not marked",
            Self::Release => "marks stay behind",
            Self::Keep => "results are not stored",
            Self::Count => "deaths are not counted",
            Self::Look => "workers do not know of each other",
            Self::Lease => "nobody waits for another's swap",
        }
    }
}

/// What the calls of jobs came to.
#[derive(Debug, Default)]
pub struct Health(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// Why nothing at all is answered.
    away: Option<String>,
    /// What is refused, and why.
    refused: BTreeMap<Errand, String>,
    /// What was said, and when.
    said: BTreeMap<String, Instant>,
}

impl Health {
    /// Why not everything is done that jobs ask for, if so.
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
            tracing::info!("Redis does again what jobs ask of it");
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
    fn what_one_call_is_refused_another_does_not_excuse() {
        let health = Health::default();
        assert_eq!(health.trouble(), None);
        health.failed(Errand::Keep, &CallError::Refused("OOM".into()));
        health.answered(Errand::Claim);
        let said = health.trouble().unwrap();
        assert!(said.contains("results are not stored: OOM"), "{said}");
        health.failed(Errand::Claim, &CallError::Away("no answer".into()));
        assert_eq!(health.trouble().as_deref(), Some("no answer"));
        // An answer to anything shows that it is there, and no more than that.
        health.answered(Errand::Look);
        assert_eq!(health.trouble(), Some(said));
        health.answered(Errand::Keep);
        assert_eq!(health.trouble(), None);
    }
}
