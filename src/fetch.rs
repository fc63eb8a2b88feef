//! Getting bytes from a URL, for candidates and for updates alike: only from where the
//! configuration allows, from an address that was checked and is then connected to, without
//! redirects, in pieces, and never more than was announced. The one place that knows how; what may be
//! fetched at all is in [`allow`], what is in a [`bucket`] is opened there, and a server's [`pace`] is
//! judged there.

mod allow;
#[cfg(feature = "buckets")]
mod bucket;
#[cfg(not(feature = "buckets"))]
mod no_bucket;
pub mod pace;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use futures_util::{FutureExt, StreamExt};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{
    ACCEPT_ENCODING, AsHeaderName, CONTENT_ENCODING, CONTENT_RANGE, ETAG, HeaderMap, HeaderName,
    HeaderValue, IF_MODIFIED_SINCE, IF_NONE_MATCH, LAST_MODIFIED, RANGE, TRANSFER_ENCODING,
};
use reqwest::{Response, StatusCode};
use tokio::io::AsyncReadExt;
use url::{Host, Url};

use crate::config::urls::has_tricks;

use allow::{covers, is_public, within};
#[cfg(feature = "buckets")]
use bucket::{Buckets, Object};
#[cfg(not(feature = "buckets"))]
use no_bucket::{self as bucket, Buckets, Object};

/// What is read of a file at once.
const PIECE: usize = 1 << 20;

/// Why there are no bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// The configuration does not allow the place.
    #[error("{0}")]
    Forbidden(String),
    /// The place did not give them; it may later.
    #[error("{0}")]
    Unavailable(String),
    /// The place gave too little over too long a time.
    #[error("{0}")]
    Slow(String),
    /// There are more than may be.
    #[error("{place}: at least {at_least} bytes, not the {most} that were announced")]
    TooLong {
        /// Where.
        place: String,
        /// Bytes that there are.
        at_least: u64,
        /// Bytes that there may be.
        most: u64,
    },
}

fn forbidden(message: impl Into<String>) -> FetchError {
    FetchError::Forbidden(message.into())
}

fn unavailable(message: impl Into<String>) -> FetchError {
    FetchError::Unavailable(message.into())
}

/// What a place says to tell one state of its contents from another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Revision {
    /// HTTP's own.
    Tag(HeaderValue),
    /// HTTP's other one.
    Date(HeaderValue),
    /// A file's size and time of change.
    File(u64, std::time::SystemTime),
    /// What a bucket says of an object.
    Object(String),
}

/// Opens what its prefixes cover.
#[derive(Debug, Clone)]
pub struct Downloader {
    allow: Arc<[String]>,
    allow_private: bool,
    client: reqwest::Client,
    buckets: Buckets,
}

/// Bytes on their way.
pub struct Body {
    place: String,
    /// Bytes before the first one that is given.
    from: u64,
    /// Bytes up to here.
    at: u64,
    most: u64,
    revision: Option<Revision>,
    source: Source,
}

enum Source {
    Http(BoxStream<'static, reqwest::Result<Bytes>>),
    Bucket(bucket::Stream),
    File(tokio::fs::File),
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { place, at, .. } = self;
        write!(f, "Body({place}, {at} bytes)")
    }
}

