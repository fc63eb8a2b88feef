//! What the graph does with its weights and inputs, as far as that decides what strangers may
//! change and what held-out data may hold: which weights nobody reads, which decide shapes, and
//! which inputs count rows. Told by following values through every node, body and local function,
//! never by names.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::rc::Rc;

use bytes::Bytes;

use super::proto::{
    Attribute, FunctionProto, GraphProto, INT32, INT64, NodeProto, SparseTensorProto,
};
use super::{Graph, GraphError, Message};
use crate::model::onnx::split_shared::{bodies, decode};

/// Bodies and functions within each other.
const DEEPEST: usize = 64;

/// Inputs by which an operator, ONNX's own or one of ONNX Runtime's, decides on shapes, sizes, counts of
/// turns or axes. Nearly all of them are whole numbers, so a weight that is cast to one decides, too,
/// whatever reads it: nobody can train through such a Cast.
const DECIDING: [(&str, &[usize]); 54] = [
    ("AffineGrid", &[1]),
    ("BeamSearch", &[1, 2, 3, 4]),
    ("BlackmanWindow", &[0]),
    ("CenterCropPad", &[1]),
    ("Col2Im", &[1, 2]),
    ("Compress", &[1]),
    ("ConstantOfShape", &[0]),
    ("ConvTransposeWithDynamicPads", &[2]),
    ("CropAndResize", &[3]),
    ("CumProd", &[1]),
    ("CumSum", &[1]),
    ("DFT", &[1, 2]),
    ("Expand", &[1]),
    ("ExpandDims", &[1]),
    ("GreedySearch", &[1, 2]),
    ("GroupQueryAttention", &[5, 6]),
    ("HammingWindow", &[0]),
    ("HannWindow", &[0]),
    ("Loop", &[0, 1]),
    ("MaxUnpool", &[2]),
    ("MelWeightMatrix", &[0, 1]),
    ("NonMaxSuppression", &[2, 3, 4]),
    ("NonZero", &[0]),
    ("OneHot", &[1]),
    ("Pad", &[1, 3]),
    ("Range", &[0, 1, 2]),
    ("ReduceL1", &[1]),
    ("ReduceL2", &[1]),
    ("ReduceLogSum", &[1]),
    ("ReduceLogSumExp", &[1]),
    ("ReduceMax", &[1]),
    ("ReduceMean", &[1]),
    ("ReduceMin", &[1]),
    ("ReduceProd", &[1]),
    ("ReduceSum", &[1]),
    ("ReduceSumSquare", &[1]),
    ("RelativePositionBias", &[1, 2]),
    ("Reshape", &[1]),
    ("Resize", &[1, 2, 3]),
    ("STFT", &[1, 3]),
    ("Sampling", &[1, 2]),
    ("SequenceAt", &[1]),
    ("SequenceErase", &[1]),
    ("SequenceInsert", &[2]),
    ("Slice", &[1, 2, 3, 4]),
    ("Split", &[1]),
    ("SplitToSequence", &[1]),
    ("Squeeze", &[1]),
    ("Tile", &[1, 2]),
    ("TopK", &[1]),
    ("Unique", &[0]),
    ("Unsqueeze", &[1]),
    ("Upsample", &[1]),
    ("WhisperBeamSearch", &[1, 2, 3, 4]),
];

/// Operators whose outputs hold no value that their first input does not hold.
const HAND_ON: [&str; 12] = [
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
    "Cast",
];

/// A rule for what an input may hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    /// The input.
    pub input: String,
    /// What is below; `None` where the graph does not say.
    pub below: Option<i64>,
    /// A value that the operator passes over.
    pub ignored: Option<i64>,
    /// In words, what counts with it.
    pub by: String,
}

/// Why nobody may be let change a weight.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Bar {
    /// It decides shapes: whoever changes it decides how much there is to compute.
    #[error("decides shapes, as {0}")]
    Decides(String),
    /// No way leads from it to the output.
    #[error("is read by nothing that {0} depends on")]
    Unread(String),
    /// It has no elements.
    #[error("has no elements")]
    Empty,
}

