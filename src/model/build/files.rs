//! The files of a package, written beside the place where it is to be, or in a hidden folder inside
//! it, and moved there when it is whole: a refusal leaves nothing behind, and neither does a signal.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::super::checkpoint::{self, Stored};
use super::Tensor;
use crate::model::manifest::{FileDigest, GraphFile, Objective, PackageError, ShardFile};
use crate::model::onnx::{External, externals, plain_location, relocate};
use crate::model::package::MANIFEST;
use crate::model::shard::parse_shard;
use crate::model::tensor::Dtype;

const GRAPH: &str = "model.onnx";
const WEIGHTS: &str = "weights.safetensors";
const SHARDS: &str = "shards";
/// Where an export's own files go whose names a package uses itself.
const EXTERNAL: &str = "external";
/// What to do where something is already.
const CHOOSE: &str = "packages are immutable, choose a new directory";

/// What the hidden folders are called in which packages are made.
const STAGING: &str = ".scorer-package-";

/// The folder of a package that is not finished yet, for whoever ends the process before it is.
#[derive(Debug, Clone, Default)]
pub struct Unfinished(Arc<Mutex<Option<TempDir>>>);

impl Unfinished {
    /// Removes the folder. Until what is returned is dropped, whoever makes the package waits, in
    /// the middle of nothing: a package that is being moved to its place is moved first.
    #[must_use]
    pub fn remove(&self) -> impl Sized {
        let mut folder = self.lock();
        if let Some(folder) = folder.take().map(TempDir::keep) {
            // Under this name nobody writes on while it is removed, and nobody makes it again.
            let gone = folder.with_extension("gone");
            if std::fs::rename(&folder, &gone).is_ok() {
                // A file that was just being made can be in the way, once.
                let _removed = (0..3).any(|_| std::fs::remove_dir_all(&gone).is_ok());
            }
        }
        folder
    }

    fn lock(&self) -> MutexGuard<'_, Option<TempDir>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a package is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// In this empty folder, which may be a mount point, or lie where nothing else can be made.
    Inside(PathBuf),
    /// As this folder, which is not there yet.
    New {
        /// The folder.
        out: PathBuf,
        /// The nearest folder above it that is there.
        above: PathBuf,
    },
}

impl Place {
    /// # Errors
    /// When something is there already, or nothing can be.
    fn find(out: &Path) -> Result<Self, PackageError> {
        let refuse = |why: String| Err(PackageError(format!("--out {}: {why}", out.display())));
        // Without what says nothing: `a/` may be a file, and nothing can be renamed to `a/.`.
        let out: &Path = &out.components().collect::<PathBuf>();
        for above in out.ancestors() {
            let here = if above.as_os_str().is_empty() {
                Path::new(".")
            } else {
                above
            };
            match std::fs::metadata(here) {
                Ok(found) if !found.is_dir() => {
                    return refuse(format!("{} is a file; {CHOOSE}", here.display()));
                }
                Ok(_) if above == out && above == here => {
                    check_empty(out, None)?;
                    let inside = out.canonicalize().map_err(|e| failed(out, &e))?;
                    return Ok(Self::Inside(inside));
                }
                Ok(_) => {
                    let below = out.strip_prefix(above).unwrap_or(out);
                    let named = |part| matches!(part, Component::Normal(_) | Component::CurDir);
                    if out.file_name().is_none() || !below.components().all(named) {
                        return refuse("names no folder that can be made".to_owned());
                    }
                    let out = out.to_owned();
                    let above = here.to_owned();
                    return Ok(Self::New { out, above });
                }
                Err(e) if is_missing(&e) => {
                    if let Ok(target) = std::fs::read_link(here) {
                        let (link, target) = (here.display(), target.display());
                        return refuse(format!(
                            "{link} is a symbolic link to {target}, which is not there; make that folder, or choose another"
                        ));
                    }
                }
                Err(e) => return refuse(format!("{}: {e}", here.display())),
            }
        }
        refuse("is below no folder".to_owned())
    }

    /// Where the hidden folder is made.
    fn folder(&self) -> &Path {
        match self {
            Self::Inside(out) => out,
            Self::New { above, .. } => above,
        }
    }

