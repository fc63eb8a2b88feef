//! Results that could not be settled yet. Their jobs are delivered again, and are answered from here even
//! while Redis is away.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::protocol::result::{Key, ResultMessage};

/// A job may be delivered again to another worker; then its result here is never used.
const MOST_KEPT: usize = 64;

/// Results of this process that may have to be published again; the oldest are forgotten.
#[derive(Debug, Clone, Default)]
pub struct RecentResults(Arc<Mutex<VecDeque<(Key, ResultMessage)>>>);

impl RecentResults {
    /// Keeps a result until it is settled.
    pub fn keep(&self, key: &Key, message: &ResultMessage) {
        let mut kept = self.kept();
        kept.retain(|(other, _)| other != key);
        if kept.len() == MOST_KEPT {
            kept.pop_front();
        }
        kept.push_back((key.clone(), message.clone().with_context(None)));
    }

    /// The result of this key, without its context.
    pub fn find(&self, key: &Key) -> Option<ResultMessage> {
        let kept = self.kept();
        let found = kept.iter().find(|(other, _)| other == key);
        found.map(|(_, message)| message.clone())
    }

    /// Forgets a result whose job is acknowledged.
    pub fn forget(&self, key: &Key) {
        self.kept().retain(|(other, _)| other != key);
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<(Key, ResultMessage)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
