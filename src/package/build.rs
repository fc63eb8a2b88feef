//! Making a package: finding, by comparing contents, where the exporter put each checkpoint
//! tensor, and refusing by name what cannot be placed beyond doubt.

mod precision;
mod unshare;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::checkpoint::{self, Checkpoint, Tensor};
use super::weights::transpose;
use super::{
    Dtype, FileDigest, GraphFile, Inputs, MANIFEST, Manifest, Objective, Outputs, PackageError,
    Place, ShardFile, TensorEntry,
};
use crate::engine::graph::{Graph, InitializerInfo, InputInfo};
use crate::job::message::V1;

/// What `scorer package` is told.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// The exported graph.
    pub graph: PathBuf,
    /// The checkpoint; without it the graph's own initializers are the tensors.
    pub weights: Option<PathBuf>,
    /// Directory of `*.safetensors` shards.
    pub shards: PathBuf,
    /// The model's name.
    pub name: String,
    /// The version of the weights.
    pub version: u64,
    /// Where the package goes; must not exist yet or be empty.
    pub out: PathBuf,
    /// What is measured.
    pub objective: Objective,
}

/// What was made.
#[derive(Debug, Clone)]
pub struct Built {
    /// The package's manifest.
    pub manifest: Manifest,
    /// Checkpoint tensors that live in the graph under another name or transposed.
    pub moved: usize,
    /// What the operator should know of the checkpoint.
    pub notes: Vec<String>,
}

type Contents = [u8; 32];

/// Makes a package; copies, never links.
///
/// # Errors
/// Names the file, tensor or initializer and what to do.
pub fn build(recipe: &Recipe) -> Result<Built, PackageError> {
    let bytes = read(&recipe.graph)?;
    let mut graph = Graph::decode(bytes.clone().into())
        .map_err(|e| PackageError(format!("{}: {e}", recipe.graph.display())))?;
    let graph_dir = recipe.graph.parent().unwrap_or(Path::new("."));
    let initializers = weight_initializers(&graph, graph_dir)?;
    let (checkpoint, note) = match &recipe.weights {
        Some(path) => {
            let checkpoint = Checkpoint::open(path)?;
            let note = checkpoint.note();
            let tensors =
                precision::as_in_graph(checkpoint.tensors, &initializers, &graph.inputs())?;
            (tensors, note)
        }
        None => {
            let own = initializers.iter().filter(|(i, _)| !i.shape.is_empty());
            (own.map(own_tensor).collect(), None)
        }
    };
    let (checkpoint, aliases) = split_aliases(checkpoint, &initializers)?;
    let (tensors, rewritten) = place(&checkpoint, &initializers, &mut graph)?;
    // An export that is good as it is goes into the package byte for byte.
    let bytes = if rewritten { graph.encode() } else { bytes };
    let moved = tensors
        .iter()
        .filter(|(name, t)| {
            t.places
                .iter()
                .any(|p| p.transposed || p.initializer != **name)
        })
        .count();

    let inputs = inputs(&graph, &tensors, recipe.objective)?;
    let outputs = outputs(&graph, recipe.objective)?;
    prepare_directory(&recipe.out)?;
    let manifest = Manifest {
        v: V1,
        name: recipe.name.clone(),
        version: recipe.version,
        graph: copy_graph(recipe, &graph, &bytes, graph_dir)?,
        weights: Some(write_checkpoint(&recipe.out, &checkpoint)?),
        inputs,
        outputs,
        objective: recipe.objective,
        precision: checkpoint.first().map_or(Dtype::F32, |t| t.dtype),
        tensors,
        trainable: None,
        aliases: (!aliases.is_empty()).then_some(aliases),
        shards: copy_shards(recipe)?,
        canary: None,
    };
    manifest.check()?;
    let json = serde_json::to_vec_pretty(&manifest).map_err(|e| PackageError(e.to_string()))?;
    write(&recipe.out.join(MANIFEST), &json)?;
    Ok(Built {
        manifest,
        moved,
        notes: note.into_iter().collect(),
    })
}

fn read(path: &Path) -> Result<Vec<u8>, PackageError> {
    std::fs::read(path).map_err(|e| PackageError(format!("{}: {e}", path.display())))
}

pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<FileDigest, PackageError> {
    let fail = |e: std::io::Error| PackageError(format!("{}: {e}", path.display()));
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(fail)?;
    }
    std::fs::write(path, bytes).map_err(fail)?;
    let file = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    Ok(FileDigest {
        file,
        sha256: hex::encode(Sha256::digest(bytes)),
    })
}

fn prepare_directory(out: &Path) -> Result<(), PackageError> {
    let fail = |e: std::io::Error| PackageError(format!("{}: {e}", out.display()));
    std::fs::create_dir_all(out).map_err(fail)?;
    if std::fs::read_dir(out).map_err(fail)?.next().is_some() {
        return Err(PackageError(format!(
            "{}: is not empty; packages are immutable, choose a new directory",
            out.display()
        )));
    }
    Ok(())
}

fn weight_initializers(
    graph: &Graph,
    dir: &Path,
) -> Result<Vec<(InitializerInfo, Bytes)>, PackageError> {
    let floats = graph
        .initializers()
        .into_iter()
        .filter(|i| i.dtype.is_some());
    floats
        .map(|i| {
            let bytes = graph
                .initializer(&i.name, dir)
                .map_err(|e| PackageError(e.to_string()))?;
            Ok((i, bytes))
        })
        .collect()
}

fn own_tensor((info, bytes): &(InitializerInfo, Bytes)) -> Tensor {
    let dtype = info.dtype.unwrap_or(Dtype::F32);
    Tensor {
        name: info.name.clone(),
        shape: info.shape.clone(),
        dtype,
        bytes: bytes.clone(),
    }
}

/// Equal large contents under two names are one tied tensor. The name that the graph uses is the
/// tensor, the other its alias. Contents of one repeated value (untrained norms, zero biases) say
/// nothing, and stay apart.
fn split_aliases(
    checkpoint: Vec<Tensor>,
    initializers: &[(InitializerInfo, Bytes)],
) -> Result<(Vec<Tensor>, BTreeMap<String, String>), PackageError> {
    let mut aliases = BTreeMap::new();
    let mut kept: Vec<Tensor> = Vec::new();
    let in_graph = |name: &str| initializers.iter().any(|(i, _)| i.name == name);
    for tensor in checkpoint {
        let twin = kept
            .iter()
            .position(|t| t.shape == tensor.shape && t.bytes == tensor.bytes && !is_uniform(t));
        match twin {
            None => kept.push(tensor),
            Some(at) if in_graph(&tensor.name) && in_graph(&kept[at].name) => kept.push(tensor),
            Some(at) if in_graph(&tensor.name) => {
                aliases.insert(std::mem::replace(&mut kept[at], tensor).name, String::new());
                let name = kept[at].name.clone();
                aliases
                    .values_mut()
                    .filter(|v| v.is_empty())
                    .for_each(|v| v.clone_from(&name));
            }
            Some(at) => {
                aliases.insert(tensor.name, kept[at].name.clone());
            }
        }
    }
    kept.sort_by(|a, b| a.name.cmp(&b.name));
    Ok((kept, aliases))
}

fn is_uniform(tensor: &Tensor) -> bool {
    let mut elements = tensor.bytes.chunks_exact(tensor.dtype.size());
    let first = elements.next();
    elements.all(|e| Some(e) == first)
}

fn contents(shape: &[usize], dtype: Dtype, bytes: &[u8]) -> Contents {
    let mut hash = Sha256::new();
    hash.update(format!("{shape:?} {}", dtype.as_str()));
    hash.update(bytes);
    hash.finalize().into()
}

