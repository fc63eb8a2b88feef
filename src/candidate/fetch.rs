//! Gets a candidate's bytes, inline or from a URL, within the limits on size and time, and checks them
//! against the job's digest.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest, Sha256};
use url::Url;

use super::cache::Cache;
use crate::config::{CandidatesConfig, format_duration};
use crate::fetch::pace::Pace;
use crate::fetch::{ByteStream, Downloader, FetchError, Revision, place};
use crate::protocol::failure::{Code, Failure};
use crate::protocol::job::{Candidate, Source};
use crate::util::blocking;

/// A server must begin to respond within this time.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// How often a broken download resumes, if each attempt made progress.
const MOST_RESUMES: u32 = 8;

/// A candidate's bytes and their digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// As sent or fetched.
    pub bytes: Bytes,
    /// SHA-256 of these bytes.
    pub sha256: [u8; 32],
}

/// What a job says of its candidate's bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Claims {
    /// SHA-256.
    pub sha256: Option<[u8; 32]>,
    /// Size in bytes.
    pub size: Option<u64>,
}

impl Claims {
    fn checked(self, fetched: Fetched) -> Result<Fetched, Failure> {
        let (size, sha256) = (fetched.bytes.len() as u64, &fetched.sha256);
        let mismatch = |message: String| Failure::new(Code::CandidateDigestMismatch, message);
        if let Some(claimed) = self.size.filter(|claimed| *claimed != size) {
            let message = format!("{size} bytes, the job says {claimed}");
            return Err(mismatch(message).with("size", size));
        }
        if let Some(claimed) = self.sha256.filter(|claimed| claimed != sha256) {
            let found = hex::encode(sha256);
            let message = format!("SHA-256 is {found}, the job says {}", hex::encode(claimed));
            return Err(mismatch(message).with("sha256", found));
        }
        Ok(fetched)
    }
}

/// The SHA-256 of a candidate's bytes.
///
/// # Errors
/// When computing it panics.
pub async fn digest(bytes: Bytes) -> Result<[u8; 32], Failure> {
    let digest = blocking::by_size(bytes.len(), move || Sha256::digest(&bytes).into());
    let digest = digest.await;
    digest.ok_or_else(|| unavailable("the digest could not be computed; the worker's log says why"))
}

/// Fetches candidates within the configured limits.
#[derive(Debug, Clone)]
pub struct Fetcher {
    config: Arc<CandidatesConfig>,
    downloader: Downloader,
    cache: Option<Cache>,
}

fn unavailable(message: impl Into<String>) -> Failure {
    Failure::new(Code::CandidateUnavailable, message)
}

impl Fetcher {
    /// Creates the client, with a cache in `folder` if given.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn new(config: CandidatesConfig, folder: Option<PathBuf>) -> anyhow::Result<Self> {
        let downloader = Downloader::new(&config.allow, config.allow_private)?;
        // Opened even if caching is off, to remove what an earlier process cached.
        let cache = folder.map(|folder| Cache::open(folder, config.cache_bytes));
        Ok(Self {
            cache: cache.filter(|_| config.cache_bytes > 0),
            config: Arc::new(config),
            downloader,
        })
    }

    /// Gets the bytes and checks size and digest. `known` is the digest of inline bytes, if the caller
    /// computed it before.
    ///
    /// # Errors
    /// A typed failure that names the URL but never repeats what the server said.
    pub async fn fetch(
        &self,
        candidate: &Candidate,
        known: Option<[u8; 32]>,
    ) -> Result<Fetched, Failure> {
        let claims = Claims {
            sha256: candidate.sha256,
            size: candidate.size,
        };
        let data = match &candidate.source {
            Source::Url(url) => return self.fetch_url(url, claims).await,
            Source::Inline(data) => data,
        };
        let limit = ("candidates.max_inline_bytes", self.config.max_inline_bytes);
        let sizes = claims.size.into_iter().chain([data.len() as u64]);
        if let Some(size) = { sizes }.find(|size| *size > limit.1) {
            return Err(too_large(size, limit));
        }
        let bytes = data.clone();
        let sha256 = match known {
            Some(digest) => digest,
            None => digest(data.clone()).await?,
        };
        claims.checked(Fetched { bytes, sha256 })
    }

    /// Gets the bytes from the cache, else from their URL and into the cache.
    ///
    /// # Errors
    /// As [`Fetcher::fetch`].
    pub async fn fetch_url(&self, text: &str, claims: Claims) -> Result<Fetched, Failure> {
        let limit = ("candidates.max_bytes", self.config.max_bytes);
        if let Some(size) = claims.size.filter(|size| *size > limit.1) {
            return Err(too_large(size, limit));
        }
        // Before the cache: a forbidden URL is refused even if its bytes are cached.
        let url = self.downloader.check(text).map_err(refusal)?;
        let cache = self.cache.as_ref().zip(claims.sha256);
        if let Some((cache, sha256)) = cache
            && let Some(bytes) = cache.read(sha256).await
        {
            return claims.checked(Fetched { bytes, sha256 });
        }
        let timeout = self.config.fetch_timeout;
        let fetch = self.fetch_checked(url, claims, claims.size.unwrap_or(limit.1));
        let fetched = tokio::time::timeout(timeout, fetch).await.map_err(|_| {
            let timeout = format_duration(timeout);
            unavailable(format!(
                "not fetched within candidates.fetch_timeout = {timeout}"
            ))
        })??;
        if let Some((cache, sha256)) = cache {
            cache.write(sha256, fetched.bytes.clone()).await;
        }
        Ok(fetched)
    }

    async fn fetch_checked(&self, url: Url, claims: Claims, most: u64) -> Result<Fetched, Failure> {
        let mut download = Download::new(self.config.min_rate, most);
        download.proven = claims.sha256.is_some();
        download.complete(&self.downloader, &url, most).await?;
        claims.checked(Fetched {
            sha256: download.digest.finalize().into(),
            bytes: download.bytes.into(),
        })
    }
}

