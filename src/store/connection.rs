//! One connection to Redis, made when it is first needed. What the driver does not recover from by itself
//! is answered with a new one: a password that was refused, a connection that went silent, a master that
//! is none any more.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redis::cluster_routing::Slot;
use redis::{ErrorKind, FromRedisValue, RedisError, RedisResult, ServerErrorKind, Value};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::StoreError;
use super::link::{self, Link, Linked, slot};
use crate::config::{RedisConfig, RedisMode};

/// A connection to the only server is given up without an answer for this long.
const SILENT: Duration = Duration::from_secs(2);
/// The same where another server may have taken over.
const REPLACEABLE: Duration = Duration::from_secs(1);

/// What a master replies that has lost its replicas (`min-replicas-to-write`): one of them may be the master
/// by now.
const NO_REPLICAS: &str = "NOREPLICAS";

/// Why a call has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum CallError {
    /// Redis refuses: it is too old or out of memory, or does not permit it.
    #[error("{0}")]
    Refused(String),
    /// There is no connection, or no answer in time; Redis may still have done it.
    #[error("{0}")]
    Away(String),
}

/// A connection for many calls at a time.
pub(super) struct Connection {
    config: RedisConfig,
    /// The longest that an answer may take.
    response: Duration,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    linked: Option<watch::Receiver<Linked>>,
    silence: Option<Silence>,
}

/// Calls have had no answer.
struct Silence {
    /// Where they went: in a cluster, others may be answered.
    slot: Slot,
    since: Instant,
}

impl Connection {
    /// Connects at the first call.
    pub(super) fn new(config: &RedisConfig, response: Duration) -> Self {
        Self {
            config: config.clone(),
            response,
            held: Mutex::default(),
        }
    }

    /// The same, but checks the configuration at once.
    ///
    /// # Errors
    /// When the URL is unusable.
    pub(super) fn open(config: &RedisConfig, response: Duration) -> Result<Self, StoreError> {
        link::check(config)?;
        Ok(Self::new(config, response))
    }

    /// The URLs without their passwords.
    pub(super) fn place(&self) -> String {
        crate::config::redact_all(&self.config.urls)
    }

    /// Makes one call; the limit includes the wait for a connection. Commands without a key go to the
    /// server that has this slot.
    pub(super) async fn call<T, F>(
        &self,
        limit: Duration,
        near: Slot,
        call: impl FnOnce(Link) -> F,
    ) -> Result<T, CallError>
    where
        F: Future<Output = RedisResult<T>>,
    {
        let began = Instant::now();
        let waiting = self.linked().map_err(|e| CallError::Away(e.0))?;
        let Ok(Some(link)) = timeout(limit, found(waiting.clone())).await else {
            let why = waiting.borrow().as_ref().err().cloned();
            let why = why.unwrap_or_else(|| format!("no answer within {limit:?}"));
            return Err(CallError::Away(why));
        };
        let left = limit.saturating_sub(began.elapsed());
        let error = match timeout(left, call(link.near(near))).await {
            Ok(Ok(answer)) => {
                self.was_answered(near);
                return Ok(answer);
            }
            Ok(Err(error)) => error,
            Err(_) => {
                self.was_silent(near, began, &waiting);
                return Err(CallError::Away(format!("no answer within {limit:?}")));
            }
        };
        match kind(&error, self.config.mode) {
            Kind::Refusal => {
                self.was_answered(near);
                return Err(CallError::Refused(error.to_string()));
            }
            Kind::NoMaster => {
                self.give_up(&waiting);
                return Err(CallError::Refused(error.to_string()));
            }
            Kind::Silence => self.was_silent(near, began, &waiting),
            Kind::Lost => self.give_up(&waiting),
            Kind::Passing => {}
        }
        Err(CallError::Away(error.to_string()))
    }

    /// A slot of each server that has keys of its own.
    pub(super) async fn shards(&self, limit: Duration) -> Result<Vec<Slot>, CallError> {
        match self.config.mode {
            RedisMode::Single | RedisMode::Sentinel => Ok(vec![slot("")]),
            RedisMode::Cluster => {
                let mut asked = redis::cmd("CLUSTER");
                asked.arg("SLOTS");
                let ranges = self.call(limit, slot(""), |mut link| async move {
                    asked.query_async(&mut link).await
                });
                Ok(first_slots(ranges.await?))
            }
        }
    }

    fn linked(&self) -> Result<watch::Receiver<Linked>, StoreError> {
        let mut held = self.held();
        let linked = match held.linked.take() {
            Some(linked) => linked,
            None => link::link(&self.config, self.response)?,
        };
        Ok(held.linked.insert(linked).clone())
    }

    fn was_answered(&self, near: Slot) {
        let mut held = self.held();
        held.silence = held.silence.take().filter(|silence| silence.slot != near);
    }