impl Downloader {
    /// Prepares a client for URLs that one of the prefixes covers.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn new(allow: &[String], allow_private: bool) -> anyhow::Result<Self> {
        let resolver = CheckedResolver::of_the_system(allow_private);
        Self::resolving(allow, allow_private, resolver)
    }

    fn resolving(
        allow: &[String],
        allow_private: bool,
        resolver: CheckedResolver,
    ) -> anyhow::Result<Self> {
        crate::config::tls::install_provider();
        let client = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .dns_resolver(Arc::new(resolver))
            .default_headers(plain())
            .user_agent(concat!("scorer/", env!("CARGO_PKG_VERSION")))
            .build()?;
        Ok(Self {
            allow: allow.into(),
            allow_private,
            client,
            buckets: Buckets::default(),
        })
    }

    /// Parses and normalises, then compares with the allowed prefixes.
    ///
    /// # Errors
    /// `Forbidden`, saying why.
    pub fn check(&self, text: &str) -> Result<Url, FetchError> {
        let url = Url::parse(text).map_err(|e| forbidden(e.to_string()))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(forbidden("user information is not allowed"));
        }
        if has_tricks(&url) {
            return Err(forbidden(
                "encoded dots, slashes and zero bytes are not allowed",
            ));
        }
        if !self.covers(&url) {
            return Err(forbidden("no prefix in candidates.allow covers it"));
        }
        let literal = match url.host() {
            Some(Host::Ipv4(ip)) => Some(IpAddr::V4(ip)),
            Some(Host::Ipv6(ip)) => Some(IpAddr::V6(ip)),
            Some(Host::Domain(_)) | None => None,
        };
        match literal {
            Some(ip) if !self.allow_private && !is_public(ip) => Err(forbidden(format!(
                "{ip} is not a public address (candidates.allow_private)"
            ))),
            Some(_) | None => Ok(url),
        }
    }

    /// Whether one of the prefixes covers the URL.
    pub fn covers(&self, url: &Url) -> bool {
        self.allow.iter().any(|prefix| covers(prefix, url))
    }

    /// Opens a checked URL at byte `from`, or before it where the place cannot skip. The body ends
    /// with an error beyond byte `most`.
    ///
    /// # Errors
    /// As the variants say; never the server's own words.
    pub async fn open(&self, url: Url, from: u64, most: u64) -> Result<Body, FetchError> {
        let body = match url.scheme() {
            "file" => self.open_file(&url, from, most).await?,
            "http" | "https" => {
                let mut headers = HeaderMap::new();
                if from > 0 {
                    headers.insert(RANGE, header(&format!("bytes={from}-"))?);
                }
                let response = self.ask(&url, headers).await?;
                Body::of(&url, response, from, most)?
            }
            "s3" | "gs" | "az" => {
                let opened = self.buckets.open(&url, from, None).await?;
                let Some(object) = opened else {
                    return Err(unavailable(format!("{}: not changed", place(&url))));
                };
                Body::in_bucket(&url, object, most)
            }
            other => {
                return Err(forbidden(format!(
                    "scheme {other} is not supported by this worker"
                )));
            }
        };
        body.within_bounds()
    }

    /// Opens a checked URL unless its contents are still those of the revision.
    ///
    /// # Errors
    /// As [`Downloader::open`].
    pub async fn open_if_changed(
        &self,
        url: Url,
        known: Option<&Revision>,
        most: u64,
    ) -> Result<Option<Body>, FetchError> {
        let condition: (HeaderName, _) = match known {
            Some(Revision::Tag(tag)) => (IF_NONE_MATCH, tag.clone()),
            Some(Revision::Date(date)) => (IF_MODIFIED_SINCE, date.clone()),
            Some(Revision::Object(tag)) => {
                let opened = self.buckets.open(&url, 0, Some(tag)).await?;
                let body = opened.map(|object| Body::in_bucket(&url, object, most));
                return body.map(Body::within_bounds).transpose();
            }
            Some(Revision::File(..)) | None => {
                let body = self.open(url, 0, most).await?;
                return Ok(Some(body).filter(|b| known.is_none() || b.revision.as_ref() != known));
            }
        };
        let response = self.ask(&url, HeaderMap::from_iter([condition])).await?;
        if response.status() == StatusCode::NOT_MODIFIED {
            return Ok(None);
        }
        Body::of(&url, response, 0, most)?.within_bounds().map(Some)
    }

    async fn ask(&self, url: &Url, headers: HeaderMap) -> Result<Response, FetchError> {
        let asked = self.client.get(url.clone()).headers(headers).send().await;
        asked.map_err(|e| refusal(&e, &place(url)))
    }

    async fn open_file(&self, url: &Url, from: u64, most: u64) -> Result<Body, FetchError> {
        let path = url
            .to_file_path()
            .map_err(|()| forbidden("not a local path"))?;
        let place = path.display().to_string();
        let missing = |e: std::io::Error| unavailable(format!("{place}: {e}"));
        // A link must not lead out of what is allowed.
        let real = tokio::fs::canonicalize(&path).await.map_err(missing)?;
        if !self.allow.iter().any(|prefix| within(prefix, &real)) {
            return Err(forbidden("leads out of candidates.allow"));
        }
        // What it is, is asked of what was opened, so that nobody puts a link or a pipe in its place;
        // to open a pipe without a writer would take for ever.
        let mut options = tokio::fs::OpenOptions::new();
        let options = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let mut file = options.read(true).open(&real).await.map_err(missing)?;
        let found = file.metadata().await.map_err(missing)?;
        if !found.is_file() {
            return Err(unavailable(format!("{place}: not a regular file")));
        }
        tokio::io::AsyncSeekExt::seek(&mut file, std::io::SeekFrom::Start(from))
            .await
            .map_err(missing)?;
        Ok(Body {
            place,
            from,
            at: from,
            most,
            revision: found
                .modified()
                .ok()
                .map(|at| Revision::File(found.len(), at)),
            source: Source::File(file),
        })
    }
}

