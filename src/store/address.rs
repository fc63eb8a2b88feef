//! What `redis.url` says, all of it: the driver by itself passes over what it does not know, and sends
//! no user that has no password. A database may also stand behind `?db=`, as clients in other languages
//! write it.

use redis::{ConnectionInfo, IntoConnectionInfo};
use url::Url;

use crate::config::urls::ServiceUrl;

const SCHEMES: [&str; 4] = ["redis", "rediss", "redis+unix", "unix"];
const KEYS: [&str; 2] = ["db", "protocol"];
/// A socket has no place for them elsewhere.
const SOCKET_KEYS: [&str; 4] = ["db", "protocol", "user", "pass"];
/// Databases of a Redis have numbers of 31 bits.
const MOST: u32 = i32::MAX.unsigned_abs();

/// Checks a `redis.url`.
///
/// # Errors
/// What is wrong with it, without the password.
pub fn check_url(text: &str) -> Result<(), String> {
    parse(text).map(drop)
}

/// What the driver is to connect to.
pub(super) fn parse(text: &str) -> Result<ConnectionInfo, String> {
    let ServiceUrl { mut url, query } = match is_socket(text) {
        true => ServiceUrl::parse(text, &SCHEMES, &SOCKET_KEYS)?,
        false => ServiceUrl::parse(text, &SCHEMES, &KEYS)?,
    };
    let asked = query.get("db").map(|db| database(db)).transpose()?;
    if url.username().is_empty() != url.password().is_none() && !url.username().is_empty() {
        return Err("has a user without a password".into());
    }
    if is_socket(text) {
        check_socket(&url, query.contains_key("user"), query.contains_key("pass"))?;
    } else {
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
    url.into_connection_info().map_err(|e| e.to_string())
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
    number.ok_or_else(|| format!("{text:?} is not the number of a database, from 0 to {MOST}"))
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
            let info = parse(url).unwrap();
            assert_eq!(info.redis_settings().db(), database, "{url}");
        }
        let info = parse("redis://u:p%40@h/0").unwrap();
        let redis = info.redis_settings();
        assert_eq!(
            (redis.username(), redis.password()),
            (Some("u"), Some("p@"))
        );
    }

    #[test]
    fn what_would_be_ignored_or_cannot_be_is_refused_without_its_password() {
        for (url, why) in [
            ("h:6379", "redis://"),
            ("localhost", "is no URL"),
            ("http://h", "redis://"),
            ("redis:h", "redis://"),
            ("redis://", "host"),
            ("redis:///0", "host"),
            ("redis://0.0.0.0/0", "wildcard"),
            ("redis://h/abc", "\"abc\" is not the number"),
            ("redis://h/0/1", "\"0/1\" is not the number"),
            ("redis://h/-1", "is not the number"),
            ("redis://h/+1", "is not the number"),
            ("redis://h/2147483648", "is not the number"),
            ("redis://h?db=", "is not the number"),
            ("redis://h?db=x", "is not the number"),
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
            let refused = parse(url).unwrap_err();
            assert!(
                refused.contains(why) && !refused.contains("hunter2"),
                "{url}: {refused}"
            );
        }
    }
}