/// Where every tensor is, and whether the graph had to be rewritten to tell them apart.
fn place(
    checkpoint: &[Tensor],
    initializers: &[(InitializerInfo, Bytes)],
    graph: &mut Graph,
) -> Result<(BTreeMap<String, TensorEntry>, bool), PackageError> {
    let mut by_contents: HashMap<Contents, Vec<&str>> = HashMap::new();
    for (info, bytes) in initializers {
        let dtype = info.dtype.unwrap_or(Dtype::F32);
        by_contents
            .entry(contents(&info.shape, dtype, bytes))
            .or_default()
            .push(&info.name);
    }
    let (all, fed) = (graph.initializers(), graph.inputs());
    let mut found: unshare::Found = checkpoint
        .iter()
        .map(|tensor| match fed_place(tensor, &fed) {
            Some(place) => Ok(vec![place]),
            None => places(tensor, checkpoint, &by_contents),
        })
        .collect();
    let unshared = unshare::unshare(graph, checkpoint, &by_contents, &mut found)?;
    let mut problems = unshared.problems;
    let mut tensors = BTreeMap::new();
    for (tensor, found) in checkpoint.iter().zip(found) {
        match found {
            Ok(places) => {
                let entry = TensorEntry {
                    places,
                    shape: tensor.shape.clone(),
                    dtype: tensor.dtype,
                };
                tensors.insert(tensor.name.clone(), entry);
            }
            Err(problem) => {
                let problem = precision::reason(tensor, &all, initializers).unwrap_or(problem);
                problems.push(format!("  {} {:?}: {problem}", tensor.name, tensor.shape));
            }
        }
    }
    if problems.is_empty() {
        return Ok((tensors, unshared.rewritten));
    }
    Err(PackageError(format!(
        "tensors cannot be placed in the graph:\n{}",
        problems.join("\n")
    )))
}

/// An export may leave a weight as an input under its own name.
fn fed_place(tensor: &Tensor, inputs: &[InputInfo]) -> Option<Place> {
    let shape: Vec<Option<usize>> = tensor.shape.iter().copied().map(Some).collect();
    let is_it = |input: &&InputInfo| input.name == tensor.name && input.shape == shape;
    inputs.iter().find(is_it).map(|input| Place {
        initializer: input.name.clone(),
        transposed: false,
    })
}

fn places(
    tensor: &Tensor,
    checkpoint: &[Tensor],
    by_contents: &HashMap<Contents, Vec<&str>>,
) -> Result<Vec<Place>, String> {
    let found = copies(tensor, by_contents);
    let equal: Vec<&str> = checkpoint
        .iter()
        .filter(|t| t.shape == tensor.shape && t.bytes == tensor.bytes)
        .map(|t| t.name.as_str())
        .collect();
    if equal.len() > 1 || is_uniform(tensor) {
        return by_name(tensor, found, &equal);
    }
    if found.is_empty() {
        Err("no initializer holds it, as it is or transposed".into())
    } else {
        Ok(found)
    }
}

/// Every initializer that holds the tensor's contents, as they are or transposed.
fn copies(tensor: &Tensor, by_contents: &HashMap<Contents, Vec<&str>>) -> Vec<Place> {
    let held = |shape: &[usize], bytes: &[u8], transposed| {
        let names = by_contents.get(&contents(shape, tensor.dtype, bytes));
        let place = move |name: &&str| Place {
            initializer: (*name).to_owned(),
            transposed,
        };
        names.into_iter().flatten().map(place)
    };
    let mut found: Vec<Place> = held(&tensor.shape, &tensor.bytes, false).collect();
    if let [rows, columns] = tensor.shape.as_slice() {
        let flipped = transpose(&tensor.bytes, *rows, *columns, tensor.dtype.size());
        // What is its own transpose is found as it is already.
        if rows != columns || flipped != tensor.bytes {
            found.extend(held(&[*columns, *rows], &flipped, true));
        }
    }
    found
}

/// Contents cannot tell equal tensors apart; only the name can, and only if every copy has one.
fn by_name(tensor: &Tensor, found: Vec<Place>, equal: &[&str]) -> Result<Vec<Place>, String> {
    let (own, others): (Vec<Place>, Vec<Place>) = found
        .into_iter()
        .partition(|p| p.initializer == tensor.name && !p.transposed);
    let nameless: Vec<&str> = others
        .iter()
        .map(|p| p.initializer.as_str())
        .filter(|name| !equal.contains(name))
        .collect();
    if own.is_empty() {
        return Err(
            "other tensors or constants have the same contents and no initializer has its name; \
                    export with the checkpoint's names, or train it"
                .into(),
        );
    }
    if !nameless.is_empty() {
        return Err(format!(
            "{} in the graph may be copies of it and have no checkpoint name; train it, or export without them",
            nameless.join(", ")
        ));
    }
    Ok(own)
}