/// Asks for the bytes as they are: their size and digest are known.
fn plain() -> HeaderMap {
    let identity = HeaderValue::from_static("identity");
    HeaderMap::from_iter([(ACCEPT_ENCODING, identity)])
}

/// What hides nothing. S3 keeps the mark of an upload in pieces beside some objects.
const UNCODED: [&str; 4] = ["", "identity", "chunked", "aws-chunked"];
/// What is named; a server's other words are not repeated.
const CODINGS: [&str; 6] = ["gzip", "x-gzip", "deflate", "br", "zstd", "compress"];

/// The first of the codings, if the bytes are not those that lie there.
fn coding<'a>(mut said: impl Iterator<Item = &'a str>) -> Option<&'static str> {
    said.find_map(|list| {
        let mut codings = list
            .split(',')
            .map(|coding| coding.trim().to_ascii_lowercase());
        let coding = codings.find(|coding| !UNCODED.contains(&coding.as_str()))?;
        let known = CODINGS.iter().find(|known| **known == coding);
        Some(known.copied().unwrap_or("something unknown"))
    })
}

/// It is the server that answers otherwise than it was asked, whoever named it.
fn uncoded<'a>(place: &str, said: impl Iterator<Item = &'a str>) -> Result<(), FetchError> {
    match coding(said) {
        None => Ok(()),
        Some(coding) => Err(unavailable(format!(
            "{place}: the answer is coded ({coding}), although only identity is accepted; serve the bytes as they are"
        ))),
    }
}

fn header(text: &str) -> Result<HeaderValue, FetchError> {
    HeaderValue::from_str(text).map_err(|e| unavailable(e.to_string()))
}

impl Body {
    fn of(url: &Url, response: Response, asked: u64, most: u64) -> Result<Self, FetchError> {
        let (place, status) = (place(url), response.status());
        if status.is_redirection() {
            return Err(unavailable(format!(
                "{place}: answered {status}; redirects are not followed"
            )));
        }
        let from = match status {
            StatusCode::PARTIAL_CONTENT => match begins_at(response.headers()) {
                Some(from) if from == asked => from,
                Some(_) | None => {
                    return Err(unavailable(format!(
                        "{place}: asked for bytes from {asked} on, it answered with others"
                    )));
                }
            },
            status if status.is_success() => 0,
            status => return Err(unavailable(format!("{place}: answered {status}"))),
        };
        let headers = response.headers();
        uncoded(&place, texts(headers, CONTENT_ENCODING))?;
        uncoded(&place, texts(headers, TRANSFER_ENCODING))?;
        let end = from.saturating_add(response.content_length().unwrap_or(0));
        if end > most {
            return Err(FetchError::TooLong {
                place,
                at_least: end,
                most,
            });
        }
        let said = |name| response.headers().get(name).cloned();
        let revision = said(ETAG).map(Revision::Tag);
        Ok(Self {
            place,
            from,
            at: from,
            most,
            revision: revision.or_else(|| said(LAST_MODIFIED).map(Revision::Date)),
            source: Source::Http(response.bytes_stream().boxed()),
        })
    }

