//! Getting a manifest and the files it names: from the place that the configuration names, or from
//! mirrors that it allows; resumed where they broke off, and used only with the right digest.

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::io::{AsyncWriteExt, BufWriter};
use url::Url;

use super::route::Step;
use crate::config::CandidatesConfig;
use crate::fetch::pace::Pace;
use crate::fetch::{ByteStream, Downloader, FetchError, Revision};
use crate::protocol::update_manifest::MAX_BYTES;

/// A place that sends nothing for so long is left for the next, and one that has not sent a manifest or a
/// signature by then; how slow it may be with a file is said by `candidates.min_rate`.
const STALL: Duration = Duration::from_secs(30);
/// What is written to the disk at once.
const PIECE: usize = 1 << 20;
/// A signature is a line.
const SIGNATURE_BYTES: u64 = 4096;

/// Why a file is not here.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// The disk refuses.
    #[error("{0}")]
    Disk(std::io::Error),
    /// No mirror had it; why, of each.
    #[error("{}", .0.join("; "))]
    Mirrors(Vec<String>),
}

/// How a download goes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// So many came.
    Came(u64),
    /// So many that were here are thrown away, and have to come again.
    Again(u64),
}

/// A manifest as it was published.
#[derive(Debug)]
pub struct Published {
    /// Its exact bytes.
    pub bytes: Vec<u8>,
    /// To ask for changes only.
    pub revision: Option<Revision>,
}

/// The places that updates may come from.
#[derive(Debug)]
pub struct Mirrors {
    manifest: Url,
    /// For what lies beside the manifest: the operator named it, wherever it is.
    own: Downloader,
    /// For everything else: what candidates may be fetched from.
    others: Downloader,
    /// The least that a server may send, bytes per second.
    min_rate: u64,
}

impl Mirrors {
    /// Prepares for a manifest at this URL.
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

    /// The manifest, unless it is still the one with this revision.
    ///
    /// # Errors
    /// When it does not come.
    pub async fn manifest(
        &self,
        known: Option<&Revision>,
    ) -> Result<Option<Published>, FetchError> {
        let url = self.own.check(self.manifest.as_str())?;
        let opening = self.own.open_if_changed(url, known, MAX_BYTES);
        let Some(body) = in_time(opening).await? else {
            return Ok(None);
        };
        let revision = body.revision().cloned();
        let bytes = in_time(body.read()).await?;
        Ok(Some(Published { bytes, revision }))
    }

    /// The signature beside the manifest.
    ///
    /// # Errors
    /// When it does not come.
    pub async fn signature(&self) -> Result<Vec<u8>, FetchError> {
        let mut beside = self.manifest.clone();
        beside.set_path(&format!("{}.sig", self.manifest.path()));
        let url = self.own.check(beside.as_str())?;
        let body = in_time(self.own.open(url, 0, SIGNATURE_BYTES)).await?;
        in_time(body.read()).await
    }

    /// Gets a step's file, going on where an earlier try ended; `told` hears how it goes.
    ///
    /// # Errors
    /// As the variants say. What came so far is kept for the next try, unless it is wrong.
    pub async fn fetch(
        &self,
        step: Step<'_>,
        part: &Path,
        told: impl Fn(News),
    ) -> Result<(), DownloadError> {
        let mut here = Part::read(part, step.size())
            .await
            .map_err(DownloadError::Disk)?;
        let mut refusals = Vec::new();
        for text in step.urls() {
            match self.complete(text, step, &mut here, &told).await {
                Ok(()) => return Ok(()),
                Err(Broken::Disk(error)) => return Err(DownloadError::Disk(error)),
                Err(Broken::Mirror(error)) => {
                    tracing::warn!(%error, bytes = here.at, "a mirror failed");
                    refusals.push(error.to_string());
                }
            }
        }
        // A mirror that is left often enough gives the file all the same, as long as nothing is lost.
        here.file.flush().await.map_err(DownloadError::Disk)?;
        Err(DownloadError::Mirrors(refusals))
    }