    fn was_silent(&self, near: Slot, began: Instant, which: &watch::Receiver<Linked>) {
        let mut held = self.held();
        let silence = held.silence.get_or_insert(Silence {
            slot: near,
            since: began,
        });
        let patience = match self.config.mode {
            RedisMode::Single => SILENT,
            RedisMode::Sentinel | RedisMode::Cluster => REPLACEABLE,
        };
        let is_over = silence.since.elapsed() >= patience;
        drop(held);
        if is_over {
            self.give_up(which);
        }
    }

    /// Connects anew, unless another call has already done so.
    fn give_up(&self, which: &watch::Receiver<Linked>) {
        let mut held = self.held();
        if held.linked.as_ref().is_some_and(|l| l.same_channel(which)) {
            held.silence = None;
            // Not left to the next call, which may not wait long enough.
            held.linked = link::link(&self.config, self.response).ok();
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for the link.
async fn found(mut waiting: watch::Receiver<Linked>) -> Option<Link> {
    let found = waiting.wait_for(Result::is_ok).await.ok()?;
    found.as_ref().ok().cloned()
}

/// What an error says of the connection.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    /// The server answered, and refuses.
    Refusal,
    /// The same, because it is a replica by now.
    NoMaster,
    /// No answer in time.
    Silence,
    /// A new connection is needed.
    Lost,
    /// The connection recovers by itself.
    Passing,
}

fn kind(error: &RedisError, mode: RedisMode) -> Kind {
    let refuses = [ErrorKind::Extension, ErrorKind::UnexpectedReturnType];
    if let ErrorKind::Server(why) = error.kind() {
        kind_of_reply(why, mode)
    } else if mode == RedisMode::Sentinel && error.code() == Some(NO_REPLICAS) {
        Kind::Lost
    } else if refuses.contains(&error.kind()) {
        Kind::Refusal
    } else if error.is_timeout() {
        Kind::Silence
    } else if error.is_io_error() && mode != RedisMode::Sentinel {
        Kind::Passing
    } else {
        // With sentinels, another server may be the master by now.
        Kind::Lost
    }
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "a foreign enum: all but these of its cases are refusals"
)]
fn kind_of_reply(why: ServerErrorKind, mode: RedisMode) -> Kind {
    use ServerErrorKind as Why;
    match why {
        Why::ReadOnly if mode == RedisMode::Single => Kind::NoMaster,
        // Another server has taken over.
        Why::ReadOnly => Kind::Lost,
        // The node is cut off, or a part of the cluster is down: other nodes may know better.
        Why::ClusterDown => Kind::Silence,
        // The server is starting, or slots are on their way to another one, which does not know the scripts yet.
        Why::Ask
        | Why::BusyLoading
        | Why::MasterDown
        | Why::Moved
        | Why::NoScript
        | Why::TryAgain => Kind::Passing,
        _ => Kind::Refusal,
    }
}

/// The first slot of each master, as `CLUSTER SLOTS` lists ranges of slots with their servers.
fn first_slots(ranges: Vec<Vec<Value>>) -> Vec<Slot> {
    let mut found: Vec<(Value, Slot)> = Vec::new();
    for range in ranges {
        let mut parts = range.into_iter();
        let first = parts.next().and_then(|n| u16::from_redis_value(n).ok());
        let master = parts.nth(1);
        let (Some(first), Some(master)) = (first.and_then(Slot::new), master) else {
            continue;
        };
        if found.iter().all(|(known, _)| *known != master) {
            found.push((master, first));
        }
    }
    found.into_iter().map(|(_, slot)| slot).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_tells_whether_to_look_for_another_server_and_whether_it_is_a_refusal() {
        let (single, sentinel, cluster) =
            (RedisMode::Single, RedisMode::Sentinel, RedisMode::Cluster);
        for (mode, reply, expected) in [
            (single, "READONLY", Kind::NoMaster),
            (sentinel, "READONLY", Kind::Lost),
            (single, "NOREPLICAS", Kind::Refusal),
            (sentinel, "NOREPLICAS", Kind::Lost),
            (cluster, "NOREPLICAS", Kind::Refusal),
            (single, "LOADING", Kind::Passing),
            (sentinel, "LOADING", Kind::Passing),
            (sentinel, "MASTERDOWN", Kind::Passing),
            (cluster, "CLUSTERDOWN", Kind::Silence),
            (cluster, "MOVED", Kind::Passing),
            (cluster, "ASK", Kind::Passing),
            (cluster, "TRYAGAIN", Kind::Passing),
            (cluster, "NOSCRIPT", Kind::Passing),
            (single, "NOPERM", Kind::Refusal),
            (single, "OOM", Kind::Refusal),
            (cluster, "ERR", Kind::Refusal),
        ] {
            let text = format!("-{reply} as the server says\r\n");
            let value = redis::parse_redis_value(text.as_bytes()).unwrap();
            let error = value.extract_error().unwrap_err();
            assert_eq!(kind(&error, mode), expected, "{mode:?} {reply}");
        }
    }
}
