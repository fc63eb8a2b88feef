//! Getting a candidate's bytes: only from where the configuration allows, from an address that
//! was checked and is then connected to, without redirects, within size and time, and with the
//! digest the job names.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use sha2::{Digest, Sha256};
use tokio::io::AsyncReadExt;
use url::{Host, Url};

use crate::config::{CandidatesConfig, format_duration};
use crate::failure::{Code, Failure};
use crate::job::{Candidate, Source};
use crate::offload;

/// A candidate's bytes and their digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// As sent or fetched.
    pub bytes: Bytes,
    /// Of these bytes.
    pub sha256: [u8; 32],
}

/// The digest of a candidate's bytes.
///
/// # Errors
/// When computing it panics.
pub async fn digest(bytes: Bytes) -> Result<[u8; 32], Failure> {
    let digest = offload::by_size(bytes.len(), move || Sha256::digest(&bytes).into());
    let digest = digest.await;
    digest.ok_or_else(|| unavailable("the digest could not be computed; the worker's log says why"))
}

/// Fetches candidates within the configuration's bounds.
#[derive(Debug, Clone)]
pub struct Fetcher {
    config: Arc<CandidatesConfig>,
    client: reqwest::Client,
}

fn forbidden(message: impl Into<String>) -> Failure {
    Failure::new(Code::CandidateUrlForbidden, message)
}

fn unavailable(message: impl Into<String>) -> Failure {
    Failure::new(Code::CandidateUnavailable, message)
}

impl Fetcher {
    /// Prepares the client.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn new(config: CandidatesConfig) -> anyhow::Result<Self> {
        // Fails only when a provider is installed already, which is as good.
        let _installed_before = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .dns_resolver(Arc::new(CheckedResolver {
                allow_private: config.allow_private,
            }))
            .user_agent(concat!("scorer/", env!("CARGO_PKG_VERSION")))
            .build()?;
        Ok(Self {
            config: Arc::new(config),
            client,
        })
    }

    /// Gets the bytes and checks size and digest; `known` is the digest of inline bytes, if
    /// somebody needed it before.
    ///
    /// # Errors
    /// A typed refusal that names the place but never the server's words.
    pub async fn fetch(
        &self,
        candidate: &Candidate,
        known: Option<[u8; 32]>,
    ) -> Result<Fetched, Failure> {
        let limit = match &candidate.source {
            Source::Inline(_) => ("candidates.max_inline_bytes", self.config.max_inline_bytes),
            Source::Url(_) => ("candidates.max_bytes", self.config.max_bytes),
        };
        if let Some(size) = candidate.size.filter(|size| *size > limit.1) {
            return Err(too_large(size, limit));
        }
        let bytes = match &candidate.source {
            Source::Inline(data) if data.len() as u64 > limit.1 => {
                return Err(too_large(data.len() as u64, limit));
            }
            Source::Inline(data) => data.clone(),
            Source::Url(url) => {
                let timeout = self.config.fetch_timeout;
                let fetch = self.fetch_url(url, candidate.size.unwrap_or(limit.1));
                let late = || {
                    unavailable(format!(
                        "not fetched within candidates.fetch_timeout = {}",
                        format_duration(timeout)
                    ))
                };
                let fetched = tokio::time::timeout(timeout, fetch).await;
                Bytes::from(fetched.map_err(|_| late())??)
            }
        };
        let sha256 = match known {
            Some(digest) => digest,
            None => digest(bytes.clone()).await?,
        };
        check_claims(candidate, bytes.len() as u64, &sha256)?;
        Ok(Fetched { bytes, sha256 })
    }

    async fn fetch_url(&self, text: &str, expected: u64) -> Result<Vec<u8>, Failure> {
        let url = self.check_url(text)?;
        match url.scheme() {
            "file" => read_file(&url, &self.config.allow, expected).await,
            "http" | "https" => self.get(url, expected).await,
            other => Err(forbidden(format!(
                "candidate.url: scheme {other} is not supported by this worker"
            ))),
        }
    }

    /// Parses and normalises, then compares with the allowed prefixes.
    fn check_url(&self, text: &str) -> Result<Url, Failure> {
        let url = Url::parse(text).map_err(|e| forbidden(format!("candidate.url: {e}")))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(forbidden("candidate.url: user information is not allowed"));
        }
        let path = url.path().to_ascii_lowercase();
        if ["%2e", "%2f", "%5c", "%00", "\\"]
            .iter()
            .any(|trick| path.contains(trick))
        {
            return Err(forbidden(
                "candidate.url: encoded dots, slashes and zero bytes are not allowed",
            ));
        }
        if !self.config.allow.iter().any(|prefix| covers(prefix, &url)) {
            return Err(forbidden(
                "candidate.url: no prefix in candidates.allow covers it",
            ));
        }
        let literal = match url.host() {
            Some(Host::Ipv4(ip)) => Some(IpAddr::V4(ip)),
            Some(Host::Ipv6(ip)) => Some(IpAddr::V6(ip)),
            Some(Host::Domain(_)) | None => None,
        };
        match literal {
            Some(ip) if !self.config.allow_private && !is_public(ip) => Err(forbidden(format!(
                "candidate.url: {ip} is not a public address (candidates.allow_private)"
            ))),
            Some(_) | None => Ok(url),
        }
    }

    async fn get(&self, url: Url, expected: u64) -> Result<Vec<u8>, Failure> {
        let place = place(&url);
        let response = self
            .client
            .get(url)
            .send()
            .await
            .map_err(|e| refusal(&e, &place))?;
        let status = response.status();
        if status.is_redirection() {
            return Err(unavailable(format!(
                "{place}: answered {status}; redirects are not followed"
            )));
        }
        if !status.is_success() {
            return Err(unavailable(format!("{place}: answered {status}")));
        }
        if let Some(length) = response
            .content_length()
            .filter(|length| *length > expected)
        {
            return Err(oversized(&place, length, expected));
        }
        let mut bytes = Vec::new();
        let mut body = response.bytes_stream();
        while let Some(chunk) = body.next().await {
            let chunk = chunk.map_err(|e| {
                unavailable(format!(
                    "{place}: broke off after {} bytes: {}",
                    bytes.len(),
                    kind(&e)
                ))
            })?;
            bytes.extend_from_slice(&chunk);
            if bytes.len() as u64 > expected {
                return Err(oversized(&place, bytes.len() as u64, expected));
            }
        }
        Ok(bytes)
    }
}

