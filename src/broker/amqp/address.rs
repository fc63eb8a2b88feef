//! The broker's address in the driver's terms.

use std::str::FromStr;

use lapin::uri::AMQPUri;
use url::Host;

use crate::config::service_urls;

/// What the driver connects to. The driver takes `localhost` for an IPv6 address, and keeps the brackets
/// of an IPv6 address.
///
/// # Errors
/// What is wrong with the URL, without the password.
pub(super) fn parse(text: &str) -> Result<AMQPUri, String> {
    let url = service_urls::amqp(text)?;
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
}