    /// Puts what is in `made`, inside of `staging`, here.
    fn fill(&self, made: &Path, staging: &Path) -> Result<(), PackageError> {
        match self {
            Self::Inside(out) => {
                check_empty(out, staging.file_name())?;
                move_up(made, out)
            }
            Self::New { out, .. } => {
                let fail = |e: std::io::Error| failed(out, &e);
                if let Some(parent) = out.parent() {
                    std::fs::create_dir_all(parent).map_err(fail)?;
                }
                if out.exists() {
                    check_empty(out, None)?;
                }
                std::fs::rename(made, out).map_err(fail)
            }
        }
    }
}

/// A package under construction.
pub(super) struct Staging {
    dir: PathBuf,
    place: Place,
    unfinished: Unfinished,
}

impl Staging {
    /// Begins on the file system of `out`.
    ///
    /// # Errors
    /// When `out` holds anything, or cannot be written to.
    pub(super) fn begin(out: &Path, unfinished: &Unfinished) -> Result<Self, PackageError> {
        let place = Place::find(out)?;
        let mut begun = unfinished.lock();
        let folder = tempfile::Builder::new()
            .prefix(STAGING)
            .tempdir_in(place.folder());
        let folder = folder.map_err(|e| {
            let (out, at) = (out.display(), place.folder().display());
            PackageError(format!("--out {out}: nothing can be written in {at}: {e}"))
        })?;
        // The outer folder is its maker's alone; this one has the usual rights.
        let dir = folder.path().join("package");
        make_folder(&dir)?;
        *begun = Some(folder);
        drop(begun);
        Ok(Self {
            dir,
            place,
            unfinished: unfinished.clone(),
        })
    }

    /// Where the files are meanwhile.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Puts the package in its place.
    ///
    /// # Errors
    /// When there is something by now, or the disk refuses.
    pub(super) fn finish(self) -> Result<(), PackageError> {
        // A signal waits until all of it is there.
        let folder = self.unfinished.lock();
        let staging = self.dir.parent().unwrap_or(&self.dir);
        let filled = self.place.fill(&self.dir, staging);
        drop(folder);
        filled
    }

    /// Writes the graph and copies its files of external data.
    ///
    /// # Errors
    /// Names the file that cannot be had, or that lies outside of the graph's folder.
    pub(super) fn graph(&self, model: Bytes, from: &Path) -> Result<GraphFile, PackageError> {
        let tensors = externals(&model).map_err(|e| PackageError(e.to_string()))?;
        let names = external_names(&tensors)?;
        for tensor in &tensors {
            check_external(tensor, from)?;
        }
        let model = match relocate(&model, &names).map_err(|e| PackageError(e.to_string()))? {
            Some(moved) => moved.into(),
            None => model,
        };
        let mut copied: BTreeMap<&str, FileDigest> = BTreeMap::new();
        for (location, name) in &names {
            if !copied.contains_key(name.as_str()) {
                let plain = plain_location(location).unwrap_or_default();
                let sha256 = self.copy(&from.join(plain), name)?;
                let file = name.clone();
                copied.insert(name, FileDigest { file, sha256 });
            }
        }
        let external: Vec<FileDigest> = copied.into_values().collect();
        let FileDigest { file, sha256 } = write(&self.dir().join(GRAPH), &model)?;
        Ok(GraphFile {
            file,
            sha256,
            external: (!external.is_empty()).then_some(external),
        })
    }

    /// Writes the weights.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(super) fn weights(&self, checkpoint: &[Tensor]) -> Result<FileDigest, PackageError> {
        let tensors = checkpoint
            .iter()
            .map(|t| (t.name.as_str(), t.dtype, t.shape.as_slice(), &t.bytes[..]));
        write_tensors(&self.dir().join(WEIGHTS), tensors)
    }

    /// Copies the shards, ascending by id; also says which files are none.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub(super) fn shards(
        &self,
        from: &Path,
        objective: Objective,
    ) -> Result<(Vec<ShardFile>, Vec<String>), PackageError> {
        let (files, notes) = find_shards(from)?;
        let mut shards = Vec::new();
        for (id, path) in files {
            let name = name_of(&path);
            let bytes = crate::model::files::map(&path)?;
            parse_shard(id, &name, &bytes, objective)?;
            let digest = write(&self.dir().join(SHARDS).join(&name), &bytes)?;
            shards.push(ShardFile {
                id,
                file: format!("{SHARDS}/{name}"),
                sha256: digest.sha256,
            });
        }
        Ok((shards, notes))
    }

    /// Copies a file of any size, with the rights of a new one, and gives its SHA-256.
    fn copy(&self, from: &Path, name: &str) -> Result<String, PackageError> {
        let mut folder = self.dir.clone();
        for part in Path::new(name).parent().into_iter().flat_map(Path::iter) {
            folder.push(part);
            make_folder(&folder)?;
        }
        let to = self.dir.join(name);
        let mut source = crate::model::files::open(from)?;
        let copied = File::create(&to).and_then(|mut file| std::io::copy(&mut source, &mut file));
        copied.map_err(|e| PackageError(format!("{} to {}: {e}", from.display(), to.display())))?;
        digest(&to)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        drop(self.unfinished.lock().take());
    }
}