fn too_large(size: u64, (key, limit): (&str, u64)) -> Failure {
    Failure::new(
        Code::CandidateTooLarge,
        format!("{size} bytes, {key} = {limit}"),
    )
    .with("size", size)
    .with("limit", limit)
}

/// More bytes than the job names: the claim is wrong, whatever the limits are.
fn oversized(place: &str, length: u64, expected: u64) -> Failure {
    let message = format!("{place}: at least {length} bytes, the job says {expected}");
    Failure::new(Code::CandidateDigestMismatch, message).with("size", expected)
}

fn check_claims(candidate: &Candidate, size: u64, sha256: &[u8; 32]) -> Result<(), Failure> {
    if let Some(claimed) = candidate.size.filter(|claimed| *claimed != size) {
        let message = format!("{size} bytes, the job says {claimed}");
        return Err(Failure::new(Code::CandidateDigestMismatch, message).with("size", size));
    }
    if let Some(claimed) = candidate.sha256.filter(|claimed| claimed != sha256) {
        let found = hex::encode(sha256);
        let message = format!("SHA-256 is {found}, the job says {}", hex::encode(claimed));
        return Err(Failure::new(Code::CandidateDigestMismatch, message).with("sha256", found));
    }
    Ok(())
}

/// Scheme, host and path of a URL, without its query, for messages.
fn place(url: &Url) -> String {
    let port = url
        .port()
        .map(|port| format!(":{port}"))
        .unwrap_or_default();
    format!(
        "{}://{}{port}{}",
        url.scheme(),
        url.host_str().unwrap_or_default(),
        url.path()
    )
}