/// What became of the weights and inputs.
#[derive(Debug, Default)]
pub struct Flow {
    /// Weights that decide shapes, and where.
    deciding: BTreeMap<String, String>,
    /// Rules for what inputs may hold.
    pub limits: Vec<Limit>,
}

impl Flow {
    /// Where the weight decides shapes, in words, if it does.
    pub fn decides(&self, name: &str) -> Option<&str> {
        self.deciding.get(name).map(String::as_str)
    }
}

impl Graph {
    /// The weights that nobody may be let change, with the reason.
    ///
    /// # Errors
    /// When a node cannot be decoded, or bodies lie too deep.
    pub fn barred(
        &self,
        weights: &[&str],
        output: &str,
    ) -> Result<BTreeMap<String, Bar>, GraphError> {
        let (flow, reach) = (self.flow(weights)?, self.reach(output)?);
        let reason = |name: &str| match flow.decides(name) {
            Some(by) => Some(Bar::Decides(by.to_owned())),
            None if reach.leads_from(name) => None,
            None => Some(Bar::Unread(output.to_owned())),
        };
        let barred = weights
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), reason(name)?)));
        Ok(barred.collect())
    }

    /// Follows the weights (initializers or inputs of these names) and the other inputs.
    ///
    /// # Errors
    /// When a node cannot be decoded, or bodies lie too deep.
    pub fn flow(&self, weights: &[&str]) -> Result<Flow, GraphError> {
        let mut functions = HashMap::new();
        for bytes in &self.model.functions {
            let function = FunctionProto::decode(bytes.clone())
                .map_err(|e| GraphError(format!("a function is broken: {e}")))?;
            let name = called(&function.domain, &function.name, &function.overload);
            functions.insert(name, Rc::new(function));
        }
        let mut walk = Walk {
            weights: weights.iter().copied().collect(),
            functions,
            flow: Flow::default(),
            scopes: vec![HashMap::new()],
        };
        let graph = self.proto();
        for input in &graph.input {
            let name = input.name.clone().unwrap_or_default();
            let fact = if walk.weights.contains(name.as_str()) {
                Fact::weight(&name, None)
            } else {
                Fact::input(&name)
            };
            walk.note(name, fact);
        }
        walk.graph(graph)?;
        Ok(walk.flow)
    }
}

/// What is known of a value.
#[derive(Debug, Clone, PartialEq)]
struct Fact {
    /// The weights that it is computed from, where it is from them and constants alone.
    from: Option<Rc<BTreeSet<String>>>,
    /// The input whose values it holds, and no others.
    input: Option<Rc<str>>,
    /// Its shape, where it is a tensor of the graph.
    dims: Option<Rc<[i64]>>,
}

impl Fact {
    const UNKNOWN: Self = Self {
        from: None,
        input: None,
        dims: None,
    };

    fn constant() -> Self {
        Self {
            from: Some(Rc::default()),
            ..Self::UNKNOWN
        }
    }

    fn weight(name: &str, dims: Option<Rc<[i64]>>) -> Self {
        Self {
            from: Some(Rc::new(BTreeSet::from([name.to_owned()]))),
            dims,
            input: None,
        }
    }

    fn input(name: &str) -> Self {
        Self {
            input: Some(name.into()),
            ..Self::UNKNOWN
        }
    }

    /// What is one or the other, as the turn or the branch has it: from weights alone where either is.
    fn or(&self, other: &Self) -> Self {
        match (&self.from, &other.from) {
            (Some(_), Some(_)) => self.and(other),
            (Some(_), None) => self.and(&Self::constant()),
            (None, Some(_)) => other.and(&Self::constant()),
            (None, None) => Self::UNKNOWN,
        }
    }