    fn in_bucket(url: &Url, object: Object, most: u64) -> Self {
        Self {
            place: place(url),
            from: object.from,
            // What is said to come is as much as what has come.
            at: object.from,
            most,
            revision: object.tag.map(Revision::Object),
            source: Source::Bucket(object.bytes),
        }
    }

    /// Scheme, host and path, for messages.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Bytes before the first one that is given.
    pub fn from(&self) -> u64 {
        self.from
    }

    /// What tells this state of the contents from another, if the place says it.
    pub fn revision(&self) -> Option<&Revision> {
        self.revision.as_ref()
    }

    fn within_bounds(self) -> Result<Self, FetchError> {
        if self.at <= self.most {
            return Ok(self);
        }
        Err(FetchError::TooLong {
            place: self.place,
            at_least: self.at,
            most: self.most,
        })
    }

    /// The next bytes; none at the end.
    ///
    /// # Errors
    /// When the rest does not come, or more than may be.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, FetchError> {
        let (place, at) = (&self.place, self.at);
        let chunk = match &mut self.source {
            Source::Http(stream) => stream.next().await.transpose().map_err(|e| {
                unavailable(format!("{place}: broke off after {at} bytes: {}", kind(&e)))
            })?,
            Source::Bucket(stream) => stream.next().await.transpose().map_err(|e| {
                tracing::debug!(error = %e, "what the bucket said");
                unavailable(format!("{place}: broke off after {at} bytes"))
            })?,
            Source::File(file) => {
                let mut piece = BytesMut::with_capacity(PIECE);
                let read = file.read_buf(&mut piece).await;
                read.map_err(|e| unavailable(format!("{place}: {e}")))?;
                Some(piece.freeze()).filter(|piece| !piece.is_empty())
            }
        };
        self.at += chunk.as_ref().map_or(0, |c| c.len() as u64);
        if self.at <= self.most {
            return Ok(chunk);
        }
        Err(FetchError::TooLong {
            place: self.place.clone(),
            at_least: self.at,
            most: self.most,
        })
    }

    /// Everything that is left.
    ///
    /// # Errors
    /// As [`Body::chunk`].
    pub async fn read(mut self) -> Result<Vec<u8>, FetchError> {
        let mut bytes = Vec::new();
        while let Some(chunk) = self.chunk().await? {
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }
}

/// The values of a header, also of one that is no text.
fn texts(headers: &HeaderMap, name: impl AsHeaderName) -> impl Iterator<Item = &str> {
    let values = headers.get_all(name).into_iter();
    values.map(|value| value.to_str().unwrap_or("unreadable"))
}

/// Where a partial answer begins: `bytes 100-199/200`.
fn begins_at(headers: &HeaderMap) -> Option<u64> {
    let range = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    let (from, _) = range.strip_prefix("bytes ")?.split_once('-')?;
    from.parse().ok()
}

