//! The address of Redis in the driver's terms.

use redis::{ConnectionInfo, IntoConnectionInfo};

use crate::config::service_urls;

/// What the driver connects to.
///
/// # Errors
/// What is wrong with the URL, without the password.
pub(super) fn parse(text: &str) -> Result<ConnectionInfo, String> {
    let url = service_urls::redis(text)?;
    url.into_connection_info().map_err(|e| e.to_string())
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
}