fn failed(path: &Path, error: &std::io::Error) -> PackageError {
    PackageError(format!("{}: {error}", path.display()))
}

fn is_missing(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory)
}

/// # Errors
/// When the folder holds anything but what is `ours`.
fn check_empty(folder: &Path, ours: Option<&OsStr>) -> Result<(), PackageError> {
    for entry in std::fs::read_dir(folder).map_err(|e| failed(folder, &e))? {
        let name = entry.map_err(|e| failed(folder, &e))?.file_name();
        if Some(&*name) != ours {
            let (folder, name) = (folder.display(), name.display());
            return Err(PackageError(format!(
                "--out {folder}: is not empty, it holds {name}; {CHOOSE}"
            )));
        }
    }
    Ok(())
}

/// Moves what a folder holds to another on the same file system, the manifest last: a worker that
/// finds it finds all. Where that fails, nothing is left there.
fn move_up(from: &Path, to: &Path) -> Result<(), PackageError> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(from).map_err(|e| failed(from, &e))? {
        names.push(entry.map_err(|e| failed(from, &e))?.file_name());
    }
    names.sort_by_key(|name| name == MANIFEST);
    for (moved, name) in names.iter().enumerate() {
        if let Err(error) = std::fs::rename(from.join(name), to.join(name)) {
            for name in &names[..moved] {
                // Back to what is removed with all that it holds.
                drop(std::fs::rename(to.join(name), from.join(name)));
            }
            return Err(failed(&to.join(name), &error));
        }
    }
    Ok(())
}

