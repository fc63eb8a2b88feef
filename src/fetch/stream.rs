//! The bytes of an opened URL, from any transport. The announced size is enforced as they arrive.

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use reqwest::header::{
    AsHeaderName, CONTENT_ENCODING, CONTENT_RANGE, ETAG, HeaderMap, LAST_MODIFIED,
    TRANSFER_ENCODING,
};
use reqwest::{Response, StatusCode};
use tokio::io::AsyncReadExt;
use url::Url;

use super::bucket::{self, Object};
use super::{FetchError, Revision, place, unavailable};

/// Bytes read from a file at a time.
const PIECE: usize = 1 << 20;

/// The bytes of an opened URL, read in chunks.
pub struct ByteStream {
    pub(super) place: String,
    /// Offset of the first byte delivered.
    pub(super) from: u64,
    /// Offset of the next byte.
    pub(super) at: u64,
    pub(super) most: u64,
    pub(super) revision: Option<Revision>,
    pub(super) transport: Transport,
}

pub(super) enum Transport {
    Http(BoxStream<'static, reqwest::Result<Bytes>>),
    Bucket(bucket::Stream),
    File(tokio::fs::File),
}

impl std::fmt::Debug for ByteStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { place, at, .. } = self;
        write!(f, "ByteStream({place}, {at} bytes)")
    }
}

impl ByteStream {
    pub(super) fn of(
        url: &Url,
        response: Response,
        asked: u64,
        most: u64,
    ) -> Result<Self, FetchError> {
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
                        "{place}: answered a request for bytes from {asked} with other bytes"
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
        check_bounds(&place, end, most)?;
        let said = |name| response.headers().get(name).cloned();
        let revision = said(ETAG).map(Revision::Tag);
        Ok(Self {
            place,
            from,
            at: from,
            most,
            revision: revision.or_else(|| said(LAST_MODIFIED).map(Revision::Date)),
            transport: Transport::Http(response.bytes_stream().boxed()),
        })
    }

    pub(super) fn in_bucket(url: &Url, object: Object, most: u64) -> Self {
        Self {
            place: place(url),
            from: object.from,
            at: object.from,
            most,
            revision: object.tag.map(Revision::Object),
            transport: Transport::Bucket(object.bytes),
        }
    }

    /// Scheme, host and path, for messages.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Offset of the first byte delivered.
    pub fn from(&self) -> u64 {
        self.from
    }

    /// The version of the content, if the server names one.
    pub fn revision(&self) -> Option<&Revision> {
        self.revision.as_ref()
    }

    pub(super) fn check_bounds(&self) -> Result<(), FetchError> {
        check_bounds(&self.place, self.at, self.most)
    }

    /// The next chunk; `None` at the end.
    ///
    /// # Errors
    /// When the transfer breaks off or exceeds the announced size.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, FetchError> {
        let (place, at) = (&self.place, self.at);
        let chunk = match &mut self.transport {
            Transport::Http(stream) => stream.next().await.transpose().map_err(|e| {
                unavailable(format!("{place}: broke off after {at} bytes: {}", kind(&e)))
            })?,
            Transport::Bucket(stream) => stream.next().await.transpose().map_err(|e| {
                tracing::debug!(error = %e, "the bucket broke off a response");
                unavailable(format!("{place}: broke off after {at} bytes"))
            })?,
            Transport::File(file) => {
                let mut piece = BytesMut::with_capacity(PIECE);
                let read = file.read_buf(&mut piece).await;
                read.map_err(|e| unavailable(format!("{place}: {e}")))?;
                Some(piece.freeze()).filter(|piece| !piece.is_empty())
            }
        };
        self.at += chunk.as_ref().map_or(0, |c| c.len() as u64);
        self.check_bounds()?;
        Ok(chunk)
    }

    /// Reads the rest into memory.
    ///
    /// # Errors
    /// As [`ByteStream::chunk`].
    pub async fn read(mut self) -> Result<Vec<u8>, FetchError> {
        let mut bytes = Vec::new();
        while let Some(chunk) = self.chunk().await? {
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }
}

fn check_bounds(place: &str, at_least: u64, most: u64) -> Result<(), FetchError> {
    if at_least <= most {
        return Ok(());
    }
    Err(FetchError::TooLong {
        place: place.to_owned(),
        at_least,
        most,
    })
}

/// Codings that leave the bytes as they are. S3 stores `aws-chunked` with some objects, a trace of their
/// upload.
const UNCODED: [&str; 4] = ["", "identity", "chunked", "aws-chunked"];
/// Codings that messages name; other words of a server are not repeated.
const CODINGS: [&str; 6] = ["gzip", "x-gzip", "deflate", "br", "zstd", "compress"];

/// The first coding that changes the bytes, if there is one.
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

/// Refuses encoded content. `Unavailable`, because the server ignored the request for identity.
pub(super) fn uncoded<'a>(
    place: &str,
    said: impl Iterator<Item = &'a str>,
) -> Result<(), FetchError> {
    match coding(said) {
        None => Ok(()),
        Some(coding) => Err(unavailable(format!(
            "{place}: the answer is coded ({coding}), but only identity is accepted; serve the bytes unencoded"
        ))),
    }
}

/// The values of a header; one that is not text reads as "unreadable".
fn texts(headers: &HeaderMap, name: impl AsHeaderName) -> impl Iterator<Item = &str> {
    let values = headers.get_all(name).into_iter();
    values.map(|value| value.to_str().unwrap_or("unreadable"))
}

/// The first offset in a `Content-Range` header such as `bytes 100-199/200`.
fn begins_at(headers: &HeaderMap) -> Option<u64> {
    let range = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    let (from, _) = range.strip_prefix("bytes ")?.split_once('-')?;
    from.parse().ok()
}

pub(super) fn kind(error: &reqwest::Error) -> &'static str {
    if error.is_connect() {
        "cannot connect"
    } else if error.is_timeout() {
        "timed out"
    } else {
        "connection failed"
    }
}
