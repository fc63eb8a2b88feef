//! What Redis says of workers and jobs, by a direct connection that gives up soon.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use redis::Commands as _;
use serde_json::Value;
use testkit::stack::Stack;

/// What a healthy Redis on the loopback needs is a thousandth of this.
const PATIENCE: Duration = Duration::from_millis(300);

/// A mark: `WORKER/INCARNATION` and its value.
pub(crate) type Mark = (String, String);

pub(crate) struct Records {
    client: redis::Client,
    prefix: String,
    open: Mutex<Option<redis::Connection>>,
}

impl Records {
    pub(crate) fn new(stack: &Stack) -> Self {
        Self {
            client: redis::Client::open(stack.redis.url()).expect("a well-formed url"),
            prefix: stack.key(""),
            open: Mutex::default(),
        }
    }

    /// The heartbeat record of each worker; none if Redis does not answer.
    pub(crate) fn beats(&self, ids: &[String]) -> Option<Vec<Option<Value>>> {
        let keys = ids.iter().map(|id| format!("{}worker:{id}", self.prefix));
        let keys: Vec<String> = keys.collect();
        let texts: Vec<Option<String>> = self.ask(|redis| redis.mget(&keys))?;
        let parse = |text: String| serde_json::from_str(&text).ok();
        Some(texts.into_iter().map(|text| text.and_then(parse)).collect())
    }

    /// The crash marks of every job that has some, by submission id.
    pub(crate) fn marks(&self) -> Option<HashMap<String, Vec<Mark>>> {
        let prefix = format!("{}crash:", self.prefix);
        let keys: Vec<String> = self.ask(|redis| redis.keys(format!("{prefix}*")))?;
        let mut all = HashMap::new();
        for key in keys {
            let marks: Vec<Mark> = self.ask(|redis| redis.hgetall(&key))?;
            let job = key.strip_prefix(&prefix)?.rsplit_once(':')?.0;
            all.insert(job.to_owned(), marks);
        }
        Some(all)
    }

    fn ask<T>(
        &self,
        question: impl FnOnce(&mut redis::Connection) -> redis::RedisResult<T>,
    ) -> Option<T> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.is_none() {
            let connection = self.client.get_connection_with_timeout(PATIENCE).ok()?;
            connection.set_read_timeout(Some(PATIENCE)).ok()?;
            *open = Some(connection);
        }
        let answer = question(open.as_mut()?).ok();
        if answer.is_none() {
            // An answer that comes late must not be taken for the next one.
            *open = None;
        }
        answer
    }
}
