//! Checkpoints as trainers and libraries write them, and files that are none.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::index::{INDEX, WHOLE};
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
        (b"PK\x03\x04", "torch.save", "save_model"),
        (b"\x80\x02}q\0", "a pickle", "save_model"),
        (b"\x1f\x8b\x08\0", "gzip", "unpack"),
        (b"", "is empty", "the safetensors file"),
        (&[9, 0, 0, 0, 0, 0, 0, 0, b'{'], "invalid header", ""),
    ] {
        std::fs::write(&path, bytes).unwrap();
        refused(&path, &["w.safetensors", "not safetensors", what, instead]);
    }
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
