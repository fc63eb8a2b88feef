//! Reading a training checkpoint: a safetensors file, or the shards that an index names. Whoever reads
//! one follows the same rule. Tensors of type F32, F16 and BF16 are weights. What cannot be a weight
//! (counters, position ids and masks by their type; what has no elements) is passed over with a note.
//! Any other float is refused by name: it may be a weight, and one that is left out is missed by nobody.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use safetensors::tensor::View;
use safetensors::{SafeTensorError, SafeTensors};
use serde::Deserialize;

use super::weights::read_element;
use crate::model::manifest::PackageError;
use crate::model::tensor::Dtype;
use crate::util::file_type::{self, Looks};

/// What the files of a checkpoint are called in a folder of their own.
const WHOLE: &str = "model.safetensors";
const WHOLE_END: &str = ".safetensors";
const INDEX: &str = "model.safetensors.index.json";
const INDEX_END: &str = ".safetensors.index.json";
/// The most bytes of an index: a thousand bytes for each of some ten thousand tensors, several times.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Names that a message lists.
const MOST_NAMED: usize = 20;

/// A tensor that can be a weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its element type.
    pub dtype: Dtype,
    /// Little endian, row-major: a part of the mapped file.
    pub bytes: Bytes,
}

/// What a checkpoint holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// What can be a weight, ascending by name; at least one.
    pub tensors: Vec<Tensor>,
    /// What cannot, and why: `NAME (I64)`; ascending by name.
    pub passed_over: Vec<String>,
}

impl Checkpoint {
    /// Reads a checkpoint: a safetensors file, the index (`*.json`) of one that is sharded, or the
    /// directory that either lies in. Nothing is copied: the files are mapped.
    ///
    /// # Errors
    /// Names the file and the tensor, and says what to give.
    pub fn open(path: &Path) -> Result<Self, PackageError> {
        let file = locate(path)?;
        if file.extension().is_some_and(|end| end == "json") {
            return read_shards(&file);
        }
        Self::read(&file)
    }

    /// Reads one safetensors file.
    ///
    /// # Errors
    /// Names the file and the tensor.
    pub fn read(file: &Path) -> Result<Self, PackageError> {
        let mut contents = Contents::default();
        contents.add(file, |_| Ok(()))?;
        contents.finish(file)
    }

    /// What was passed over, in a sentence for the operator; none where nothing was.
    pub fn note(&self) -> Option<String> {
        let passed_over = list(&self.passed_over);
        (!self.passed_over.is_empty())
            .then(|| format!("passed over, because they cannot be weights: {passed_over}"))
    }
}

/// What the files of a checkpoint hold.
#[derive(Default)]
struct Contents {
    tensors: Vec<Tensor>,
    passed_over: Vec<String>,
    /// Floats of types that no weight has.
    refused: Vec<String>,
}

impl Contents {
    /// Adds a file; each name that it holds is to be `expected` there.
    fn add(
        &mut self,
        file: &Path,
        mut expected: impl FnMut(&str) -> Result<(), PackageError>,
    ) -> Result<(), PackageError> {
        let map = crate::model::files::map(file)?;
        for (name, view) in deserialize(file, &map)?.iter() {
            expected(name)?;
            let dtype = view.dtype();
            match kind(dtype) {
                // Nothing of it could be trained, whatever its type is.
                _ if view.data().is_empty() => {
                    self.passed_over.push(format!("{name} (no elements)"));
                }
                Kind::Weight(dtype) => self.tensors.push(Tensor {
                    name: name.to_owned(),
                    shape: view.shape().to_vec(),
                    dtype,
                    bytes: map.slice_ref(view.data()),
                }),
                Kind::NoWeight => self.passed_over.push(format!("{name} ({dtype})")),
                Kind::OtherFloat => self.refused.push(format!("{name} ({dtype})")),
            }
        }
        Ok(())
    }

