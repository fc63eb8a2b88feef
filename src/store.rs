//! The only place that knows Redis: the heartbeat, results, crash marks, and what observers read. Every
//! call is bounded in time. The worker goes on while Redis is away.

mod beat;
mod breaker;
mod connection;
mod fleet;
mod health;
mod jobs;
mod lease;
mod link;
mod peers;
mod scripts;
#[cfg(test)]
mod slots;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

pub use beat::{Beat, Ownership};
pub use breaker::Reply;
pub use fleet::{FleetStore, LiveRecord, StreamEntry};
pub use health::Health;
pub use jobs::{Claim, DEAD, JobRecord, Keep, Note, Release};

use redis::cluster_routing::Slot;

use crate::config::RedisConfig;
use breaker::Breaker;
use connection::{CallError, Connection};
use health::Errand;
use scripts::Scripts;

/// The longest that any call may take: a heartbeat.
const CALL_TIMEOUT: Duration = Duration::from_millis(800);
/// The longest that a look-up may delay a job.
pub const LOOKUP_TIMEOUT: Duration = Duration::from_millis(50);
/// A call that delays no computation.
pub const STORE_TIMEOUT: Duration = Duration::from_millis(300);
/// The first version of Redis whose `SET` takes both `NX` and `GET`.
const OLDEST: u64 = 7;

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

    /// The slot of all of them.
    fn slot(&self) -> Slot {
        link::slot(&self.prefix)
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

/// A worker's connection to Redis; made when first needed, so that a worker starts without it.
#[derive(Clone)]
pub struct Store {
    connection: Arc<Connection>,
    keys: Keys,
    scripts: Arc<Scripts>,
    breaker: Arc<Breaker>,
    health: Arc<Health>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("keys", &self.keys)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Prepares a connection for a model's keys.
    ///
    /// # Errors
    /// When the URL is unusable; an absent Redis is no error.
    pub fn new(config: &RedisConfig, model: &str) -> Result<Self, StoreError> {
        Ok(Self {
            connection: Arc::new(Connection::open(config, CALL_TIMEOUT)?),
            keys: Keys::new(&config.namespace, model),
            scripts: Arc::new(Scripts::new()),
            breaker: Arc::default(),
            health: Arc::default(),
        })
    }

    /// Whether Redis does what jobs ask of it.
    pub fn health(&self) -> Arc<Health> {
        Arc::clone(&self.health)
    }

    /// Connects, so that the first job does not wait for it, and checks that Redis is new enough.
    pub async fn connect(&self) {
        let greeted = self.connection.call(
            CALL_TIMEOUT,
            self.keys.slot(),
            |mut connection| async move { redis::cmd("HELLO").query_async(&mut connection).await },
        );
        let hello = match greeted.await {
            Ok(hello) => hello,
            // A proxy may not know the command. What Redis can do shows when it is asked.
            Err(error) => return tracing::debug!(%error, "Redis does not tell its version"),
        };
        if let Some(why) = Server::of(&hello).too_old() {
            let error = CallError::Refused(why);
            self.health.failed(Errand::Keep, &error);
        }
    }
}

/// A server's name and version, as it reports them.
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

    /// Why it cannot do what jobs ask of it, if its version is too old.
    fn too_old(&self) -> Option<String> {
        let Self(said) = self;
        let (_, version) = said.rsplit_once(' ')?;
        let major: u64 = version.split('.').next()?.parse().ok()?;
        (major < OLDEST).then(|| format!("{said} is older than {OLDEST}.0"))
    }
}

/// The name under which a worker reports while another holds its name.
fn own_name(worker_id: &str, incarnation: &str) -> String {
    format!("{worker_id}~{incarnation:.8}")
}