/// Makes a folder in one that is there: not above, for what is removed must not come back.
fn make_folder(folder: &Path) -> Result<(), PackageError> {
    match std::fs::create_dir(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => Err(failed(folder, &e)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// What each file of external data is called in the package: as it is, unless a package has a file
/// of that name itself.
fn external_names(tensors: &[External]) -> Result<BTreeMap<String, String>, PackageError> {
    let mut names = BTreeMap::new();
    let mut plain: BTreeMap<&str, String> = BTreeMap::new();
    for External { location, at, .. } in tensors {
        let name = plain_location(location).ok_or_else(|| {
            PackageError(format!(
                "graph: {at}: its external data {location:?} is outside of the graph's folder; put the file beside the graph"
            ))
        })?;
        plain.insert(location, name);
    }
    let taken: BTreeSet<String> = plain.values().cloned().collect();
    for (location, name) in &plain {
        let first = name.split('/').next().unwrap_or_default();
        let mut free = name.clone();
        // On some file systems a name in capitals is the same.
        while [GRAPH, WEIGHTS, SHARDS, MANIFEST].contains(&first.to_lowercase().as_str())
            && (free == *name || taken.contains(&free))
        {
            free = format!("{EXTERNAL}/{free}");
        }
        names.insert((*location).to_owned(), free);
    }
    Ok(names)
}

/// A tensor whose file is shorter than it says would be refused by every worker.
fn check_external(tensor: &External, from: &Path) -> Result<(), PackageError> {
    let path = from.join(plain_location(&tensor.location).unwrap_or_default());
    let at = &tensor.at;
    let found = std::fs::metadata(&path).map_err(|e| {
        let path = path.display();
        PackageError(format!(
            "graph: {at}: its external data cannot be read: {path}: {e}; keep the export's files together"
        ))
    })?;
    crate::model::files::check_regular(&path, &found)
        .map_err(|e| PackageError(format!("graph: {at}: its external data: {e}")))?;
    let (start, end) = tensor.span;
    let length = usize::try_from(found.len()).unwrap_or(usize::MAX);
    if start.max(end.unwrap_or(start)) <= length {
        return Ok(());
    }
    let (path, end) = (path.display(), end.unwrap_or(start));
    Err(PackageError(format!(
        "graph: {at}: {path} has {length} bytes, and the tensor is in {start} to {end}; export it again, or copy the file again"
    )))
}

/// Files by the number in their name; what is no shard is said.
fn find_shards(from: &Path) -> Result<(BTreeMap<u64, PathBuf>, Vec<String>), PackageError> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(from).map_err(|e| failed(from, &e))? {
        paths.push(entry.map_err(|e| failed(from, &e))?.path());
    }
    paths.sort();
    let (mut shards, mut others) = (BTreeMap::new(), Vec::new());
    for path in paths {
        let name = name_of(&path);
        if name.starts_with(STAGING) {
            continue;
        }
        // Other systems leave files of their own: `._shard_1.safetensors`, `.DS_Store`.
        if name.starts_with('.') || !name.ends_with(".safetensors") || !path.is_file() {
            others.push(name);
            continue;
        }
        let id =
            shard_id(&name).map_err(|why| PackageError(format!("{}: {why}", path.display())))?;
        if let Some(first) = shards.insert(id, path) {
            return Err(PackageError(format!(
                "{}: {} and {name} are both shard {id}: the first number in a file's name is the shard's id; rename one of them",
                from.display(),
                name_of(&first)
            )));
        }
    }
    if shards.is_empty() {
        let message = format!("{}: holds no *.safetensors shards", from.display());
        return Err(PackageError(message));
    }
    let note = (!others.is_empty()).then(|| format!("not taken for shards: {}", others.join(", ")));
    Ok((shards, note.into_iter().collect()))
}

/// The first number in a shard's file name.
fn shard_id(name: &str) -> Result<u64, &'static str> {
    let digits: String = name
        .chars()
        .skip_while(|c| !c.is_ascii_digit())
        .take_while(char::is_ascii_digit)
        .collect();
    if digits.is_empty() {
        return Err("no number in the file name; it is the shard's id");
    }
    digits
        .parse()
        .map_err(|_| "the number in the file name, which is the shard's id, is above 2^64 - 1")
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Writes a file of a package.
///
/// # Errors
/// When the disk refuses.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<FileDigest, PackageError> {
    if let Some(parent) = path.parent() {
        make_folder(parent)?;
    }
    std::fs::write(path, bytes).map_err(|e| failed(path, &e))?;
    Ok(FileDigest {
        file: name_of(path),
        sha256: hex::encode(Sha256::digest(bytes)),
    })
}

/// A file's SHA-256, a part at a time: what is mapped would count as memory.
fn digest(path: &Path) -> Result<String, PackageError> {
    let mut file = File::open(path).map_err(|e| failed(path, &e))?;
    let (mut hash, mut part) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut part).map_err(|e| failed(path, &e))? {
            0 => return Ok(hex::encode(hash.finalize())),
            read => hash.update(&part[..read]),
        }
    }
}

