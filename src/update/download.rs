//! Downloads a manifest and the files that it names, from the URL that the configuration names or from
//! mirrors that it allows. Downloads are resumed, and used only if the digest is right.

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::io::{AsyncWriteExt, BufWriter};
use url::Url;

use super::route::Step;
use crate::config::CandidatesConfig;
use crate::fetch::pace::Pace;
use crate::fetch::{ByteStream, Downloader, FetchError, Revision, place};
use crate::protocol::update_manifest::MAX_BYTES;

/// The time limit for a manifest, for a signature, and for a mirror to send anything at all. How slowly it
/// may send a file is up to `candidates.min_rate`.
const STALL: Duration = Duration::from_secs(30);
/// Bytes written to the disk at once.
const WRITE_BUFFER: usize = 1 << 20;
/// A signature is one line.
const SIGNATURE_BYTES: u64 = 4096;

/// Why a file could not be downloaded.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// The disk refuses.
    #[error("{0}")]
    Disk(std::io::Error),
    /// No mirror sent it; the reason of each.
    #[error("{}", .0.join("; "))]
    Mirrors(Vec<String>),
}

/// The progress of a download, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Arrived.
    Received(u64),
    /// Thrown away, to be downloaded again.
    Discarded(u64),
}

/// A manifest as it was published.
#[derive(Debug)]
pub struct Published {
    /// The exact bytes, which the signature covers.
    pub bytes: Vec<u8>,
    /// For the next request: send it only if it has changed.
    pub revision: Option<Revision>,
}

/// Where updates may come from.
#[derive(Debug)]
pub struct Mirrors {
    manifest: Url,
    /// For files beside the manifest, whose URL the operator chose: allowed anywhere.
    own: Downloader,
    /// For all other files: allowed where candidates may be fetched from.
    others: Downloader,
    /// The lowest rate at which a mirror may send, in bytes per second.
    min_rate: u64,
}

