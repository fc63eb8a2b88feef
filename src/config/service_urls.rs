//! Checks of `amqp.url` and `redis.url`. The drivers ignore parts that they do not know; here those are
//! refused, so that every part of an accepted URL takes effect.

use percent_encoding::percent_decode_str;
use url::Url;

use super::urls::ServiceUrl;

const AMQP_SCHEMES: [&str; 2] = ["amqp", "amqps"];
/// Query keys that take effect; `connection_timeout` applies to blocking connections only.
const AMQP_KEYS: [&str; 4] = ["heartbeat", "channel_max", "frame_max", "auth_mechanism"];
/// As the AMQP driver spells them, in lower case.
const MECHANISMS: [&str; 5] = [
    "plain",
    "external",
    "amqplain",
    "anonymous",
    "rabbit-cr-demo",
];

const REDIS_SCHEMES: [&str; 4] = ["redis", "rediss", "redis+unix", "unix"];
const REDIS_KEYS: [&str; 4] = ["db", "protocol", SENTINEL_USER, SENTINEL_PASSWORD];
/// How the sentinels themselves are logged in to; user and password of the URL are those of Redis.
pub(crate) const SENTINEL_USER: &str = "sentinel_user";
pub(crate) const SENTINEL_PASSWORD: &str = "sentinel_password";
/// The URL of a socket has no other place for them.
const SOCKET_KEYS: [&str; 4] = ["db", "protocol", "user", "pass"];
const PROTOCOLS: [&str; 4] = ["2", "resp2", "3", "resp3"];
/// Databases of a Redis have numbers of 31 bits.
const MOST: u32 = i32::MAX.unsigned_abs();

/// Checks an `amqp.url`.
///
/// # Errors
/// What is wrong with it, without the password.
pub(crate) fn amqp(text: &str) -> Result<Url, String> {
    let ServiceUrl { url, query } = ServiceUrl::parse(text, &AMQP_SCHEMES, &AMQP_KEYS)?;
    if url.host_str().is_none_or(str::is_empty) {
        return Err("names no host".into());
    }
    let mechanism = query.get("auth_mechanism").map(|m| m.to_lowercase());
    let mechanism = mechanism.as_deref();
    if mechanism.is_some_and(|mechanism| !MECHANISMS.contains(&mechanism)) {
        return Err(format!(
            "auth_mechanism must be one of {}",
            MECHANISMS.join(", ")
        ));
    }
    let by_certificate = mechanism == Some("external");
    if url.username().is_empty() != url.password().is_none() && !by_certificate {
        return Err("has a user without a password, or a password without a user".into());
    }
    check_virtual_host(url.path())?;
    check_encoding(&url)?;
    let number = |key: &str, least: u32, most: u32| match query.get(key).map(|n| n.parse::<u32>()) {
        None => Ok(()),
        Some(Ok(n)) if (least..=most).contains(&n) => Ok(()),
        Some(_) => Err(format!("{key} must be a number from {least} to {most}")),
    };
    let short = u32::from(u16::MAX);
    number("heartbeat", 1, short)?;
    number("channel_max", 0, short)?;
    number("frame_max", 0, u32::MAX)?;
    Ok(url)
}

/// Checks a whole `amqp.url`: the nodes of one cluster, each once.
///
/// # Errors
/// What is wrong with it, without the passwords.
pub(super) fn amqp_nodes(urls: &[String]) -> Result<(), String> {
    let mut nodes: Vec<Url> = Vec::new();
    for (text, number) in urls.iter().zip(1..) {
        let named = |why: String| match urls.len() {
            1 => why,
            _ => format!("item {number}: {why}"),
        };
        let url = amqp(text).map_err(named)?;
        let other = nodes.iter().find_map(|node| difference(node, &url));
        if let Some(why) = other {
            return Err(named(why));
        }
        nodes.push(url);
    }
    Ok(())
}

/// Why two URLs are not those of two nodes of one cluster.
fn difference(one: &Url, other: &Url) -> Option<String> {
    if one.scheme() != other.scheme() {
        let (one, other) = (one.scheme(), other.scheme());
        return Some(format!("is {other}://, but another node is {one}://"));
    }
    let (ours, theirs) = (virtual_host(one), virtual_host(other));
    if ours != theirs {
        return Some(format!(
            "has the virtual host {theirs:?}, but another node has {ours:?}"
        ));
    }
    let node = node(other);
    (self::node(one) == node).then(|| format!("names {node} twice"))
}

/// Host and port of an `amqp.url`.
pub(crate) fn node(url: &Url) -> String {
    let default = if url.scheme() == "amqps" { 5671 } else { 5672 };
    let host = url.host_str().unwrap_or_default().to_ascii_lowercase();
    format!("{host}:{}", url.port().unwrap_or(default))
}