/// Writes weights as a safetensors file.
///
/// # Errors
/// When the disk refuses.
pub(crate) fn write_tensors<'a>(
    path: &Path,
    tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize], &'a [u8])>,
) -> Result<FileDigest, PackageError> {
    let stored = tensors.map(|(name, dtype, shape, bytes)| {
        let stored = Stored {
            dtype,
            wanted: dtype,
            shape,
            bytes,
        };
        (name, stored)
    });
    checkpoint::write(path, stored).map_err(|e| failed(path, &e))?;
    Ok(FileDigest {
        file: name_of(path),
        sha256: digest(path)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn external(location: &str) -> External {
        External {
            location: location.into(),
            at: "tensor w".into(),
            span: (0, None),
        }
    }

    #[test]
    fn an_export_s_own_files_keep_their_names_unless_a_package_has_them() {
        let names = |locations: &[&str]| {
            let tensors: Vec<External> = locations.iter().map(|l| external(l)).collect();
            external_names(&tensors)
        };
        let given = [
            ("m.data", "m.data"),
            ("./m.data", "m.data"),
            ("a/../b/./m.data", "b/m.data"),
            ("weights.safetensors", "external/weights.safetensors"),
            ("./model.onnx", "external/model.onnx"),
            ("model.json", "external/model.json"),
            ("shards/x", "external/shards/x"),
            ("Model.onnx", "external/Model.onnx"),
            ("external/weights", "external/weights"),
        ];
        let found = names(&given.map(|(location, _)| location)).unwrap();
        let expected: BTreeMap<String, String> =
            given.map(|(a, b)| (a.to_owned(), b.to_owned())).into();
        assert_eq!(found, expected);
        let found = names(&["model.json", "external/model.json"]).unwrap();
        assert_eq!(found["model.json"], "external/external/model.json");
        for outside in ["../m.data", "/etc/passwd", "a/../../m.data", ".", ""] {
            let refusal = names(&[outside]).unwrap_err().0;
            assert!(
                refusal.contains("tensor w") && refusal.contains("outside"),
                "{refusal}"
            );
        }
    }

    #[test]
    fn shards_are_told_by_the_first_number_in_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str| std::fs::write(folder.path().join(name), "").unwrap();
        assert!(
            find_shards(folder.path())
                .unwrap_err()
                .0
                .contains("holds no")
        );
        for name in [
            "shard_000002.safetensors",
            "10.safetensors",
            "._10.safetensors",
            "notes.txt",
        ] {
            put(name);
        }
        let (found, notes) = find_shards(folder.path()).unwrap();
        assert_eq!(found.into_keys().collect::<Vec<_>>(), [2, 10]);
        assert_eq!(notes, ["not taken for shards: ._10.safetensors, notes.txt"]);
        put("2024_b.safetensors");
        put("2024_a.safetensors");
        let refusal = find_shards(folder.path()).unwrap_err().0;
        let said =
            "2024_a.safetensors and 2024_b.safetensors are both shard 2024: the first number";
        assert!(refusal.contains(said), "{refusal}");
        assert!(shard_id("x.safetensors").unwrap_err().contains("no number"));
        assert!(
            shard_id("99999999999999999999.safetensors")
                .unwrap_err()
                .contains("2^64")
        );
    }

    fn begin(out: &Path) -> Result<Staging, PackageError> {
        Staging::begin(out, &Unfinished::default())
    }

    fn holds(folder: &Path) -> BTreeSet<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries.map(|e| name_of(&e.unwrap().path())).collect()
    }

    #[test]
    fn what_is_not_finished_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("a/b/package");
        let staging = begin(&out).unwrap();
        write(&staging.dir().join("shards/x"), b"x").unwrap();
        drop(staging);
        assert!(holds(folder.path()).is_empty());
        let staging = begin(&out).unwrap();
        write(&staging.dir().join("x"), b"x").unwrap();
        staging.finish().unwrap();
        assert_eq!(std::fs::read(out.join("x")).unwrap(), b"x");
        assert_eq!(holds(folder.path()).len(), 1);
        let refusal = begin(&out).err().unwrap().0;
        assert!(refusal.contains("is not empty, it holds x"), "{refusal}");
    }

    #[test]
    fn an_empty_folder_is_filled_where_it_is_however_it_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let empty = folder.path().join("empty");
        let link = folder.path().join("link");
        std::fs::create_dir(&empty).unwrap();
        std::os::unix::fs::symlink("empty", &link).unwrap();
        for out in [
            &empty,
            &link,
            &empty.join("."),
            &link.join(""),
            &empty.join("../empty"),
        ] {
            // It may be a mount point, and nothing may be writable beside it.
            let inside = Place::Inside(empty.canonicalize().unwrap());
            assert_eq!(Place::find(out).unwrap(), inside);
            let before = begin(out).unwrap();
            write(&before.dir().join("shards/x"), b"x").unwrap();
            assert!(begin(out).is_err(), "another is being made there");
            drop(before);
            assert!(holds(&empty).is_empty());
            let staging = begin(out).unwrap();
            for file in [MANIFEST, GRAPH, "shards/x"] {
                write(&staging.dir().join(file), b"x").unwrap();
            }
            assert_eq!(holds(&empty).len(), 1);
            staging.finish().unwrap();
            assert_eq!(
                holds(&empty),
                [MANIFEST, GRAPH, SHARDS].map(String::from).into()
            );
            std::fs::remove_dir_all(&empty).unwrap();
            std::fs::create_dir(&empty).unwrap();
        }
        // What somebody else has put there meanwhile stays, and is all that does.
        let staging = begin(&empty).unwrap();
        write(&staging.dir().join(GRAPH), b"x").unwrap();
        write(&empty.join("theirs"), b"x").unwrap();
        let refusal = staging.finish().unwrap_err().0;
        assert!(refusal.contains("it holds theirs"), "{refusal}");
        assert_eq!(holds(&empty), ["theirs".to_owned()].into());
    }

    #[test]
    fn where_not_all_can_be_moved_nothing_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        for name in ["from/a", "from/model.json", "from/z", "to/model.json/x"] {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        assert!(move_up(&from, &to).is_err());
        assert_eq!(holds(&to), [MANIFEST.to_owned()].into());
        assert_eq!(holds(&from).len(), 3);
    }

    #[test]
    fn what_cannot_be_a_package_s_place_is_refused_in_words() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("file"), "").unwrap();
        std::os::unix::fs::symlink("nowhere", at("dangling")).unwrap();
        for (out, said) in [
            ("file", "is a file"),
            ("file/", "is a file"),
            ("file/package", "file is a file"),
            ("dangling", "dangling is a symbolic link to nowhere"),
            ("dangling/.", "dangling is a symbolic link to nowhere"),
            ("dangling/package", "dangling is a symbolic link to nowhere"),
            ("new/..", "names no folder"),
            ("new/../package", "names no folder"),
        ] {
            let refusal = begin(&at(out)).err().unwrap().0;
            assert!(refusal.contains(said), "{out}: {refusal}");
        }
        assert!(begin(Path::new("")).is_err());
        let new = |out: &str| Place::find(&at(out)).unwrap();
        let expected = Place::New {
            out: at("a2"),
            above: folder.path().to_owned(),
        };
        for out in ["a2", "a2/", "a2/."] {
            assert_eq!(new(out), expected);
        }
        let here = Place::New {
            out: "a2".into(),
            above: ".".into(),
        };
        assert_eq!(Place::find(Path::new("a2")).unwrap(), here);
        assert_eq!(holds(folder.path()).len(), 2);
    }

    #[test]
    fn what_is_removed_early_does_not_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let export = folder.path().join("m.data");
        std::fs::write(&export, "x").unwrap();
        let unfinished = Unfinished::default();
        let staging = Staging::begin(&folder.path().join("a/package"), &unfinished).unwrap();
        write(&staging.dir().join("shards/x"), b"x").unwrap();
        drop(unfinished.remove());
        assert_eq!(holds(folder.path()), ["m.data".to_owned()].into());
        for name in ["x", "shards/y"] {
            assert!(write(&staging.dir().join(name), b"x").is_err());
        }
        assert!(staging.copy(&export, "a/b/m.data").is_err());
        assert!(staging.weights(&[]).is_err());
        assert!(staging.finish().is_err());
        assert!(!folder.path().join("a/package").exists());
    }

    #[test]
    fn what_is_copied_can_be_read_as_what_is_written_can() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let export = folder.path().join("m.data");
        std::fs::write(&export, "x").unwrap();
        std::fs::set_permissions(&export, PermissionsExt::from_mode(0o600)).unwrap();
        let staging = begin(&folder.path().join("package")).unwrap();
        write(&staging.dir().join("x"), b"x").unwrap();
        let copied = staging.copy(&export, "parts/m.data").unwrap();
        assert_eq!(copied, hex::encode(Sha256::digest("x")));
        let mode = |name: &str| {
            let found = std::fs::metadata(staging.dir().join(name)).unwrap();
            found.permissions().mode()
        };
        assert_eq!(mode("parts/m.data"), mode("x"));
    }

    #[test]
    fn only_regular_files_are_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let (pipe, inner) = (folder.path().join("pipe"), folder.path().join("folder"));
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.unwrap().success());
        std::fs::create_dir(&inner).unwrap();
        let index = folder.path().join("x.safetensors.index.json");
        for (name, said) in [
            ("pipe", "pipe: is a pipe"),
            ("folder", "folder: is a folder"),
        ] {
            let path = folder.path().join(name);
            let tensor = external(name);
            let refusals = [
                check_external(&tensor, folder.path()).unwrap_err(),
                crate::model::files::map(&path).unwrap_err(),
                begin(&folder.path().join("package"))
                    .unwrap()
                    .copy(&path, "x")
                    .unwrap_err(),
            ];
            for PackageError(refusal) in refusals {
                assert!(refusal.contains(said), "{refusal}");
            }
            std::fs::write(&index, format!(r#"{{"weight_map": {{"w": "{name}"}}}}"#)).unwrap();
            let refusal = checkpoint::Checkpoint::open(&index).unwrap_err().0;
            assert!(refusal.contains(name), "{refusal}");
        }
        let piped = folder.path().join("pipe.json");
        std::fs::rename(&pipe, &piped).unwrap();
        let refusal = checkpoint::Checkpoint::open(&piped).unwrap_err().0;
        assert!(refusal.contains("is no regular file"), "{refusal}");
    }
}
