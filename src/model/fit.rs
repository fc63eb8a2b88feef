//! Fitting a trainer's full weights of another version to a package, by the rules of packaging:
//! what cannot be a weight is skipped, 16 bits are widened to 32, a common prefix of names is
//! removed or prepended; missing or unknown tensors, and those that would be rounded, are refused.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::checkpoint::{Checkpoint, Tensor};
use super::compare::{agrees, is_named, is_uniform};
use super::names::list;
use super::prefix::{Renaming, prefixes};
use super::weights_file::Stored;
use crate::model::manifest::TensorEntry;
use crate::model::onnx::{Graph, InitializerInfo};
use crate::model::package::Package;
use crate::model::tensor::Dtype;

/// The tensors of a package, out of a checkpoint.
#[derive(Debug)]
pub(crate) struct Fitted {
    /// By their names in the package, with their types there.
    tensors: BTreeMap<String, (Tensor, Dtype)>,
    passed_over: Vec<String>,
    /// How many have the same name and type in the file.
    as_they_are: usize,
}

impl Fitted {
    /// Whether the checkpoint's file can be used unchanged.
    pub(crate) fn as_it_is(&self) -> bool {
        self.as_they_are == self.tensors.len()
    }

    /// The tensors, to be written with the package's names and types.
    pub(crate) fn stored(&self) -> impl Iterator<Item = (&str, Stored<'_>)> {
        self.tensors.iter().map(|(name, (tensor, wanted))| {
            let stored = Stored {
                dtype: tensor.dtype,
                wanted: *wanted,
                shape: &tensor.shape,
                bytes: &tensor.bytes,
            };
            (name.as_str(), stored)
        })
    }

    /// A note for the operator, if anything was skipped.
    pub(crate) fn note(&self) -> Option<String> {
        let note = || {
            format!(
                "passed over, because they are no weights: {}",
                list(&self.passed_over)
            )
        };
        (!self.passed_over.is_empty()).then(note)
    }
}

/// Finds the package's tensors in a checkpoint.
///
/// # Errors
/// Every tensor that does not fit, and why.
pub(crate) fn fit(checkpoint: Checkpoint, package: &Package) -> Result<Fitted, String> {
    let manifest = &package.manifest;
    let renaming = renaming(&checkpoint, package);
    let mut fitted = Fitted {
        tensors: BTreeMap::new(),
        passed_over: checkpoint.passed_over,
        as_they_are: 0,
    };
    let (mut unknown, mut problems) = (Vec::new(), Vec::new());
    for tensor in checkpoint.tensors {
        let name = renaming.apply(&tensor.name);
        let known = name.and_then(|name| {
            let name = canonical(package, &name);
            manifest.tensors.get_key_value(name)
        });
        match known {
            Some((name, entry)) => problems.extend(fitted.add(name, entry, tensor)),
            None => unknown.push(tensor),
        }
    }
    let frozen = Frozen::of(package, !unknown.is_empty())?;
    for tensor in unknown {
        match frozen.hold(&tensor) {
            true => fitted
                .passed_over
                .push(format!("{} (frozen in the graph)", tensor.name)),
            false => problems.push(format!("{} is not a tensor of the package", tensor.name)),
        }
    }
    let missing = manifest
        .tensors
        .keys()
        .filter(|name| !fitted.tensors.contains_key(*name));
    problems.extend(missing.map(|name| format!("{name} is missing")));
    match problems.is_empty() {
        true => Ok(fitted),
        false => Err(list(&problems)),
    }
}

/// The tensor's own name for an alias.
fn canonical<'a>(package: &'a Package, name: &'a str) -> &'a str {
    let aliases = package.manifest.aliases.as_ref();
    let alias = aliases.and_then(|aliases| aliases.get(name));
    alias.map_or(name, String::as_str)
}

/// The renaming to the package's names under which none of these is missing.
fn renaming(checkpoint: &Checkpoint, package: &Package) -> Renaming {
    let names = || checkpoint.tensors.iter().map(|tensor| tensor.name.as_str());
    let wanted: BTreeSet<&str> = package
        .manifest
        .tensors
        .keys()
        .map(String::as_str)
        .collect();
    let complete = |renaming: &Renaming| {
        let renamed = names().filter_map(|name| renaming.apply(name));
        let found = renamed.filter_map(|name| wanted.get(canonical(package, &name)).copied());
        found.collect::<BTreeSet<&str>>().len() == wanted.len()
    };
    let all = Renaming::all(names(), &prefixes(wanted.iter().copied()));
    let mut complete = all.into_iter().filter(complete);
    // Without one, names are compared as they are, so that missing ones are reported.
    complete.next().unwrap_or_default()
}

