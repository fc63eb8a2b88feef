//! The nodes that `redis.url` names, as `redis.mode` needs them.

use std::collections::BTreeSet;

use url::Url;

use super::service_urls::{self, SENTINEL_PASSWORD, SENTINEL_USER};
use super::{RedisConfig, RedisMode};

/// Where sentinels listen by default; for Redis it is the driver that knows.
const SENTINEL_PORT: u16 = 26379;

/// The URLs differ in host and port only.
#[derive(Debug)]
pub(crate) struct RedisNodes {
    /// At least one.
    pub(crate) urls: Vec<Url>,
    /// User and password of the sentinels themselves.
    pub(crate) sentinel: Option<(Option<String>, String)>,
}

impl RedisNodes {
    /// Checks the URLs, each and together.
    ///
    /// # Errors
    /// What is wrong with them, without passwords.
    pub(crate) fn of(config: &RedisConfig) -> Result<Self, String> {
        let given = &config.urls;
        let urls = given.iter().zip(1..).map(|(text, n)| {
            let url = service_urls::redis(text);
            url.map_err(|why| match given.as_slice() {
                [_] => why,
                _ => format!("item {n}: {why}"),
            })
        });
        let mut urls: Vec<Url> = urls.collect::<Result<_, _>>()?;
        let sentinel = sentinel_login(urls.first().ok_or("must name a node")?);
        match config.mode {
            RedisMode::Single => check_single(&urls, sentinel.is_some())?,
            RedisMode::Sentinel => {
                for url in urls.iter_mut().filter(|url| url.port().is_none()) {
                    // Fails for URLs without a host only, which are refused below.
                    let _no_host = url.set_port(Some(SENTINEL_PORT));
                }
                check_alike(&urls)?;
            }
            RedisMode::Cluster => {
                check_alike(&urls)?;
                check_cluster(&urls, sentinel.is_some())?;
            }
        }
        Ok(Self { urls, sentinel })
    }
}

fn sentinel_login(url: &Url) -> Option<(Option<String>, String)> {
    let value = |name: &str| {
        let mut pairs = url.query_pairs();
        let found = pairs.find(|(key, _)| key == name);
        found.map(|(_, value)| value.into_owned())
    };
    Some((value(SENTINEL_USER), value(SENTINEL_PASSWORD)?))
}

fn check_single(urls: &[Url], sentinel: bool) -> Result<(), String> {
    match urls {
        [_] if sentinel => Err(format!(
            "{SENTINEL_PASSWORD} needs redis.mode = \"sentinel\""
        )),
        [_] => Ok(()),
        _ => Err(
            "is a list, which needs redis.mode = \"sentinel\" or \"cluster\"; one server has one URL"
                .into(),
        ),
    }
}

/// The other nodes are learnt from these, with an address alone: all else must hold for all.
fn check_alike(urls: &[Url]) -> Result<(), String> {
    if urls.iter().any(|url| !url.has_host()) {
        return Err("a socket leads to one server only: redis.mode = \"single\"".into());
    }
    let place = |url: &Url| (url.host_str().map(str::to_owned), url.port());
    let places: BTreeSet<_> = urls.iter().map(place).collect();
    if places.len() < urls.len() {
        return Err("names a node twice".into());
    }
    let besides = |url: &Url| {
        let login = (url.username().to_owned(), url.password().map(str::to_owned));
        let query: BTreeSet<(String, String)> = url.query_pairs().into_owned().collect();
        (url.scheme().to_owned(), login, database(url), query)
    };
    let kinds: BTreeSet<_> = urls.iter().map(besides).collect();
    match kinds.len() {
        1 => Ok(()),
        _ => Err("URLs of a list must differ in host and port only".into()),
    }
}

