//! Tensors whose contents are in files beside the model: listing them, renaming their files, and
//! reading them.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use bytes::Bytes;
use prost::Message;

use super::proto::{EXTERNAL, GraphError, TensorProto, dtype_of, elem_of};
use super::walk::{Change, Kind, Trail, decode_tensor, describe, edit};
use crate::model::files;
use crate::model::tensor::{Dtype, Elem};

/// Tensors of at most so many bytes are embedded into the model, whatever file they are in.
const SMALL: usize = 1 << 16;

/// The largest model that protobuf can hold, with room for what is added later.
const LARGEST: usize = (2 << 30) - (16 << 20);

/// A tensor whose contents are in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct External {
    /// The file, as named in the graph.
    pub location: String,
    /// Where in the graph the tensor is, in words.
    pub at: String,
    /// Its byte range in the file; `None` if the graph does not give the end.
    pub span: (usize, Option<usize>),
}

/// Every tensor of a model whose contents are in a file.
///
/// # Errors
/// When this is not an ONNX file, or a tensor does not say where its contents are.
pub fn externals(model: &Bytes) -> Result<Vec<External>, GraphError> {
    let mut found = Vec::new();
    edit_external(model, |trail, tensor| {
        let at = describe(trail);
        let lacking = || GraphError(format!("{at}: external data without a location"));
        found.push(External {
            location: entry(&tensor, "location").ok_or_else(lacking)?,
            span: span(&tensor).map_err(|e| GraphError(format!("{at}: {e}")))?,
            at,
        });
        Ok(None)
    })?;
    Ok(found)
}

/// Replaces tensors whose contents are in a file, where `change` returns another.
fn edit_external(
    model: &Bytes,
    mut change: impl FnMut(&Trail, TensorProto) -> Result<Option<TensorProto>, GraphError>,
) -> Result<Option<Vec<u8>>, GraphError> {
    edit(model, &mut |trail| {
        let Some((Kind::Tensor, bytes)) = trail.last() else {
            return Ok(Change::Keep);
        };
        let tensor = decode_tensor(bytes)?;
        let changed = match tensor.data_location {
            Some(EXTERNAL) => change(trail, tensor)?,
            Some(_) | None => None,
        };
        let replaced = |t: TensorProto| Change::Replace(vec![t.encode_to_vec().into()]);
        Ok(changed.map_or(Change::Keep, replaced))
    })
}

/// The model with its external data files renamed; `None` if none of them is.
///
/// # Errors
/// As [`externals`].
pub fn relocate(
    model: &Bytes,
    names: &BTreeMap<String, String>,
) -> Result<Option<Vec<u8>>, GraphError> {
    edit_external(model, |_, mut tensor| {
        let old = entry(&tensor, "location");
        let new = old.as_ref().and_then(|old| names.get(old));
        if new == old.as_ref() || new.is_none() {
            return Ok(None);
        }
        let entries = tensor.external_data.iter_mut();
        let locations = entries.filter(|entry| entry.key() == "location");
        locations.for_each(|location| location.value = new.cloned());
        Ok(Some(tensor))
    })
}

/// Embeds small external tensors into the model; large ones stay in their files. When ONNX Runtime
/// folds constants in subgraphs it looks for their files in the working directory, and it rejects
/// files that are links: tensors in such files are embedded as well.
///
/// # Errors
/// Names the tensor whose contents cannot be read, or the link whose file is too large.
pub(super) fn embed(model: Vec<u8>, dir: &Path) -> Result<Vec<u8>, GraphError> {
    let model = Bytes::from(model);
    let mut room = LARGEST.saturating_sub(model.len());
    let embedded = edit_external(&model, |trail, mut tensor| {
        let contents = contents(&tensor, dir)?;
        let location = entry(&tensor, "location").unwrap_or_default();
        if contents.len() > SMALL && !is_link(dir, &location) {
            return Ok(None);
        }
        room = room.checked_sub(contents.len()).ok_or_else(|| {
            let at = describe(trail);
            GraphError(format!(
                "{at}: {location} is a link, and more is behind links than a graph can hold; copy the file itself into the package"
            ))
        })?;
        tensor.raw_data = Some(contents);
        tensor.data_location = None;
        tensor.external_data.clear();
        Ok(Some(tensor))
    })?;
    Ok(embedded.unwrap_or_else(|| model.into()))
}