impl Fitted {
    /// Adds a tensor, or returns why it does not fit.
    fn add(&mut self, name: &str, entry: &TensorEntry, tensor: Tensor) -> Option<String> {
        if tensor.shape != entry.shape {
            return Some(format!(
                "{} is {:?}, and {:?} in the package",
                tensor.name, tensor.shape, entry.shape
            ));
        }
        let widened = tensor.dtype != entry.dtype;
        if widened && entry.dtype != Dtype::F32 {
            let (ours, theirs) = (entry.dtype.stored(), tensor.dtype.stored());
            return Some(format!(
                "{} is of this name and shape, but {ours} in the package and {theirs} in the file, \
                 which would have to be rounded; save it in {ours}",
                tensor.name
            ));
        }
        self.as_they_are += usize::from(!widened && tensor.name == name);
        match self.tensors.get(name) {
            Some((other, _)) if other.dtype != tensor.dtype || other.bytes != tensor.bytes => {
                Some(format!(
                    "{} and {} differ, and are one tensor in the package",
                    other.name, tensor.name
                ))
            }
            Some(_) => None,
            None => {
                self.tensors.insert(name.to_owned(), (tensor, entry.dtype));
                None
            }
        }
    }
}

/// Frozen initializers, which packaging left out and a trainer's file may still contain.
struct Frozen(Vec<(InitializerInfo, Bytes)>);

impl Frozen {
    fn of(package: &Package, needed: bool) -> Result<Self, String> {
        if !needed {
            return Ok(Self(Vec::new()));
        }
        let graph = Graph::decode(package.graph.clone()).map_err(|e| e.to_string())?;
        let places = package
            .manifest
            .tensors
            .values()
            .flat_map(|entry| &entry.places);
        let patched: BTreeSet<&str> = places.map(|place| place.initializer.as_str()).collect();
        let frozen = graph.initializers().into_iter();
        let frozen = frozen.filter(|i| i.dtype.is_some() && !patched.contains(i.name.as_str()));
        let held = frozen.map(|info| {
            let bytes = graph
                .initializer(&info.name, &package.dir)
                .map_err(|e| e.to_string())?;
            Ok((info, bytes))
        });
        held.collect::<Result<_, String>>().map(Self)
    }