    /// What is computed from both.
    fn and(&self, other: &Self) -> Self {
        let from = match (&self.from, &other.from) {
            (Some(a), Some(b)) if a.is_superset(b) => Some(Rc::clone(a)),
            (Some(a), Some(b)) => Some(Rc::new(a.union(b).cloned().collect())),
            (_, _) => None,
        };
        Self {
            from,
            ..Self::UNKNOWN
        }
    }
}

/// Domain, name and overload of a function.
type Name = (String, String, Vec<u8>);

fn called(domain: &Option<String>, name: &Option<String>, overload: &Option<Vec<u8>>) -> Name {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    (
        text(domain),
        text(name),
        overload.clone().unwrap_or_default(),
    )
}

struct Walk<'a> {
    weights: HashSet<&'a str>,
    functions: HashMap<Name, Rc<FunctionProto>>,
    flow: Flow,
    /// Values by name: of the graph, of the body within it, and so on.
    scopes: Vec<HashMap<String, Fact>>,
}

impl Walk<'_> {
    fn note(&mut self, name: String, fact: Fact) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name, fact);
        }
    }

    fn fact(&self, name: &str) -> Fact {
        let found = self.scopes.iter().rev().find_map(|scope| scope.get(name));
        found.cloned().unwrap_or(Fact::UNKNOWN)
    }

    fn graph(&mut self, graph: &GraphProto) -> Result<(), GraphError> {
        for tensor in &graph.initializer {
            let name = tensor.name.clone().unwrap_or_default();
            let fact = if self.weights.contains(name.as_str()) && self.scopes.len() == 1 {
                Fact::weight(&name, Some(tensor.dims.as_slice().into()))
            } else {
                Fact {
                    dims: Some(tensor.dims.as_slice().into()),
                    ..Fact::constant()
                }
            };
            self.note(name, fact);
        }
        for bytes in &graph.sparse_initializer {
            let sparse = SparseTensorProto::decode(bytes.clone())
                .map_err(|e| GraphError(format!("a sparse initializer is broken: {e}")))?;
            let name = sparse.values.and_then(|values| values.name);
            self.note(name.unwrap_or_default(), Fact::constant());
        }
        self.nodes(&graph.node)
    }

    fn nodes(&mut self, nodes: &[Bytes]) -> Result<(), GraphError> {
        if self.scopes.len() > DEEPEST {
            return Err(GraphError(format!(
                "has more than {DEEPEST} bodies within each other"
            )));
        }
        for bytes in nodes {
            let node = decode(bytes)?;
            let inputs: Vec<Fact> = node.input.iter().map(|name| self.input(name)).collect();
            self.decide(&node, &inputs)?;
            self.limit(&node, &inputs)?;
            let outputs = self.outputs(&node, &inputs)?;
            for (name, fact) in node.output.iter().zip(outputs) {
                self.note(name.clone(), fact);
            }
        }
        Ok(())
    }

    /// An input that is left out is as good as a constant.
    fn input(&self, name: &str) -> Fact {
        if name.is_empty() {
            Fact::constant()
        } else {
            self.fact(name)
        }
    }

    fn decide(&mut self, node: &NodeProto, inputs: &[Fact]) -> Result<(), GraphError> {
        let op = node.op();
        let own = op.strip_prefix("com.microsoft.").unwrap_or(&op);
        let positions = DECIDING.iter().find(|(name, _)| *name == own);
        for position in positions.map_or(&[][..], |(_, positions)| positions) {
            if let Some(fact) = inputs.get(*position) {
                let by = format!("input {position} of {} ({op})", display(node));
                self.deciding(fact, &by);
            }
        }
        if op == "Cast" && is_whole(node)? {
            let by = format!("a whole number, by {} (Cast)", display(node));
            inputs.iter().for_each(|fact| self.deciding(fact, &by));
        }
        Ok(())
    }

    fn deciding(&mut self, fact: &Fact, by: &str) {
        for weight in fact.from.iter().flat_map(|weights| weights.iter()) {
            let known = self.flow.deciding.entry(weight.clone());
            known.or_insert_with(|| by.to_owned());
        }
    }

    /// What an operator that picks rows, or entries of a class, expects of an input.
    fn limit(&mut self, node: &NodeProto, inputs: &[Fact]) -> Result<(), GraphError> {
        let op = node.op();
        let picks = matches!(op.as_str(), "Gather" | "GatherElements" | "GatherND");
        let classes = matches!(
            op.as_str(),
            "SoftmaxCrossEntropyLoss" | "NegativeLogLikelihoodLoss"
        );
        let (Some(data), Some(index)) = (inputs.first(), inputs.get(1)) else {
            return Ok(());
        };
        let Some(input) = index.input.as_deref().filter(|_| picks || classes) else {
            return Ok(());
        };
        let below = match (&data.dims, op.as_str()) {
            (Some(dims), "Gather" | "GatherElements") => {
                let axis = integer(node, "axis")?.unwrap_or(0);
                let from_the_end = i64::try_from(dims.len()).unwrap_or(0) + axis;
                let axis = usize::try_from(axis).or_else(|_| usize::try_from(from_the_end));
                axis.ok().and_then(|axis| dims.get(axis).copied())
            }
            (_, _) => None,
        };
        let limit = Limit {
            input: input.to_owned(),
            below,
            ignored: if classes {
                integer(node, "ignore_index")?
            } else {
                None
            },
            by: format!("{} ({op})", display(node)),
        };
        self.flow.limits.push(limit);
        Ok(())
    }

    fn outputs(&mut self, node: &NodeProto, inputs: &[Fact]) -> Result<Vec<Fact>, GraphError> {
        let name = called(&node.domain, &node.op_type, &node.overload);
        if let Some(function) = self.functions.get(&name).cloned() {
            return self.call(&function, inputs);
        }
        let bodies = bodies(node)?;
        if !bodies.is_empty() {
            return self.bodies(node, &bodies, inputs);
        }
        let op = node.op();
        let all = inputs
            .iter()
            .fold(Fact::constant(), |all, fact| all.and(fact));
        let fact = match op.as_str() {
            // Shapes are fixed once the window is; who can change one is found where it is decided.
            "Shape" | "Size" => Fact::constant(),
            op if HAND_ON.contains(&op) && is_whole(node)? => {
                let first = inputs.first().cloned().unwrap_or(Fact::UNKNOWN);
                let same = matches!(op, "Identity" | "Cast");
                Fact {
                    input: first.input,
                    dims: first.dims.filter(|_| same),
                    ..all
                }
            }
            _ => all,
        };
        Ok(vec![fact; node.output.len()])
    }

    /// The outputs of a function of the model: it sees nothing but its inputs.
    fn call(&mut self, function: &FunctionProto, inputs: &[Fact]) -> Result<Vec<Fact>, GraphError> {
        let formal = function.input.iter().cloned();
        let values = formal.zip(inputs.iter().cloned()).collect();
        // As deep as the caller, so that functions that call each other come to an end.
        let depth = self.scopes.len();
        let mut inner = vec![HashMap::new(); depth];
        inner.push(values);
        let outer = std::mem::replace(&mut self.scopes, inner);
        self.nodes(&function.node)?;
        let outputs = function.output.iter().map(|name| self.fact(name)).collect();
        self.scopes = outer;
        Ok(outputs)
    }

    /// The outputs of an If, a Loop, a Scan or the like, whose bodies see what is around them.
    fn bodies(
        &mut self,
        node: &NodeProto,
        bodies: &[GraphProto],
        inputs: &[Fact],
    ) -> Result<Vec<Fact>, GraphError> {
        let is_loop = node.op() == "Loop";
        let mut carried: Vec<Fact> = if is_loop {
            inputs.get(2..).unwrap_or_default().to_vec()
        } else {
            inputs.to_vec()
        };
        let mut outputs: Vec<Option<Fact>> = vec![None; node.output.len()];
        loop {
            let before = carried.clone();
            for body in bodies {
                let turn: &[Fact] = if is_loop {
                    &[Fact::constant(), Fact::constant()]
                } else {
                    &[]
                };
                let mut made = self.body(body, &[turn, &carried].concat())?;
                if is_loop && !made.is_empty() {
                    let again = made.remove(0);
                    self.deciding(&again, &format!("condition of {} (Loop)", display(node)));
                }
                for (known, made) in carried.iter_mut().zip(&made) {
                    // What goes round is whatever it has been in any turn.
                    *known = known.or(made);
                }
                for (known, made) in outputs.iter_mut().zip(made) {
                    *known = Some(known.as_ref().map_or(made.clone(), |known| known.or(&made)));
                }
            }
            // It comes to an end: what is carried only ever grows, by weights of which there are so many.
            if carried == before || node.op() == "If" {
                break;
            }
        }
        // A loop may make no turn at all.
        let initial = carried.into_iter().map(Some).chain(std::iter::repeat(None));
        let known = |(made, initial): (Option<Fact>, Option<Fact>)| match (made, initial) {
            (Some(made), Some(initial)) if is_loop => made.or(&initial),
            (made, _) => made.unwrap_or(Fact::UNKNOWN),
        };
        Ok(outputs.into_iter().zip(initial).map(known).collect())
    }

    fn body(&mut self, body: &GraphProto, inputs: &[Fact]) -> Result<Vec<Fact>, GraphError> {
        self.scopes.push(HashMap::new());
        for (input, fact) in body.input.iter().zip(inputs) {
            self.note(input.name.clone().unwrap_or_default(), fact.clone());
        }
        self.graph(body)?;
        let names = body.output.iter().map(|output| output.name.as_deref());
        let outputs = names
            .map(|name| self.fact(name.unwrap_or_default()))
            .collect();
        self.scopes.pop();
        Ok(outputs)
    }
}