impl Mirrors {
    /// Prepares for the manifest at this URL.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn new(manifest: Url, candidates: &CandidatesConfig) -> anyhow::Result<Self> {
        let mut folder = manifest.join(".")?;
        folder.set_query(None);
        Ok(Self {
            own: Downloader::new(&[folder.into()], true)?,
            others: Downloader::new(&candidates.allow, candidates.allow_private)?,
            min_rate: candidates.min_rate,
            manifest,
        })
    }

    /// The manifest; None if it still has this revision.
    ///
    /// # Errors
    /// When it cannot be downloaded.
    pub async fn manifest(
        &self,
        known: Option<&Revision>,
    ) -> Result<Option<Published>, FetchError> {
        let url = self.own.check(self.manifest.as_str())?;
        let opening = self.own.open_if_changed(url, known, MAX_BYTES);
        let Some(body) = in_time(&place(&self.manifest), opening).await? else {
            return Ok(None);
        };
        let revision = body.revision().cloned();
        let bytes = in_time(&place(&self.manifest), body.read()).await?;
        Ok(Some(Published { bytes, revision }))
    }

    /// The signature beside the manifest.
    ///
    /// # Errors
    /// When it cannot be downloaded.
    pub async fn signature(&self) -> Result<Vec<u8>, FetchError> {
        let mut beside = self.manifest.clone();
        beside.set_path(&format!("{}.sig", self.manifest.path()));
        let url = self.own.check(beside.as_str())?;
        let body = in_time(&place(&beside), self.own.open(url, 0, SIGNATURE_BYTES)).await?;
        in_time(&place(&beside), body.read()).await
    }

    /// Downloads a step's file from the first of these mirrors that has it, resuming an earlier attempt; `report` is
    /// called with its progress.
    ///
    /// # Errors
    /// As the variants say. What has arrived is kept for the next attempt, unless it is wrong.
    pub async fn fetch(
        &self,
        step: Step<'_>,
        urls: &[String],
        part: &Path,
        report: impl Fn(Progress),
    ) -> Result<(), DownloadError> {
        let mut partial = PartialFile::read(part, step.size())
            .await
            .map_err(DownloadError::Disk)?;
        let mut failures = Vec::new();
        for text in urls {
            match self.complete(text, step, &mut partial, &report).await {
                Ok(()) => return Ok(()),
                Err(FetchFailure::Disk(error)) => return Err(DownloadError::Disk(error)),
                Err(FetchFailure::Mirror(error)) => {
                    if urls.len() > 1 {
                        tracing::warn!(%error, bytes = partial.at, "a mirror failed");
                    }
                    failures.push(error.to_string());
                }
            }
        }
        // Nothing that arrived is lost: even a bad mirror delivers the file over several attempts.
        partial.file.flush().await.map_err(DownloadError::Disk)?;
        Err(DownloadError::Mirrors(failures))
    }

    /// Fetches what is missing, and then, if the digest is wrong, everything: what came before may be to
    /// blame.
    async fn complete(
        &self,
        text: &str,
        step: Step<'_>,
        partial: &mut PartialFile,
        report: &impl Fn(Progress),
    ) -> Result<(), FetchFailure> {
        loop {
            let resumed = partial.at > 0;
            if partial.at < step.size() {
                self.fetch_rest(text, step, partial, report).await?;
            }
            let at = partial.at;
            match partial.finish(step).await? {
                None => return Ok(()),
                Some(wrong) if resumed => {
                    report(Progress::Discarded(at));
                    tracing::warn!(url = text, wrong, "downloading the whole file again")
                }
                Some(wrong) => {
                    report(Progress::Discarded(at));
                    let why = FetchError::Unavailable(format!("{text}: {wrong}"));
                    return Err(why.into());
                }
            }
        }
    }

    async fn fetch_rest(
        &self,
        text: &str,
        step: Step<'_>,
        partial: &mut PartialFile,
        report: &impl Fn(Progress),
    ) -> Result<(), FetchFailure> {
        let (downloader, url) = self.locate(text)?;
        let at = place(&url);
        let mut body: ByteStream =
            in_time(&at, downloader.open(url, partial.at, step.size())).await?;
        if body.from() != partial.at {
            report(Progress::Discarded(partial.at));
            partial.restart().await?;
        }
        let mut pace = Pace::new(self.min_rate);
        while let Some(chunk) = in_time(&at, pace.next(&mut body)).await? {
            partial.append(&chunk).await?;
            report(Progress::Received(chunk.len() as u64));
        }
        if partial.at == step.size() {
            return Ok(());
        }
        let (place, at, size) = (body.place(), partial.at, step.size());
        let why = format!("{place}: ended after {at} bytes of {size}");
        Err(FetchError::Unavailable(why).into())
    }

    fn locate(&self, text: &str) -> Result<(&Downloader, Url), FetchError> {
        let url = self.manifest.join(text);
        let url = url.map_err(|e| FetchError::Forbidden(format!("{text:?}: {e}")))?;
        let downloader = if self.own.covers(&url) {
            &self.own
        } else {
            &self.others
        };
        let checked = downloader.check(url.as_str());
        let named = |why: FetchError| {
            FetchError::Forbidden(format!(
                "{text:?}: {why}, and it is not beside the manifest"
            ))
        };
        checked.map(|url| (downloader, url)).map_err(named)
    }
}

