//! The only place that knows Redis: the atomic beat, stored results, and reading the fleet. Every
//! call is bounded in time; Redis being away slows nothing down and stops nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{AsyncCommands, Script};

use crate::clock::unix_ms;
use crate::config::RedisConfig;

/// One beat, whatever Redis does.
const BEAT_TIMEOUT: Duration = Duration::from_millis(800);
/// A look-up may delay a job by this much, never more.
const LOOKUP_TIMEOUT: Duration = Duration::from_millis(50);
const STORE_TIMEOUT: Duration = Duration::from_millis(300);
/// After a failure the store is left alone for this long.
const BREAKER_MS: u64 = 1000;

/// What went wrong with Redis.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Redis: {0}")]
pub struct StoreError(pub String);

/// The keys of one model, in one cluster slot.
#[derive(Debug, Clone)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    /// Keys under `NAMESPACE:{MODEL}`.
    pub fn new(namespace: &str, model: &str) -> Self {
        Self {
            prefix: format!("{namespace}:{{{model}}}"),
        }
    }

    fn worker(&self, id: &str) -> String {
        format!("{}:worker:{id}", self.prefix)
    }

    fn workers(&self) -> String {
        format!("{}:workers", self.prefix)
    }

    fn events(&self) -> String {
        format!("{}:events", self.prefix)
    }

    fn result(&self, key: &str) -> String {
        format!("{}:result:{key}", self.prefix)
    }
}

/// Connections to Redis; made when first needed, so that a worker starts without it.
#[derive(Clone)]
pub struct Store {
    connection: ConnectionManager,
    keys: Keys,
    open_again_ms: Arc<AtomicU64>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("keys", &self.keys)
            .finish_non_exhaustive()
    }
}

fn manager(config: &RedisConfig) -> Result<ConnectionManager, StoreError> {
    let client = redis::Client::open(config.url.as_str())
        .map_err(|e| StoreError(format!("redis.url: {e}")))?;
    let settings = ConnectionManagerConfig::new()
        .set_number_of_retries(2)
        .set_min_delay(Duration::from_millis(50))
        .set_max_delay(Duration::from_millis(300))
        .set_response_timeout(Some(Duration::from_millis(500)))
        .set_connection_timeout(Some(Duration::from_millis(500)));
    ConnectionManager::new_lazy_with_config(client, settings).map_err(|e| StoreError(e.to_string()))
}

/// What one beat carries.
#[derive(Debug)]
pub struct Beat<'a> {
    /// The worker's name.
    pub worker_id: &'a str,
    /// This start of it.
    pub incarnation: &'a str,
    /// Its host, to tell a dead process of ours from somebody else's.
    pub host: &'a str,
    /// The record, JSON.
    pub record: &'a str,
    /// The record's life.
    pub ttl: Duration,
    /// Events to append, each as field-value pairs.
    pub events: &'a [Vec<(String, String)>],
    /// The worker leaves the sorted set.
    pub leaving: bool,
    /// An incarnation known to be dead, whose record may be taken over at once.
    pub dead: Option<&'a str>,
}

/// Whose the worker's name is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ownership {
    /// Ours.
    Ours,
    /// A live record of another incarnation holds it; its host and pid.
    Theirs {
        /// Its incarnation.
        incarnation: String,
        /// Its host.
        host: String,
        /// Its process.
        pid: u32,
    },
}

/// Writes the record, the index and the events in one step, and never over another incarnation's
/// live record: then everything goes under a name of our own.
const BEAT: &str = r"
local function foreign()
  local raw = redis.call('GET', KEYS[1])
  if not raw then return nil end
  local ok, record = pcall(cjson.decode, raw)
  if not ok or type(record) ~= 'table' then return nil end
  if record.incarnation == ARGV[1] or record.state == 'stopped' or record.incarnation == ARGV[6] then return nil end
  return record
end
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local ttl = tonumber(ARGV[3])
local other = foreign()
local record, member, mine = KEYS[1], ARGV[4], true
if other then record, member, mine = KEYS[2], ARGV[5], false end
redis.call('SET', record, ARGV[2], 'PX', ttl)
if mine then
  redis.call('DEL', KEYS[2])
  redis.call('ZREM', KEYS[3], ARGV[5])
