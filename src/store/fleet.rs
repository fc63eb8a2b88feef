//! Redis as observers and operators of a fleet use it: records, events, and the crash marks that an
//! operator clears.

use std::collections::BTreeMap;
use std::time::Duration;

use redis::cluster_routing::Slot;
use redis::{Cmd, FromRedisValue};

use super::connection::{CallError, Connection};
use super::link::slot;
use super::{Keys, Server, StoreError};
use crate::config::RedisConfig;
use crate::util::clock;

/// Events per read, as many as are kept.
const EVENTS: usize = 2000;
/// Records per read, and keys per step of a scan.
const PART: usize = 1000;
/// Time-out of a command, including the wait for a connection.
const LIMIT: Duration = Duration::from_secs(2);

/// A fleet's Redis, read repeatedly on one connection.
pub struct FleetStore {
    connection: Connection,
    namespace: String,
}

impl std::fmt::Debug for FleetStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FleetStore").finish_non_exhaustive()
    }
}

/// The record of a live worker.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LiveRecord {
    /// Time since its heartbeat, by Redis' clock: the worker's own may be wrong.
    pub age_ms: u64,
    /// As it was written.
    pub text: String,
}

/// An entry of the stream of events: its id, and its fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamEntry {
    /// Milliseconds and a number, as Redis gives it.
    pub id: String,
    /// By name.
    pub fields: BTreeMap<String, String>,
}

impl StreamEntry {
    /// Milliseconds and number of its id.
    pub fn when(&self) -> (u64, u64) {
        let (millis, number) = self.id.split_once('-').unwrap_or((&self.id, ""));
        (millis.parse().unwrap_or(0), number.parse().unwrap_or(0))
    }
}

impl FleetStore {
    /// Connects at the first call.
    pub fn new(config: &RedisConfig) -> Self {
        Self {
            connection: Connection::new(config, LIMIT),
            namespace: config.namespace.clone(),
        }
    }

    /// Checks that Redis accepts the connection and is new enough; its name and version.
    ///
    /// # Errors
    /// Why not.
    pub async fn greet(&self) -> Result<String, StoreError> {
        let hello = self.ask(slot(""), &redis::cmd("HELLO")).await?;
        let server = Server::of(&hello);
        match server.too_old() {
            Some(why) => Err(StoreError(format!("{}: {why}", self.connection.place()))),
            None => Ok(server.0),
        }
    }

    /// Redis' time, and the records of the live workers of one model, or of all.
    ///
    /// # Errors
    /// When Redis cannot be read.
    pub async fn live_records(
        &self,
        model: Option<&str>,
        ttl: Duration,
    ) -> Result<(u64, Vec<LiveRecord>), StoreError> {
        let namespace = &self.namespace;
        let indexes = match model {
            Some(model) => vec![Keys::new(namespace, model).workers()],
            None => self.scan(&format!("{namespace}:{{*}}:workers")).await?,
        };
        let mut now = self.now(indexes.first().map_or("", String::as_str)).await?;
        let mut records = Vec::new();
        for (n, index) in indexes.iter().enumerate() {
            if n > 0 {
                // In a cluster another server may have it, with a clock of its own.
                now = self.now(index).await?;
            }
            let oldest = now.saturating_sub(clock::millis(ttl));
            records.extend(self.records(index, now, oldest).await?);
        }
        Ok((now, records))
    }

    /// By the clock that wrote this key.
    async fn now(&self, key: &str) -> Result<u64, StoreError> {
        let time = redis::cmd("TIME");
        let (seconds, micros): (u64, u64) = self.ask(slot(key), &time).await?;
        Ok(seconds * 1000 + micros / 1000)
    }

    /// The records of the workers that an index has, but for those that beat last before `oldest`.
    async fn records(
        &self,
        index: &str,
        now: u64,
        oldest: u64,
    ) -> Result<Vec<LiveRecord>, StoreError> {
        let prefix = index.strip_suffix(":workers").unwrap_or(index);
        let mut beats = redis::cmd("ZRANGEBYSCORE");
        beats.arg(index).arg(oldest).arg("+inf").arg("WITHSCORES");
        let beats: Vec<(String, f64)> = self.ask(slot(index), &beats).await?;
        let mut records = Vec::new();
        // In parts: Redis does nothing else while it answers a call.
        for beats in beats.chunks(PART) {
            let mut read = redis::cmd("MGET");
            for (id, _) in beats {
                read.arg(format!("{prefix}:worker:{id}"));
            }
            let found: Vec<Option<Vec<u8>>> = self.ask(slot(index), &read).await?;
            let found = beats.iter().zip(found);
            records.extend(found.filter_map(|((_, beaten), text)| {
                let age_ms = now.saturating_sub(millis(*beaten));
                // What is no text is no record; the others are.
                let text = String::from_utf8(text?).ok()?;
                Some(LiveRecord { age_ms, text })
            }));
        }
        Ok(records)
    }