    fn finish(mut self, file: &Path) -> Result<Checkpoint, PackageError> {
        let broken = |why: String| PackageError(format!("{}: {why}", file.display()));
        self.refused.sort();
        self.passed_over.sort();
        self.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        if !self.refused.is_empty() {
            return Err(broken(format!(
                "weights are F32, F16 or BF16, and so are not: {}; save them in one of these \
                 (PyTorch: tensor.float()), or leave them out of the file if they are no weights",
                list(&self.refused)
            )));
        }
        if self.tensors.is_empty() {
            return Err(broken(match self.passed_over.as_slice() {
                [] => "holds no tensors".into(),
                others => format!(
                    "holds no weights, which are F32, F16 or BF16, but {}",
                    list(others)
                ),
            }));
        }
        Ok(Checkpoint {
            tensors: self.tensors,
            passed_over: self.passed_over,
        })
    }
}

/// What a tensor can be, by its type.
enum Kind {
    Weight(Dtype),
    NoWeight,
    OtherFloat,
}

fn kind(dtype: safetensors::Dtype) -> Kind {
    use safetensors::Dtype as Stored;
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "a foreign enum: what is not known may be a weight, and is refused"
    )]
    match dtype {
        Stored::F32 => Kind::Weight(Dtype::F32),
        Stored::F16 => Kind::Weight(Dtype::F16),
        Stored::BF16 => Kind::Weight(Dtype::Bf16),
        Stored::BOOL
        | Stored::U8
        | Stored::I8
        | Stored::I16
        | Stored::U16
        | Stored::I32
        | Stored::U32
        | Stored::I64
        | Stored::U64
        | Stored::C64 => Kind::NoWeight,
        _ => Kind::OtherFloat,
    }
}

/// Our name for a safetensors element type, if it can be a weight.
pub(super) fn weight_type(dtype: safetensors::Dtype) -> Option<Dtype> {
    match kind(dtype) {
        Kind::Weight(dtype) => Some(dtype),
        Kind::NoWeight | Kind::OtherFloat => None,
    }
}

/// The name of safetensors for our element types.
pub(crate) fn stored_type(dtype: Dtype) -> safetensors::Dtype {
    match dtype {
        Dtype::F32 => safetensors::Dtype::F32,
        Dtype::F16 => safetensors::Dtype::F16,
        Dtype::Bf16 => safetensors::Dtype::BF16,
    }
}

/// A tensor's 16-bit elements as 32-bit ones, which hold every value of theirs.
pub(super) fn widen(bytes: &[u8], dtype: Dtype) -> Vec<u8> {
    let elements = bytes.len() / dtype.size();
    let mut wide = Vec::with_capacity(elements * Dtype::F32.size());
    for at in 0..elements {
        wide.extend_from_slice(&read_element(bytes, dtype, at).to_le_bytes());
    }
    wide
}

/// Reads the header of a safetensors file.
///
/// # Errors
/// Says what the file is instead, and what to give.
pub(super) fn deserialize<'a>(
    file: &Path,
    bytes: &'a [u8],
) -> Result<SafeTensors<'a>, PackageError> {
    let broken = |e: SafeTensorError| {
        let why = match remedy(Looks::of(bytes)) {
            Some(remedy) => format!("it {}; {remedy}", file_type::describe(bytes)),
            None => e.to_string(),
        };
        PackageError(format!("{}: not safetensors: {why}", file.display()))
    };
    SafeTensors::deserialize(bytes).map_err(broken)
}

/// What to give instead of what is no safetensors file; none where its own error says more.
fn remedy(looks: Looks) -> Option<&'static str> {
    match looks {
        Looks::Safetensors | Looks::Unknown => None,
        Looks::CheckpointIndex | Looks::Json => {
            Some("the index of a sharded checkpoint is given as a file *.json, beside its shards")
        }
        Looks::Zip | Looks::TorchLegacy | Looks::Pickle => {
            Some("save the weights with safetensors.torch.save_file(model.state_dict(), FILE)")
        }
        Looks::Gzip | Looks::Zstd | Looks::Xz | Looks::Bzip2 | Looks::Tar => {
            Some("unpack it, and give the file in it")
        }
        Looks::Empty
        | Looks::GitLfsPointer
        | Looks::WebPage
        | Looks::Xml
        | Looks::Text
        | Looks::Utf16
        | Looks::Onnx
        | Looks::Numpy
        | Looks::Hdf5
        | Looks::Gguf
        | Looks::MessagePack => Some("give the safetensors file itself"),
    }
}

