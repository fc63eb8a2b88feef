//! One connection to Redis, made when it is first needed. The driver recovers by itself from a connection
//! that broke, but not from a password that was refused, nor from a connection that went silent. Then a
//! new connection is made.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::io::tcp::TcpSettings;
use redis::{
    ConnectionInfo, ErrorKind, IntoConnectionInfo, RedisError, RedisResult, ServerErrorKind,
};
use tokio::time::Instant;

use super::StoreError;
use crate::config::tls::Pem;
use crate::config::{RedisConfig, service_urls};

/// A connection without an answer for this long is given up.
const SILENT: Duration = Duration::from_secs(2);

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
    manager: Option<ConnectionManager>,
    /// Since when calls have had no answer, if they have none.
    silent_since: Option<Instant>,
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
        client(config)?;
        Ok(Self::new(config, response))
    }

    /// The URL without its password.
    pub(super) fn place(&self) -> String {
        crate::config::redact(&self.config.url)
    }

    /// Makes one call; the limit includes the wait for a connection.
    pub(super) async fn call<T, F>(
        &self,
        limit: Duration,
        call: impl FnOnce(ConnectionManager) -> F,
    ) -> Result<T, CallError>
    where
        F: Future<Output = RedisResult<T>>,
    {
        let began = Instant::now();
        let manager = self.manager().map_err(|e| CallError::Away(e.0))?;
        let error = match tokio::time::timeout(limit, call(manager)).await {
            Ok(Ok(answer)) => {
                self.held().silent_since = None;
                return Ok(answer);
            }
            Ok(Err(error)) => error,
            Err(_) => {
                self.was_silent(began);
                return Err(CallError::Away(format!("no answer within {limit:?}")));
            }
        };
        if is_refusal(&error) {
            let mut held = self.held();
            held.silent_since = None;
            if error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly) {
                // It has become a replica. Its name may lead to the master by now.
                held.manager = None;
            }
            return Err(CallError::Refused(error.to_string()));
        }
        if error.is_timeout() {
            self.was_silent(began);
        } else if !error.is_io_error() {
            self.held().manager = None;
        }
        Err(CallError::Away(error.to_string()))
    }

    fn manager(&self) -> Result<ConnectionManager, StoreError> {
        let mut held = self.held();
        let manager = match held.manager.take() {
            Some(manager) => manager,
            None => {
                let made = manager(&self.config, self.response)?;
                // Connecting goes on when a call gives up: short calls alone would never complete it.
                let mut connecting = made.clone();
                tokio::spawn(async move {
                    drop(redis::cmd("PING").exec_async(&mut connecting).await);
                });
                made
            }
        };
        Ok(held.manager.insert(manager).clone())
    }

    fn was_silent(&self, began: Instant) {
        let mut held = self.held();
        let since = *held.silent_since.get_or_insert(began);
        if since.elapsed() >= SILENT {
            *held = Held::default();
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether Redis answered with a refusal.
fn is_refusal(error: &RedisError) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Server(_) | ErrorKind::Extension | ErrorKind::UnexpectedReturnType
    )
}

/// What the driver connects to. Errors do not show the password.
fn address(text: &str) -> Result<ConnectionInfo, String> {
    let url = service_urls::redis(text)?;
    url.into_connection_info().map_err(|e| e.to_string())
}

fn client(config: &RedisConfig) -> Result<redis::Client, StoreError> {
    let unusable = |e: RedisError| StoreError(format!("redis.url: {e}"));
    let info = address(&config.url);
    let info = info.map_err(|why| StoreError(format!("redis.url: {why}")))?;
    // No delay: calls are small, and a job waits for each. No linger: data that an abandoned connection
    // has not sent must never arrive, because a mark that arrives after its removal would stay.
    let tcp = TcpSettings::default().set_nodelay(true);
    let tcp = tcp.set_linger_time(Duration::ZERO);
    let info = info.set_tcp_settings(tcp);
    let client = match config.tls.read() {
        Err((key, why)) => return Err(StoreError(format!("redis.tls.{key}: {why}"))),
        Ok(Pem {
            ca: None,
            identity: None,
        }) => redis::Client::open(info),
        Ok(Pem { ca, identity }) => {
            let client_tls = identity.map(|(cert, key)| redis::ClientTlsConfig {
                client_cert: cert.into(),
                client_key: key.into(),
            });
            let root_cert = ca.map(Into::into);
            let certificates = redis::TlsCertificates {
                client_tls,
                root_cert,
            };
            redis::Client::build_with_tls(info, certificates)
        }
    };
    client.map_err(unusable)
}

fn manager(config: &RedisConfig, response: Duration) -> Result<ConnectionManager, StoreError> {
    let settings = ConnectionManagerConfig::new()
        .set_number_of_retries(2)
        .set_min_delay(Duration::from_millis(50))
        .set_max_delay(Duration::from_millis(300))
        .set_response_timeout(Some(response))
        .set_connection_timeout(Some(Duration::from_millis(500)));
    ConnectionManager::new_lazy_with_config(client(config)?, settings)
        .map_err(|e| StoreError(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_takes_effect() {
        for (url, database) in [
            ("redis://h", 0),
            ("redis://h/", 0),
            ("redis://h:1/3", 3),
            ("redis://h/3/", 3),
            ("redis://h?db=3", 3),
            ("redis://h/?db=3", 3),
            ("rediss://u:p%40@h/3?db=3&protocol=3", 3),
            ("redis://:p@[::1]:1/0", 0),
            ("unix:///run/redis.sock?db=3", 3),
            ("redis+unix:///run/redis.sock?db=3&user=u&pass=p", 3),
        ] {
            let info = address(url).unwrap();
            assert_eq!(info.redis_settings().db(), database, "{url}");
        }
        let info = address("redis://u:p%40@h/0").unwrap();
        let redis = info.redis_settings();
        assert_eq!(
            (redis.username(), redis.password()),
            (Some("u"), Some("p@"))
        );
    }
}