/// Whether the file has a second hard link, or resolves to somewhere outside of the folder.
fn is_link(dir: &Path, location: &str) -> bool {
    use std::os::unix::fs::MetadataExt;
    let path = dir.join(plain_location(location).unwrap_or_default());
    let alone = std::fs::metadata(&path).is_ok_and(|found| found.nlink() == 1);
    let (real, folder) = (path.canonicalize(), dir.canonicalize());
    let inside = real.is_ok_and(|real| folder.is_ok_and(|folder| real.starts_with(folder)));
    !(alone && inside)
}

/// A location without `.` and `..`, if it stays in the graph's folder.
pub fn plain_location(location: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for component in Path::new(location).components() {
        match component {
            Component::CurDir => {}
            Component::Normal(part) => parts.push(part.to_str()?),
            Component::ParentDir => {
                parts.pop()?;
            }
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

/// A tensor's little-endian bytes, from the graph or its external file in `dir`.
pub(super) fn contents(tensor: &TensorProto, dir: &Path) -> Result<Bytes, GraphError> {
    if tensor.data_location == Some(EXTERNAL) {
        let location = entry(tensor, "location").unwrap_or_default();
        let fail = |e| GraphError(format!("initializer {}: {location}: {e}", tensor.name()));
        return read_external(tensor, &location, dir).map_err(fail);
    }
    if let Some(raw) = &tensor.raw_data {
        return Ok(raw.clone());
    }
    let floats = tensor.float_data.iter().flat_map(|v| v.to_le_bytes());
    // 16-bit floats are stored in int32s.
    let halves = tensor.int32_data.iter();
    let halves = halves.flat_map(|v| v.to_le_bytes().into_iter().take(2));
    Ok(floats.chain(halves).collect::<Vec<u8>>().into())
}

fn read_external(tensor: &TensorProto, location: &str, dir: &Path) -> Result<Bytes, String> {
    let plain = plain_location(location).ok_or("leads out of the graph's folder")?;
    let file = files::map(&dir.join(plain)).map_err(|e| e.to_string())?;
    let (start, end) = span(tensor)?;
    let end = end.unwrap_or(file.len());
    if start > end || end > file.len() {
        return Err(format!("has no bytes {start} to {end}"));
    }
    Ok(file.slice(start..end))
}

fn span(tensor: &TensorProto) -> Result<(usize, Option<usize>), String> {
    let number = |key: &str| {
        let value = entry(tensor, key);
        let parsed = value.map(|v| v.parse::<usize>().map_err(|e| format!("{key}: {e}")));
        parsed.transpose()
    };
    let start = number("offset")?.unwrap_or(0);
    // A length of 0 means none: ONNX Runtime uses the shape then as well.
    let length = number("length")?.filter(|length| *length > 0);
    let length = length.or_else(|| size(tensor));
    Ok((start, length.map(|length| start.saturating_add(length))))
}

/// The size of the contents in bytes, for the usual types.
fn size(tensor: &TensorProto) -> Option<usize> {
    let data_type = tensor.data_type?;
    let element = dtype_of(data_type)
        .map(Dtype::size)
        .or_else(|| elem_of(data_type).map(Elem::size))?;
    let dims = tensor.dims.iter();
    dims.map(|d| usize::try_from(*d).ok())
        .try_fold(element, |n: usize, d| n.checked_mul(d?))
}

fn entry(tensor: &TensorProto, key: &str) -> Option<String> {
    let mut entries = tensor.external_data.iter();
    let found = entries.find(|e| e.key.as_deref() == Some(key))?;
    found.value.clone()
}

#[cfg(test)]
mod tests {
    use super::super::proto::{
        Attribute, FLOAT, FunctionProto, GraphProto, ModelProto, NodeProto, SparseTensorProto,
        StringEntry,
    };
    use super::super::walk::{MAX_DEPTH, append};
    use super::*;

    fn external(name: &str, location: &str) -> TensorProto {
        let entry = |key: &str, value: &str| StringEntry {
            key: Some(key.into()),
            value: Some(value.into()),
        };
        TensorProto {
            name: Some(name.into()),
            dims: vec![2],
            data_type: Some(FLOAT),
            external_data: vec![entry("location", location), entry("offset", "8")],
            data_location: Some(EXTERNAL),
            ..TensorProto::default()
        }
    }

    fn node(name: &str, attribute: Attribute) -> Bytes {
        let node = NodeProto {
            name: Some(name.into()),
            op_type: Some("Op".into()),
            attribute: vec![attribute.encode_to_vec().into()],
            ..NodeProto::default()
        };
        node.encode_to_vec().into()
    }

    /// A field that is not typed here, as raw bytes behind an attribute's own.
    fn untyped(attribute: Attribute, number: u32, message: &[u8]) -> Bytes {
        let mut bytes = attribute.encode_to_vec();
        append(&mut bytes, number, message);
        let node = NodeProto {
            name: Some("untyped".into()),
            op_type: Some("Op".into()),
            attribute: vec![bytes.into()],
            ..NodeProto::default()
        };
        node.encode_to_vec().into()
    }

    fn held(tensor: TensorProto) -> Attribute {
        Attribute {
            t: Some(tensor),
            ..Attribute::default()
        }
    }

    fn sparse(tensor: TensorProto) -> SparseTensorProto {
        SparseTensorProto {
            values: Some(tensor),
            dims: vec![4],
        }
    }

    fn graph(node: Vec<Bytes>, initializer: Vec<TensorProto>) -> GraphProto {
        GraphProto {
            node,
            initializer,
            ..GraphProto::default()
        }
    }

    /// Every node that can hold tensors, in every field of an attribute.
    fn nodes(tensor: &mut impl FnMut(&str) -> TensorProto) -> Vec<Bytes> {
        let deep = node("deep", held(tensor("attribute in a body")));
        let body = Attribute {
            g: Some(graph(vec![deep], vec![tensor("in a body")])),
            ..Attribute::default()
        };
        let branches = Attribute {
            graphs: vec![graph(vec![], vec![tensor("in graphs")])],
            ..Attribute::default()
        };
        let field = |number, message: &[u8]| untyped(Attribute::default(), number, message);
        let tensors = tensor("in tensors").encode_to_vec();
        let one = sparse(tensor("in a sparse tensor")).encode_to_vec();
        let many = sparse(tensor("in sparse tensors")).encode_to_vec();
        vec![
            node("constant", held(tensor("attribute"))),
            node("loop", body),
            node("branches", branches),
            field(10, &tensors),
            field(22, &one),
            field(23, &many),
        ]
    }

    /// A tensor in every place that can hold one, each in a file of its name.
    fn everywhere() -> (Bytes, Vec<String>) {
        let mut names = Vec::new();
        let mut tensor = |name: &str| {
            names.push(name.to_owned());
            external(name, &format!("{name}.data"))
        };
        let main = GraphProto {
            sparse_initializer: vec![sparse(tensor("sparse initializer")).encode_to_vec().into()],
            ..graph(nodes(&mut tensor), vec![tensor("initializer")])
        };
        let function = FunctionProto {
            name: Some("F".into()),
            node: vec![node("inside", held(tensor("in a function")))],
            ..FunctionProto::default()
        };
        let mut function = function.encode_to_vec();
        let default = held(tensor("default of a function")).encode_to_vec();
        append(&mut function, 11, &default);
        let model = ModelProto {
            graph: Some(main),
            functions: vec![function.into()],
            ..ModelProto::default()
        };
        (model.encode_to_vec().into(), names)
    }

    /// A model of one initializer that is above what is taken in.
    fn large_tensor() -> ModelProto {
        let mut tensor = external("initializer", "initializer.data");
        tensor.dims = vec![i64::try_from(SMALL / 4 + 1).unwrap()];
        tensor.external_data.truncate(1);
        let graph = GraphProto {
            initializer: vec![tensor],
            ..GraphProto::default()
        };
        ModelProto {
            graph: Some(graph),
            ..ModelProto::default()
        }
    }

    fn locations(model: &Bytes) -> Vec<String> {
        let mut found: Vec<String> = externals(model)
            .unwrap()
            .into_iter()
            .map(|e| e.location)
            .collect();
        found.sort();
        found
    }

    #[test]
    fn every_tensor_is_found_wherever_it_stands_and_can_move_to_another_file() {
        let (model, names) = everywhere();
        let mut files: Vec<String> = names.iter().map(|name| format!("{name}.data")).collect();
        files.sort();
        assert_eq!(locations(&model), files);
        let all = externals(&model).unwrap();
        assert!(all.iter().all(|e| e.span == (8, Some(16))), "{all:?}");
        let at = |name: &str| {
            &all.iter()
                .find(|e| e.location.starts_with(name))
                .unwrap()
                .at
        };
        assert_eq!(
            at("attribute in"),
            "Op loop, Op deep, tensor attribute in a body"
        );
        assert_eq!(
            at("in a function"),
            "function F, Op inside, tensor in a function"
        );
        let moved = files
            .iter()
            .map(|file| (file.clone(), format!("moved/{file}")))
            .collect();
        let elsewhere: Bytes = relocate(&model, &moved).unwrap().unwrap().into();
        let expected: Vec<String> = files.iter().map(|file| format!("moved/{file}")).collect();
        assert_eq!(locations(&elsewhere), expected);
        let back = moved
            .into_iter()
            .map(|(file, moved)| (moved, file))
            .collect();
        assert_eq!(relocate(&elsewhere, &back).unwrap().unwrap(), model);
        assert_eq!(relocate(&model, &BTreeMap::new()).unwrap(), None);
    }

    #[test]
    fn what_is_small_or_behind_a_link_is_taken_in_and_what_is_large_stays() {
        let (model, names) = everywhere();
        let dir = tempfile::tempdir().unwrap();
        for name in &names {
            std::fs::write(dir.path().join(format!("{name}.data")), [7; 16]).unwrap();
        }
        let taken: Bytes = embed(model.to_vec(), dir.path()).unwrap().into();
        assert_eq!(externals(&taken).unwrap(), []);
        let (large, linked) = (
            dir.path().join("initializer.data"),
            dir.path().join("elsewhere"),
        );
        std::fs::write(&large, vec![7; SMALL + 10]).unwrap();
        let model: Bytes = large_tensor().encode_to_vec().into();
        let left = |model: &Bytes| {
            let embedded: Bytes = embed(model.to_vec(), dir.path()).unwrap().into();
            externals(&embedded).unwrap().len()
        };
        assert_eq!(left(&model), 1);
        std::fs::hard_link(&large, &linked).unwrap();
        assert_eq!(left(&model), 0);
        std::fs::remove_file(&linked).unwrap();
        assert_eq!(left(&model), 1);
        let outside = tempfile::tempdir().unwrap();
        std::fs::rename(&large, outside.path().join("x")).unwrap();
        std::os::unix::fs::symlink(outside.path().join("x"), &large).unwrap();
        assert_eq!(left(&model), 0);
        let (model, _) = everywhere();
        std::fs::write(dir.path().join("attribute.data"), [7; 15]).unwrap();
        let error = embed(model.to_vec(), dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("attribute.data: has no bytes 8 to 16"),
            "{error}"
        );
    }

    #[test]
    fn what_is_cut_off_or_lies_too_deep_is_refused() {
        let (model, _) = everywhere();
        let cut = externals(&model.slice(..model.len() - 3))
            .unwrap_err()
            .to_string();
        assert!(cut.contains("ends in the middle"), "{cut}");
        let mut deep = GraphProto::default();
        for _ in 0..MAX_DEPTH {
            let inner = Attribute {
                g: Some(deep),
                ..Attribute::default()
            };
            deep = GraphProto {
                node: vec![node("n", inner)],
                ..GraphProto::default()
            };
        }
        let model = ModelProto {
            graph: Some(deep),
            ..ModelProto::default()
        };
        let error = externals(&model.encode_to_vec().into())
            .unwrap_err()
            .to_string();
        assert!(error.contains("levels"), "{error}");
    }

    #[test]
    fn locations_lose_their_detours_and_never_lead_out() {
        for (location, plain) in [
            ("m.data", Some("m.data")),
            ("./m.data", Some("m.data")),
            ("a/./b/../m.data", Some("a/m.data")),
            ("a/../../m.data", None),
            ("../m.data", None),
            ("/m.data", None),
            ("..", None),
            (".", None),
            ("", None),
        ] {
            assert_eq!(plain_location(location).as_deref(), plain, "{location}");
        }
    }
}