/// A node's name, or what it makes.
fn display(node: &NodeProto) -> &str {
    let name = node.name.as_deref().filter(|name| !name.is_empty());
    name.or(node.output.first().map(String::as_str))
        .unwrap_or("a node")
}

fn integer(node: &NodeProto, name: &str) -> Result<Option<i64>, GraphError> {
    for bytes in &node.attribute {
        let attribute = Attribute::decode(bytes.clone())
            .map_err(|e| GraphError(format!("an attribute is broken: {e}")))?;
        if attribute.name.as_deref() == Some(name) {
            return Ok(Some(attribute.i.unwrap_or(0)));
        }
    }
    Ok(None)
}

/// A Cast hands whole numbers on only to another type of whole numbers.
fn is_whole(node: &NodeProto) -> Result<bool, GraphError> {
    if node.op() != "Cast" {
        return Ok(true);
    }
    let to = integer(node, "to")?;
    Ok([INT32, INT64]
        .iter()
        .any(|whole| to == Some((*whole).into())))
}

#[cfg(test)]
mod tests {
    use super::super::proto::{ModelProto, OperatorSetId, TensorProto, ValueInfo};
    use super::*;

    /// A node; the first of its outputs names it.
    fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
        let owned = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        NodeProto {
            op_type: Some(op.into()),
            input: owned(inputs),
            output: owned(outputs),
            ..NodeProto::default()
        }
    }

    fn with(mut node: NodeProto, attribute: Attribute) -> NodeProto {
        node.attribute.push(attribute.encode_to_vec().into());
        node
    }

    fn number(name: &str, value: i64) -> Attribute {
        Attribute {
            name: Some(name.into()),
            i: Some(value),
            ..Attribute::default()
        }
    }

    fn graph(
        nodes: &[NodeProto],
        inputs: &[&str],
        outputs: &[&str],
        weights: &[&str],
    ) -> GraphProto {
        let named = |names: &[&str]| -> Vec<ValueInfo> {
            let value = |name: &&str| ValueInfo {
                name: Some((*name).to_owned()),
                r#type: None,
            };
            names.iter().map(value).collect()
        };
        let tensor = |name: &&str| TensorProto {
            name: Some((*name).to_owned()),
            dims: vec![6, 4],
            ..TensorProto::default()
        };
        GraphProto {
            node: nodes.iter().map(|n| n.encode_to_vec().into()).collect(),
            input: named(inputs),
            output: named(outputs),
            initializer: weights.iter().map(tensor).collect(),
            ..GraphProto::default()
        }
    }

    fn body(graph: GraphProto) -> Attribute {
        Attribute {
            g: Some(graph),
            ..Attribute::default()
        }
    }

    /// A model of the nodes with weights `w` and `v`, a constant `c`, and inputs `tokens` and `labels`.
    fn model(nodes: &[NodeProto], functions: &[FunctionProto]) -> Graph {
        let graph = graph(nodes, &["tokens", "labels"], &["out"], &["w", "v", "c"]);
        let opset = OperatorSetId {
            domain: Some("ai.onnx".into()),
            version: Some(18),
        };
        let model = ModelProto {
            graph: Some(graph),
            opset_import: vec![opset],
            functions: functions.iter().map(|f| f.encode_to_vec().into()).collect(),
            ..ModelProto::default()
        };
        Graph::decode(model.encode_to_vec().into()).unwrap()
    }

    fn flow_of(nodes: &[NodeProto], functions: &[FunctionProto]) -> Flow {
        model(nodes, functions).flow(&["w", "v"]).unwrap()
    }

    #[track_caller]
    fn decides(nodes: &[NodeProto], expected: bool) {
        let flow = flow_of(nodes, &[]);
        assert_eq!(flow.decides("w").is_some(), expected, "{nodes:?}");
        assert_eq!(flow.decides("v"), None, "{nodes:?}");
    }

    /// A node of this operator that has `value` at this input and activations at all others.
    fn at(op: &str, position: usize, value: &str) -> NodeProto {
        let mut inputs = vec!["x"; position];
        inputs.push(value);
        node(op, &inputs, &["out"])
    }

    #[test]
    fn every_input_that_decides_is_found_with_constants_between_and_not_with_activations() {
        for (op, positions) in DECIDING.iter().filter(|(op, _)| *op != "Loop") {
            for position in *positions {
                let activations = node("Gather", &["v", "tokens"], &["x"]);
                let direct = at(op, *position, "w");
                decides(&[activations.clone(), direct], true);
                let derived = [
                    activations.clone(),
                    node("Mul", &["w", "c"], &["scaled"]),
                    node("Cast", &["scaled"], &["whole"]),
                    node("Shape", &["x"], &["shape"]),
                    node("Concat", &["shape", "whole"], &["wanted"]),
                    at(op, *position, "wanted"),
                ];
                decides(&derived, true);
                let routed = [
                    activations,
                    node("MatMul", &["x", "w"], &["scores"]),
                    node("TopK", &["scores", "c"], &["best", "which"]),
                    node("NonZero", &["which"], &["rows"]),
                    at(op, *position, "rows"),
                ];
                decides(&routed, false);
            }
        }
    }

    #[test]
    fn what_is_cast_to_a_whole_number_decides_whatever_reads_it() {
        let cast = |to: i32| with(node("Cast", &["w"], &["n"]), number("to", to.into()));
        let reads = NodeProto {
            domain: Some("com.example".into()),
            ..node("Anything", &["tokens", "n"], &["out"])
        };
        decides(&[cast(INT64), reads.clone()], true);
        decides(&[cast(INT32), reads.clone()], true);
        decides(&[cast(1), reads], false);
    }

    #[test]
    fn what_has_a_shape_does_not_decide_it() {
        let shape = node("Shape", &["w"], &["shape"]);
        decides(
            &[shape, node("Reshape", &["tokens", "shape"], &["out"])],
            false,
        );
        for (op, position) in [
            ("Resize", 0),
            ("Slice", 0),
            ("Pad", 2),
            ("Expand", 0),
            ("TopK", 0),
        ] {
            decides(&[at(op, position, "w")], false);
        }
    }

    #[test]
    fn bodies_are_followed_in_and_out() {
        let shaped = |name: &str| node("ConstantOfShape", &[name], &["zeros"]);
        let inner = graph(&[shaped("w")], &[], &["zeros"], &[]);
        decides(&[with(node("If", &["c"], &["out"]), body(inner))], true);
        let own = graph(&[shaped("w")], &[], &["zeros"], &["w"]);
        decides(&[with(node("If", &["c"], &["out"]), body(own))], false);
        let branch = graph(&[node("Neg", &["w"], &["n"])], &[], &["n"], &[]);
        let chosen = with(node("If", &["c"], &["size"]), body(branch.clone()));
        decides(&[chosen, shaped("size")], true);
        let asked = with(node("If", &["tokens"], &["size"]), body(branch));
        decides(&[asked, shaped("size")], true);
        let dynamic = graph(&[node("Neg", &["tokens"], &["n"])], &[], &["n"], &[]);
        let branches = with(
            node("If", &["tokens"], &["size"]),
            body(graph(&[node("Neg", &["w"], &["n"])], &[], &["n"], &[])),
        );
        decides(&[with(branches, body(dynamic)), shaped("size")], true);
    }

    #[test]
    fn loops_are_followed_round_and_by_their_counts_and_conditions() {
        let turns = |nodes: &[NodeProto], condition: &str, carried: &[&str]| {
            let outputs: Vec<&str> = std::iter::once(condition)
                .chain(carried.iter().copied())
                .collect();
            body(graph(nodes, &["turn", "go", "a", "b"], &outputs, &[]))
        };
        let keep = node("Identity", &["go"], &["again"]);
        let plain = turns(std::slice::from_ref(&keep), "again", &["a", "b"]);
        let looped = |inputs: &[&str]| node("Loop", inputs, &["out", "other"]);
        decides(&[with(looped(&["w", "", "c", "c"]), plain.clone())], true);
        decides(&[with(looped(&["c", "w", "c", "c"]), plain.clone())], true);
        decides(&[with(looped(&["tokens", "", "w", "c"]), plain)], false);
        let asks = node("Less", &["w", "c"], &["again"]);
        decides(
            &[with(
                looped(&["c", "", "c", "c"]),
                turns(&[asks], "again", &["a", "b"]),
            )],
            true,
        );
        // What one turn makes, the next but one uses: `w` goes to `a` and from there to `b`.
        let swap = [keep, node("Expand", &["c", "b"], &["wide"])];
        let rotating = turns(&swap, "again", &["a", "a"]);
        decides(&[with(looped(&["c", "", "w", "c"]), rotating)], true);
        // One turn after the other hands a weight on, and the last but one a constant of its own.
        let names: Vec<String> = (0..12).map(|n| format!("v{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let inputs = [&["turn", "go"], &names[..]].concat();
        let outputs = [&["again", "v11"], &names[..11]].concat();
        let shift = [
            node("Identity", &["go"], &["again"]),
            node("ConstantOfShape", &["v11"], &["zeros"]),
        ];
        let long = body(graph(&shift, &inputs, &outputs, &[]));
        let start = [&["c", "", "w"], &["c"; 11][..]].concat();
        decides(&[with(node("Loop", &start, &["out"]), long.clone())], true);
        let start = [&["c", "", "w"], &["tokens"; 11][..]].concat();
        decides(&[with(node("Loop", &start, &["out"]), long)], true);
        let step = graph(
            &[node("Tile", &["row", "state"], &["rows"])],
            &["state", "row"],
            &["rows"],
            &[],
        );
        decides(
            &[with(node("Scan", &["w", "tokens"], &["out"]), body(step))],
            true,
        );
    }

    #[test]
    fn functions_are_followed_and_see_only_what_they_are_given() {
        let function = |nodes: &[NodeProto]| FunctionProto {
            name: Some("F".into()),
            domain: Some("local".into()),
            input: vec!["x".into(), "size".into()],
            output: vec!["y".into()],
            node: nodes.iter().map(|n| n.encode_to_vec().into()).collect(),
            ..FunctionProto::default()
        };
        let call = |inputs: &[&str], output: &str| NodeProto {
            domain: Some("local".into()),
            ..node("F", inputs, &[output])
        };
        let reshapes = function(&[node("Reshape", &["x", "size"], &["y"])]);
        let flow = flow_of(
            &[call(&["tokens", "w"], "out")],
            std::slice::from_ref(&reshapes),
        );
        assert!(flow.decides("w").is_some_and(|by| by.contains("Reshape")));
        let flow = flow_of(&[call(&["w", "c"], "out")], &[reshapes]);
        assert_eq!(flow.decides("w"), None);
        let hands_on = function(&[node("Neg", &["size"], &["y"])]);
        let nodes = [
            call(&["tokens", "w"], "n"),
            node("Range", &["c", "n", "c"], &["out"]),
        ];
        assert!(flow_of(&nodes, &[hands_on]).decides("w").is_some());
        let of = |overload: &str, op: &str| FunctionProto {
            overload: Some(overload.into()),
            ..function(&[node(op, &["x", "size"], &["y"])])
        };
        let overloaded = NodeProto {
            overload: Some(b"a".to_vec()),
            ..call(&["tokens", "w"], "out")
        };
        let both = [of("a", "Reshape"), of("b", "Add")];
        assert!(
            flow_of(std::slice::from_ref(&overloaded), &both)
                .decides("w")
                .is_some()
        );
        let other = [of("b", "Reshape"), of("a", "Add")];
        assert_eq!(flow_of(&[overloaded], &other).decides("w"), None);
        let itself = function(&[call(&["x", "size"], "y")]);
        let error = model(&[call(&["tokens", "w"], "out")], &[itself]).flow(&["w"]);
        assert!(error.unwrap_err().to_string().contains("within each other"));
    }

    #[test]
    fn who_picks_rows_or_classes_by_an_input_limits_it() {
        let limits = |nodes: &[NodeProto]| -> Vec<(String, Option<i64>, Option<i64>)> {
            let limits = flow_of(nodes, &[]).limits.into_iter();
            limits
                .map(|limit| (limit.input, limit.below, limit.ignored))
                .collect()
        };
        let of = |input: &str, below, ignored| vec![(input.to_owned(), below, ignored)];
        let picks = |axis| {
            with(
                node("Gather", &["w", "tokens"], &["out"]),
                number("axis", axis),
            )
        };
        assert_eq!(
            limits(&[node("Gather", &["w", "tokens"], &["out"])]),
            of("tokens", Some(6), None)
        );
        assert_eq!(limits(&[picks(1)]), of("tokens", Some(4), None));
        assert_eq!(limits(&[picks(-2)]), of("tokens", Some(6), None));
        let handed = [
            with(
                node("Cast", &["tokens"], &["a"]),
                number("to", INT64.into()),
            ),
            node("Unsqueeze", &["a", "c"], &["b"]),
            node("Cast", &["w"], &["table"]),
            node("Gather", &["table", "b"], &["out"]),
        ];
        assert_eq!(limits(&handed[..3]), []);
        assert_eq!(limits(&handed), of("tokens", None, None));
        let clamped = [
            node("Max", &["tokens", "c"], &["a"]),
            node("Gather", &["w", "a"], &["out"]),
        ];
        assert_eq!(limits(&clamped), []);
        let loss = |attribute| {
            let plain = node("SoftmaxCrossEntropyLoss", &["x", "labels"], &["out"]);
            limits(&[with(plain, attribute)])
        };
        assert_eq!(
            loss(number("ignore_index", -100)),
            of("labels", None, Some(-100))
        );
        assert_eq!(loss(number("other", 1)), of("labels", None, None));
    }
}