/// Weights to be written.
pub(crate) struct Stored<'a> {
    /// As they are here.
    pub(crate) dtype: Dtype,
    /// As they are to be in the file: the same, or wider.
    pub(crate) wanted: Dtype,
    /// Their shape.
    pub(crate) shape: &'a [usize],
    /// Little endian, row-major.
    pub(crate) bytes: &'a [u8],
}

impl View for Stored<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        stored_type(self.wanted)
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self.dtype == self.wanted {
            true => Cow::Borrowed(self.bytes),
            false => Cow::Owned(widen(self.bytes, self.dtype)),
        }
    }

    fn data_len(&self) -> usize {
        self.bytes.len() / self.dtype.size() * self.wanted.size()
    }
}

/// Writes weights as a safetensors file, holding at most one of them in memory.
///
/// # Errors
/// When the disk refuses.
pub(crate) fn write<'a>(
    file: &Path,
    tensors: impl Iterator<Item = (&'a str, Stored<'a>)>,
) -> std::io::Result<()> {
    // The crate puts a file of its own in the place of this one, and lets nobody else read it.
    let permissions = File::create(file)?.metadata()?.permissions();
    safetensors::serialize_to_file(tensors, None, file).map_err(|error| {
        if let SafeTensorError::IoError(error) = error {
            error
        } else {
            std::io::Error::other(error)
        }
    })?;
    std::fs::set_permissions(file, permissions)
}

/// The file to read: of a directory, the one checkpoint that lies in it.
fn locate(path: &Path) -> Result<PathBuf, PackageError> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let broken = |why: String| PackageError(format!("{}: {why}", path.display()));
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(path).map_err(|e| broken(e.to_string()))? {
        let entry = entry.map_err(|e| broken(e.to_string()))?;
        names.insert(entry.file_name().to_string_lossy().into_owned());
    }
    let ending = |end: &str| -> Vec<&str> {
        let visible = names.iter().filter(|name| !name.starts_with('.'));
        visible
            .map(String::as_str)
            .filter(|n| n.ends_with(end))
            .collect()
    };
    let usual: Vec<&str> = [WHOLE, INDEX]
        .into_iter()
        .filter(|n| names.contains(*n))
        .collect();
    let indexes = ending(INDEX_END);
    // The shards lie beside their index.
    let others = if indexes.is_empty() {
        ending(WHOLE_END)
    } else {
        indexes
    };
    let found = if usual.is_empty() { others } else { usual };
    match found.as_slice() {
        [one] => Ok(path.join(one)),
        [] => Err(broken(format!(
            "holds no checkpoint: neither {WHOLE} nor {INDEX}; give the file itself"
        ))),
        several => Err(broken(format!(
            "holds several checkpoints: {}; give the one that is meant",
            several.join(", ")
        ))),
    }
}

/// The index of a sharded checkpoint, as the libraries that write it do.
#[derive(Deserialize)]
struct Index {
    /// Names of tensors, and the file that each lies in.
    weight_map: BTreeMap<String, String>,
}

