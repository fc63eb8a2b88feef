//! An export's external data files, and their names in the package.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::disk::{GRAPH, SHARDS, WEIGHTS};
use crate::model::files::check_regular;
use crate::model::manifest::PackageError;
use crate::model::onnx::{External, plain_location};
use crate::model::package::MANIFEST;

/// The folder for an export's files whose names a package uses itself.
const EXTERNAL: &str = "external";

/// The name of each external data file in the package: unchanged, unless it is that of one of the
/// package's own files.
pub(super) fn external_names(
    tensors: &[External],
) -> Result<BTreeMap<String, String>, PackageError> {
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
        // Some file systems ignore case.
        while [GRAPH, WEIGHTS, SHARDS, MANIFEST].contains(&first.to_lowercase().as_str())
            && (free == *name || taken.contains(&free))
        {
            free = format!("{EXTERNAL}/{free}");
        }
        names.insert((*location).to_owned(), free);
    }
    Ok(names)
}

/// Every worker would refuse a tensor whose file is too short.
pub(super) fn check_external(tensor: &External, from: &Path) -> Result<(), PackageError> {
    let path = from.join(plain_location(&tensor.location).unwrap_or_default());
    let at = &tensor.at;
    let found = std::fs::metadata(&path).map_err(|e| {
        let path = path.display();
        PackageError(format!(
            "graph: {at}: its external data cannot be read: {path}: {e}; keep the export's files together"
        ))
    })?;
    check_regular(&path, &found)
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

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::model::build) fn external(location: &str) -> External {
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
}