    /// Whether the graph holds the same tensor. A uniform one must have the same name as well,
    /// because many tensors match it.
    fn hold(&self, tensor: &Tensor) -> bool {
        self.0.iter().any(|held| {
            let told = !is_uniform(tensor) || is_named(&held.0.name, &tensor.name);
            told && agrees(tensor, held, Dtype::F32).is_some()
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::engine::trial::build;
    use crate::model::build::Recipe;
    use crate::model::manifest::Objective;
    use crate::model::weights::Weights;
    use half::bf16;
    use std::path::{Path, PathBuf};
    use tempfile::TempDir;

    fn model() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/model")
    }

    fn saved() -> Checkpoint {
        Checkpoint::open(&model().join("checkpoint.safetensors")).unwrap()
    }

    /// A package of the tests' model, version 1, in `package` of this folder.
    pub(crate) fn package() -> (Package, TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("package");
        build(&Recipe {
            exclude: Vec::new(),
            graph: model().join("graph-named.onnx"),
            weights: Some(model().join("checkpoint.safetensors")),
            shards: model().join("shards"),
            name: "tiny".into(),
            version: 1,
            out: out.clone(),
            objective: Objective::causal_lm(128),
        })
        .unwrap();
        (Package::load(&out, false, &[]).unwrap(), dir)
    }

    fn tensor(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes());
        Tensor {
            name: name.into(),
            shape: shape.to_vec(),
            dtype: Dtype::F32,
            bytes: bytes.collect(),
        }
    }

    /// Rounds a tensor to bfloat16.
    fn narrow(tensor: &mut Tensor) {
        let values = tensor.bytes.as_chunks().0.iter();
        let narrow = values.map(|b| bf16::from_f32(f32::from_le_bytes(*b)));
        tensor.bytes = narrow.flat_map(bf16::to_le_bytes).collect();
        tensor.dtype = Dtype::Bf16;
    }

    #[test]
    fn a_file_of_this_model_is_taken_whatever_the_trainer_s_habits() {
        let (package, dir) = package();
        let as_saved = fit(saved(), &package).unwrap();
        assert!(as_saved.as_it_is());
        assert_eq!(as_saved.note(), None);

        let mut with_buffers = saved();
        with_buffers.passed_over.push("steps (I64)".into());
        let fitted = fit(with_buffers, &package).unwrap();
        assert!(fitted.as_it_is() && fitted.note().unwrap().contains("steps (I64)"));

        for prefix in ["module.", "_orig_mod.", "module._orig_mod.", "net."] {
            let mut wrapped = saved();
            for tensor in &mut wrapped.tensors {
                tensor.name.insert_str(0, prefix);
            }
            let fitted = fit(wrapped, &package).unwrap();
            assert!(!fitted.as_it_is());
            assert_eq!(
                written(&fitted, &package, &dir),
                package.weights.weights_id,
                "{prefix}"
            );
        }
    }

    /// The id of the weights that are written.
    fn written(fitted: &Fitted, package: &Package, dir: &TempDir) -> String {
        let path = dir.path().join("new.safetensors");
        crate::model::weights_file::write(&path, fitted.stored()).unwrap();
        Weights::open(&path, &package.manifest)
            .unwrap()
            .0
            .weights_id
    }

    #[test]
    fn sixteen_bits_are_widened_and_thirty_two_are_not_rounded() {
        let (mut package, dir) = package();
        let (mut halved, mut rounded) = (saved(), saved());
        halved.tensors.iter_mut().for_each(narrow);
        for tensor in &mut rounded.tensors {
            narrow(tensor);
            let wide = crate::model::weights_file::widen(&tensor.bytes, tensor.dtype);
            (tensor.bytes, tensor.dtype) = (wide.into(), Dtype::F32);
        }
        let expected = written(&fit(rounded, &package).unwrap(), &package, &dir);
        let fitted = fit(halved.clone(), &package).unwrap();
        assert!(!fitted.as_it_is());
        assert_eq!(written(&fitted, &package, &dir), expected);

        for entry in package.manifest.tensors.values_mut() {
            entry.dtype = Dtype::Bf16;
        }
        assert!(fit(halved, &package).unwrap().as_it_is());
        let refusal = fit(saved(), &package).unwrap_err();
        let reason = "of this name and shape, but BF16 in the package and F32 in the file";
        assert!(refusal.contains(reason), "{refusal}");
    }

    #[test]
    fn what_is_missing_unknown_or_of_another_shape_is_named() {
        let (package, _dir) = package();
        let mut lacking = saved();
        let lost = lacking.tensors.remove(1).name;
        let refusal = fit(lacking, &package).unwrap_err();
        assert_eq!(refusal, format!("{lost} is missing"));

        let mut more = saved();
        more.tensors
            .push(tensor("adapter.weight", &[2], &[1.0, 2.0]));
        let refusal = fit(more, &package).unwrap_err();
        assert_eq!(refusal, "adapter.weight is not a tensor of the package");

        let mut other = saved();
        other.tensors[0].shape.insert(0, 1);
        let refusal = fit(other, &package).unwrap_err();
        assert!(refusal.contains("in the package"), "{refusal}");
    }

    #[test]
    fn an_alias_is_its_tensor_and_both_must_agree() {
        let (mut package, dir) = package();
        let first = saved().tensors.remove(0);
        let alias = [("tied".to_owned(), first.name.clone())];
        package.manifest.aliases = Some(alias.into());
        let mut alone = saved();
        alone.tensors[0].name = "tied".into();
        let fitted = fit(alone, &package).unwrap();
        assert!(!fitted.as_it_is());
        assert_eq!(written(&fitted, &package, &dir), package.weights.weights_id);

        let mut both = saved();
        both.tensors.push(Tensor {
            name: "tied".into(),
            ..first
        });
        assert!(fit(both.clone(), &package).unwrap().as_it_is());
        both.tensors[0].bytes = vec![0; both.tensors[0].bytes.len()].into();
        let refusal = fit(both, &package).unwrap_err();
        assert!(refusal.contains("and tied differ"), "{refusal}");
    }

    #[test]
    fn what_packaging_froze_may_be_there_as_long_as_it_is_the_same() {
        let (mut package, _dir) = package();
        let frozen = saved()
            .tensors
            .into_iter()
            .find(|t| !is_uniform(t))
            .unwrap();
        package.manifest.tensors.remove(&frozen.name);
        let fitted = fit(saved(), &package).unwrap();
        assert!(fitted.note().unwrap().contains(&frozen.name));
        let mut trained = saved();
        let tensor = trained
            .tensors
            .iter_mut()
            .find(|t| t.name == frozen.name)
            .unwrap();
        tensor.bytes = vec![0; tensor.bytes.len()].into();
        let refusal = fit(trained, &package).unwrap_err();
        assert_eq!(
            refusal,
            format!("{} is not a tensor of the package", frozen.name)
        );
    }
}