/// A download in progress.
struct Download {
    bytes: Vec<u8>,
    digest: Sha256,
    min_rate: u64,
    /// The version of the content that the bytes belong to.
    revision: Option<Revision>,
    /// Whether a digest check follows, which detects bytes of different versions.
    proven: bool,
}

impl Download {
    fn new(min_rate: u64, most: u64) -> Self {
        let mut bytes = Vec::new();
        // Reserves address space only: unwritten pages cost nothing, and a growing buffer would be copied.
        drop(bytes.try_reserve_exact(usize::try_from(most).unwrap_or(usize::MAX)));
        Self {
            bytes,
            digest: Sha256::new(),
            min_rate,
            revision: None,
            proven: false,
        }
    }

    /// Downloads everything and resumes after a break, as long as each attempt makes progress.
    async fn complete(
        &mut self,
        downloader: &Downloader,
        url: &Url,
        most: u64,
    ) -> Result<(), Failure> {
        for resumed in 1.. {
            let before = self.bytes.len();
            match self.fetch_rest(downloader, url, most).await {
                Err(FetchError::Unavailable(why))
                    if self.bytes.len() > before && resumed <= MOST_RESUMES =>
                {
                    tracing::debug!(why, "resuming a download that broke off");
                }
                outcome => return outcome.map_err(refusal),
            }
        }
        Ok(())
    }

    /// Whether a response with this revision continues the bytes received so far.
    fn continues(&self, revision: Option<&Revision>) -> bool {
        match (&self.revision, revision) {
            (Some(known), Some(given)) => known == given,
            (None, None) => self.proven,
            (Some(_), None) | (None, Some(_)) => false,
        }
    }

    async fn fetch_rest(
        &mut self,
        downloader: &Downloader,
        url: &Url,
        most: u64,
    ) -> Result<(), FetchError> {
        let here = self.bytes.len() as u64;
        let mut body = answer(downloader, url, here, most).await?;
        if body.from() > 0 && !self.continues(body.revision()) {
            body = answer(downloader, url, 0, most).await?;
        }
        if body.from() != here {
            self.bytes.clear();
            self.digest = Sha256::new();
        }
        self.revision = body.revision().cloned();
        let mut pace = Pace::new(self.min_rate);
        while let Some(chunk) = pace.next(&mut body).await? {
            self.digest.update(&chunk);
            self.bytes.extend_from_slice(&chunk);
        }
        Ok(())
    }
}

async fn answer(
    downloader: &Downloader,
    url: &Url,
    from: u64,
    most: u64,
) -> Result<ByteStream, FetchError> {
    let opening = downloader.open(url.clone(), from, most);
    let opened = tokio::time::timeout(ANSWER_WITHIN, opening).await;
    opened.unwrap_or_else(|_| {
        let (place, within) = (place(url), format_duration(ANSWER_WITHIN));
        let why = format!("{place}: no answer within {within}");
        Err(FetchError::Unavailable(why))
    })
}

fn refusal(error: FetchError) -> Failure {
    match error {
        FetchError::Forbidden(why) => {
            Failure::new(Code::CandidateUrlForbidden, format!("candidate.url: {why}"))
        }
        FetchError::Unavailable(why) | FetchError::Slow(why) => unavailable(why),
        // The content is larger than the job claims, so the claim is wrong whatever the limits are.
        FetchError::TooLong {
            place,
            at_least,
            most,
        } => {
            let message = format!("{place}: at least {at_least} bytes, the job says {most}");
            Failure::new(Code::CandidateDigestMismatch, message).with("size", most)
        }
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