fn virtual_host(url: &Url) -> String {
    match url.path() {
        "" | "//" => "/".into(),
        path => percent_decode_str(&path[1..])
            .decode_utf8_lossy()
            .into_owned(),
    }
}

fn check_virtual_host(path: &str) -> Result<(), String> {
    match path {
        // As Celery writes the host `/`.
        "" | "//" => Ok(()),
        "/" => Err(
            "ends in /, which is the virtual host with an empty name: write /%2f for the virtual host /"
                .into(),
        ),
        path if path[1..].contains('/') => {
            Err("has a / in the name of the virtual host: write %2f".into())
        }
        _ => Ok(()),
    }
}

/// The drivers need user, password and path as text.
fn check_encoding(url: &Url) -> Result<(), String> {
    let parts = [
        url.username(),
        url.password().unwrap_or_default(),
        url.path(),
    ];
    let is_text = |part: &&str| percent_decode_str(part).decode_utf8().is_ok();
    match parts.iter().all(is_text) {
        true => Ok(()),
        false => Err("is not UTF-8 once its % signs are decoded".into()),
    }
}

/// Checks a `redis.url`. The database may also be given as `?db=`, as for clients in other languages;
/// the returned URL has it where the driver reads it.
///
/// # Errors
/// What is wrong with it, without the password.
pub(crate) fn redis(text: &str) -> Result<Url, String> {
    let ServiceUrl { mut url, query } = match is_socket(text) {
        true => ServiceUrl::parse(text, &REDIS_SCHEMES, &SOCKET_KEYS)?,
        false => ServiceUrl::parse(text, &REDIS_SCHEMES, &REDIS_KEYS)?,
    };
    let protocol = query.get("protocol");
    if protocol.is_some_and(|protocol| !PROTOCOLS.contains(&protocol.as_str())) {
        return Err("protocol must be 2 or 3".into());
    }
    let asked = query.get("db").map(|db| database(db)).transpose()?;
    if url.username().is_empty() != url.password().is_none() && !url.username().is_empty() {
        return Err("has a user without a password".into());
    }
    if query.contains_key(SENTINEL_USER) && !query.contains_key(SENTINEL_PASSWORD) {
        return Err(format!("has {SENTINEL_USER} without {SENTINEL_PASSWORD}"));
    }
    if is_socket(text) {
        check_socket(&url, query.contains_key("user"), query.contains_key("pass"))?;
    } else {
        check_redis_host(&url)?;
        let path = url.path().trim_start_matches('/');
        let named = match path.strip_suffix('/').unwrap_or(path) {
            "" => None,
            path => Some(database(path)?),
        };
        match (named, asked) {
            (Some(one), Some(other)) if one != other => {
                return Err(format!("names two databases, {one} and {other}"));
            }
            (Some(_) | None, None) => {}
            (Some(_) | None, Some(asked)) => url.set_path(&format!("/{asked}")),
        }
    }
    check_encoding(&url)?;
    Ok(url)
}

fn check_redis_host(url: &Url) -> Result<(), String> {
    match url.host_str() {
        None | Some("") => Err("names no host".into()),
        Some("0.0.0.0" | "[::]") => {
            Err("names a wildcard address, which is only for listening".into())
        }
        Some(_) => Ok(()),
    }
}

fn is_socket(text: &str) -> bool {
    Url::parse(text).is_ok_and(|url| url.scheme().ends_with("unix"))
}

fn check_socket(url: &Url, user: bool, password: bool) -> Result<(), String> {
    if url.has_host() || url.has_authority() && !url.authority().is_empty() {
        return Err("a socket has no host: unix:///path, with ?db=, &user= and &pass=".into());
    }
    if url.path().trim_matches('/').is_empty() {
        return Err("names no socket: unix:///path".into());
    }
    match user && !password {
        true => Err("has a user without a password".into()),
        false => Ok(()),
    }
}

