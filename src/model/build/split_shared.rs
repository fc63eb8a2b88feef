//! Tensors of equal contents that an exporter merged into one initializer: finds out whose each use
//! of it is, from the names that the exporter left, and gives each tensor an initializer of its own.
//! A use that is given to the wrong tensor is a wrong score that no probe sees, so what is not
//! certain is refused.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::Tensor;
use super::place::{Contents, Known, copies};
use crate::model::manifest::{PackageError, Place};
use crate::model::onnx::split_shared::{Module, NodeFacts, Use, Wiring};
use crate::model::onnx::{Graph, GraphError};

/// Nodes that hand their first input on; whose they are is told by who reads them.
const HAND_ON: [&str; 5] = ["Cast", "Identity", "Reshape", "Transpose", "Unsqueeze"];
/// What the inputs of operators hold, in the words that checkpoints have for it.
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

/// Whether tensors of equal contents are one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tie {
    /// An embedding and the head that shares it, under two names.
    Tied,
    /// Parameters of their own, which the exporter merged.
    Apart,
    /// Nothing tells.
    Unclear,
}

/// Looks at who reads what holds them. An exporter names each parameter that is one, also where it
/// merged several; a tied one has a single name, and is looked up as well as multiplied with. Equal
/// uses alone may be of one parameter, or of several whose uses were merged, too.
pub(super) fn tie(wiring: &Wiring, tensors: &[Tensor], held: &[&str]) -> Tie {
    let readers = held.iter().flat_map(|name| wiring.uses(name));
    let readers: Vec<(&NodeFacts, usize)> = readers
        .map(|place| (&wiring.nodes[place.node], place.input))
        .collect();
    let named = |tensor: &&Tensor| {
        let reads = |(node, _): &(&NodeFacts, usize)| {
            let called = node
                .call
                .as_ref()
                .is_some_and(|call| mentions(call, &tensor.name));
            called || node.outputs.contains(&tensor.name)
        };
        held.contains(&tensor.name.as_str()) || readers.iter().any(reads)
    };
    let named = tensors.iter().filter(named).count();
    let looks_up = |(node, input): &(&NodeFacts, usize)| node.op == "Gather" && *input == 0;
    let looked_up = readers.iter().filter(|reader| looks_up(reader)).count();
    if named > 1 {
        Tie::Apart
    } else if looked_up > 0 && looked_up < readers.len() {
        Tie::Tied
    } else {
        Tie::Unclear
    }
}

/// Where each tensor is, or why it cannot be placed.
pub(super) type Found = Vec<Result<Vec<Place>, String>>;

/// What came of it.
#[derive(Debug, Default)]
pub(super) struct Unshared {
    /// Whether the graph is another one now.
    pub(super) rewritten: bool,
    /// The tensors that could not be told apart, with the reasons.
    pub(super) problems: Vec<String>,
}

/// Tells tensors of equal contents apart where their names alone do not.
pub(super) fn unshare(
    graph: &mut Graph,
    checkpoint: &[Known<'_>],
    by_contents: &HashMap<Contents, Vec<&str>>,
    found: &mut Found,
) -> Result<Unshared, PackageError> {
    let mut unshared = Unshared::default();
    for at in 0..checkpoint.len() {
        let tensor = &checkpoint[at];
        if found[at].is_ok() || copies(tensor, by_contents).is_empty() {
            continue;
        }
        let members: Vec<usize> = (0..checkpoint.len())
            .filter(|other| tensor.is_like(&checkpoint[*other]))
            .collect();
        let wiring = graph.wiring().map_err(broken)?;
        let family = Family {
            tensors: members.iter().map(|m| &checkpoint[*m]).collect(),
            wiring: &wiring,
        };
        match family.assign(by_contents) {
            Ok(shares) => {
                let placed = apply(graph, &family, &shares)?;
                unshared.rewritten |= placed.rewritten;
                for (member, places) in members.iter().zip(placed.places) {
                    found[*member] = Ok(places);
                }
            }
            Err(problem) => {
                unshared.problems.push(problem);
                members.iter().for_each(|m| found[*m] = Ok(Vec::new()));
            }
        }
    }
    Ok(unshared)
}

fn broken(error: GraphError) -> PackageError {
    PackageError(error.to_string())
}

/// The uses of one initializer, by the position of the tensor whose they are.
struct Share {
    initializer: String,
    transposed: Vec<bool>,
    owners: BTreeMap<usize, Vec<Use>>,
}

struct Claim {
    tensor: usize,
    /// The exporter named the tensor itself, not just the module.
    named: bool,
}

/// Tensors of equal contents.
struct Family<'a> {
    tensors: Vec<&'a Known<'a>>,
    wiring: &'a Wiring,
}

