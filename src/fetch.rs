//! Downloads for candidates and updates alike: only from the prefixes that the configuration allows,
//! only from an address that was checked, without redirects, in pieces, and never more bytes than were
//! announced. [`allow`] holds the rules, [`resolver`] applies them to DNS, [`downloader`] opens URLs,
//! [`stream`] reads what they hold, and [`pace`] gives up on slow servers.

mod allow;
#[cfg(feature = "buckets")]
mod bucket;
mod downloader;
#[cfg(not(feature = "buckets"))]
mod no_bucket;
pub mod pace;
mod resolver;
mod stream;

#[cfg(not(feature = "buckets"))]
use no_bucket as bucket;
use reqwest::header::HeaderValue;
use url::Url;

pub use downloader::Downloader;
pub use stream::ByteStream;

/// Why a download failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// The configuration does not allow this URL.
    #[error("{0}")]
    Forbidden(String),
    /// The server did not deliver; a later try may succeed.
    #[error("{0}")]
    Unavailable(String),
    /// The server sent less than `candidates.min_rate`.
    #[error("{0}")]
    Slow(String),
    /// The content is larger than announced.
    #[error("{place}: at least {at_least} bytes, not the {most} that were announced")]
    TooLong {
        /// Scheme, host and path, or a local path.
        place: String,
        /// Bytes seen or declared so far.
        at_least: u64,
        /// The announced size in bytes.
        most: u64,
    },
}

fn forbidden(message: impl Into<String>) -> FetchError {
    FetchError::Forbidden(message.into())
}

fn unavailable(message: impl Into<String>) -> FetchError {
    FetchError::Unavailable(message.into())
}

/// Identifies one version of the content behind a URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Revision {
    /// The HTTP `ETag`.
    Tag(HeaderValue),
    /// The HTTP `Last-Modified` date.
    Date(HeaderValue),
    /// A file's size in bytes and its modification time.
    File(u64, std::time::SystemTime),
    /// The entity tag of an object in a bucket.
    Object(String),
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
