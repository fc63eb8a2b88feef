//! The only place that knows Redis: the atomic beat, stored results, crash marks, and what watchers read. Every
//! call is bounded in time; Redis being away slows nothing down and stops nothing.

mod address;
mod connection;
mod fleet;
mod health;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use redis::aio::ConnectionManager;
use redis::{AsyncCommands, FromRedisValue, RedisResult, Script, ScriptInvocation};

pub use fleet::{FleetStore, LiveRecord, StreamEntry};

use crate::config::RedisConfig;
use crate::protocol::heartbeat::Record;
use crate::protocol::state::State;
use crate::telemetry::metrics::{self, StoreCall};
use crate::util::clock::steady_ms;
use connection::{CallError, Connection};
use health::Errand;
pub use health::Health;

/// One beat, whatever Redis does.
const BEAT_TIMEOUT: Duration = Duration::from_millis(800);
/// A look-up may delay a job by this much, never more.
pub const LOOKUP_TIMEOUT: Duration = Duration::from_millis(50);
/// A call that delays no computation.
pub const STORE_TIMEOUT: Duration = Duration::from_millis(300);
/// After a failure the store is left alone for this long.
const BREAKER_MS: u64 = 1000;
/// Workers that are looked at in search of idle ones.
const MOST_LOOKED_AT: usize = 64;
/// The first Redis that tells, where it stores a result, which one was there before.
const OLDEST: u64 = 7;
/// A mark is forgotten after this.
const MARK_LIFE: Duration = Duration::from_secs(24 * 3600);

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

    fn swap(&self) -> String {
        format!("{}:swap", self.prefix)
    }

    fn crash(&self, job: &str) -> String {
        format!("{}:crash:{job}", self.prefix)
    }
}

/// Connections to Redis; made when first needed, so that a worker starts without it.
#[derive(Clone)]
pub struct Store {
    connection: Arc<Connection>,
    keys: Keys,
    scripts: Arc<Scripts>,
    /// By the steady clock.
    open_again_ms: Arc<AtomicU64>,
    health: Arc<Health>,
}

/// Their digests are computed once.
struct Scripts {
    beat: Script,
    claim: Script,
    release: Script,
    count: Script,
    hold: Script,
    let_go: Script,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("keys", &self.keys)
            .finish_non_exhaustive()
    }
}

/// What one beat carries.
#[derive(Debug)]
pub struct Beat<'a> {
    /// The worker's name.
    pub worker_id: &'a str,
    /// This start of it.
    pub incarnation: &'a str,
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
    /// A live record of another incarnation holds it.
    Theirs {
        /// Its incarnation.
        incarnation: String,
        /// Its process.
        pid: u32,
        /// What that number counts in, if its record says it.
        pid_space: Option<String>,
    },
}

/// What a job asks of the store before it computes.
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
    /// Marked even beside marks of others.
    pub anyway: bool,
    /// How long the job may be delayed.
    pub limit: Duration,
}

/// An attempt that ends.
#[derive(Debug, Clone, Copy)]
pub struct Release<'a> {
    /// `SUBMISSION:VERSION`.
    pub job: &'a str,
    /// Field of our mark.
    pub own: &'a str,
    /// Its value.
    pub started_ms: u64,
    /// The marks that count as deaths go too.
    pub counted: bool,
}

/// A result to store.
#[derive(Debug, Clone, Copy)]
pub struct Keep<'a> {
    /// Its key.
    pub key: &'a str,
    /// The result, JSON.
    pub text: &'a str,
    /// How long it is kept.
    pub ttl: Duration,
}

/// What the store knows of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// Its result. Then there are no marks, and none was written.
    pub stored: Option<String>,
    /// Its marks before ours was written.
    pub marks: Vec<(String, String)>,
}

/// What became of a bounded call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply<T> {
    /// Redis did it.
    Answer(T),
    /// Redis was not asked: it failed a moment ago.
    Skipped,
    /// Nobody knows whether it was done.
    Failed,
}

