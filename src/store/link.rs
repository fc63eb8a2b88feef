//! What commands go over, in each mode: to one server, to the master that the sentinels name, or to the
//! nodes of a cluster. How it is made is here, too; who uses it does not know the mode.

use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use redis::aio::{
    ConnectionLike, ConnectionManager, ConnectionManagerConfig, MultiplexedConnection,
};
use redis::cluster::{ClusterClient, ClusterClientBuilder};
use redis::cluster_async::ClusterConnection;
use redis::cluster_routing::{Route, RoutingInfo, SingleNodeRoutingInfo, Slot, SlotAddr};
use redis::io::tcp::TcpSettings;
use redis::sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType};
use redis::{
    Arg, AsyncConnectionConfig, Cmd, ConnectionInfo, IntoConnectionInfo, Pipeline, RedisError,
    RedisFuture, TlsCertificates, Value,
};
use tokio::sync::watch;
use url::Url;

use super::StoreError;
use crate::config::redis_nodes::RedisNodes;
use crate::config::service_urls;
use crate::config::tls::Pem;
use crate::config::{RedisConfig, RedisMode};

/// The longest that connecting to one server may take.
const CONNECT: Duration = Duration::from_millis(500);
/// Between two attempts to find a master or a cluster.
const PAUSE: Duration = Duration::from_millis(500);
/// How often a command to a cluster is tried again, or redirected, within the time that its caller waits: a
/// heartbeat is then written as soon as a replica is promoted.
const TRIES: u32 = 10;
/// Between two tries, milliseconds.
const TRY_AGAIN_MS: (u64, u64) = (50, 200);

/// A connection for many commands at a time.
#[derive(Clone)]
pub(super) enum Link {
    /// To one server. It recovers by itself from a connection that broke.
    Single(ConnectionManager),
    /// To the server that was the master when the sentinels were asked.
    Master(MultiplexedConnection),
    /// To a cluster. It follows its slots; commands without a key go where this slot is.
    Cluster(ClusterConnection, Slot),
}

/// The link, or why there is none yet.
pub(super) type Linked = Result<Link, String>;

/// The slot of a key.
pub(super) fn slot(key: &str) -> Slot {
    Slot::for_key(key)
}

impl Link {
    /// The same, but commands without a key go where this slot is.
    pub(super) fn near(self, slot: Slot) -> Self {
        match self {
            Self::Cluster(connection, _) => Self::Cluster(connection, slot),
            Self::Single(_) | Self::Master(_) => self,
        }
    }
}

impl ConnectionLike for Link {
    fn req_packed_command<'a>(&'a mut self, command: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Self::Single(connection) => connection.req_packed_command(command),
            Self::Master(connection) => connection.req_packed_command(command),
            Self::Cluster(connection, slot) => match is_keyless(command) {
                true => Box::pin(connection.route_command(command.clone(), beside(*slot))),
                false => connection.req_packed_command(command),
            },
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            Self::Single(connection) => connection.req_packed_commands(pipeline, offset, count),
            Self::Master(connection) => connection.req_packed_commands(pipeline, offset, count),
            Self::Cluster(connection, _) => connection.req_packed_commands(pipeline, offset, count),
        }
    }

    fn get_db(&self) -> i64 {
        match self {
            Self::Single(connection) => connection.get_db(),
            Self::Master(connection) => connection.get_db(),
            Self::Cluster(connection, _) => connection.get_db(),
        }
    }
}

/// Whether no key says where a command goes. The driver would send these to any node, and a script to all
/// nodes, so that one that is down would keep the script from the others.
fn is_keyless(command: &Cmd) -> bool {
    const KEYLESS: [&[u8]; 6] = [b"CLUSTER", b"HELLO", b"PING", b"SCAN", b"SCRIPT", b"TIME"];
    let mut words = command.args_iter();
    match words.next() {
        Some(Arg::Simple(name)) => KEYLESS.contains(&name),
        Some(_) | None => false,
    }
}

/// To the master that has a slot.
fn beside(slot: Slot) -> RoutingInfo {
    let route = Route::with_slot(slot, SlotAddr::Master);
    RoutingInfo::SingleNode(SingleNodeRoutingInfo::SpecificNode(route))
}

