//! A disk cache of fetched candidates by digest, so that a resent or redelivered job does not fetch
//! again. It evicts the least recently used first. Every read is hashed, so files need not be trusted,
//! synced or locked, and a disk error only means fetching again.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use lru::LruCache;
use sha2::{Digest, Sha256};

/// Prefix of files being written.
const PART: &str = "part-";

type Sha = [u8; 32];

/// A folder of cached candidates.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    folder: Arc<Path>,
    most: u64,
    kept: Arc<Mutex<Kept>>,
}

/// The index of the folder. All operations take constant time, since it may have 100,000 files.
#[derive(Debug)]
struct Kept {
    /// Bytes of each.
    sizes: LruCache<Sha, u64>,
    /// Their sum.
    taken: u64,
}

impl Kept {
    /// Adds an entry as the most recently used.
    fn put(&mut self, sha256: Sha, size: u64) {
        self.forget(sha256);
        self.sizes.put(sha256, size);
        self.taken = self.taken.saturating_add(size);
    }

    /// The least recently used entry, if another of this size does not fit beside it.
    fn excess(&self, most: u64, size: u64) -> Option<Sha> {
        let (oldest, _) = self.sizes.peek_lru()?;
        (self.taken.saturating_add(size) > most).then_some(*oldest)
    }

    fn forget(&mut self, sha256: Sha) -> Option<u64> {
        let size = self.sizes.pop(&sha256)?;
        self.taken = self.taken.saturating_sub(size);
        Some(size)
    }
}