#[derive(Debug, thiserror::Error)]
#[error(transparent)]
enum FetchFailure {
    Disk(#[from] std::io::Error),
    Mirror(#[from] FetchError),
}

/// Bounds the time that a place may take.
async fn in_time<T>(
    place: &str,
    work: impl Future<Output = Result<T, FetchError>>,
) -> Result<T, FetchError> {
    let late = || {
        FetchError::Unavailable(format!(
            "{place}: nothing arrived within {} s",
            STALL.as_secs()
        ))
    };
    tokio::time::timeout(STALL, work)
        .await
        .map_err(|_| late())?
}

/// A file that is partly downloaded, and the digest of what has arrived.
struct PartialFile {
    file: BufWriter<tokio::fs::File>,
    at: u64,
    digest: Sha256,
}

impl PartialFile {
    /// Opens what an earlier attempt left, and hashes it: nothing on the disk is trusted.
    async fn read(path: &Path, size: u64) -> std::io::Result<Self> {
        let path = path.to_owned();
        let read = move || {
            let mut options = std::fs::OpenOptions::new();
            let mut file = options.read(true).append(true).create(true).open(&path)?;
            let mut digest = Sha256::new();
            let mut at = std::io::copy(&mut file, &mut digest)?;
            if at > size {
                file.set_len(0)?;
                (at, digest) = (0, Sha256::new());
            }
            let file = BufWriter::with_capacity(WRITE_BUFFER, tokio::fs::File::from_std(file));
            Ok(Self { file, at, digest })
        };
        tokio::task::spawn_blocking(read)
            .await
            .map_err(std::io::Error::other)?
    }

    async fn append(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.file.write_all(bytes).await?;
        self.digest.update(bytes);
        self.at += bytes.len() as u64;
        Ok(())
    }

    async fn restart(&mut self) -> std::io::Result<()> {
        self.file.flush().await?;
        self.file.get_ref().set_len(0).await?;
        (self.at, self.digest) = (0, Sha256::new());
        Ok(())
    }

    /// Flushes the file and compares the digest. A wrong file is emptied; returns what is wrong.
    async fn finish(&mut self, step: Step<'_>) -> std::io::Result<Option<String>> {
        self.file.flush().await?;
        let found = hex::encode(self.digest.clone().finalize());
        if found == step.sha256() {
            return Ok(None);
        }
        self.restart().await?;
        let expected = step.sha256();
        Ok(Some(format!(
            "its SHA-256 is {found}, the manifest says {expected}"
        )))
    }
}

/// Whether the disk is full.
pub fn is_full(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Layers};
    use crate::protocol::update_manifest::FullWeights;
    use std::sync::Arc;
    use tokio::io::AsyncReadExt;
    use tokio::net::{TcpListener, TcpStream};

    const FILE: [u8; 1000] = [7; 1000];

    /// Sends the file from the byte that is asked for: at once, or byte by byte if the path is `slow`.
    async fn answer(mut stream: TcpStream) -> std::io::Result<()> {
        let mut request = vec![0; 4096];
        let read = stream.read(&mut request).await?;
        let request = String::from_utf8_lossy(&request[..read]).to_ascii_lowercase();
        let from = request.split_once("range: bytes=").map_or(0, |(_, rest)| {
            rest.split_once('-').unwrap().0.parse().unwrap()
        });
        let (rest, last) = (&FILE[from..], FILE.len() - 1);
        let length = rest.len();
        let head = format!(
            "HTTP/1.1 206 X\r\nConnection: close\r\nContent-Length: {length}\r\n\
             Content-Range: bytes {from}-{last}/{}\r\n\r\n",
            FILE.len()
        );
        let head = match from {
            0 => head.replace("206", "200"),
            _ => head,
        };
        stream.write_all(head.as_bytes()).await?;
        if !request.starts_with("get /slow") {
            return stream.write_all(rest).await;
        }
        for byte in rest {
            stream.write_all(&[*byte]).await?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Mirrors, one of which is slow.
    async fn mirrors() -> Arc<Mirrors> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}/", listener.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // A client that has left cannot be sent anything.
                tokio::spawn(async move { drop(answer(stream).await) });
            }
        });
        let config = Config::load(&Layers::default()).unwrap();
        let manifest = format!("{base}m.json").parse().unwrap();
        Arc::new(Mirrors::new(manifest, &config.candidates).unwrap())
    }

    fn file(urls: &[&str]) -> FullWeights {
        FullWeights {
            version: 2,
            urls: urls.iter().map(|url| (*url).to_owned()).collect(),
            sha256: hex::encode(Sha256::digest(FILE)),
            size: FILE.len() as u64,
            graph_sha256: "0".repeat(64),
            canary: None,
        }
    }

    #[tokio::test]
    async fn a_slow_mirror_is_left_for_the_next_and_what_it_sent_is_kept() {
        let (folder, mirrors) = (tempfile::tempdir().unwrap(), mirrors().await);
        let fetch = async |name: &str, urls: &[&str]| {
            let (part, full) = (folder.path().join(name), file(urls));
            let received =
                |progress| assert!(matches!(progress, Progress::Received(_)), "{progress:?}");
            let fetched = mirrors.fetch(Step::Full(&full), &full.urls, &part, received);
            let fetched = tokio::time::timeout(Duration::from_secs(20), fetched).await;
            let here = std::fs::read(&part).unwrap();
            (fetched.expect("a slow mirror is left in time"), here)
        };
        let alone = fetch("alone", &["slow"]);
        let (alone, followed) = tokio::join!(alone, fetch("followed", &["slow", "quick"]));
        followed.0.unwrap();
        assert_eq!(followed.1, FILE);
        let why = alone.0.unwrap_err().to_string();
        assert!(why.contains("candidates.min_rate = 16384 bytes"), "{why}");
        assert!((20..=100).contains(&alone.1.len()), "{}", alone.1.len());
    }
}
