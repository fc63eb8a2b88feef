//! A connection to one node.

use lapin::protocol::{AMQPErrorKind, AMQPHardError};
use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};
use lapin::uri::AMQPUri;
use lapin::{Connection, ConnectionProperties, ErrorKind};
use url::Host;

use super::{failed, greeting, within};
use crate::broker::BrokerError;
use crate::broker::nodes::Nodes;
use crate::config::service_urls;

/// What the driver connects to. The driver takes `localhost` for an IPv6 address, and keeps the brackets
/// of an IPv6 address. Errors do not show the password.
fn address(text: &str) -> Result<AMQPUri, String> {
    let url = service_urls::amqp(text)?;
    let mut uri = url.as_str().parse::<AMQPUri>()?;
    if let Some(Host::Ipv6(ip)) = url.host() {
        uri.authority.host = ip.to_string();
    }
    Ok(uri)
}

/// Host and port of a node.
pub(super) fn node(url: &str) -> String {
    service_urls::amqp(url).map_or_else(|_| "?".into(), |url| service_urls::node(&url))
}

/// Opens a connection to one of the nodes; returns its version too, unless it names none.
pub(super) async fn open(
    nodes: &Nodes,
    url: &str,
    name: &str,
) -> Result<(Connection, Option<String>), BrokerError> {
    let config = &nodes.config;
    let uri = address(url);
    let mut uri = uri.map_err(|why| BrokerError::Failed(format!("amqp.url: {why}")))?;
    let place = node(url);
    let heartbeat = nodes.heartbeat().as_secs();
    let heartbeat = u16::try_from(heartbeat).unwrap_or(u16::MAX);
    uri.query.heartbeat.get_or_insert(heartbeat.max(1));
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let tls = config.tls.read();
    let tls = tls.map_err(|(key, why)| BrokerError::Failed(format!("amqp.tls.{key}: {why}")))?;
    let tls = OwnedTLSConfig {
        identity: tls.identity.map(|(cert, key)| OwnedIdentity::PKCS8 {
            pem: cert.into(),
            key: key.into(),
        }),
        cert_chain: tls.ca,
    };
    let connecting = Box::pin(greeting::connect(uri, properties, tls));
    let what = format!("connect to {place}");
    let answered = within(nodes.patience(), &what, async { Ok(connecting.await) }).await?;
    answered.map_err(|error| not_opened(&what, &error))
}

/// Why there is no connection. That a user or a virtual host is not allowed is no fault of the broker's.
fn not_opened(what: &str, error: &lapin::Error) -> BrokerError {
    let no_entry = matches!(error.kind(), ErrorKind::ProtocolError(refusal)
        if *refusal.kind() == AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED));
    match failed(what, error) {
        BrokerError::Forbidden(why) => BrokerError::Denied(why),
        BrokerError::Failed(why) if no_entry => BrokerError::Denied(why),
        other @ (BrokerError::Differs(_)
        | BrokerError::Missing(_)
        | BrokerError::Denied(_)
        | BrokerError::Failed(_)) => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapin::protocol::{AMQPError, AMQPSoftError};

    #[test]
    fn a_login_that_is_refused_is_told_from_a_broker_that_is_away() {
        let refusal = |kind: AMQPErrorKind| {
            let error = ErrorKind::ProtocolError(AMQPError::new(kind, "why".into()));
            not_opened("connect", &error.into())
        };
        let denied = |error: &BrokerError| matches!(error, BrokerError::Denied(_));
        for login in [
            AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED),
            AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED),
        ] {
            assert!(denied(&refusal(login)));
        }
        assert!(!denied(&refusal(AMQPErrorKind::Hard(
            AMQPHardError::CONNECTIONFORCED
        ))));
        let away = std::io::Error::other("Connection refused").into();
        assert!(!denied(&not_opened("connect", &away)));
        let one = || BrokerError::Denied("a".into());
        let away = || BrokerError::Failed("b".into());
        assert!(denied(&BrokerError::of_all(vec![one(), one()])));
        assert!(!denied(&BrokerError::of_all(vec![one(), away()])));
    }

    #[test]
    fn every_part_takes_effect() {
        let uri = address("amqps://u%40x:p%2f@h:1/a%2Fb?heartbeat=7&frame_max=9000&channel_max=5")
            .unwrap();
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
            let uri = address(url).unwrap();
            assert_eq!(
                (uri.authority.host.as_str(), uri.vhost.as_str()),
                (host, "/")
            );
        }
        assert_eq!(address("amqp://u:p@h//").unwrap().vhost, "/");
        assert!(
            address("amqps://u@h/?auth_mechanism=external").is_err(),
            "the virtual host"
        );
        assert!(address("amqps://u@h?auth_mechanism=external").is_ok());
        assert!(address("amqps://h/%2f?auth_mechanism=EXTERNAL").is_ok());
    }
}