impl Cache {
    /// Opens a cache of at most `most` bytes and evicts what exceeds it. The folder is created on the
    /// first write.
    pub(super) fn open(folder: PathBuf, most: u64) -> Self {
        let mut found: Vec<(SystemTime, Sha, u64)> = Vec::new();
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_str().unwrap_or_default();
            let mut sha256 = [0; 32];
            if name.starts_with(PART) {
                // Left behind by a process that died.
                drop(std::fs::remove_file(entry.path()));
            } else if hex::decode_to_slice(name, &mut sha256).is_ok()
                && let Ok(facts) = entry.metadata()
                && let Ok(used) = facts.modified()
            {
                found.push((used, sha256, facts.len()));
            }
        }
        found.sort_by_key(|(used, ..)| *used);
        let mut kept = Kept {
            sizes: LruCache::unbounded(),
            taken: 0,
        };
        for (_, sha256, size) in found {
            kept.put(sha256, size);
        }
        let cache = Self {
            folder: folder.into(),
            most,
            kept: Arc::new(Mutex::new(kept)),
        };
        if let Err(error) = cache.make_room(0) {
            let folder = cache.folder.display();
            tracing::warn!(%error, %folder, "the cache exceeds candidates.cache_bytes");
        }
        cache
    }

    /// The candidate, if it is cached and intact.
    pub(super) async fn read(&self, sha256: Sha) -> Option<Bytes> {
        let cache = self.clone();
        let read = move || cache.find(sha256);
        tokio::task::spawn_blocking(read).await.ok().flatten()
    }

    /// Caches a candidate under its computed digest; a disk error is only logged.
    pub(super) async fn write(&self, sha256: Sha, bytes: Bytes) {
        let cache = self.clone();
        let write = move || {
            if let Err(error) = cache.keep(sha256, &bytes) {
                let folder = cache.folder.display();
                tracing::warn!(%error, %folder, "cannot cache a candidate; it may be fetched again");
            }
        };
        drop(tokio::task::spawn_blocking(write).await);
    }

    fn find(&self, sha256: Sha) -> Option<Bytes> {
        // Removed from the index while it is read, so that it is not evicted meanwhile.
        let size = self.kept().forget(sha256)?;
        let path = self.path(sha256);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "cannot read a cached candidate; fetching it again");
                self.kept().put(sha256, size);
                return None;
            }
        };
        if Sha256::digest(&bytes)[..] != sha256 {
            tracing::warn!(path = %path.display(), "a cached candidate is corrupt; fetching it again");
            drop(std::fs::remove_file(&path));
            return None;
        }
        // The modification time records the last use for the next process.
        let file = std::fs::File::options().append(true).open(&path);
        drop(file.and_then(|file| file.set_modified(SystemTime::now())));
        self.kept().put(sha256, size);
        Some(bytes.into())
    }

    fn keep(&self, sha256: Sha, bytes: &[u8]) -> std::io::Result<()> {
        let size = bytes.len() as u64;
        if size > self.most {
            return Ok(());
        }
        std::fs::create_dir_all(&self.folder)?;
        self.make_room(size)?;
        let mut file = tempfile::Builder::new();
        let file = file.prefix(PART).tempfile_in(&self.folder)?;
        std::fs::write(&file, bytes)?;
        file.persist(self.path(sha256))?;
        self.kept().put(sha256, size);
        Ok(())
    }

    fn make_room(&self, size: u64) -> std::io::Result<()> {
        loop {
            // Not locked while the file is removed.
            let excess = self.kept().excess(self.most, size);
            let Some(oldest) = excess else {
                return Ok(());
            };
            match std::fs::remove_file(self.path(oldest)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => drop(self.kept().forget(oldest)),
            }
        }
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, sha256: Sha) -> PathBuf {
        self.folder.join(hex::encode(sha256))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sha(bytes: &[u8]) -> Sha {
        Sha256::digest(bytes).into()
    }

    fn keep(cache: &Cache, bytes: &[u8]) {
        cache.keep(sha(bytes), bytes).unwrap();
    }

    fn has(cache: &Cache, bytes: &[u8]) -> bool {
        cache.find(sha(bytes)).is_some_and(|found| found == bytes)
    }

    #[test]
    fn the_least_recently_used_go_first_and_the_budget_holds() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("made when needed");
        let cache = Cache::open(folder.clone(), 10);
        keep(&cache, b"aaaa");
        keep(&cache, b"bbbb");
        assert!(has(&cache, b"aaaa"));
        keep(&cache, b"cccc");
        assert!(has(&cache, b"aaaa") && has(&cache, b"cccc"));
        assert!(!has(&cache, b"bbbb"));
        keep(&cache, b"longer than 10 bytes");
        let sizes = std::fs::read_dir(&folder).unwrap();
        let sizes = sizes.map(|entry| entry.unwrap().metadata().unwrap().len());
        assert_eq!(sizes.sum::<u64>(), 8);
    }

    #[test]
    fn another_process_finds_it_and_nobody_takes_what_was_changed() {
        let folder = tempfile::tempdir().unwrap();
        keep(&Cache::open(folder.path().to_owned(), 100), b"candidate");
        let part = folder.path().join("part-of-one-that-died");
        std::fs::write(&part, b"cand").unwrap();
        let cache = Cache::open(folder.path().to_owned(), 100);
        assert!(has(&cache, b"candidate") && !part.exists());
        std::fs::write(cache.path(sha(b"candidate")), b"candidatE").unwrap();
        assert!(!has(&cache, b"candidate"));
        assert!(!cache.path(sha(b"candidate")).exists());
    }

    #[test]
    fn a_smaller_budget_holds_from_the_start() {
        let folder = tempfile::tempdir().unwrap();
        let open = |most| Cache::open(folder.path().to_owned(), most);
        let kept = || std::fs::read_dir(folder.path()).unwrap().count();
        let cache = open(10);
        keep(&cache, b"aaaa");
        keep(&cache, b"bbbb");
        open(10);
        assert_eq!(kept(), 2);
        open(4);
        assert_eq!(kept(), 1);
        open(0);
        assert_eq!(kept(), 0);
    }

    /// What it takes to keep one more where so many are known already, and one has to go.
    fn one_more(known: u64) -> std::time::Duration {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path().to_owned(), known);
        for number in 0..known {
            cache.kept().put(sha(&number.to_be_bytes()), 1);
        }
        let rounds = (0..50_u8).map(|round| {
            let began = std::time::Instant::now();
            cache.keep(sha(&[round]), &[round]).unwrap();
            cache.find(sha(&[round])).unwrap();
            began.elapsed()
        });
        // What else the machine does only makes it longer.
        rounds.min().unwrap()
    }

    #[test]
    fn to_keep_one_more_takes_no_longer_where_many_are_known() {
        let (few, many) = (one_more(1000), one_more(100_000));
        // With a list to search and to sum up it was 25 times as long.
        assert!(many < few * 8, "{few:?} of 1,000, {many:?} of 100,000");
    }
}