/// Scheme, host and path of a URL, without its query, for messages.
pub fn place(url: &Url) -> String {
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

fn refusal(error: &reqwest::Error, place: &str) -> FetchError {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(current) = cause {
        if let Some(private) = current.downcast_ref::<NotPublic>() {
            return forbidden(format!("{place}: {private}"));
        }
        cause = current.source();
    }
    unavailable(format!("{place}: {}", kind(error)))
}

/// Resolves a host once and hands out only addresses that may be connected to, so that a second
/// look-up cannot lead elsewhere.
struct CheckedResolver {
    may: fn(IpAddr) -> bool,
    look_up: fn(String) -> BoxFuture<'static, std::io::Result<Vec<SocketAddr>>>,
}

#[derive(Debug, thiserror::Error)]
#[error("resolves to {0}, which is not a public address (candidates.allow_private)")]
struct NotPublic(IpAddr);

impl CheckedResolver {
    fn of_the_system(allow_private: bool) -> Self {
        Self {
            may: if allow_private { |_| true } else { is_public },
            look_up: |name| {
                async move { Ok(tokio::net::lookup_host((name, 0)).await?.collect()) }.boxed()
            },
        }
    }
}

impl Resolve for CheckedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (may, found) = (self.may, (self.look_up)(name.as_str().to_owned()));
        Box::pin(async move {
            let addresses = found.await?;
            match addresses.iter().find(|a| !may(a.ip())) {
                Some(private) => Err(NotPublic(private.ip()).into()),
                None => Ok(Box::new(addresses.into_iter()) as Addrs),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    #[test]
    fn tricks_in_a_url_are_refused() {
        let allow = ["https://a.example/c/".into(), "file:///srv/".into()];
        let getter = Downloader::new(&allow, false).unwrap();
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
            let refused = getter.check(trick);
            assert!(matches!(refused, Err(FetchError::Forbidden(_))), "{trick}");
        }
        assert!(getter.check("https://a.example/c/x").is_ok());
    }

    /// A server that says these lines beside its answer; what it is asked comes back.
    async fn saying(lines: &'static str) -> (String, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let place = format!("http://{}/", listener.local_addr().unwrap());
        let asked = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 4096];
            let read = stream.read(&mut request).await.unwrap();
            let answer =
                format!("HTTP/1.1 200 X\r\nConnection: close\r\n{lines}\r\n1\r\nx\r\n0\r\n\r\n");
            stream.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8_lossy(&request[..read]).to_ascii_lowercase()
        });
        (place, asked)
    }

    #[tokio::test]
    async fn only_the_bytes_themselves_are_asked_for_and_taken() {
        for (lines, fits) in [
            ("Transfer-Encoding: chunked\r\n", true),
            (
                "Transfer-Encoding: chunked\r\nContent-Encoding: identity\r\n",
                true,
            ),
            (
                "Transfer-Encoding: chunked\r\nContent-Encoding: aws-chunked\r\n",
                true,
            ),
            ("Transfer-Encoding: chunked\r\nContent-Encoding:\r\n", true),
            (
                "Transfer-Encoding: chunked\r\nContent-Encoding: gzip\r\n",
                false,
            ),
            (
                "Transfer-Encoding: chunked\r\nContent-Encoding: Identity, Zstd\r\n",
                false,
            ),
            (
                "Transfer-Encoding: chunked\r\nContent-Encoding: identity\r\nContent-Encoding: br\r\n",
                false,
            ),
            (
                "Transfer-Encoding: chunked\r\nContent-Encoding: \u{e9}\r\n",
                false,
            ),
            ("Transfer-Encoding: gzip, chunked\r\n", false),
        ] {
            let (place, asked) = saying(lines).await;
            let getter = Downloader::new(std::slice::from_ref(&place), true).unwrap();
            let opened = getter.open(getter.check(&place).unwrap(), 0, 100).await;
            assert!(
                asked
                    .await
                    .unwrap()
                    .contains("\r\naccept-encoding: identity\r\n")
            );
            match opened {
                Ok(body) => {
                    assert!(fits, "{lines}");
                    assert_eq!(body.read().await.unwrap(), b"x");
                }
                Err(FetchError::Unavailable(why)) => {
                    assert!(!fits && why.contains("is coded"), "{lines}: {why}");
                }
                Err(other) => panic!("{lines}: {other}"),
            }
        }
    }

    /// A server that answers every request with its name, until the test ends.
    async fn named(ip: [u8; 4], port: u16, name: &'static str) -> (u16, Arc<AtomicUsize>) {
        let listener = TcpListener::bind((IpAddr::from(ip), port)).await.unwrap();
        let (port, asked) = (
            listener.local_addr().unwrap().port(),
            Arc::<AtomicUsize>::default(),
        );
        let counter = Arc::clone(&asked);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                counter.fetch_add(1, Ordering::SeqCst);
                let length = name.len();
                let answer = format!(
                    "HTTP/1.1 200 X\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{name}"
                );
                assert!(stream.read(&mut [0; 4096]).await.unwrap() > 0);
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        (port, asked)
    }

    #[tokio::test]
    async fn a_name_that_changes_its_address_leads_only_where_the_check_has_been() {
        static LOOK_UPS: AtomicUsize = AtomicUsize::new(0);
        // In this test 127.0.0.1 is the internet, and 127.0.0.2 somebody's intranet.
        let (outside, inside): ([u8; 4], [u8; 4]) = ([127, 0, 0, 1], [127, 0, 0, 2]);
        let (port, _) = named(outside, 0, "outside").await;
        let (_, asked_inside) = named(inside, port, "inside").await;
        let resolver = CheckedResolver {
            may: |ip| ip == IpAddr::from([127, 0, 0, 1]),
            look_up: |_| {
                let outside = SocketAddr::from(([127, 0, 0, 1], 0));
                let inside = SocketAddr::from(([127, 0, 0, 2], 0));
                let answer = match LOOK_UPS.fetch_add(1, Ordering::SeqCst) {
                    0 => vec![outside],
                    1 => vec![inside],
                    _ => vec![outside, inside],
                };
                async move { Ok(answer) }.boxed()
            },
        };
        let place = format!("http://rebinding.example:{port}/");
        let getter = Downloader::resolving(std::slice::from_ref(&place), false, resolver).unwrap();
        let url = getter.check(&place).unwrap();
        let open = || getter.open(url.clone(), 0, 100);
        assert_eq!(open().await.unwrap().read().await.unwrap(), b"outside");
        assert_eq!(LOOK_UPS.load(Ordering::SeqCst), 1);
        for _ in 0..2 {
            let refused = open().await.unwrap_err();
            assert!(matches!(refused, FetchError::Forbidden(_)), "{refused}");
        }
        assert_eq!(asked_inside.load(Ordering::SeqCst), 0);
    }

    #[tokio::test]
    async fn a_file_is_read_from_anywhere_up_to_its_bound_and_unless_it_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, b"0123456789").unwrap();
        let url = Url::from_file_path(&path).unwrap();
        let prefix = Url::from_directory_path(folder.path()).unwrap().to_string();
        let getter = Downloader::new(&[prefix], false).unwrap();
        let open = |from, most| getter.open(url.clone(), from, most);
        assert_eq!(
            open(0, 10).await.unwrap().read().await.unwrap(),
            b"0123456789"
        );
        assert_eq!(open(7, 10).await.unwrap().read().await.unwrap(), b"789");
        let error = open(0, 9).await.unwrap().read().await.unwrap_err();
        assert!(
            matches!(error, FetchError::TooLong { most: 9, .. }),
            "{error}"
        );
        let known = open(0, 10).await.unwrap().revision().cloned();
        let again = getter.open_if_changed(url.clone(), known.as_ref(), 10);
        assert!(again.await.unwrap().is_none());
        std::fs::write(&path, b"changed").unwrap();
        let again = getter.open_if_changed(url.clone(), known.as_ref(), 10);
        assert_eq!(
            again.await.unwrap().unwrap().read().await.unwrap(),
            b"changed"
        );
    }
}
