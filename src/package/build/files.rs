//! The files of a package, written beside the place where it is to be and moved there when it is
//! whole: a refusal leaves nothing behind.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::super::checkpoint::{self, Stored};
use super::super::{
    Dtype, FileDigest, GraphFile, MANIFEST, Objective, PackageError, ShardFile, parse_shard,
};
use super::Tensor;
use crate::engine::graph::{External, externals, plain_location, relocate};

const GRAPH: &str = "model.onnx";
const WEIGHTS: &str = "weights.safetensors";
const SHARDS: &str = "shards";
/// Where an export's own files go whose names a package uses itself.
const EXTERNAL: &str = "external";

/// A package under construction.
pub(super) struct Staging {
    folder: tempfile::TempDir,
    out: PathBuf,
}

impl Staging {
    /// Begins beside `out`, on the same file system.
    ///
    /// # Errors
    /// When `out` holds anything, or its folder cannot be written to.
    pub(super) fn begin(out: &Path) -> Result<Self, PackageError> {
        check_free(out)?;
        let parent = out.ancestors().skip(1).find(|dir| dir.is_dir());
        let parent = parent.unwrap_or(Path::new("."));
        let folder = tempfile::Builder::new()
            .prefix(".scorer-package-")
            .tempdir_in(parent);
        let staging = Self {
            folder: folder.map_err(|e| failed(parent, &e))?,
            out: out.to_owned(),
        };
        let dir = staging.dir();
        std::fs::create_dir(&dir).map_err(|e| failed(&dir, &e))?;
        Ok(staging)
    }

    /// Where the files are meanwhile.
    pub(super) fn dir(&self) -> PathBuf {
        // The outer folder is its maker's alone; this one has the usual rights.
        self.folder.path().join("package")
    }

    /// Puts the package in its place.
    ///
    /// # Errors
    /// When there is something by now, or the disk refuses.
    pub(super) fn finish(self) -> Result<(), PackageError> {
        let fail = |e: std::io::Error| failed(&self.out, &e);
        if let Some(parent) = self.out.parent() {
            std::fs::create_dir_all(parent).map_err(fail)?;
        }
        check_free(&self.out)?;
        std::fs::rename(self.dir(), &self.out).map_err(fail)
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
                let to = self.dir().join(name);
                let sha256 = copy(&from.join(plain), &to)?;
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
            let bytes = super::super::map(&path)?;
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
}

fn failed(path: &Path, error: &std::io::Error) -> PackageError {
    PackageError(format!("{}: {error}", path.display()))
}

/// Whether a package may be put here.
///
/// # Errors
/// When something is there already.
pub(super) fn check_free(out: &Path) -> Result<(), PackageError> {
    let refuse = |why: &str| {
        let message = format!(
            "{}: {why}; packages are immutable, choose a new directory",
            out.display()
        );
        Err(PackageError(message))
    };
    match std::fs::read_dir(out).map(Iterator::count) {
        Ok(0) => Ok(()),
        Ok(_) => refuse("is not empty"),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => refuse("is a file"),
        Err(e) => Err(failed(out, &e)),
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
pub(in super::super) fn write(path: &Path, bytes: &[u8]) -> Result<FileDigest, PackageError> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(|e| failed(path, &e))?;
    }
    std::fs::write(path, bytes).map_err(|e| failed(path, &e))?;
    Ok(FileDigest {
        file: name_of(path),
        sha256: hex::encode(Sha256::digest(bytes)),
    })
}

/// Copies a file of any size, and gives its SHA-256.
fn copy(from: &Path, to: &Path) -> Result<String, PackageError> {
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent).map_err(|e| failed(to, &e))?;
    }
    std::fs::copy(from, to)
        .map_err(|e| PackageError(format!("{} to {}: {e}", from.display(), to.display())))?;
    digest(to)
}

/// A file's SHA-256, a part at a time: what is mapped would count as memory.
fn digest(path: &Path) -> Result<String, PackageError> {
    let mut file = std::fs::File::open(path).map_err(|e| failed(path, &e))?;
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
pub(in super::super) fn write_tensors<'a>(
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

    #[test]
    fn what_is_not_finished_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("a/b/package");
        let staging = Staging::begin(&out).unwrap();
        write(&staging.dir().join("shards/x"), b"x").unwrap();
        drop(staging);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let staging = Staging::begin(&out).unwrap();
        write(&staging.dir().join("x"), b"x").unwrap();
        staging.finish().unwrap();
        assert_eq!(std::fs::read(out.join("x")).unwrap(), b"x");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let refusal = Staging::begin(&out).err().unwrap().0;
        assert!(refusal.contains("is not empty"), "{refusal}");
        assert!(
            check_free(&out.join("x"))
                .unwrap_err()
                .0
                .contains("is a file")
        );
    }
}
