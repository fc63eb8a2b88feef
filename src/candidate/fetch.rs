//! Getting a candidate's bytes: inline or from a URL, within size and time, and with the digest the
//! job names.

use std::sync::Arc;

use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::config::{CandidatesConfig, format_duration};
use crate::failure::{Code, Failure};
use crate::fetch::{FetchError, Getter};
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
    getter: Getter,
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
        let getter = Getter::new(&config.allow, config.allow_private)?;
        Ok(Self {
            config: Arc::new(config),
            getter,
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
        let url = self.getter.check(text).map_err(refusal)?;
        let body = self.getter.open(url, 0, expected).await.map_err(refusal)?;
        body.read().await.map_err(refusal)
    }
}

fn refusal(error: FetchError) -> Failure {
    match error {
        FetchError::Forbidden(why) => {
            Failure::new(Code::CandidateUrlForbidden, format!("candidate.url: {why}"))
        }
        FetchError::Unavailable(why) => unavailable(why),
        // More bytes than the job names: the claim is wrong, whatever the limits are.
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
