//! Which of several tensors of equal contents each use of a shared initializer reads, told by the
//! names that the exporter left. What is not certain is refused: a use that is given to the wrong
//! tensor is a wrong score that no probe notices.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::contents::{ContentHash, HashedTensor};
use crate::model::onnx::{NodeInfo, Use, Wiring};

/// Operators that pass their first input on; their owner is that of their readers.
const PASS_THROUGH: [&str; 5] = ["Cast", "Identity", "Reshape", "Transpose", "Unsqueeze"];

/// The names that checkpoints use for the inputs of operators.
const INPUTS: [(&str, &[&str]); 8] = [
    (
        "BatchNormalization",
        &["", "weight", "bias", "running_mean", "running_var"],
    ),
    ("Conv", &["", "weight", "bias"]),
    ("ConvTranspose", &["", "weight", "bias"]),
    ("Gemm", &["", "weight", "bias"]),
    ("GroupNormalization", &["", "weight", "bias"]),
    ("InstanceNormalization", &["", "weight", "bias"]),
    ("LayerNormalization", &["", "weight", "bias"]),
    ("RMSNormalization", &["", "weight"]),
];

const WORDS: [&str; 4] = ["weight", "bias", "running_mean", "running_var"];

/// The uses of one initializer, by the position of the tensor that they read.
pub(super) struct SharedInitializer {
    pub(super) initializer: String,
    pub(super) transposed: Vec<bool>,
    pub(super) owners: BTreeMap<usize, Vec<Use>>,
}

struct Owner {
    tensor: usize,
    /// The exporter recorded the tensor itself, not just the module.
    named: bool,
}

/// Tensors of equal contents.
pub(super) struct EqualTensors<'a> {
    pub(super) tensors: Vec<&'a HashedTensor<'a>>,
    pub(super) wiring: &'a Wiring,
}