fn read_shards(index: &Path) -> Result<Checkpoint, PackageError> {
    let broken = |why: String| PackageError(format!("{}: {why}", index.display()));
    let map = read_index(index).map_err(broken)?;
    let files: BTreeSet<&str> = map.values().map(String::as_str).collect();
    let folder = index.parent().unwrap_or(Path::new(""));
    for file in &files {
        let path = Path::new(file);
        let inside = path.components().all(|c| matches!(c, Component::Normal(_)));
        if file.is_empty() || !inside {
            return Err(broken(format!("names {file:?}, which is not beside it")));
        }
    }
    let missing = files.iter().filter(|file| !folder.join(file).is_file());
    let missing: Vec<String> = missing.map(|file| (*file).to_owned()).collect();
    if !missing.is_empty() {
        let (lost, all) = (missing.len(), files.len());
        let missing = list(&missing);
        return Err(broken(format!(
            "{lost} of its {all} shards are missing: {missing}"
        )));
    }
    let mut contents = Contents::default();
    let mut awaited: BTreeMap<&str, &str> = map
        .iter()
        .map(|(name, file)| (name.as_str(), file.as_str()))
        .collect();
    for file in files {
        contents.add(&folder.join(file), |name| match map.get(name) {
            Some(named) if named == file => {
                awaited.remove(name);
                Ok(())
            }
            Some(named) => Err(broken(format!(
                "says that {name} is in {named}, but {file} holds it, too"
            ))),
            None => Err(broken(format!("does not name {name}, which {file} holds"))),
        })?;
    }
    let lost: Vec<String> = awaited
        .iter()
        .map(|(name, file)| format!("{name} ({file})"))
        .collect();
    if !lost.is_empty() {
        let lost = list(&lost);
        return Err(broken(format!(
            "names tensors that its shards do not hold: {lost}"
        )));
    }
    contents.finish(index)
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>, String> {
    let found = std::fs::metadata(path).map_err(|e| e.to_string())?;
    if !found.is_file() {
        return Err("is no regular file".into());
    }
    let size = found.len();
    if size > MAX_INDEX_BYTES {
        return Err(format!(
            "{size} bytes, where the index of a sharded checkpoint has at most {MAX_INDEX_BYTES}"
        ));
    }
    let text = std::fs::read(path).map_err(|e| e.to_string())?;
    let index: Index = serde_json::from_slice(&text)
        .map_err(|e| format!("not the index of a sharded checkpoint: {e}"))?;
    if index.weight_map.is_empty() {
        return Err("weight_map names no tensors".into());
    }
    Ok(index.weight_map)
}

/// The first names of a list, and how many follow.
pub(super) fn list(names: &[String]) -> String {
    let shown = names[..names.len().min(MOST_NAMED)].join(", ");
    match names.len().saturating_sub(MOST_NAMED) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use safetensors::Dtype as Type;
    use safetensors::tensor::TensorView;

    /// A tensor of zeros.
    pub(crate) type Zeros<'a> = (&'a str, Type, &'a [usize]);

    /// Writes a safetensors file.
    pub(crate) fn put(path: &Path, tensors: &[Zeros<'_>]) {
        let contents: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, dtype, shape)| {
                vec![0; (dtype.bitsize() * shape.iter().product::<usize>()).div_ceil(8)]
            })
            .collect();
        let views = tensors
            .iter()
            .zip(&contents)
            .map(|((name, dtype, shape), bytes)| {
                (
                    *name,
                    TensorView::new(*dtype, shape.to_vec(), bytes).unwrap(),
                )
            });
        std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    fn names(checkpoint: &Checkpoint) -> Vec<&str> {
        checkpoint.tensors.iter().map(|t| t.name.as_str()).collect()
    }

    #[track_caller]
    fn refused(path: &Path, words: &[&str]) {
        let refusal = Checkpoint::open(path).unwrap_err().0;
        for word in words {
            assert!(refusal.contains(word), "{word}: {refusal}");
        }
    }

    const WEIGHT: Zeros<'static> = ("w", Type::F32, &[2]);

    #[test]
    fn floats_of_sixteen_and_of_thirty_two_bits_are_weights() {
        let folder = folder();
        let path = folder.path().join("w.safetensors");
        for (stored, dtype) in [
            (Type::F32, Dtype::F32),
            (Type::F16, Dtype::F16),
            (Type::BF16, Dtype::Bf16),
        ] {
            put(&path, &[("other", stored, &[3, 4]), WEIGHT]);
            let read = Checkpoint::open(&path).unwrap();
            assert_eq!(names(&read), ["other", "w"]);
            assert_eq!(read.tensors[0].dtype, dtype);
            assert_eq!(read.note(), None);
        }
    }

    #[test]
    fn what_is_no_float_or_has_no_elements_is_passed_over_with_a_note() {
        let folder = folder();
        let path = folder.path().join("w.safetensors");
        for stored in [
            Type::BOOL,
            Type::U8,
            Type::I8,
            Type::I16,
            Type::U16,
            Type::I32,
            Type::U32,
            Type::I64,
            Type::U64,
            Type::C64,
        ] {
            put(&path, &[("bn.num_batches_tracked", stored, &[]), WEIGHT]);
            let read = Checkpoint::open(&path).unwrap();
            assert_eq!(names(&read), ["w"]);
            let note = read.note().unwrap();
            let said = format!("bn.num_batches_tracked ({stored})");
            assert!(note.contains(&said), "{note}");
        }
        let none: [Zeros<'_>; 2] = [("roi", Type::F32, &[0]), ("none", Type::F64, &[0, 3])];
        put(&path, &[WEIGHT, none[0], none[1]]);
        let note = Checkpoint::open(&path).unwrap().note().unwrap();
        let said = "none (no elements), roi (no elements)";
        assert!(note.contains(said), "{note}");
    }

    #[test]
    fn floats_of_other_sizes_are_refused_by_name() {
        let folder = folder();
        let path = folder.path().join("w.safetensors");
        for stored in [
            Type::F64,
            Type::F4,
            Type::F6_E2M3,
            Type::F6_E3M2,
            Type::F8_E4M3,
            Type::F8_E5M2,
            Type::F8_E8M0,
            Type::F8_E4M3FNUZ,
            Type::F8_E5M2FNUZ,
        ] {
            put(&path, &[("a", stored, &[8]), WEIGHT, ("b", stored, &[8])]);
            let both = format!("a ({stored}), b ({stored})");
            refused(&path, &[&both, "tensor.float()"]);
        }
    }

    #[test]
    fn a_file_without_weights_says_what_it_holds() {
        let folder = folder();
        let path = folder.path().join("w.safetensors");
        put(&path, &[]);
        refused(&path, &["w.safetensors", "holds no tensors"]);
        put(&path, &[("steps", Type::I64, &[])]);
        refused(&path, &["holds no weights", "steps (I64)"]);
        for (bytes, what, instead) in [
            (
                &b"version https://git-lfs.github.com/spec/v1\n"[..],
                "Git LFS pointer",
                "the safetensors file",
            ),
            (
                b"<!DOCTYPE html><html>",
                "a web page",
                "the safetensors file",
            ),
            (b"{\"weight_map\": {}}", "index of a checkpoint", "*.json"),
            (b"PK\x03\x04", "torch.save", "save_file"),
            (b"\x80\x02}q\0", "a pickle", "save_file"),
            (b"\x1f\x8b\x08\0", "gzip", "unpack"),
            (b"", "is empty", "the safetensors file"),
            (&[9, 0, 0, 0, 0, 0, 0, 0, b'{'], "invalid header", ""),
        ] {
            std::fs::write(&path, bytes).unwrap();
            refused(&path, &["w.safetensors", "not safetensors", what, instead]);
        }
    }

    #[test]
    fn what_is_written_can_be_read_by_others_and_is_wider_where_that_is_wanted() {
        use std::os::unix::fs::PermissionsExt;
        let folder = folder();
        let (path, plain) = (
            folder.path().join("w.safetensors"),
            folder.path().join("plain"),
        );
        std::fs::write(&plain, "").unwrap();
        let half = half::f16::from_f32(0.1);
        let stored = Stored {
            dtype: Dtype::F16,
            wanted: Dtype::F32,
            shape: &[1],
            bytes: &half.to_le_bytes(),
        };
        write(&path, std::iter::once(("w", stored))).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&path), mode(&plain));
        let read = Checkpoint::open(&path).unwrap();
        assert_eq!(read.tensors[0].dtype, Dtype::F32);
        assert_eq!(read.tensors[0].bytes, half.to_f32().to_le_bytes()[..]);
    }

    #[test]
    fn nothing_is_copied() {
        let folder = folder();
        let path = folder.path().join("w.safetensors");
        put(&path, &[("a", Type::F32, &[4]), ("b", Type::F32, &[4])]);
        let read = Checkpoint::open(&path).unwrap();
        let [a, b] = [&read.tensors[0], &read.tensors[1]].map(|t| t.bytes.as_ptr().addr());
        assert_eq!(a.abs_diff(b), 16);
    }

    /// Two shards and their index.
    fn sharded(folder: &Path) -> PathBuf {
        put(
            &folder.join("model-1-of-2.safetensors"),
            &[("b", Type::BF16, &[2]), ("steps", Type::I64, &[])],
        );
        put(
            &folder.join("model-2-of-2.safetensors"),
            &[("a", Type::BF16, &[2])],
        );
        index(folder, &[("a", 2), ("b", 1), ("steps", 1)])
    }

    fn index(folder: &Path, map: &[(&str, usize)]) -> PathBuf {
        let map: BTreeMap<_, _> = map
            .iter()
            .map(|(name, shard)| (*name, format!("model-{shard}-of-2.safetensors")))
            .collect();
        let document = serde_json::json!({"metadata": {"total_size": 16}, "weight_map": map});
        let path = folder.join(INDEX);
        std::fs::write(&path, document.to_string()).unwrap();
        path
    }

    #[test]
    fn shards_are_read_through_their_index_or_the_folder_it_is_in() {
        let folder = folder();
        let index = sharded(folder.path());
        let read = Checkpoint::open(&index).unwrap();
        assert_eq!(names(&read), ["a", "b"]);
        assert_eq!(read.passed_over, ["steps (I64)"]);
        assert_eq!(Checkpoint::open(folder.path()).unwrap(), read);
    }

    #[test]
    fn an_index_and_its_shards_must_agree() {
        let folder = folder();
        let path = sharded(folder.path());
        index(
            folder.path(),
            &[("a", 2), ("b", 1), ("steps", 1), ("lost", 2)],
        );
        refused(&path, &["lost (model-2-of-2.safetensors)", "do not hold"]);
        index(folder.path(), &[("a", 2), ("steps", 1)]);
        refused(&path, &["does not name b", "model-1-of-2.safetensors"]);
        put(
            &folder.path().join("model-2-of-2.safetensors"),
            &[("a", Type::BF16, &[2]), ("b", Type::BF16, &[2])],
        );
        index(folder.path(), &[("a", 2), ("b", 1), ("steps", 1)]);
        refused(
            &path,
            &["b is in model-1", "model-2-of-2.safetensors holds it, too"],
        );
        std::fs::remove_file(folder.path().join("model-1-of-2.safetensors")).unwrap();
        refused(&path, &["1 of its 2 shards", "model-1-of-2.safetensors"]);
    }

    #[test]
    fn an_index_names_nothing_elsewhere_and_is_one() {
        let folder = folder();
        let path = folder.path().join("x.json");
        for file in ["../w.safetensors", "/w.safetensors", "a/../../w", "", "."] {
            let document = serde_json::json!({"weight_map": {"a": file}});
            std::fs::write(&path, document.to_string()).unwrap();
            refused(&path, &["x.json", "not beside it"]);
        }
        for (text, word) in [
            (r#"{"weight_map": {}}"#, "names no tensors"),
            (r#"{"architectures": []}"#, "weight_map"),
            ("<html>", "not the index"),
        ] {
            std::fs::write(&path, text).unwrap();
            refused(&path, &["x.json", word]);
        }
    }

    #[test]
    fn a_folder_holds_one_checkpoint_or_is_asked_which() {
        let folder = folder();
        let file = |name: &str| folder.path().join(name);
        refused(folder.path(), &["holds no checkpoint"]);
        put(&file("a.safetensors"), &[("w", Type::F32, &[2])]);
        put(&file("._a.safetensors"), &[]);
        assert_eq!(names(&Checkpoint::open(folder.path()).unwrap()), ["w"]);
        put(&file("b.safetensors"), &[("w", Type::F32, &[2])]);
        refused(folder.path(), &["a.safetensors, b.safetensors"]);
        put(&file(WHOLE), &[("whole", Type::F32, &[2])]);
        assert_eq!(names(&Checkpoint::open(folder.path()).unwrap()), ["whole"]);
        sharded(folder.path());
        refused(folder.path(), &["several", WHOLE, INDEX]);
    }
}