/// Begins to connect. One server's link is there at once and connects by itself; a master and a cluster
/// are looked for until they are found, or until nobody waits any more.
///
/// # Errors
/// When the configuration is unusable.
pub(super) fn link(
    config: &RedisConfig,
    response: Duration,
) -> Result<watch::Receiver<Linked>, StoreError> {
    match config.mode {
        RedisMode::Single => {
            let manager = manager(config, response)?;
            // Connecting goes on when a call gives up: short calls alone would never complete it.
            let mut connecting = manager.clone();
            tokio::spawn(async move {
                drop(redis::cmd("PING").exec_async(&mut connecting).await);
            });
            Ok(watch::channel(Ok(Link::Single(manager))).1)
        }
        RedisMode::Sentinel | RedisMode::Cluster => {
            let (found, waiting) = watch::channel(Err("no answer yet".to_owned()));
            tokio::spawn(search(config.clone(), response, found));
            Ok(waiting)
        }
    }
}

async fn search(config: RedisConfig, response: Duration, found: watch::Sender<Linked>) {
    loop {
        let tried = match config.mode {
            RedisMode::Single => manager(&config, response).map(Link::Single),
            RedisMode::Sentinel => master(&config, response).await,
            RedisMode::Cluster => cluster(&config, response).await,
        };
        let tried = tried.map_err(|StoreError(why)| why);
        let is_found = tried.is_ok();
        if found.send(tried).is_err() || is_found {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            () = found.closed() => return,
        }
    }
}

/// Checks the configuration as far as that is possible without a connection.
///
/// # Errors
/// When it is unusable.
pub(super) fn check(config: &RedisConfig) -> Result<(), StoreError> {
    match config.mode {
        RedisMode::Single => client(config).map(drop),
        RedisMode::Sentinel => sentinels(config).map(drop),
        RedisMode::Cluster => cluster_client(config, PAUSE).map(drop),
    }
}

fn nodes(config: &RedisConfig) -> Result<RedisNodes, StoreError> {
    RedisNodes::of(config).map_err(|why| StoreError(format!("redis.url: {why}")))
}

fn unusable(error: RedisError) -> StoreError {
    StoreError(format!("redis.url: {error}"))
}

/// What the driver connects to. Errors do not show the password.
fn address(url: &Url) -> Result<ConnectionInfo, StoreError> {
    let info = url.clone().into_connection_info().map_err(unusable)?;
    Ok(info.set_tcp_settings(tcp()))
}

/// No delay: calls are small, and a job waits for each. No linger: data that an abandoned connection
/// has not sent must never arrive, because a mark that arrives after its removal would stay.
fn tcp() -> TcpSettings {
    let tcp = TcpSettings::default().set_nodelay(true);
    tcp.set_linger_time(Duration::ZERO)
}

/// The certificates of `redis.tls`, if there are any.
fn certificates(config: &RedisConfig) -> Result<Option<TlsCertificates>, StoreError> {
    let Pem { ca, identity } = config
        .tls
        .read()
        .map_err(|(key, why)| StoreError(format!("redis.tls.{key}: {why}")))?;
    if ca.is_none() && identity.is_none() {
        return Ok(None);
    }
    let client_tls = identity.map(|(cert, key)| redis::ClientTlsConfig {
        client_cert: cert.into(),
        client_key: key.into(),
    });
    let root_cert = ca.map(Into::into);
    Ok(Some(TlsCertificates {
        client_tls,
        root_cert,
    }))
}

fn client(config: &RedisConfig) -> Result<redis::Client, StoreError> {
    let nodes = nodes(config)?;
    let url = nodes.urls.first();
    let info = address(url.ok_or_else(|| StoreError("redis.url: must name a node".into()))?)?;
    let client = match certificates(config)? {
        None => redis::Client::open(info),
        Some(certificates) => redis::Client::build_with_tls(info, certificates),
    };
    client.map_err(unusable)
}

fn manager(config: &RedisConfig, response: Duration) -> Result<ConnectionManager, StoreError> {
    let settings = ConnectionManagerConfig::new()
        .set_number_of_retries(2)
        .set_min_delay(Duration::from_millis(50))
        .set_max_delay(Duration::from_millis(300))
        .set_response_timeout(Some(response))
        .set_connection_timeout(Some(CONNECT));
    ConnectionManager::new_lazy_with_config(client(config)?, settings)
        .map_err(|e| StoreError(e.to_string()))
}

/// Asks all sentinels at once: one that is frozen delays none of the others. The driver checks that the
/// server which a sentinel names considers itself a master.
async fn master(config: &RedisConfig, response: Duration) -> Result<Link, StoreError> {
    let settings = AsyncConnectionConfig::new()
        .set_response_timeout(Some(response))
        .set_connection_timeout(Some(CONNECT));
    let places = nodes(config)?.urls;
    let mut asked: FuturesUnordered<_> = sentinels(config)?
        .into_iter()
        .zip(&places)
        .map(|(mut sentinel, place)| {
            let settings = settings.clone();
            async move {
                let asked = sentinel.get_async_connection_with_config(&settings).await;
                asked.map_err(|why| format!("{}: {why}", service_urls::node(place)))
            }
        })
        .collect();
    let mut reasons = Vec::new();
    while let Some(answered) = asked.next().await {
        match answered {
            Ok(connection) => return Ok(Link::Master(connection)),
            Err(why) => reasons.push(why),
        }
    }
    // In one order, so that the same trouble reads the same.
    reasons.sort();
    let (master, reasons) = (&config.master, reasons.join("; "));
    Err(StoreError(format!(
        "no sentinel leads to the master {master}: {reasons}"
    )))
}

