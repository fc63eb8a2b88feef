//! Opens URLs that the configuration allows: HTTP, files and buckets.

use std::net::IpAddr;
use std::sync::Arc;

use reqwest::header::{
    ACCEPT_ENCODING, HeaderMap, HeaderName, HeaderValue, IF_MODIFIED_SINCE, IF_NONE_MATCH, RANGE,
};
use reqwest::{Response, StatusCode};
use url::{Host, Url};

use super::allow::{covers, is_public, within};
use super::bucket::Buckets;
use super::resolver::{CheckedResolver, NotPublic};
use super::stream::{ByteStream, Transport, kind};
use super::{FetchError, Revision, forbidden, place, unavailable};
use crate::config::urls::has_tricks;

/// Opens URLs that one of its prefixes covers.
#[derive(Debug, Clone)]
pub struct Downloader {
    allow: Arc<[String]>,
    allow_private: bool,
    client: reqwest::Client,
    buckets: Buckets,
}

impl Downloader {
    /// Creates a client for URLs under these prefixes.
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

    /// Parses and normalises a URL, then checks it against the allowed prefixes.
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

    /// Opens a checked URL at byte `from`, or at 0 where the server cannot skip. The stream fails
    /// beyond byte `most`.
    ///
    /// # Errors
    /// Any [`FetchError`]; messages never repeat what the server said.
    pub async fn open(&self, url: Url, from: u64, most: u64) -> Result<ByteStream, FetchError> {
        let body = match url.scheme() {
            "file" => self.open_file(&url, from, most).await?,
            "http" | "https" => {
                let mut headers = HeaderMap::new();
                if from > 0 {
                    let range = HeaderValue::from_str(&format!("bytes={from}-"));
                    headers.insert(RANGE, range.map_err(|e| unavailable(e.to_string()))?);
                }
                let response = self.ask(&url, headers).await?;
                ByteStream::of(&url, response, from, most)?
            }
            "s3" | "gs" | "az" => {
                let opened = self.buckets.open(&url, from, None).await?;
                let Some(object) = opened else {
                    return Err(unavailable(format!("{}: not changed", place(&url))));
                };
                ByteStream::in_bucket(&url, object, most)
            }
            other => {
                return Err(forbidden(format!(
                    "scheme {other} is not supported by this worker"
                )));
            }
        };
        body.check_bounds()?;
        Ok(body)
    }

    /// Opens a checked URL unless its content still has the known revision.
    ///
    /// # Errors
    /// As [`Downloader::open`].
    pub async fn open_if_changed(
        &self,
        url: Url,
        known: Option<&Revision>,
        most: u64,
    ) -> Result<Option<ByteStream>, FetchError> {
        let condition: (HeaderName, _) = match known {
            Some(Revision::Tag(tag)) => (IF_NONE_MATCH, tag.clone()),
            Some(Revision::Date(date)) => (IF_MODIFIED_SINCE, date.clone()),
            Some(Revision::Object(tag)) => {
                let opened = self.buckets.open(&url, 0, Some(tag)).await?;
                let body = opened.map(|object| ByteStream::in_bucket(&url, object, most));
                body.iter().try_for_each(ByteStream::check_bounds)?;
                return Ok(body);
            }
            Some(Revision::File(..)) | None => {
                let body = self.open(url, 0, most).await?;
                return Ok(Some(body).filter(|b| known.is_none() || b.revision() != known));
            }
        };
        let response = self.ask(&url, HeaderMap::from_iter([condition])).await?;
        if response.status() == StatusCode::NOT_MODIFIED {
            return Ok(None);
        }
        ByteStream::of(&url, response, 0, most).map(Some)
    }

    async fn ask(&self, url: &Url, headers: HeaderMap) -> Result<Response, FetchError> {
        let asked = self.client.get(url.clone()).headers(headers).send().await;
        asked.map_err(|e| refusal(&e, &place(url)))
    }

    async fn open_file(&self, url: &Url, from: u64, most: u64) -> Result<ByteStream, FetchError> {
        let path = url
            .to_file_path()
            .map_err(|()| forbidden("not a local path"))?;
        let place = path.display().to_string();
        let missing = |e: std::io::Error| unavailable(format!("{place}: {e}"));
        // A symbolic link must not lead out of the allowed prefixes.
        let real = tokio::fs::canonicalize(&path).await.map_err(missing)?;
        if !self.allow.iter().any(|prefix| within(prefix, &real)) {
            return Err(forbidden(format!("{place}: leads out of candidates.allow")));
        }
        // Inspect the opened file, so that nobody can swap in a link or a pipe after the check.
        // Without O_NONBLOCK, opening a pipe that has no writer would block forever.
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
        Ok(ByteStream {
            place,
            from,
            at: from,
            most,
            revision: found
                .modified()
                .ok()
                .map(|at| Revision::File(found.len(), at)),
            transport: Transport::File(file),
        })
    }
}

/// Asks for unencoded bytes, since size and digest are those of the raw content.
pub(super) fn plain() -> HeaderMap {
    let identity = HeaderValue::from_static("identity");
    HeaderMap::from_iter([(ACCEPT_ENCODING, identity)])
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

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use std::net::SocketAddr;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    #[test]
    fn tricks_in_a_url_are_refused() {
        let allow = ["https://a.example/c/".into(), "file:///srv/".into()];
        let downloader = Downloader::new(&allow, false).unwrap();
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
            let refused = downloader.check(trick);
            assert!(matches!(refused, Err(FetchError::Forbidden(_))), "{trick}");
        }
        assert!(downloader.check("https://a.example/c/x").is_ok());
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
            let downloader = Downloader::new(std::slice::from_ref(&place), true).unwrap();
            let opened = downloader
                .open(downloader.check(&place).unwrap(), 0, 100)
                .await;
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
        let downloader =
            Downloader::resolving(std::slice::from_ref(&place), false, resolver).unwrap();
        let url = downloader.check(&place).unwrap();
        let open = || downloader.open(url.clone(), 0, 100);
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
        let downloader = Downloader::new(&[prefix], false).unwrap();
        let open = |from, most| downloader.open(url.clone(), from, most);
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
        let again = downloader.open_if_changed(url.clone(), known.as_ref(), 10);
        assert!(again.await.unwrap().is_none());
        std::fs::write(&path, b"changed").unwrap();
        let again = downloader.open_if_changed(url.clone(), known.as_ref(), 10);
        assert_eq!(
            again.await.unwrap().unwrap().read().await.unwrap(),
            b"changed"
        );
    }
}