end
if ARGV[7] == '1' then redis.call('ZREM', KEYS[3], member) else redis.call('ZADD', KEYS[3], string.format('%.0f', now), member) end
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', '(' .. string.format('%.0f', now - ttl))
local at = 8
while ARGV[at] do
  local count = tonumber(ARGV[at])
  local fields = {}
  for i = 1, count do fields[i] = ARGV[at + i] end
  redis.call('XADD', KEYS[4], 'MAXLEN', '~', 2000, '*', unpack(fields))
  at = at + count + 1
end
if mine then return {'', '', '0'} end
return {tostring(other.incarnation), tostring(other.host), string.format('%.0f', tonumber(other.pid) or 0)}
";

impl Store {
    /// Prepares connections for a model's keys.
    ///
    /// # Errors
    /// When the URL is unusable; an absent Redis is no error.
    pub fn new(config: &RedisConfig, model: &str) -> Result<Self, StoreError> {
        let keys = Keys::new(&config.namespace, model);
        Ok(Self {
            connection: manager(config)?,
            keys,
            open_again_ms: Arc::default(),
        })
    }

    /// Writes one beat.
    ///
    /// # Errors
    /// When Redis does not take it in time.
    pub async fn beat(&self, beat: &Beat<'_>) -> Result<Ownership, StoreError> {
        let own_name = format!(
            "{}~{}",
            beat.worker_id,
            beat.incarnation.chars().take(8).collect::<String>()
        );
        let script = Script::new(BEAT);
        let mut call = script.key(self.keys.worker(beat.worker_id));
        call.key(self.keys.worker(&own_name))
            .key(self.keys.workers())
            .key(self.keys.events());
        call.arg(beat.incarnation).arg(beat.record);
        call.arg(u64::try_from(beat.ttl.as_millis()).unwrap_or(u64::MAX));
        call.arg(beat.worker_id)
            .arg(&own_name)
            .arg(beat.dead.unwrap_or("-"))
            .arg(u8::from(beat.leaving));
        for event in beat.events {
            call.arg(event.len() * 2);
            for (field, value) in event {
                call.arg(field).arg(value);
            }
        }
        let mut connection = self.connection.clone();
        let invoked = tokio::time::timeout(
            BEAT_TIMEOUT,
            call.invoke_async::<(String, String, u32)>(&mut connection),
        );
        match invoked.await {
            Ok(Ok((incarnation, _, _))) if incarnation.is_empty() => Ok(Ownership::Ours),
            Ok(Ok((incarnation, host, pid))) => Ok(Ownership::Theirs {
                incarnation,
                host,
                pid,
            }),
            Ok(Err(e)) => Err(StoreError(e.to_string())),
            Err(_) => Err(StoreError("no answer in time".into())),
        }
    }

    /// A stored result, if there is one and Redis says so quickly.
    pub async fn lookup(&self, key: &str) -> Option<String> {
        if unix_ms() < self.open_again_ms.load(Ordering::Relaxed) {
            return None;
        }
        let mut connection = self.connection.clone();
        let get = connection.get::<_, Option<String>>(self.keys.result(key));
        self.guarded(tokio::time::timeout(LOOKUP_TIMEOUT, get).await)
            .flatten()
    }

    /// Stores a result unless there is one already, which then is the one to publish.
    pub async fn keep(&self, key: &str, result: &str, ttl: Duration) -> Option<String> {
        if unix_ms() < self.open_again_ms.load(Ordering::Relaxed) {
            return None;
        }
        let mut connection = self.connection.clone();
        let mut set = redis::cmd("SET");
        set.arg(self.keys.result(key))
            .arg(result)
            .arg("NX")
            .arg("GET")
            .arg("EX")
            .arg(ttl.as_secs().max(1));
        let set = set.query_async::<Option<String>>(&mut connection);
        self.guarded(tokio::time::timeout(STORE_TIMEOUT, set).await)
            .flatten()
    }

    fn guarded<T>(
        &self,
        outcome: Result<redis::RedisResult<T>, tokio::time::error::Elapsed>,
    ) -> Option<T> {
        let error = match outcome {
            Ok(Ok(value)) => return Some(value),
            Ok(Err(e)) => e.to_string(),
            Err(_) => "no answer in time".into(),
        };
        tracing::debug!(%error, "stored results are left alone for a moment");
        self.open_again_ms
            .store(unix_ms() + BREAKER_MS, Ordering::Relaxed);
        None
    }
}

/// The models that have workers, and the records of those alive, by Redis' own clock.
///
/// # Errors
/// When Redis cannot be read.
pub async fn read_fleet(
    config: &RedisConfig,
    model: Option<&str>,
    ttl: Duration,
) -> Result<(u64, Vec<String>), StoreError> {
    let mut connection = manager(config)?;
    let fail =
        |e: redis::RedisError| StoreError(format!("{}: {e}", crate::config::redact(&config.url)));
    let (seconds, micros): (u64, u64) = redis::cmd("TIME")
        .query_async(&mut connection)
        .await
        .map_err(fail)?;
    let now = seconds * 1000 + micros / 1000;
    let indexes = match model {
        Some(model) => vec![Keys::new(&config.namespace, model).workers()],
        None => scan(
            &mut connection,
            &format!("{}:{{*}}:workers", config.namespace),
        )
        .await
        .map_err(fail)?,
    };
    let mut records = Vec::new();
    let oldest = now.saturating_sub(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX));
    for index in indexes {
        let prefix = index.strip_suffix(":workers").unwrap_or(&index).to_owned();
        let members: Vec<String> = connection
            .zrangebyscore(&index, oldest, "+inf")
            .await
            .map_err(fail)?;
        let keys: Vec<String> = members
            .iter()
            .map(|id| format!("{prefix}:worker:{id}"))
            .collect();
        if !keys.is_empty() {
            let found: Vec<Option<String>> = connection.mget(keys).await.map_err(fail)?;
            records.extend(found.into_iter().flatten());
        }
    }
    Ok((now, records))
}

async fn scan(
    connection: &mut ConnectionManager,
    pattern: &str,
) -> redis::RedisResult<Vec<String>> {
    use futures_util::StreamExt;
    let mut found: Vec<String> = Vec::new();
    let mut keys = connection.scan_match::<_, String>(pattern).await?;
    while let Some(key) = keys.next().await {
        found.push(key?);
    }
    found.sort();
    Ok(found)
}