impl EqualTensors<'_> {
    pub(super) fn assign(
        &self,
        by_contents: &HashMap<ContentHash, Vec<&str>>,
    ) -> Result<Vec<SharedInitializer>, String> {
        let held = self.initializers(by_contents);
        let first = self.tensors[0];
        if first.is_symmetric() {
            let doubt = "they are their own transpose, so the graph does not show whether it holds them transposed";
            return Err(self.refusal(&held, &[doubt.to_owned()]));
        }
        let mut doubts = Vec::new();
        let mut by_module = vec![0_usize; self.tensors.len()];
        let mut shares = Vec::new();
        for (initializer, contents) in &held {
            if self.wiring.escapes(initializer) {
                doubts.push(format!(
                    "{initializer} is read in the body of a node, or is an output"
                ));
            }
            let mut owners: BTreeMap<usize, Vec<Use>> = BTreeMap::new();
            for place in self.wiring.uses(initializer) {
                match self.owner(initializer, *place) {
                    Ok(claim) => {
                        by_module[claim.tensor] += usize::from(!claim.named);
                        owners.entry(claim.tensor).or_default().push(*place);
                    }
                    Err(doubt) => doubts.push(doubt),
                }
            }
            shares.push(self.share(initializer, *contents, owners));
        }
        for (at, tensor) in self.tensors.iter().enumerate() {
            if !shares.iter().any(|s| s.owners.contains_key(&at)) {
                doubts.push(format!("nothing is seen to read {}", tensor.name));
            }
            // One of these nodes may read a constant of the same contents.
            if by_module[at] > 1 {
                let module = module_of(&tensor.name).0;
                doubts.push(format!(
                    "{} nodes of {module} read it, and not all need to mean {}",
                    by_module[at], tensor.name
                ));
            }
        }
        match doubts.is_empty() {
            true => Ok(shares),
            false => Err(self.refusal(&held, &doubts)),
        }
    }

    /// The initializers that hold these tensors, by name, with their content hashes.
    fn initializers(
        &self,
        by_contents: &HashMap<ContentHash, Vec<&str>>,
    ) -> BTreeMap<String, ContentHash> {
        let all = self.tensors.iter().flat_map(|t| t.initializer_hashes());
        let all: BTreeSet<ContentHash> = all.map(|(contents, _)| contents).collect();
        let named = |contents: ContentHash| {
            let names = by_contents.get(&contents).into_iter().flatten();
            names.map(move |name| ((*name).to_owned(), contents))
        };
        all.into_iter().flat_map(named).collect()
    }

    fn share(
        &self,
        initializer: &str,
        contents: ContentHash,
        owners: BTreeMap<usize, Vec<Use>>,
    ) -> SharedInitializer {
        let transposed =
            |t: &&HashedTensor<'_>| t.initializer_hashes().any(|held| held == (contents, true));
        SharedInitializer {
            initializer: initializer.to_owned(),
            transposed: self.tensors.iter().map(transposed).collect(),
            owners,
        }
    }

    /// The owner of a use of the initializer, or of a value passed on from it.
    fn owner(&self, initializer: &str, place: Use) -> Result<Owner, String> {
        let node = &self.wiring.nodes[place.node];
        if !PASS_THROUGH.contains(&node.op.as_str()) || place.input != 0 {
            return self.by_module(initializer, node, place.input);
        }
        // TorchScript's exporter writes Identity(merged) -> "layers.1.norm.weight".
        if let Some(tensor) = self.position(|t| node.outputs.contains(&t.name)) {
            return Ok(Owner {
                tensor,
                named: true,
            });
        }
        let (mut owner, mut named): (Option<usize>, bool) = (None, true);
        for output in &node.outputs {
            if self.wiring.escapes(output) {
                return Err(doubt(node, "its output is read in the body of a node"));
            }
            for reader in self.wiring.uses(output) {
                let claim = self.owner(initializer, *reader)?;
                if owner.is_some_and(|o| o != claim.tensor) {
                    return Err(doubt(node, "its output is read for more than one of them"));
                }
                owner = Some(claim.tensor);
                named &= claim.named;
            }
        }
        let tensor = owner.ok_or_else(|| doubt(node, "nothing reads its output"))?;
        Ok(Owner { tensor, named })
    }

    fn by_module(&self, initializer: &str, node: &NodeInfo, input: usize) -> Result<Owner, String> {
        let reads = |at: &usize| self.reads(node, input, &self.tensors[*at].name);
        let members: Vec<usize> = (0..self.tensors.len()).filter(reads).collect();
        match (members.as_slice(), self.remaining(initializer)) {
            ([tensor], remaining) if remaining.is_none_or(|r| r == *tensor) => Ok(Owner {
                tensor: *tensor,
                named: node.is_traced() || remaining.is_some(),
            }),
            ([], Some(tensor)) => Ok(Owner {
                tensor,
                named: true,
            }),
            ([], None) => Err(doubt(
                node,
                "not known to read one of them; a constant may have the same contents",
            )),
            _ => Err(doubt(node, "it may read more than one of them")),
        }
    }

    /// Whether this input of the node reads the tensor, according to what the exporter recorded.
    fn reads(&self, node: &NodeInfo, input: usize, name: &str) -> bool {
        let (module, last) = module_of(name);
        let inside = node.module.as_ref().is_some_and(|found| {
            found.path == module && !(found.from_name && self.numbered(module))
        });
        let words = INPUTS.iter().find(|(op, _)| *op == node.op);
        let word = words.and_then(|(_, words)| words.get(input));
        let fits = word.is_none_or(|word| *word == last || !WORDS.contains(&last));
        inside && fits && node.passes(name) != Some(false)
    }

    /// Whether `norm_1` in a path may be another module `norm` of these tensors.
    fn numbered(&self, path: &str) -> bool {
        let is_number = |n: &str| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit());
        path.split('.').any(|part| {
            part.rsplit_once('_').is_some_and(|(base, number)| {
                let has =
                    |t: &&&HashedTensor<'_>| module_of(&t.name).0.split('.').any(|p| p == base);
                is_number(number) && self.tensors.iter().any(|t| has(&t))
            })
        })
    }

    /// The tensor that the initializer is named after, where every one of these tensors has a value
    /// of its own name: a node that reads the initializer directly reads this tensor.
    fn remaining(&self, initializer: &str) -> Option<usize> {
        let mut tensors = self.tensors.iter();
        let all = tensors.all(|t| self.wiring.values.contains(&t.name));
        self.position(|t| all && t.name == initializer)
    }

    fn position(&self, is_it: impl Fn(&HashedTensor<'_>) -> bool) -> Option<usize> {
        self.tensors.iter().position(|t| is_it(t))
    }

    fn refusal(&self, held: &BTreeMap<String, ContentHash>, doubts: &[String]) -> String {
        let held: Vec<&str> = held.keys().map(String::as_str).collect();
        let name = |t: &&HashedTensor<'_>| format!("{} {:?}", t.name, t.shape);
        let names: Vec<String> = self.tensors.iter().map(name).collect();
        format!(
            "  {}: their contents are in {}, and which of them each use reads cannot be determined; export with \
             torch.onnx.export(..., optimize=False), which merges nothing, or train them first:\n    {}",
            names.join(", "),
            held.join(", "),
            doubts.join("\n    ")
        )
    }
}

fn doubt(node: &NodeInfo, why: &str) -> String {
    let module = match &node.module {
        Some(module) => format!("module {:?}", module.path),
        None => "no module".to_owned(),
    };
    format!("node {} ({}, {module}): {why}", node.name, node.op)
}

fn module_of(name: &str) -> (&str, &str) {
    name.rsplit_once('.').unwrap_or(("", name))
}