impl<T> Reply<T> {
    /// What is made of the answer, if there is one.
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

/// Incarnation and process of the record that holds a name, and what that counts in; empty = ours.
type Holder = (String, u32, String);

/// What begins the value of a mark whose incarnation was counted dead.
pub const DEAD: &str = "dead:";

/// Looks a result up and marks the job in one step; a job with a result needs no marks any more. Beside marks of others ours waits until it is
/// known what became of them.
const CLAIM: &str = r"
local stored = redis.call('GET', KEYS[1])
if stored then
  redis.call('DEL', KEYS[2])
  return {stored, {}}
end
local marks = redis.call('HGETALL', KEYS[2])
local alone = true
for i = 1, #marks, 2 do
  if marks[i] ~= ARGV[1] then alone = false end
end
if alone or ARGV[4] == '1' then
  redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
  redis.call('EXPIRE', KEYS[2], ARGV[3])
end
return {false, marks}
";

/// Ends an attempt. Stores its result, if it has one to keep and there is none yet (else returns that
/// one); removes our mark, counted or not, unless a later attempt of ours has written it anew; and
/// the counted marks of others where the job is answered.
const RELEASE: &str = r"
local mark = redis.call('HGET', KEYS[1], ARGV[1])
if mark == ARGV[2] or mark == 'dead:' .. ARGV[2] then redis.call('HDEL', KEYS[1], ARGV[1]) end
if ARGV[3] == '1' then
  local marks = redis.call('HGETALL', KEYS[1])
  for i = 1, #marks, 2 do
    if string.sub(marks[i + 1], 1, 5) == 'dead:' then redis.call('HDEL', KEYS[1], marks[i]) end
  end
end
if not KEYS[2] then return false end
return redis.call('SET', KEYS[2], ARGV[4], 'NX', 'GET', 'EX', ARGV[5])
";

/// Counts deaths. A mark that is gone is not brought back, and one that is counted stays as it is.
const COUNT: &str = r"
for _, field in ipairs(ARGV) do
  local mark = redis.call('HGET', KEYS[1], field)
  if mark and string.sub(mark, 1, 5) ~= 'dead:' then redis.call('HSET', KEYS[1], field, 'dead:' .. mark) end
end
return 1
";

/// Takes the lease on swapping weights, or keeps it a while longer.
const HOLD: &str = r"
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
";

/// Gives the lease on swapping weights back, if it is ours still.
const LET_GO: &str = r"
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
";

/// Writes the record, the index and the events in one step (what is not of their type was written by
/// no worker, and goes), and never over another incarnation's
/// live record: then everything goes under a name of our own.
const BEAT: &str = r"
for i, kind in ipairs({'string', 'string', 'zset', 'stream'}) do
  local found = redis.call('TYPE', KEYS[i]).ok
  if found ~= kind and found ~= 'none' then redis.call('DEL', KEYS[i]) end
end
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
if mine then return {'', '0', ''} end
local space = type(other.pid_space) == 'string' and other.pid_space or ''
return {tostring(other.incarnation), string.format('%.0f', tonumber(other.pid) or 0), space}
";

impl Store {
    /// Prepares connections for a model's keys.
    ///
    /// # Errors
    /// When the URL is unusable; an absent Redis is no error.
    pub fn new(config: &RedisConfig, model: &str) -> Result<Self, StoreError> {
        let keys = Keys::new(&config.namespace, model);
        Ok(Self {
            connection: Arc::new(Connection::open(config, BEAT_TIMEOUT)?),
            keys,
            scripts: Arc::new(Scripts {
                beat: Script::new(BEAT),
                claim: Script::new(CLAIM),
                release: Script::new(RELEASE),
                count: Script::new(COUNT),
                hold: Script::new(HOLD),
                let_go: Script::new(LET_GO),
            }),
            open_again_ms: Arc::default(),
            health: Arc::default(),
        })
    }

    /// Whether Redis does what jobs ask of it.
    pub fn health(&self) -> Arc<Health> {
        Arc::clone(&self.health)
    }