    /// Fetches what is missing; where an earlier mirror may be to blame for a wrong digest, everything.
    async fn complete(
        &self,
        text: &str,
        step: Step<'_>,
        here: &mut Part,
        told: &impl Fn(News),
    ) -> Result<(), Broken> {
        loop {
            let resumed = here.at > 0;
            if here.at < step.size() {
                self.fetch_rest(text, step, here, told).await?;
            }
            let at = here.at;
            match here.finish(step).await? {
                None => return Ok(()),
                Some(wrong) if resumed => {
                    told(News::Again(at));
                    tracing::warn!(url = text, wrong, "fetched again as a whole")
                }
                Some(wrong) => {
                    told(News::Again(at));
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
        here: &mut Part,
        told: &impl Fn(News),
    ) -> Result<(), Broken> {
        let (getter, url) = self.locate(text)?;
        let mut body: ByteStream = in_time(getter.open(url, here.at, step.size())).await?;
        if body.from() != here.at {
            told(News::Again(here.at));
            here.restart().await?;
        }
        let mut pace = Pace::new(self.min_rate);
        while let Some(chunk) = in_time(pace.next(&mut body)).await? {
            here.append(&chunk).await?;
            told(News::Came(chunk.len() as u64));
        }
        if here.at == step.size() {
            return Ok(());
        }
        let (place, at, size) = (body.place(), here.at, step.size());
        let why = format!("{place}: ended after {at} bytes of {size}");
        Err(FetchError::Unavailable(why).into())
    }

    fn locate(&self, text: &str) -> Result<(&Downloader, Url), FetchError> {
        let url = self.manifest.join(text);
        let url = url.map_err(|e| FetchError::Forbidden(format!("{text:?}: {e}")))?;
        let getter = if self.own.covers(&url) {
            &self.own
        } else {
            &self.others
        };
        let checked = getter.check(url.as_str());
        let named = |why: FetchError| {
            FetchError::Forbidden(format!(
                "{text:?}: {why}, nor does it lie beside the manifest"
            ))
        };
        checked.map(|url| (getter, url)).map_err(named)
    }
}

enum Broken {
    Disk(std::io::Error),
    Mirror(FetchError),
}

impl From<FetchError> for Broken {
    fn from(error: FetchError) -> Self {
        Self::Mirror(error)
    }
}

impl From<std::io::Error> for Broken {
    fn from(error: std::io::Error) -> Self {
        Self::Disk(error)
    }
}

async fn in_time<T>(work: impl Future<Output = Result<T, FetchError>>) -> Result<T, FetchError> {
    let late = || FetchError::Unavailable(format!("did not come within {} s", STALL.as_secs()));
    tokio::time::timeout(STALL, work)
        .await
        .map_err(|_| late())?
}

/// A file on its way, and the digest of what is here of it.
struct Part {
    file: BufWriter<tokio::fs::File>,
    at: u64,
    digest: Sha256,
}

impl Part {
    /// What an earlier try has left is hashed: nothing on the disk is trusted.
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
            let file = BufWriter::with_capacity(PIECE, tokio::fs::File::from_std(file));
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

    /// Writes what is buffered and compares the digest; what is wrong is thrown away.
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

/// Whether the disk has no room.
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

    /// Sends the file, byte by byte from where the path says `slow`, else at once from where it is asked.
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

    /// Mirrors of which one drips, and the place that they are at.
    async fn mirrors() -> Arc<Mirrors> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let place = format!("http://{}/", listener.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // Who was left cannot send any more.
                tokio::spawn(async move { drop(answer(stream).await) });
            }
        });
        let config = Config::load(&Layers::default()).unwrap();
        let manifest = format!("{place}m.json").parse().unwrap();
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
    async fn a_mirror_that_drips_is_left_for_the_next_and_what_it_gave_is_kept() {
        let (folder, mirrors) = (tempfile::tempdir().unwrap(), mirrors().await);
        let fetch = async |name: &str, urls: &[&str]| {
            let (part, full) = (folder.path().join(name), file(urls));
            let again = |news| assert!(matches!(news, News::Came(_)), "{news:?}");
            let fetched = mirrors.fetch(Step::Full(&full), &part, again);
            let fetched = tokio::time::timeout(Duration::from_secs(20), fetched).await;
            let here = std::fs::read(&part).unwrap();
            (fetched.expect("it does not wait for ever"), here)
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