/// The usual names of what a language model takes besides its tokens are known.
fn inputs(
    graph: &Graph,
    tensors: &BTreeMap<String, TensorEntry>,
    objective: Objective,
) -> Result<Inputs, PackageError> {
    let Objective::CausalLm { .. } = objective else {
        return Ok(Inputs::default());
    };
    let names = graph.inputs().into_iter().map(|input| input.name);
    let names: Vec<String> = names.filter(|name| !tensors.contains_key(name)).collect();
    let usual = |name: &str| names.iter().find(|n| *n == name).cloned();
    let (attention_mask, position_ids) = (usual("attention_mask"), usual("position_ids"));
    let taken = [&attention_mask, &position_ids];
    let rest = |name: &&String| !taken.iter().any(|t| t.as_ref() == Some(*name));
    let rest: Vec<String> = names.iter().filter(rest).cloned().collect();
    let tokens = sole(&rest, &["tokens", "input_ids"], "input")?;
    let unknown: Vec<&str> = rest
        .iter()
        .filter(|n| **n != tokens)
        .map(String::as_str)
        .collect();
    if !unknown.is_empty() {
        return Err(PackageError(format!(
            "graph: nothing is known to feed its input {}; export it without (no cache, no labels)",
            unknown.join(", ")
        )));
    }
    Ok(Inputs {
        tokens: Some(tokens),
        attention_mask,
        position_ids,
    })
}

fn outputs(graph: &Graph, objective: Objective) -> Result<Outputs, PackageError> {
    let name = |preferred| sole(&graph.outputs(), &[preferred], "output").map(Some);
    Ok(match objective {
        Objective::CausalLm { .. } => Outputs {
            logits: name("logits")?,
            loss: None,
        },
        Objective::GraphLoss {} => Outputs {
            logits: None,
            loss: name("loss")?,
        },
    })
}

/// A name asked for, or the only one there is.
fn sole(names: &[String], preferred: &[&str], what: &str) -> Result<String, PackageError> {
    if let Some(found) = names.iter().find(|n| preferred.contains(&n.as_str())) {
        return Ok(found.clone());
    }
    match names {
        [only] => Ok(only.clone()),
        other => Err(PackageError(format!(
            "graph: name one {what} {}; it has {other:?}",
            preferred.join(" or ")
        ))),
    }
}

fn copy_graph(
    recipe: &Recipe,
    graph: &Graph,
    bytes: &[u8],
    dir: &Path,
) -> Result<GraphFile, PackageError> {
    let FileDigest { file, sha256 } = write(&recipe.out.join("model.onnx"), bytes)?;
    let files = graph.external_files();
    let mut external = Vec::new();
    for location in &files {
        let digest = write(
            &super::inside(&recipe.out, location)?,
            &read(&dir.join(location))?,
        )?;
        external.push(FileDigest {
            file: location.clone(),
            sha256: digest.sha256,
        });
    }
    Ok(GraphFile {
        file,
        sha256,
        external: (!external.is_empty()).then_some(external),
    })
}

fn write_checkpoint(out: &Path, checkpoint: &[Tensor]) -> Result<FileDigest, PackageError> {
    let tensors = checkpoint
        .iter()
        .map(|t| (t.name.as_str(), t.dtype, t.shape.as_slice(), &t.bytes[..]));
    write_tensors(&out.join("weights.safetensors"), tensors)
}

/// Writes weights as a safetensors file.
pub(super) fn write_tensors<'a>(
    path: &Path,
    tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize], &'a [u8])>,
) -> Result<FileDigest, PackageError> {
    let fail = |e: std::io::Error| PackageError(format!("{}: {e}", path.display()));
    checkpoint::write(path, tensors).map_err(fail)?;
    let sha256 = hex::encode(Sha256::digest(super::map(path)?));
    let file = path.file_name().unwrap_or_default();
    let file = file.to_string_lossy().into_owned();
    Ok(FileDigest { file, sha256 })
}