fn check_cluster(urls: &[Url], sentinel: bool) -> Result<(), String> {
    if sentinel {
        return Err(format!(
            "{SENTINEL_PASSWORD} needs redis.mode = \"sentinel\""
        ));
    }
    match urls.iter().map(database).find(|database| database != "0") {
        Some(database) => Err(format!(
            "names database {database}, but a cluster has only database 0"
        )),
        None => Ok(()),
    }
}

/// As the URL has it once it was checked.
fn database(url: &Url) -> String {
    match url.path().trim_matches('/') {
        "" => "0".to_owned(),
        // 00 is 0, too.
        digits => digits
            .parse::<u32>()
            .map_or_else(|_| digits.to_owned(), |n| n.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TlsConfig;

    fn nodes(mode: RedisMode, urls: &[&str]) -> Result<RedisNodes, String> {
        RedisNodes::of(&RedisConfig {
            urls: urls.iter().map(|url| (*url).to_owned()).collect(),
            mode,
            master: "mymaster".into(),
            namespace: "scorer".into(),
            tls: TlsConfig::default(),
        })
    }

    #[test]
    fn nodes_of_every_mode_are_taken() {
        for (mode, urls) in [
            (RedisMode::Single, &["redis://h/3"][..]),
            (RedisMode::Single, &["unix:///run/redis.sock"]),
            (RedisMode::Sentinel, &["redis://h/3", "redis://g:26380/3"]),
            (
                RedisMode::Sentinel,
                &["rediss://u:p@h?db=3", "rediss://u:p@g?db=3"],
            ),
            (RedisMode::Cluster, &["redis://h", "redis://h:7001/0"]),
            (RedisMode::Cluster, &["redis://h/00"]),
        ] {
            assert!(nodes(mode, urls).is_ok(), "{mode:?} {urls:?}");
        }
    }

    #[test]
    fn what_a_mode_cannot_use_is_refused_without_its_password() {
        let (single, sentinel, cluster) =
            (RedisMode::Single, RedisMode::Sentinel, RedisMode::Cluster);
        for (mode, urls, why) in [
            (
                single,
                &["redis://h", "redis://g"][..],
                "one server has one URL",
            ),
            (
                single,
                &["redis://h?sentinel_password=hunter2"],
                "redis.mode",
            ),
            (sentinel, &[], "must name a node"),
            (sentinel, &["unix:///run/redis.sock"], "socket"),
            (
                sentinel,
                &["redis://h", "http://g"],
                "item 2: must be a URL",
            ),
            (sentinel, &["redis://h", "redis://h:26379"], "twice"),
            (sentinel, &["redis://h", "rediss://g"], "host and port only"),
            (
                sentinel,
                &["redis://h/1", "redis://g/2"],
                "host and port only",
            ),
            (
                sentinel,
                &["redis://:hunter2@h", "redis://:x@g"],
                "host and port only",
            ),
            (cluster, &["redis://h/1"], "only database 0"),
            (cluster, &["redis://h?db=1"], "only database 0"),
            (
                cluster,
                &["redis://h?sentinel_password=hunter2"],
                "redis.mode",
            ),
            (cluster, &["unix:///run/redis.sock"], "socket"),
        ] {
            let refused = nodes(mode, urls).unwrap_err();
            assert!(
                refused.contains(why) && !refused.contains("hunter2"),
                "{mode:?} {urls:?}: {refused}"
            );
        }
    }

    #[test]
    fn sentinels_have_a_port_and_a_login_of_their_own() {
        let url = "redis://u:p@h/1?sentinel_user=s&sentinel_password=%40";
        let found = nodes(RedisMode::Sentinel, &[url]).unwrap();
        assert_eq!(found.urls[0].port(), Some(26379));
        assert_eq!(found.sentinel, Some((Some("s".into()), "@".into())));
        let found = nodes(RedisMode::Sentinel, &["redis://h"]).unwrap();
        assert_eq!(found.sentinel, None);
        let found = nodes(RedisMode::Cluster, &["redis://h"]).unwrap();
        assert_eq!(found.urls[0].port(), None);
    }
}