fn kind(error: &reqwest::Error) -> &'static str {
    if error.is_connect() {
        "cannot connect"
    } else if error.is_timeout() {
        "timed out"
    } else {
        "connection failed"
    }
}

fn refusal(error: &reqwest::Error, place: &str) -> Failure {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(current) = cause {
        if let Some(private) = current.downcast_ref::<NotPublic>() {
            return forbidden(format!("{place}: {private}"));
        }
        cause = current.source();
    }
    unavailable(format!("{place}: {}", kind(error)))
}

/// Whether the prefix covers the URL: same scheme, host and port, and its path up to a boundary.
fn covers(prefix: &str, url: &Url) -> bool {
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

async fn read_file(url: &Url, allow: &[String], expected: u64) -> Result<Vec<u8>, Failure> {
    let path = url
        .to_file_path()
        .map_err(|()| forbidden("candidate.url: not a local path"))?;
    let missing = |e: std::io::Error| unavailable(format!("{}: {e}", path.display()));
    // A link must not lead out of what is allowed.
    let real = tokio::fs::canonicalize(&path).await.map_err(missing)?;
    if !allow.iter().any(|prefix| within(prefix, &real)) {
        return Err(forbidden("candidate.url: leads out of candidates.allow"));
    }
    let file = tokio::fs::File::open(&real).await.map_err(missing)?;
    if !file.metadata().await.map_err(missing)?.is_file() {
        return Err(unavailable(format!(
            "{}: not a regular file",
            path.display()
        )));
    }
    let mut bytes = Vec::new();
    file.take(expected.saturating_add(1))
        .read_to_end(&mut bytes)
        .await
        .map_err(missing)?;
    if bytes.len() as u64 > expected {
        return Err(oversized(
            &path.display().to_string(),
            bytes.len() as u64,
            expected,
        ));
    }
    Ok(bytes)
}

fn within(prefix: &str, real: &std::path::Path) -> bool {
    let allowed = Url::parse(prefix)
        .ok()
        .filter(|u| u.scheme() == "file")
        .and_then(|u| u.to_file_path().ok());
    let canonical = allowed.and_then(|path: PathBuf| path.canonicalize().ok());
    canonical.is_some_and(|allowed| real.starts_with(allowed))
}

/// Resolves a host once and hands out only addresses that may be connected to, so that a second
/// look-up cannot lead elsewhere.
struct CheckedResolver {
    allow_private: bool,
}

#[derive(Debug, thiserror::Error)]
#[error("resolves to {0}, which is not a public address (candidates.allow_private)")]
struct NotPublic(IpAddr);

impl Resolve for CheckedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let allow_private = self.allow_private;
        Box::pin(async move {
            let addresses: Vec<SocketAddr> =
                tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            match addresses
                .iter()
                .find(|a| !allow_private && !is_public(a.ip()))
            {
                Some(private) => Err(NotPublic(private.ip()).into()),
                None => Ok(Box::new(addresses.into_iter()) as Addrs),
            }
        })
    }
}

/// Whether an address is on the public internet.
fn is_public(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            let [a, b, c, _] = ip.octets();
            !(ip.is_private()
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
            // Only 2000::/3 is global unicast; tunnels in it carry IPv4 addresses nobody checked.
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

    #[test]
    fn tricks_in_a_url_are_refused() {
        let config = crate::config::Config::load(&crate::config::Layers::default())
            .unwrap()
            .candidates;
        let config = CandidatesConfig {
            allow: vec!["https://a.example/c/".into(), "file:///srv/".into()],
            ..config
        };
        let fetcher = Fetcher::new(config).unwrap();
        for trick in [
            "https://user@a.example/c/x",
            "https://a.example/c/%2e%2e/x",
            "https://a.example/c/..%2fx",
            "ftp://a.example/c/x",
            "https://127.0.0.1/c/x",
            "file:///etc/passwd",
            "file:///srv/../etc/passwd",
            "nonsense",
        ] {
            assert_eq!(
                fetcher.check_url(trick).unwrap_err().code,
                Code::CandidateUrlForbidden,
                "{trick}"
            );
        }
        assert!(fetcher.check_url("https://a.example/c/x").is_ok());
    }
}
