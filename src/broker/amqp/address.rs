//! What `amqp.url` says, all of it: the driver by itself passes over what it does not know, takes
//! `localhost` for an IPv6 address, and `guest` for a password that is missing.

use std::str::FromStr;

use lapin::uri::AMQPUri;
use url::Host;

use crate::config::urls::ServiceUrl;

const SCHEMES: [&str; 2] = ["amqp", "amqps"];
/// Those that take effect; `connection_timeout` is for connections that block.
const KEYS: [&str; 4] = ["heartbeat", "channel_max", "frame_max", "auth_mechanism"];

/// Checks an `amqp.url`.
///
/// # Errors
/// What is wrong with it, without the password.
pub fn check_url(text: &str) -> Result<(), String> {
    parse(text).map(drop)
}

/// What the driver is to connect to.
pub(super) fn parse(text: &str) -> Result<AMQPUri, String> {
    let ServiceUrl { url, query } = ServiceUrl::parse(text, &SCHEMES, &KEYS)?;
    if url.host_str().is_none_or(str::is_empty) {
        return Err("names no host".into());
    }
    let by_certificate = query
        .get("auth_mechanism")
        .is_some_and(|mechanism| mechanism.eq_ignore_ascii_case("external"));
    if url.username().is_empty() != url.password().is_none() && !by_certificate {
        return Err("has a user without a password, or a password without a user".into());
    }
    match url.path() {
        // As Celery writes the host `/`.
        "" | "//" => {}
        "/" => {
            return Err(
                "ends in /, which names a virtual host without a name: write /%2f for the host /"
                    .into(),
            );
        }
        path if path[1..].contains('/') => {
            return Err("has a / within the virtual host's name, where it is written %2f".into());
        }
        _ => {}
    }
    let number = |key: &str, least: u32, most: u32| match query.get(key).map(|n| n.parse::<u32>()) {
        None => Ok(()),
        Some(Ok(n)) if (least..=most).contains(&n) => Ok(()),
        Some(_) => Err(format!("{key} must be a number from {least} to {most}")),
    };
    let short = u32::from(u16::MAX);
    number("heartbeat", 1, short)?;
    number("channel_max", 0, short)?;
    number("frame_max", 0, u32::MAX)?;
    let mut uri = AMQPUri::from_str(url.as_str())?;
    if let Some(Host::Ipv6(ip)) = url.host() {
        uri.authority.host = ip.to_string();
    }
    Ok(uri)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_takes_effect() {
        let uri =
            parse("amqps://u%40x:p%2f@h:1/a%2Fb?heartbeat=7&frame_max=9000&channel_max=5").unwrap();
        assert_eq!(uri.authority.userinfo.username, "u@x");
        assert_eq!(uri.authority.userinfo.password, "p/");
        assert_eq!((uri.authority.host.as_str(), uri.authority.port), ("h", 1));
        assert_eq!(uri.vhost, "a/b");
        let query = (
            uri.query.heartbeat,
            uri.query.frame_max,
            uri.query.channel_max,
        );
        assert_eq!(query, (Some(7), Some(9000), Some(5)));
        for (url, host) in [
            ("amqp://[::1]", "::1"),
            ("amqp://127.0.0.1", "127.0.0.1"),
            ("amqp://h%61", "ha"),
        ] {
            let uri = parse(url).unwrap();
            assert_eq!(
                (uri.authority.host.as_str(), uri.vhost.as_str()),
                (host, "/")
            );
        }
        assert_eq!(parse("amqp://u:p@h//").unwrap().vhost, "/");
        assert!(
            parse("amqps://u@h/?auth_mechanism=external").is_err(),
            "the virtual host"
        );
        assert!(parse("amqps://u@h?auth_mechanism=external").is_ok());
        assert!(parse("amqps://h/%2f?auth_mechanism=EXTERNAL").is_ok());
    }

    #[test]
    fn what_would_be_ignored_or_cannot_be_is_refused_without_its_password() {
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
            ("amqp://h/v?auth_mechanism=magic", "magic"),
            ("amqp://u:%ff@h/v", "utf-8"),
        ] {
            let refused = parse(url).unwrap_err();
            assert!(
                refused.contains(why) && !refused.contains("hunter2"),
                "{url}: {refused}"
            );
        }
    }
}
