//! Calls on behalf of jobs are bounded in time. After one that Redis did not answer, the next calls are
//! skipped for a moment, so that jobs do not wait for each of them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use redis::{FromRedisValue, RedisResult, ScriptInvocation};

use super::Store;
use super::connection::CallError;
use super::health::Errand;
use super::link::Link;
use crate::telemetry::metrics::{self, StoreCall};
use crate::util::clock::steady_ms;

/// How long calls are skipped after one without an answer.
const OPEN_MS: u64 = 1000;

/// What became of a bounded call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply<T> {
    /// Redis did it.
    Answer(T),
    /// Redis was not asked, because it failed a moment ago.
    Skipped,
    /// It failed; Redis may still have done it.
    Failed,
}

impl<T> Reply<T> {
    /// Converts the answer, if there is one.
    pub fn map<U>(self, make: impl FnOnce(T) -> U) -> Reply<U> {
        match self {
            Self::Answer(answer) => Reply::Answer(make(answer)),
            Self::Skipped => Reply::Skipped,
            Self::Failed => Reply::Failed,
        }
    }

    /// The answer, if there is one.
    pub fn answer(self) -> Option<T> {
        match self {
            Self::Answer(answer) => Some(answer),
            Self::Skipped | Self::Failed => None,
        }
    }
}

/// Open while calls are skipped.
#[derive(Debug, Default)]
pub(super) struct Breaker {
    /// By the steady clock.
    open_until_ms: AtomicU64,
}

impl Breaker {
    fn is_open(&self, now_ms: u64) -> bool {
        now_ms < self.open_until_ms.load(Ordering::Relaxed)
    }

    fn trip(&self, now_ms: u64) {
        self.open_until_ms
            .store(now_ms + OPEN_MS, Ordering::Relaxed);
    }
}

impl Store {
    /// Runs a script.
    pub(super) async fn script<T: FromRedisValue>(
        &self,
        errand: Errand,
        limit: Duration,
        call: ScriptInvocation<'_>,
    ) -> Reply<T> {
        self.bounded(errand, limit, |mut connection| async move {
            call.invoke_async(&mut connection).await
        })
        .await
    }

    /// Makes a call, unless the breaker is open. A call that Redis refuses does not open it: a refusal
    /// costs no time.
    pub(super) async fn bounded<T, F>(
        &self,
        errand: Errand,
        limit: Duration,
        call: impl FnOnce(Link) -> F,
    ) -> Reply<T>
    where
        F: Future<Output = RedisResult<T>>,
    {
        if self.breaker.is_open(steady_ms()) {
            metrics::store_call(StoreCall::Skipped);
            return Reply::Skipped;
        }
        let error = match self.connection.call(limit, self.keys.slot(), call).await {
            Ok(value) => {
                self.health.answered(errand);
                return Reply::Answer(value);
            }
            Err(error) => error,
        };
        self.health.failed(errand, &error);
        if let CallError::Away(_) = error {
            self.breaker.trip(steady_ms());
        }
        Reply::Failed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_skipped_for_a_moment_after_one_without_an_answer() {
        let breaker = Breaker::default();
        assert!(!breaker.is_open(0));
        breaker.trip(500);
        for (now_ms, open) in [
            (500, true),
            (500 + OPEN_MS - 1, true),
            (500 + OPEN_MS, false),
        ] {
            assert_eq!(breaker.is_open(now_ms), open, "at {now_ms} ms");
        }
    }
}