fn database(text: &str) -> Result<u32, String> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse().ok().filter(|n| digits && *n <= MOST);
    number.ok_or_else(|| format!("{text:?} is not a database number from 0 to {MOST}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_amqp_url_that_would_be_half_honoured_is_refused_without_its_password() {
        for (url, why) in [
            ("h:5672", "amqp://"),
            ("http://u:hunter2@h", "amqp://"),
            ("amqp:h", "amqp://"),
            ("amqp://", "no host"),
            ("amqp:///v", "no host"),
            ("amqp://u:hunter2@h/v#x", "#"),
            ("amqp://u:hunter2@h:99999/v", "is no URL"),
            ("amqp://u:hunt#er2@h/v", "is no URL"),
            ("amqp://u@h/v", "without a password"),
            ("amqp://:hunter2@h/v", "without a user"),
            ("amqp://h/", "%2f"),
            ("amqp://h/a/b", "%2f"),
            ("amqp://h///", "%2f"),
            (
                "amqp://h/v?connection_timeout=5",
                "\"connection_timeout\" is not honoured",
            ),
            ("amqp://h/v?heartbeats=5", "\"heartbeats\" is not honoured"),
            ("amqp://h/v?cacertfile=x", "\"cacertfile\" is not honoured"),
            ("amqp://h/v?heartbeat=5&heartbeat=6", "twice"),
            ("amqp://h/v?heartbeat=soon", "heartbeat must be"),
            ("amqp://h/v?heartbeat=0", "heartbeat must be"),
            ("amqp://h/v?heartbeat=65536", "heartbeat must be"),
            ("amqp://h/v?channel_max=-1", "channel_max must be"),
            ("amqp://h/v?auth_mechanism=magic", "auth_mechanism must be"),
            ("amqp://u:%ff@h/v", "UTF-8"),
        ] {
            let refused = amqp(url).unwrap_err();
            assert!(
                refused.contains(why) && !refused.contains("hunter2"),
                "{url}: {refused}"
            );
        }
    }

    #[test]
    fn a_list_names_each_node_of_one_cluster_once() {
        let checked = |urls: &[&str]| {
            let urls: Vec<String> = urls.iter().map(|url| (*url).to_owned()).collect();
            amqp_nodes(&urls)
        };
        for fit in [
            &["amqp://h"][..],
            &["amqp://a", "amqp://b"],
            &["amqp://h:1/v", "amqp://h:2/v"],
            &["amqp://u:p@a/%2f", "amqp://v:q@b", "amqp://c//"],
        ] {
            assert_eq!(checked(fit), Ok(()), "{fit:?}");
        }
        for (unfit, why) in [
            (&["h:5672"][..], "must be a URL that begins with"),
            (&["amqp://a", "amqp://"], "item 2: names no host"),
            (
                &["amqp://a", "amqp://u:hunter2@a:5672/"],
                "item 2: ends in /",
            ),
            (
                &["amqp://a", "amqp://b", "amqp://u:hunter2@A:5672"],
                "item 3: names a:5672 twice",
            ),
            (
                &["amqps://a", "amqps://a:5671/%2f"],
                "item 2: names a:5671 twice",
            ),
            (&["amqp://a", "amqps://u:hunter2@b"], "item 2: is amqps://"),
            (
                &["amqp://a/v", "amqp://u:hunter2@b"],
                "item 2: has the virtual host \"/\"",
            ),
        ] {
            let refused = checked(unfit).unwrap_err();
            assert!(
                refused.starts_with(why) && !refused.contains("hunter2"),
                "{unfit:?}: {refused}"
            );
        }
    }

    #[test]
    fn a_redis_url_that_would_be_half_honoured_is_refused_without_its_password() {
        for (url, why) in [
            ("h:6379", "redis://"),
            ("localhost", "is no URL"),
            ("http://h", "redis://"),
            ("redis:h", "redis://"),
            ("redis://", "host"),
            ("redis:///0", "host"),
            ("redis://0.0.0.0/0", "wildcard"),
            ("redis://h/abc", "\"abc\" is not a database number"),
            ("redis://h/0/1", "\"0/1\" is not a database number"),
            ("redis://h/-1", "is not a database number"),
            ("redis://h/+1", "is not a database number"),
            ("redis://h/2147483648", "is not a database number"),
            ("redis://h?db=", "is not a database number"),
            ("redis://h?db=x", "is not a database number"),
            ("redis://h/1?db=2", "two databases"),
            ("redis://h?db=1&db=1", "twice"),
            ("redis://h?DB=1", "\"DB\" is not honoured"),
            (
                "redis://h?ssl_cert_reqs=none",
                "\"ssl_cert_reqs\" is not honoured",
            ),
            ("redis://h?timeout=5", "\"timeout\" is not honoured"),
            ("redis://h?pass=hunter2", "\"pass\" is not honoured"),
            ("redis://h?protocol=4", "protocol"),
            ("redis://u@h", "without a password"),
            ("redis://h?sentinel_user=u", "without sentinel_password"),
            ("redis://:hunter2@h#x", "#"),
            ("rediss://h/0#insecure", "#"),
            ("redis://:%ff@h", "UTF-8"),
            ("redis://:hunter2@h:99999", "is no URL"),
            ("unix://", "no socket"),
            ("unix://h/redis.sock", "no host"),
            ("unix:///r.sock?user=u", "without a password"),
            (
                "unix:///r.sock?password=hunter2",
                "\"password\" is not honoured",
            ),
        ] {
            let refused = redis(url).unwrap_err();
            assert!(
                refused.contains(why) && !refused.contains("hunter2"),
                "{url}: {refused}"
            );
        }
    }
}