    /// Events after an entry, or all that are kept; oldest first.
    ///
    /// # Errors
    /// When Redis does not answer.
    pub async fn events(
        &self,
        model: &str,
        after: Option<&str>,
    ) -> Result<Vec<StreamEntry>, StoreError> {
        let key = Keys::new(&self.namespace, model).events();
        let (command, from, to) = match after {
            Some(after) => ("XRANGE", format!("({after}"), "+"),
            None => ("XREVRANGE", "+".to_owned(), "-"),
        };
        let mut call = redis::cmd(command);
        call.arg(&key).arg(from).arg(to).arg("COUNT").arg(EVENTS);
        let found: Vec<(String, BTreeMap<String, String>)> = self.ask(slot(&key), &call).await?;
        let found = found.into_iter();
        let mut events: Vec<StreamEntry> = found
            .map(|(id, fields)| StreamEntry { id, fields })
            .collect();
        events.sort_by_key(StreamEntry::when);
        Ok(events)
    }

    /// The result that is stored under a key, JSON.
    ///
    /// # Errors
    /// When Redis does not answer, or does not permit it.
    pub async fn stored_result(
        &self,
        model: &str,
        key: &str,
    ) -> Result<Option<String>, StoreError> {
        let key = Keys::new(&self.namespace, model).result(key);
        self.ask(slot(&key), redis::cmd("GET").arg(&key)).await
    }

    /// The crash marks of a job, `SUBMISSION:VERSION`: field and value of each.
    ///
    /// # Errors
    /// When Redis does not answer, or does not permit it.
    pub async fn crash_marks(
        &self,
        model: &str,
        job: &str,
    ) -> Result<BTreeMap<String, String>, StoreError> {
        let key = Keys::new(&self.namespace, model).crash(job);
        self.ask(slot(&key), redis::cmd("HGETALL").arg(&key)).await
    }

    /// Deletes the crash marks of a job, for every version, so that it is scored again.
    ///
    /// # Errors
    /// When Redis does not answer.
    pub async fn forget_deaths(&self, model: &str, submission_id: &str) -> Result<(), StoreError> {
        let keys = Keys::new(&self.namespace, model);
        let prefix = keys.crash(&format!("{submission_id}:"));
        // A name may contain colons, so that of another job may begin like this.
        let is_version = |rest: &str| rest.bytes().all(|b| b.is_ascii_digit());
        for key in self.scan_shard(keys.slot(), &format!("{prefix}*")).await? {
            if key.strip_prefix(&prefix).is_some_and(is_version) {
                self.ask::<()>(slot(&key), redis::cmd("DEL").arg(&key))
                    .await?;
            }
        }
        Ok(())
    }

    /// The keys of a pattern, on every server, each once.
    async fn scan(&self, pattern: &str) -> Result<Vec<String>, StoreError> {
        let shards = self.connection.shards(LIMIT).await;
        let mut found = Vec::new();
        for shard in shards.map_err(|why| self.at_place(&why))? {
            found.extend(self.scan_shard(shard, pattern).await?);
        }
        found.sort();
        found.dedup();
        Ok(found)
    }

    /// The keys of a pattern on the server that has this slot.
    async fn scan_shard(&self, shard: Slot, pattern: &str) -> Result<Vec<String>, StoreError> {
        let (mut found, mut cursor) = (Vec::new(), 0_u64);
        loop {
            let mut step = redis::cmd("SCAN");
            step.arg(cursor).arg("MATCH").arg(pattern);
            step.arg("COUNT").arg(PART);
            let (next, keys): (u64, Vec<String>) = self.ask(shard, &step).await?;
            found.extend(keys);
            if next == 0 {
                return Ok(found);
            }
            cursor = next;
        }
    }

    /// One command, in time.
    async fn ask<T: FromRedisValue>(&self, near: Slot, command: &Cmd) -> Result<T, StoreError> {
        let asked = self.connection.call(LIMIT, near, |mut link| async move {
            command.query_async(&mut link).await
        });
        asked.await.map_err(|why| self.at_place(&why))
    }

    fn at_place(&self, why: &CallError) -> StoreError {
        StoreError(format!("{}: {why}", self.connection.place()))
    }
}

/// A score of the index of workers; one that is not a time is clamped.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "milliseconds fit for ages, and others are cut"
)]
fn millis(score: f64) -> u64 {
    score as u64
}
