//! What those read who watch or operate a fleet, and are no workers: records, events; and the deaths that
//! an operator has forgotten.

use std::collections::BTreeMap;
use std::time::Duration;

use redis::AsyncCommands;
use redis::aio::ConnectionManager;

use super::{Keys, StoreError, manager};
use crate::config::RedisConfig;

/// Records that are read at once.
const PART: usize = 1000;

/// Whether Redis lets us in and answers.
///
/// # Errors
/// Why not.
pub async fn ping(config: &RedisConfig) -> Result<(), StoreError> {
    let mut connection = manager(config)?;
    let answered = redis::cmd("PING").query_async(&mut connection).await;
    answered.map_err(|e| StoreError(format!("{}: {e}", crate::config::redact(&config.url))))
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
        // In parts: Redis does nothing else while it answers one call.
        for members in members.chunks(PART) {
            let key = |id: &String| format!("{prefix}:worker:{id}");
            let keys: Vec<String> = members.iter().map(key).collect();
            let found: Vec<Option<String>> = connection.mget(keys).await.map_err(fail)?;
            records.extend(found.into_iter().flatten());
        }
    }
    Ok((now, records))
}

/// An entry of the stream of events: its id, and its fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamEntry {
    /// Milliseconds and a number, as Redis gives it.
    pub id: String,
    /// By name.
    pub fields: BTreeMap<String, String>,
}

/// Events after an entry, or the last few; oldest first, at most so many as fit a page.
///
/// # Errors
/// When Redis does not answer.
pub async fn read_events(
    config: &RedisConfig,
    model: &str,
    after: Option<&str>,
) -> Result<Vec<StreamEntry>, StoreError> {
    const PAGE: usize = 200;
    let mut connection = manager(config)?;
    let key = Keys::new(&config.namespace, model).events();
    let (command, from, to) = match after {
        Some(after) => ("XRANGE", format!("({after}"), "+"),
        None => ("XREVRANGE", "+".to_owned(), "-"),
    };
    let mut call = redis::cmd(command);
    call.arg(key).arg(from).arg(to).arg("COUNT").arg(PAGE);
    let found = call.query_async(&mut connection).await;
    let found: Vec<(String, BTreeMap<String, String>)> =
        found.map_err(|e: redis::RedisError| StoreError(e.to_string()))?;
    let mut events: Vec<StreamEntry> = found
        .into_iter()
        .map(|(id, fields)| StreamEntry { id, fields })
        .collect();
    events.sort_by_key(|event| when(&event.id));
    Ok(events)
}

/// Milliseconds and number of an entry.
fn when(id: &str) -> (u64, u64) {
    let (millis, number) = id.split_once('-').unwrap_or((id, ""));
    (millis.parse().unwrap_or(0), number.parse().unwrap_or(0))
}

/// Forgets which workers died of a job, whatever its version, so that it is computed again.
///
/// # Errors
/// When Redis does not answer.
pub async fn forget_deaths(
    config: &RedisConfig,
    model: &str,
    submission_id: &str,
) -> Result<(), StoreError> {
    let fail = |e: redis::RedisError| StoreError(e.to_string());
    let mut connection = manager(config)?;
    let prefix = Keys::new(&config.namespace, model).crash(&format!("{submission_id}:"));
    let found = scan(&mut connection, &format!("{prefix}*")).await;
    // A name may contain colons, so that of another job may begin like this.
    let is_version = |rest: &str| rest.bytes().all(|b| b.is_ascii_digit());
    for key in found.map_err(fail)? {
        if key.strip_prefix(&prefix).is_some_and(is_version) {
            let forgotten: redis::RedisResult<()> = connection.del(&key).await;
            forgotten.map_err(fail)?;
        }
    }
    Ok(())
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