    /// Writes one beat.
    ///
    /// # Errors
    /// When Redis does not take it in time.
    pub async fn beat(&self, beat: &Beat<'_>) -> Result<Ownership, StoreError> {
        let own_name = own_name(beat.worker_id, beat.incarnation);
        let mut call = self.scripts.beat.key(self.keys.worker(beat.worker_id));
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
        let beaten = self
            .connection
            .call(BEAT_TIMEOUT, |mut connection| async move {
                call.invoke_async::<Holder>(&mut connection).await
            });
        match beaten.await {
            Ok((incarnation, _, _)) if incarnation.is_empty() => Ok(Ownership::Ours),
            Ok((incarnation, pid, pid_space)) => Ok(Ownership::Theirs {
                incarnation,
                pid,
                pid_space: Some(pid_space).filter(|space| !space.is_empty()),
            }),
            Err(error) => Err(StoreError(format!("{}: {error}", self.connection.place()))),
        }
    }

    /// Connects, so that the first job does not wait for it, and looks whether Redis is new enough.
    pub async fn connect(&self) {
        let greeted = self
            .connection
            .call(BEAT_TIMEOUT, |mut connection| async move {
                redis::cmd("HELLO").query_async(&mut connection).await
            });
        let hello = match greeted.await {
            Ok(hello) => hello,
            // Something between us and Redis may not know the command; what it does know, shows.
            Err(error) => return tracing::debug!(%error, "Redis does not say its version"),
        };
        if let Some(why) = Server::of(&hello).too_old() {
            let error = CallError::Refused(why);
            self.health.failed(Errand::Keep, &error);
        }
    }

    /// Takes the fleet's lease on swapping weights, or keeps it; false = another has it.
    pub async fn hold_swap(&self, holder: &str, life: Duration) -> Reply<bool> {
        let life = u64::try_from(life.as_millis()).unwrap_or(u64::MAX);
        let mut call = self.scripts.hold.key(self.keys.swap());
        call.arg(holder).arg(life);
        self.script(Errand::Lease, STORE_TIMEOUT, call).await
    }

    /// Gives the lease back.
    pub async fn let_go_of_swap(&self, holder: &str) -> Reply<()> {
        let mut call = self.scripts.let_go.key(self.keys.swap());
        call.arg(holder);
        self.script(Errand::Lease, STORE_TIMEOUT, call).await
    }

    /// Looks up a result and marks its job.
    pub async fn claim(&self, claim: &Claim<'_>) -> Reply<Known> {
        let mut call = self.scripts.claim.key(self.keys.result(claim.result));
        call.key(self.keys.crash(claim.job))
            .arg(claim.own)
            .arg(claim.started_ms)
            .arg(MARK_LIFE.as_secs())
            .arg(u8::from(claim.anyway));
        let claimed = self.script(Errand::Claim, claim.limit, call).await;
        claimed.map(|(stored, marks)| Known { stored, marks })
    }

    /// Ends an attempt: removes its mark, and stores its result unless there is one already, which
    /// then is the one to publish.
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

    /// Counts the incarnations behind these marks as dead, however often it is called.
    pub async fn count_deaths(&self, job: &str, fields: &[String]) -> Reply<()> {
        let mut call = self.scripts.count.key(self.keys.crash(job));
        call.arg(fields);
        self.script(Errand::Count, STORE_TIMEOUT, call).await
    }

    /// The `seq` in the record of each `WORKER_ID/INCARNATION`; none where that incarnation has no
    /// record, or one that says `stopped`.
    pub async fn last_seqs(&self, fields: &[String]) -> Reply<Vec<Option<u64>>> {
        let owners: Vec<(&str, &str)> = fields
            .iter()
            .map(|field| field.rsplit_once('/').unwrap_or((field, "")))
            .collect();
        // A name that another live worker holds is no reason to believe its former holder dead.
        let keys = owners.iter().flat_map(|(id, incarnation)| {
            let own_name = own_name(id, incarnation);
            [self.keys.worker(id), self.keys.worker(&own_name)]
        });
        let keys: Vec<String> = keys.collect();
        let read = self.bounded(Errand::Look, STORE_TIMEOUT, |mut connection| async move {
            connection.mget::<_, Vec<Option<String>>>(keys).await
        });
        let records = read.await;
        records.map(|records| {
            let seqs = owners.iter().zip(records.chunks(2));
            let seqs = seqs.map(|((_, incarnation), records)| {
                let records = records.iter().flatten();
                let mut records = records.filter_map(|text| Record::read(text));
                let record = records.find(|record| {
                    record.incarnation == *incarnation && record.state != State::Stopped.as_str()
                });
                record.map(|record| record.seq)
            });
            seqs.collect()
        })
    }

