//! What may be fetched: allowed URL prefixes, and addresses on the public internet.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use url::Url;

/// Whether the prefix covers the URL: same scheme, host and port, and its path up to a boundary.
pub(super) fn covers(prefix: &str, url: &Url) -> bool {
    let Ok(prefix) = Url::parse(prefix) else {
        return false;
    };
    let same_place = prefix.scheme() == url.scheme()
        && prefix.host() == url.host()
        && prefix.port_or_known_default() == url.port_or_known_default();
    let bounded = |path: &str| {
        let rest = url.path().strip_prefix(path);
        rest.is_some_and(|rest| path.ends_with('/') || rest.is_empty() || rest.starts_with('/'))
    };
    same_place && bounded(prefix.path())
}

/// Whether a path lies below a `file://` prefix, links resolved.
pub(super) fn within(prefix: &str, real: &Path) -> bool {
    let allowed = Url::parse(prefix)
        .ok()
        .filter(|u| u.scheme() == "file")
        .and_then(|u| u.to_file_path().ok());
    let canonical = allowed.and_then(|path: PathBuf| path.canonicalize().ok());
    canonical.is_some_and(|allowed| real.starts_with(allowed))
}

const AZURE_WIRE_SERVER: Ipv4Addr = Ipv4Addr::new(168, 63, 129, 16);

/// Whether an address is on the public internet.
pub(super) fn is_public(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            let [a, b, c, _] = ip.octets();
            // Azure serves instance metadata from this public address.
            ip != AZURE_WIRE_SERVER
                && !(ip.is_private()
                    || ip.is_loopback()
                    || ip.is_link_local()
                    || ip.is_unspecified()
                    || ip.is_broadcast()
                    || ip.is_multicast()
                    || ip.is_documentation()
                    || a == 0
                    || a >= 240
                    || (a == 100 && (64..128).contains(&b))
                    || (a == 198 && (b == 18 || b == 19))
                    || (a == 192 && b == 0 && c == 0))
        }
        IpAddr::V6(ip) => {
            let [first, second, ..] = ip.segments();
            // Only 2000::/3 is global unicast. Tunnels in it carry unchecked IPv4 addresses.
            (first & 0xe000) == 0x2000
                && first != 0x2002
                && !(first == 0x2001 && (second == 0 || second == 0xdb8))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_end_at_a_boundary() {
        let url = |text: &str| Url::parse(text).unwrap();
        assert!(covers(
            "https://a.example/c/",
            &url("https://A.example/c/x.json")
        ));
        assert!(covers(
            "https://a.example/c",
            &url("https://a.example/c/x.json?sig=1")
        ));
        assert!(covers("https://a.example", &url("https://a.example:443/x")));
        for other in [
            "http://a.example/c/x",
            "https://a.example/cx",
            "https://a.example.evil/c/x",
            "https://a.example:8443/c/x",
            "https://a.example/c/../d/x",
        ] {
            assert!(!covers("https://a.example/c", &url(other)), "{other}");
        }
    }

    #[test]
    fn only_public_addresses_are_public() {
        for private in [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "168.63.129.16",
            "0.0.0.0",
            "100.64.0.1",
            "::1",
            "fe80::1",
            "fd00::1",
            "::ffff:10.0.0.1",
            "2002:7f00:1::",
            "224.0.0.1",
            "255.255.255.255",
        ] {
            assert!(!is_public(private.parse().unwrap()), "{private}");
        }
        for public in ["1.1.1.1", "93.184.216.34", "2606:4700::1111"] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
    }
}