impl Family<'_> {
    fn assign(&self, by_contents: &HashMap<Contents, Vec<&str>>) -> Result<Vec<Share>, String> {
        let held = self.initializers(by_contents);
        let first = self.tensors[0];
        if first.is_symmetric() {
            let doubt =
                "they are their own transpose, so whether the graph holds it cannot be seen";
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
            // One of them may read a constant of the same contents.
            if by_module[at] > 1 {
                let module = module_of(&tensor.name).0;
                doubts.push(format!(
                    "{} nodes of {module} read it, and not all need to mean {}",
                    by_module[at], tensor.name
                ));
            }
        }
        if doubts.is_empty() {
            Ok(shares)
        } else {
            Err(self.refusal(&held, &doubts))
        }
    }

    /// What holds their contents, by name, with the contents.
    fn initializers(
        &self,
        by_contents: &HashMap<Contents, Vec<&str>>,
    ) -> BTreeMap<String, Contents> {
        let all: BTreeSet<Contents> = self
            .tensors
            .iter()
            .flat_map(|t| t.held().map(|(contents, _)| contents))
            .collect();
        let named = |contents: Contents| {
            let names = by_contents.get(&contents).into_iter().flatten();
            names.map(move |name| ((*name).to_owned(), contents))
        };
        all.into_iter().flat_map(named).collect()
    }

    fn share(
        &self,
        initializer: &str,
        contents: Contents,
        owners: BTreeMap<usize, Vec<Use>>,
    ) -> Share {
        let transposed = |t: &&Known<'_>| t.held().any(|held| held == (contents, true));
        Share {
            initializer: initializer.to_owned(),
            transposed: self.tensors.iter().map(transposed).collect(),
            owners,
        }
    }

    /// Whose a use of the initializer is, or of a value that was handed on from it.
    fn owner(&self, initializer: &str, place: Use) -> Result<Claim, String> {
        let node = &self.wiring.nodes[place.node];
        if !HAND_ON.contains(&node.op.as_str()) || place.input != 0 {
            return self.by_module(initializer, node, place.input);
        }
        // TorchScript's exporter writes Identity(merged) -> "layers.1.norm.weight".
        if let Some(tensor) = self.position(|t| node.outputs.contains(&t.name)) {
            return Ok(Claim {
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
        Ok(Claim { tensor, named })
    }

    fn by_module(
        &self,
        initializer: &str,
        node: &NodeFacts,
        input: usize,
    ) -> Result<Claim, String> {
        let members: Vec<usize> = (0..self.tensors.len())
            .filter(|at| self.reads(node, input, &self.tensors[*at].name))
            .collect();
        match (members.as_slice(), self.remaining(initializer)) {
            ([tensor], remaining) if remaining.is_none_or(|r| r == *tensor) => Ok(Claim {
                tensor: *tensor,
                named: node.call.is_some() || remaining.is_some(),
            }),
            ([], Some(tensor)) => Ok(Claim {
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

    /// Whether this input of the node reads the tensor, by what the exporter says of the node.
    fn reads(&self, node: &NodeFacts, input: usize, name: &str) -> bool {
        let (module, last) = module_of(name);
        let inside = match &node.module {
            Some(Module::Path(path)) => path == module,
            Some(Module::Called(path)) => path == module && !self.numbered(path),
            None => false,
        };
        let word = INPUTS
            .iter()
            .find(|(op, _)| *op == node.op)
            .and_then(|(_, words)| words.get(input));
        let fits = word.is_none_or(|word| *word == last || !WORDS.contains(&last));
        inside && fits && node.call.as_ref().is_none_or(|call| mentions(call, name))
    }

    /// Whether `norm_1` in a path may be another module `norm` of the family.
    fn numbered(&self, path: &str) -> bool {
        let is_number = |n: &str| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit());
        path.split('.').any(|part| {
            part.rsplit_once('_').is_some_and(|(base, number)| {
                let has = |t: &&&Known<'_>| module_of(&t.name).0.split('.').any(|p| p == base);
                is_number(number) && self.tensors.iter().any(|t| has(&t))
            })
        })
    }

    /// The tensor that the initializer is named after, where every tensor of the family has a value
    /// of its own name: who reads this one directly means this one.
    fn remaining(&self, initializer: &str) -> Option<usize> {
        let all = self
            .tensors
            .iter()
            .all(|t| self.wiring.values.contains(&t.name));
        all.then(|| self.position(|t| t.name == initializer))
            .flatten()
    }

    fn position(&self, is_it: impl Fn(&Known<'_>) -> bool) -> Option<usize> {
        self.tensors.iter().position(|t| is_it(t))
    }

    fn refusal(&self, held: &BTreeMap<String, Contents>, doubts: &[String]) -> String {
        let held: Vec<&str> = held.keys().map(String::as_str).collect();
        let name = |t: &&Known<'_>| format!("{} {:?}", t.name, t.shape);
        let names: Vec<String> = self.tensors.iter().map(name).collect();
        format!(
            "  {}: their contents are in {}, and whose each use is cannot be told; export with \
             torch.onnx.export(..., optimize=False), which merges nothing, or train them first:\n    {}",
            names.join(", "),
            held.join(", "),
            doubts.join("\n    ")
        )
    }
}

fn doubt(node: &NodeFacts, why: &str) -> String {
    let module = match &node.module {
        Some(Module::Path(path) | Module::Called(path)) => format!("module {path:?}"),
        None => "no module".to_owned(),
    };
    format!("node {} ({}, {module}): {why}", node.name, node.op)
}

fn module_of(name: &str) -> (&str, &str) {
    name.rsplit_once('.').unwrap_or(("", name))
}

/// Whether a traced call has the tensor among its arguments: `torch.export` calls the parameter
/// `a.B.weight` `%p_a_b_weight`, and a buffer `%b_...`.
fn mentions(call: &str, name: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '%';
    let plain: String = name
        .to_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .collect();
    let placeholders = [format!("%p_{plain}"), format!("%b_{plain}")];
    call.split(|c| !word(c))
        .any(|found| placeholders.iter().any(|p| p == found))
}

struct Placed {
    places: Vec<Vec<Place>>,
    rewritten: bool,
}

/// Splits what has more than one owner; places every tensor.
fn apply(graph: &mut Graph, family: &Family<'_>, shares: &[Share]) -> Result<Placed, PackageError> {
    let mut taken = family.wiring.values.clone();
    let mut places = vec![Vec::new(); family.tensors.len()];
    let mut rewritten = false;
    for share in shares {
        let mut copies = Vec::new();
        let whole = share.owners.len() == 1;
        for (tensor, uses) in &share.owners {
            let name = &family.tensors[*tensor].name;
            let initializer = if whole || *name == share.initializer {
                share.initializer.clone()
            } else {
                free(name, &taken)
            };
            taken.insert(initializer.clone());
            places[*tensor].push(Place {
                initializer: initializer.clone(),
                transposed: share.transposed[*tensor],
            });
            copies.push((initializer, uses.clone()));
        }
        if copies.len() > 1 {
            graph.split(&share.initializer, &copies).map_err(broken)?;
            rewritten = true;
        }
    }
    Ok(Placed { places, rewritten })
}

/// The tensor's name, with a number where something else is called so.
fn free(name: &str, taken: &HashSet<String>) -> String {
    let mut free = name.to_owned();
    let mut number = 0;
    while taken.contains(&free) {
        number += 1;
        free = format!("{name}.copy_{number}");
    }
    free
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::build::place::place;
    use crate::model::manifest::TensorEntry;
    use crate::model::onnx::InitializerInfo;
    use crate::model::onnx::split_shared::hand_made::{Made, graph};
    use crate::model::tensor::Dtype;

    const SCOPE_A: &str = "['', 'm', 'm.a', 'mul']";
    const SCOPE_B: &str = "['', 'm', 'm.b', 'mul_1']";
    const A: Made<'static> = node("a", "Mul", &["x", "m.a.weight"], "y", SCOPE_A);
    const B: Made<'static> = node("b", "Mul", &["y", "m.a.weight"], "z", SCOPE_B);

    const fn node<'a>(
        name: &'a str,
        op: &'a str,
        input: &'a [&'a str],
        output: &'a str,
        scopes: &'a str,
    ) -> Made<'a> {
        Made {
            name,
            op,
            input,
            output,
            scopes,
            call: "",
            in_body: false,
        }
    }

    fn ones(name: &str, shape: &[usize]) -> Tensor {
        Tensor {
            name: name.into(),
            shape: shape.into(),
            dtype: Dtype::F32,
            bytes: [0, 0, 128, 63].repeat(shape.iter().product()).into(),
        }
    }

    type Placed = Result<(BTreeMap<String, TensorEntry>, bool, Graph), String>;

    fn placed(tensors: &[Tensor], nodes: &[Made<'_>], held: &[(&str, &[usize])]) -> Placed {
        let names: Vec<&str> = held.iter().map(|(name, _)| *name).collect();
        let mut graph = graph(nodes, &names);
        let held: Vec<_> = held
            .iter()
            .map(|(name, shape)| {
                let info = InitializerInfo {
                    name: (*name).into(),
                    shape: shape.to_vec(),
                    dtype: Some(Dtype::F32),
                };
                (info, ones(name, shape).bytes)
            })
            .collect();
        let (tensors, rewritten) =
            place(tensors, &held, &mut graph, |_| None, str::to_owned).map_err(|e| e.0)?;
        Ok((tensors, rewritten, graph))
    }

    fn norms() -> [Tensor; 2] {
        ["m.a.weight", "m.b.weight"].map(|name| ones(name, &[4]))
    }

    /// Where the two tensors of [`norms`] are when the graph holds them once.
    fn merged(nodes: &[Made<'_>]) -> Result<[String; 2], String> {
        let (tensors, rewritten, graph) = placed(&norms(), nodes, &[("m.a.weight", &[4])])?;
        assert!(rewritten);
        let wiring = graph.wiring().unwrap();
        let places = ["m.a.weight", "m.b.weight"].map(|name| {
            let [place] = tensors[name].places.as_slice() else {
                panic!("{name} has {:?}", tensors[name].places);
            };
            assert!(!place.transposed && !wiring.uses(&place.initializer).is_empty());
            place.initializer.clone()
        });
        let held: Vec<_> = graph.initializers().into_iter().map(|i| i.name).collect();
        assert_eq!(held, places);
        Ok(places)
    }

    #[track_caller]
    fn refused(nodes: &[Made<'_>], why: &str) {
        let refusal = merged(nodes).unwrap_err();
        for part in ["m.a.weight [4], m.b.weight [4]", why] {
            assert!(refusal.contains(part), "{refusal}");
        }
    }

    #[test]
    fn each_module_gets_the_copy_of_its_own_tensor() {
        for nodes in [[A, B], [B, A]] {
            let (tensors, _, graph) = placed(&norms(), &nodes, &[("m.a.weight", &[4])]).unwrap();
            let wiring = graph.wiring().unwrap();
            for (name, reader) in [("m.a.weight", "a"), ("m.b.weight", "b")] {
                assert_eq!(tensors[name].places[0].initializer, name);
                let [only] = wiring.uses(name) else {
                    panic!("{name} has {:?}", wiring.uses(name));
                };
                assert_eq!(
                    (wiring.nodes[only.node].name.as_str(), only.input),
                    (reader, 1)
                );
            }
        }
    }

    #[test]
    fn names_of_nodes_tell_modules_too() {
        let a = node("/m/a/Mul", "Mul", &["x", "m.a.weight"], "y", "");
        let b = node("/m/b/Mul", "Mul", &["y", "m.a.weight"], "z", "");
        assert_eq!(merged(&[a, b]).unwrap(), ["m.a.weight", "m.b.weight"]);
        let elsewhere = Made {
            name: "/m/b_1/Mul",
            ..b
        };
        refused(&[a, elsewhere], "/m/b_1/Mul (Mul, module \"m.b_1\")");
    }

    /// The exporter calls a second `norm` `norm_1`, whatever else is called so.
    #[test]
    fn a_number_at_the_end_of_a_called_module_may_be_the_exporter_s() {
        let tensors = ["norm.weight", "norm_1.weight"].map(|name| ones(name, &[4]));
        let first = node("/norm/Mul", "Mul", &["x", "val_1"], "y", "");
        let second = node("/norm_1/Mul", "Mul", &["y", "val_1"], "z", "");
        let refusal = placed(&tensors, &[first, second], &[("val_1", &[4])])
            .err()
            .unwrap();
        assert!(refusal.contains("/norm_1/Mul"), "{refusal}");
        let traced = |name, input, output, scopes| node(name, "Mul", input, output, scopes);
        let nodes = [
            traced("a", &["x", "val_1"], "y", "['', 'norm', 'mul']"),
            traced("b", &["y", "val_1"], "z", "['', 'norm_1', 'mul_1']"),
        ];
        assert!(placed(&tensors, &nodes, &[("val_1", &[4])]).is_ok());
    }

    /// As TorchScript's exporter writes it: the tensor the initializer is named after is read
    /// directly, every other through an Identity that has its name.
    #[test]
    fn an_identity_with_a_tensor_s_name_is_that_tensor() {
        let identity = node("Identity_7", "Identity", &["m.a.weight"], "m.b.weight", "");
        let a = node("/a/Mul", "Mul", &["x", "m.a.weight"], "y", "");
        let b = node("/a_1/Mul", "Mul", &["y", "m.b.weight"], "z", "");
        let places = merged(&[identity, a, b]).unwrap();
        assert_eq!(places, ["m.a.weight", "m.b.weight.copy_1"]);
        let contrary = Made {
            name: "/m/b/Mul",
            ..a
        };
        refused(&[identity, contrary, b], "may read more than one");
    }

    #[test]
    fn what_hands_a_tensor_on_belongs_to_its_only_reader() {
        let cast = |name, output| node(name, "Cast", &["m.a.weight"], output, "");
        let a = Made {
            input: &["x", "w1"],
            ..A
        };
        let b = Made {
            input: &["y", "w2"],
            ..B
        };
        let places = merged(&[cast("c1", "w1"), cast("c2", "w2"), a, b]).unwrap();
        assert_eq!(places, ["m.a.weight", "m.b.weight"]);
        let both = Made {
            input: &["y", "w1"],
            ..B
        };
        refused(
            &[cast("c1", "w1"), a, both],
            "c1 (Cast, no module): its output is read for more",
        );
        refused(
            &[cast("c1", "w1"), A, B],
            "c1 (Cast, no module): nothing reads its output",
        );
    }

    #[test]
    fn what_is_not_told_is_refused() {
        refused(&[A, Made { scopes: "", ..B }], "b (Mul, no module)");
        refused(&[A], "nothing is seen to read m.b.weight");
        let parent = Made {
            scopes: "['', 'm', 'mul']",
            ..B
        };
        refused(&[A, B, parent], "b (Mul, module \"m\")");
        refused(&[A, B, Made { in_body: true, ..B }], "body of a node");
        let output = node("copy", "Identity", &["m.a.weight"], "m.a.weight", "");
        refused(&[A, B, output], "is an output");
        refused(&[A, B, A], "2 nodes of m.a read it");
    }

    /// A normalisation without weights gets ones of its own, which merge with the module's.
    #[test]
    fn a_call_that_does_not_name_the_tensor_does_not_read_it() {
        let calls = |call| Made { call, ..A };
        let [mul, bare] = [
            "%mul : mul(args = (%x, %p_m_a_weight))",
            "%ln : ln(args = (%x, [4]))",
        ]
        .map(calls);
        let b = Made {
            call: "%mul_1 : mul(args = (%y, %p_m_b_weight))",
            ..B
        };
        assert!(merged(&[mul, b]).is_ok());
        assert!(merged(&[mul, mul, b]).is_ok());
        refused(&[mul, bare, b], "a (Mul, module \"m.a\")");
        let other = calls("%mul : mul(args = (%x, %p_m_a_weight_1))");
        refused(&[other, b], "a (Mul, module \"m.a\")");
    }

    #[test]
    fn weight_and_bias_of_one_module_are_told_apart_by_the_operator_alone() {
        let tensors = ["n.bias", "n.weight"].map(|name| ones(name, &[4]));
        let scopes = "['', 'n', 'layer_norm']";
        let op = |op| node("n", op, &["x", "val_1", "val_1"], "y", scopes);
        let held: [(&str, &[usize]); 1] = [("val_1", &[4])];
        let (placed_apart, _, graph) =
            placed(&tensors, &[op("LayerNormalization")], &held).unwrap();
        let wiring = graph.wiring().unwrap();
        for (name, input) in [("n.weight", 1), ("n.bias", 2)] {
            assert_eq!(placed_apart[name].places[0].initializer, name);
            assert_eq!(wiring.uses(name), [Use { node: 0, input }]);
        }
        assert!(!wiring.values.contains("val_1"));
        let refusal = placed(&tensors, &[op("Max")], &held).err().unwrap();
        assert!(
            refusal.contains("n (Max, module \"n\"): it may read more"),
            "{refusal}"
        );
        let alone = placed(&tensors[1..], &[op("LayerNormalization")], &held)
            .err()
            .unwrap();
        assert!(alone.contains("n (LayerNormalization"), "{alone}");
    }

    #[test]
    fn transposes_are_told_by_their_shape_or_not_at_all() {
        let nodes = [
            node("a", "MatMul", &["x", "val_1"], "y", SCOPE_A),
            node("b", "MatMul", &["y", "val_1"], "z", SCOPE_B),
        ];
        let tensors = [ones("m.a.weight", &[2, 4]), ones("m.b.weight", &[4, 2])];
        let (apart, _, _) = placed(&tensors, &nodes, &[("val_1", &[4, 2])]).unwrap();
        assert!(apart["m.a.weight"].places[0].transposed);
        assert!(!apart["m.b.weight"].places[0].transposed);
        let square = ["m.a.weight", "m.b.weight"].map(|name| ones(name, &[4, 4]));
        let refusal = placed(&square, &nodes, &[("val_1", &[4, 4])])
            .err()
            .unwrap();
        assert!(refusal.contains("their own transpose"), "{refusal}");
    }

    /// Renamed and not merged: told by use, and the graph stays as it is.
    #[test]
    fn a_renamed_tensor_of_one_value_is_found_by_who_reads_it() {
        let nodes = [
            Made {
                input: &["x", "val_1"],
                ..A
            },
            Made {
                input: &["y", "val_2"],
                ..B
            },
        ];
        let held: [(&str, &[usize]); 2] = [("val_1", &[4]), ("val_2", &[4])];
        let (tensors, rewritten, _) = placed(&norms(), &nodes, &held).unwrap();
        assert!(!rewritten);
        assert_eq!(tensors["m.b.weight"].places[0].initializer, "val_2");
    }
}