    /// How many workers of this model beat, ready or not.
    pub async fn live_workers(&self) -> Reply<u32> {
        let index = self.keys.workers();
        self.bounded(Errand::Look, STORE_TIMEOUT, |mut connection| async move {
            connection.zcard(index).await
        })
        .await
    }

    /// How many of them say that the broker has their consumer.
    pub async fn consuming_workers(&self) -> Reply<u32> {
        // All of them; a command less to be permitted.
        let mut all = redis::cmd("ZRANDMEMBER");
        all.arg(self.keys.workers()).arg(i32::MAX);
        let records = self.records(all).await;
        records.map(|records| {
            let consuming = records.iter().filter(|record| record.broker.consuming);
            u32::try_from(consuming.count()).unwrap_or(u32::MAX)
        })
    }

    /// How many workers of this model could take a job at once: ready, and holding none. Of a large
    /// fleet some are looked at.
    pub async fn idle_workers(&self) -> Reply<usize> {
        let mut some = redis::cmd("ZRANDMEMBER");
        some.arg(self.keys.workers()).arg(MOST_LOOKED_AT);
        let records = self.records(some).await;
        records.map(|records| {
            let idle = |record: &&Record| {
                record.accepting && record.jobs.in_flight == 0 && record.jobs.buffered == 0
            };
            records.iter().filter(idle).count()
        })
    }

    /// The records of the workers that a command names, as far as they are readable.
    async fn records(&self, named: redis::Cmd) -> Reply<Vec<Record>> {
        let keys = self.keys.clone();
        let read = self.bounded(Errand::Look, STORE_TIMEOUT, |mut connection| async move {
            let ids: Vec<String> = named.query_async(&mut connection).await?;
            let records: Vec<String> = ids.iter().map(|id| keys.worker(id)).collect();
            if records.is_empty() {
                return Ok(Vec::new());
            }
            connection.mget::<_, Vec<Option<String>>>(records).await
        });
        read.await.map(|records| {
            let records = records.iter().flatten();
            records.filter_map(|text| Record::read(text)).collect()
        })
    }

    async fn script<T: FromRedisValue>(
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

    /// Where Redis does not answer it is left alone for a moment; what it refuses costs no time.
    async fn bounded<T, F>(
        &self,
        errand: Errand,
        limit: Duration,
        call: impl FnOnce(ConnectionManager) -> F,
    ) -> Reply<T>
    where
        F: Future<Output = RedisResult<T>>,
    {
        if steady_ms() < self.open_again_ms.load(Ordering::Relaxed) {
            metrics::store_call(StoreCall::Skipped);
            return Reply::Skipped;
        }
        let error = match self.connection.call(limit, call).await {
            Ok(value) => {
                self.health.answered(errand);
                return Reply::Answer(value);
            }
            Err(error) => error,
        };
        self.health.failed(errand, &error);
        if let CallError::Away(_) = error {
            let open_again = steady_ms() + BREAKER_MS;
            self.open_again_ms.store(open_again, Ordering::Relaxed);
        }
        Reply::Failed
    }
}

/// The name and the version of a server, as it says them.
struct Server(String);

impl Server {
    fn of(hello: &HashMap<String, redis::Value>) -> Self {
        let text = |name| match hello.get(name) {
            Some(redis::Value::BulkString(text)) => String::from_utf8_lossy(text).into_owned(),
            Some(redis::Value::SimpleString(text)) => text.clone(),
            Some(_) | None => "?".to_owned(),
        };
        Self(format!("{} {}", text("server"), text("version")))
    }

    /// Why it cannot do what jobs ask of it, if it says so.
    fn too_old(&self) -> Option<String> {
        let Self(said) = self;
        let (_, version) = said.rsplit_once(' ')?;
        let major: u64 = version.split('.').next()?.parse().ok()?;
        (major < OLDEST).then(|| format!("{said} is older than {OLDEST}.0"))
    }
}

/// Where a worker reports while another holds its name.
fn own_name(worker_id: &str, incarnation: &str) -> String {
    let short: String = incarnation.chars().take(8).collect();
    format!("{worker_id}~{short}")
}