/// A client for each sentinel. User, password and database of the URLs are those of the master.
fn sentinels(config: &RedisConfig) -> Result<Vec<SentinelClient>, StoreError> {
    let (nodes, certificates) = (nodes(config)?, certificates(config)?);
    let sentinels = nodes.urls.iter().map(|url| {
        let info = address(url)?;
        let (redis, tls) = (info.redis_settings(), url.scheme() == "rediss");
        let place = vec![info.addr().clone()];
        let server = SentinelServerType::Master;
        let mut builder = SentinelClientBuilder::new(place, &config.master, server)
            .map_err(unusable)?
            .set_client_to_redis_db(redis.db())
            .set_client_to_redis_protocol(redis.protocol())
            .set_client_to_redis_tcp_settings(tcp())
            .set_client_to_sentinel_tcp_settings(tcp());
        if tls {
            builder = builder.set_client_to_redis_tls_mode(redis::TlsMode::Secure);
        }
        if let Some(certificates) = certificates.clone().filter(|_| tls) {
            builder = builder
                .set_client_to_redis_certificates(certificates.clone())
                .set_client_to_sentinel_certificates(certificates);
        }
        if let Some(user) = redis.username() {
            builder = builder.set_client_to_redis_username(user);
        }
        if let Some(password) = redis.password() {
            builder = builder.set_client_to_redis_password(password);
        }
        if let Some((user, password)) = &nodes.sentinel {
            builder = builder.set_client_to_sentinel_password(password);
            if let Some(user) = user {
                builder = builder.set_client_to_sentinel_username(user);
            }
        }
        builder.build().map_err(unusable)
    });
    sentinels.collect()
}

async fn cluster(config: &RedisConfig, response: Duration) -> Result<Link, StoreError> {
    let client = cluster_client(config, response)?;
    let connection = client.get_async_connection().await;
    let connection = connection.map_err(|e| StoreError(e.to_string()))?;
    Ok(Link::Cluster(connection, slot("")))
}

fn cluster_client(config: &RedisConfig, response: Duration) -> Result<ClusterClient, StoreError> {
    let nodes = nodes(config)?;
    let infos = nodes.urls.iter().map(address);
    let infos: Vec<ConnectionInfo> = infos.collect::<Result<_, _>>()?;
    let mut builder = ClusterClientBuilder::new(infos)
        .retries(TRIES)
        .min_retry_wait(TRY_AGAIN_MS.0)
        .max_retry_wait(TRY_AGAIN_MS.1)
        .connection_timeout(CONNECT)
        .response_timeout(response)
        .tcp_settings(tcp());
    if let Some(certificates) = certificates(config)? {
        builder = builder.certs(certificates);
    }
    builder.build().map_err(unusable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Layers};

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
            let info = address(&service_urls::redis(url).unwrap()).unwrap();
            assert_eq!(info.redis_settings().db(), database, "{url}");
        }
        let info = address(&service_urls::redis("redis://u:p%40@h/0").unwrap()).unwrap();
        let redis = info.redis_settings();
        assert_eq!(
            (redis.username(), redis.password()),
            (Some("u"), Some("p@"))
        );
    }

    #[tokio::test]
    async fn every_sentinel_has_its_reason() {
        let urls = ["127.0.0.1:2", "127.0.0.1:1"].map(|place| format!("redis://u:hunter2@{place}"));
        let set = [
            format!("redis.url={urls:?}"),
            "redis.mode=sentinel".to_owned(),
        ];
        let layers = Layers {
            set: &set,
            ..Layers::default()
        };
        let config = Config::load(&layers).unwrap().redis;
        let found = master(&config, CONNECT).await;
        let Err(StoreError(why)) = found.map(drop) else {
            panic!("nothing listens there");
        };
        let begins = "no sentinel leads to the master mymaster: 127.0.0.1:1: ";
        assert!(
            why.starts_with(begins) && why.contains("; 127.0.0.1:2: "),
            "{why}"
        );
        assert!(!why.contains("hunter2"), "{why}");
    }
}