fn copy_shards(recipe: &Recipe) -> Result<Vec<ShardFile>, PackageError> {
    let (from, out) = (&recipe.shards, &recipe.out);
    let fail = |e: std::io::Error| PackageError(format!("{}: {e}", from.display()));
    let mut shards = Vec::new();
    for entry in std::fs::read_dir(from).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let digits: String = name
            .chars()
            .skip_while(|c| !c.is_ascii_digit())
            .take_while(char::is_ascii_digit)
            .collect();
        let id = digits
            .parse()
            .map_err(|_| PackageError(format!("{}: no number in the file name", path.display())))?;
        let bytes = read(&path)?;
        super::parse_shard(id, &name, &bytes, recipe.objective)?;
        let digest = write(&out.join("shards").join(&name), &bytes)?;
        shards.push(ShardFile {
            id,
            file: format!("shards/{name}"),
            sha256: digest.sha256,
        });
    }
    shards.sort_by_key(|s| s.id);
    if shards.is_empty() {
        Err(PackageError(format!(
            "{}: holds no *.safetensors shards",
            from.display()
        )))
    } else {
        Ok(shards)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
        Tensor {
            name: name.into(),
            shape: shape.into(),
            dtype: Dtype::F32,
            bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }

    /// Places where nothing but names and contents can tell.
    fn placed(checkpoint: &[Tensor], held: &[Tensor]) -> Result<Vec<(String, bool)>, String> {
        let names: Vec<&str> = held.iter().map(|t| t.name.as_str()).collect();
        let mut graph = crate::engine::graph::unshare::hand_made::graph(&[], &names);
        let held: Vec<_> = held
            .iter()
            .map(|t| {
                let info = InitializerInfo {
                    name: t.name.clone(),
                    shape: t.shape.clone(),
                    dtype: Some(t.dtype),
                };
                (info, t.bytes.clone())
            })
            .collect();
        let (tensors, rewritten) = place(checkpoint, &held, &mut graph).map_err(|e| e.0)?;
        assert!(!rewritten);
        let places = tensors[&checkpoint[0].name].places.iter();
        Ok(places
            .map(|p| (p.initializer.clone(), p.transposed))
            .collect())
    }

    const MATRIX: [f32; 6] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];

    #[test]
    fn a_tensor_is_found_in_every_place_it_has() {
        let checkpoint = [tensor("w", &[2, 3], &MATRIX)];
        let graph = [
            tensor("renamed", &[2, 3], &MATRIX),
            tensor("folded", &[3, 2], &[1.0, 4.0, 2.0, 5.0, 3.0, 6.0]),
            tensor("other", &[3, 2], &MATRIX),
        ];
        let expected = [("renamed".to_owned(), false), ("folded".to_owned(), true)];
        assert_eq!(placed(&checkpoint, &graph).unwrap(), expected);
        let lost = placed(&checkpoint, &graph[2..]).unwrap_err();
        assert!(lost.contains("w [2, 3]"), "{lost}");
    }

    #[test]
    fn equal_tensors_are_told_apart_by_name_or_refused() {
        let ones = [1.0; 2];
        let checkpoint = [tensor("norm.a", &[2], &ones), tensor("norm.b", &[2], &ones)];
        assert_eq!(
            placed(&checkpoint, &checkpoint).unwrap(),
            [("norm.a".to_owned(), false)]
        );
        let merged = placed(&checkpoint, &checkpoint[..1]).unwrap_err();
        assert!(merged.contains("norm.a [2], norm.b [2]"), "{merged}");
    }

    #[test]
    fn a_copy_without_a_name_is_refused_where_contents_say_nothing() {
        let checkpoint = [tensor("w", &[2, 3], &[0.5; 6])];
        let graph = [
            tensor("w", &[2, 3], &[0.5; 6]),
            tensor("val_7", &[3, 2], &[0.5; 6]),
        ];
        assert_eq!(
            placed(&checkpoint, &graph[..1]).unwrap(),
            [("w".to_owned(), false)]
        );
        let doubt = placed(&checkpoint, &graph).unwrap_err();
        assert!(doubt.contains("val_7"), "{doubt}");
    }
}
