//! What the graph does with its weights and inputs: which weights determine shapes, and which
//! inputs are used as indices. Found by following values through every node, subgraph and local
//! function, never by names.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::rc::Rc;

use bytes::Bytes;

use super::graph::Graph;
use super::operators::{PASS_THROUGH, SHAPE_INPUTS};
use super::proto::{
    FunctionProto, GraphError, GraphProto, INT32, INT64, NodeProto, SparseTensorProto, bodies,
    decode, decode_node, integer,
};

/// The maximum nesting of subgraphs and functions.
const MAX_DEPTH: usize = 64;

/// The range that an input's values must be in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexLimit {
    /// The input.
    pub input: String,
    /// The exclusive upper bound; `None` where the graph does not say.
    pub below: Option<i64>,
    /// A value that the operator ignores.
    pub ignored: Option<i64>,
    /// The node that uses it as an index, in words.
    pub by: String,
}

/// What was found about the weights and inputs.
#[derive(Debug, Default)]
pub struct Flow {
    /// Weights that determine shapes, and where.
    deciding: BTreeMap<String, String>,
    /// Rules for what inputs may hold.
    pub limits: Vec<IndexLimit>,
}

impl Flow {
    /// Where the weight determines a shape, in words, if it does.
    pub fn decides(&self, name: &str) -> Option<&str> {
        self.deciding.get(name).map(String::as_str)
    }
}

impl Graph {
    /// Follows the weights (initializers or inputs of these names) and the other inputs.
    ///
    /// # Errors
    /// When a node cannot be decoded, or subgraphs are nested too deeply.
    pub fn flow(&self, weights: &[&str]) -> Result<Flow, GraphError> {
        let mut functions = HashMap::new();
        for bytes in &self.model.functions {
            let f: FunctionProto = decode(bytes, "a function")?;
            let key = function_key(f.domain(), f.name(), f.overload());
            functions.insert(key, Rc::new(f));
        }
        let mut tracer = Tracer {
            weights: weights.iter().copied().collect(),
            functions,
            flow: Flow::default(),
            scopes: vec![HashMap::new()],
        };
        let graph = self.proto();
        for input in &graph.input {
            let name = input.name();
            let fact = match tracer.weights.contains(name) {
                true => ValueFact::weight(name, None),
                false => ValueFact::input(name),
            };
            tracer.note(name.to_owned(), fact);
        }
        tracer.graph(graph)?;
        Ok(tracer.flow)
    }
}

/// What is known of a value.
#[derive(Debug, Clone, PartialEq, Default)]
struct ValueFact {
    /// The weights it is computed from, if it depends on nothing but weights and constants.
    from: Option<Rc<BTreeSet<String>>>,
    /// The input whose values it holds, if it holds no others.
    input: Option<Rc<str>>,
    /// Its shape, where it is a tensor of the graph.
    dims: Option<Rc<[i64]>>,
}

impl ValueFact {
    fn constant() -> Self {
        Self {
            from: Some(Rc::default()),
            ..Self::default()
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
            ..Self::default()
        }
    }

    /// Either of the two, depending on the iteration or branch: computed from weights alone if
    /// either is.
    fn or(&self, other: &Self) -> Self {
        match (&self.from, &other.from) {
            (Some(_), Some(_)) => self.and(other),
            (Some(_), None) => self.and(&Self::constant()),
            (None, Some(_)) => other.and(&Self::constant()),
            (None, None) => Self::default(),
        }
    }

    /// A value computed from both.
    fn and(&self, other: &Self) -> Self {
        let from = match (&self.from, &other.from) {
            (Some(a), Some(b)) if a.is_superset(b) => Some(Rc::clone(a)),
            (Some(a), Some(b)) => Some(Rc::new(a.union(b).cloned().collect())),
            (_, _) => None,
        };
        Self {
            from,
            ..Self::default()
        }
    }
}

/// Domain, name and overload of a function.
type FunctionKey = (String, String, Vec<u8>);

fn function_key(domain: &str, name: &str, overload: &[u8]) -> FunctionKey {
    (domain.to_owned(), name.to_owned(), overload.to_owned())
}

struct Tracer<'a> {
    weights: HashSet<&'a str>,
    functions: HashMap<FunctionKey, Rc<FunctionProto>>,
    flow: Flow,
    /// Values by name: of the graph, of the subgraph within it, and so on.
    scopes: Vec<HashMap<String, ValueFact>>,
}

impl Tracer<'_> {
    fn note(&mut self, name: String, fact: ValueFact) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name, fact);
        }
    }

    fn fact(&self, name: &str) -> ValueFact {
        let found = self.scopes.iter().rev().find_map(|scope| scope.get(name));
        found.cloned().unwrap_or_default()
    }

    fn graph(&mut self, graph: &GraphProto) -> Result<(), GraphError> {
        for tensor in &graph.initializer {
            let name = tensor.name();
            let dims = Some(tensor.dims.as_slice().into());
            let fact = match self.weights.contains(name) && self.scopes.len() == 1 {
                true => ValueFact::weight(name, dims),
                false => ValueFact {
                    dims,
                    ..ValueFact::constant()
                },
            };
            self.note(name.to_owned(), fact);
        }
        for bytes in &graph.sparse_initializer {
            let sparse: SparseTensorProto = decode(bytes, "a sparse initializer")?;
            let name = sparse.values.and_then(|values| values.name);
            self.note(name.unwrap_or_default(), ValueFact::constant());
        }
        self.nodes(&graph.node)
    }

    fn nodes(&mut self, nodes: &[Bytes]) -> Result<(), GraphError> {
        if self.scopes.len() > MAX_DEPTH {
            let message = format!("has more than {MAX_DEPTH} bodies within each other");
            return Err(GraphError(message));
        }
        for bytes in nodes {
            let node = decode_node(bytes)?;
            let inputs: Vec<ValueFact> = node.input.iter().map(|name| self.input(name)).collect();
            self.decide(&node, &inputs)?;
            self.limit(&node, &inputs)?;
            let outputs = self.outputs(&node, &inputs)?;
            for (name, fact) in node.output.iter().zip(outputs) {
                self.note(name.clone(), fact);
            }
        }
        Ok(())
    }

    /// An omitted input counts as a constant.
    fn input(&self, name: &str) -> ValueFact {
        if name.is_empty() {
            ValueFact::constant()
        } else {
            self.fact(name)
        }
    }

    fn decide(&mut self, node: &NodeProto, inputs: &[ValueFact]) -> Result<(), GraphError> {
        let op = node.op();
        let own = op.strip_prefix("com.microsoft.").unwrap_or(&op);
        let positions = SHAPE_INPUTS.iter().find(|(name, _)| *name == own);
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

    fn deciding(&mut self, fact: &ValueFact, by: &str) {
        for weight in fact.from.iter().flat_map(|weights| weights.iter()) {
            let known = self.flow.deciding.entry(weight.clone());
            known.or_insert_with(|| by.to_owned());
        }
    }

    /// The range that an operator that picks rows or classes expects of its index input.
    fn limit(&mut self, node: &NodeProto, inputs: &[ValueFact]) -> Result<(), GraphError> {
        let op = node.op();
        let classes = match op.as_str() {
            "Gather" | "GatherElements" | "GatherND" => false,
            "SoftmaxCrossEntropyLoss" | "NegativeLogLikelihoodLoss" => true,
            _ => return Ok(()),
        };
        let [data, index, ..] = inputs else {
            return Ok(());
        };
        let Some(input) = index.input.as_deref() else {
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
        let limit = IndexLimit {
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

    fn outputs(
        &mut self,
        node: &NodeProto,
        inputs: &[ValueFact],
    ) -> Result<Vec<ValueFact>, GraphError> {
        let name = function_key(node.domain(), node.op_type(), node.overload());
        if let Some(function) = self.functions.get(&name).cloned() {
            return self.call(&function, inputs);
        }
        let bodies = bodies(node)?;
        if !bodies.is_empty() {
            return self.bodies(node, &bodies, inputs);
        }
        let op = node.op();
        let none = ValueFact::constant();
        let all = inputs.iter().fold(none, |all, fact| all.and(fact));
        let fact = match op.as_str() {
            // Shapes are fixed once the window is; a weight that determines one is found where it
            // does.
            "Shape" | "Size" => ValueFact::constant(),
            op if PASS_THROUGH.contains(&op) && is_whole(node)? => {
                let first = inputs.first().cloned().unwrap_or_default();
                let same = matches!(op, "Identity" | "Cast");
                ValueFact {
                    input: first.input,
                    dims: first.dims.filter(|_| same),
                    ..all
                }
            }
            _ => all,
        };
        Ok(vec![fact; node.output.len()])
    }

    /// The outputs of a local function, which sees only its inputs.
    fn call(
        &mut self,
        function: &FunctionProto,
        inputs: &[ValueFact],
    ) -> Result<Vec<ValueFact>, GraphError> {
        let formal = function.input.iter().cloned();
        let values = formal.zip(inputs.iter().cloned()).collect();
        // As deep as the caller, so that recursive functions hit the depth limit.
        let depth = self.scopes.len();
        let mut inner = vec![HashMap::new(); depth];
        inner.push(values);
        let outer = std::mem::replace(&mut self.scopes, inner);
        self.nodes(&function.node)?;
        let outputs = function.output.iter().map(|name| self.fact(name)).collect();
        self.scopes = outer;
        Ok(outputs)
    }

    /// The outputs of an If, Loop, Scan or the like, whose subgraphs see the enclosing scope.
    fn bodies(
        &mut self,
        node: &NodeProto,
        bodies: &[GraphProto],
        inputs: &[ValueFact],
    ) -> Result<Vec<ValueFact>, GraphError> {
        let is_loop = node.op() == "Loop";
        // The number of iterations and the condition are not handed on.
        let own = if is_loop { 2 } else { 0 };
        let mut carried = inputs.get(own..).unwrap_or_default().to_vec();
        let turn = vec![ValueFact::constant(); own];
        let mut outputs: Vec<Option<ValueFact>> = vec![None; node.output.len()];
        loop {
            let before = carried.clone();
            for body in bodies {
                let mut made = self.body(body, &[&turn[..], &carried].concat())?;
                if is_loop && !made.is_empty() {
                    let again = made.remove(0);
                    self.deciding(&again, &format!("condition of {} (Loop)", display(node)));
                }
                for (known, made) in carried.iter_mut().zip(&made) {
                    // A carried value may be what it was in any iteration.
                    *known = known.or(made);
                }
                for (known, made) in outputs.iter_mut().zip(made) {
                    *known = Some(known.as_ref().map_or(made.clone(), |known| known.or(&made)));
                }
            }
            // This terminates: the sets of weights only grow, and there are finitely many weights.
            if carried == before || node.op() == "If" {
                break;
            }
        }
        // A loop may run zero iterations.
        let initial = carried.into_iter().map(Some).chain(std::iter::repeat(None));
        let known = |(made, initial): (Option<ValueFact>, Option<ValueFact>)| match (made, initial)
        {
            (Some(made), Some(initial)) if is_loop => made.or(&initial),
            (made, _) => made.unwrap_or_default(),
        };
        Ok(outputs.into_iter().zip(initial).map(known).collect())
    }

    fn body(
        &mut self,
        body: &GraphProto,
        inputs: &[ValueFact],
    ) -> Result<Vec<ValueFact>, GraphError> {
        self.scopes.push(HashMap::new());
        for (input, fact) in body.input.iter().zip(inputs) {
            self.note(input.name().to_owned(), fact.clone());
        }
        self.graph(body)?;
        let outputs = body.output.iter();
        let outputs = outputs.map(|output| self.fact(output.name())).collect();
        self.scopes.pop();
        Ok(outputs)
    }
}

fn display(node: &NodeProto) -> &str {
    node.display().unwrap_or("a node")
}

/// A Cast keeps integers only if it casts to another integer type.
fn is_whole(node: &NodeProto) -> Result<bool, GraphError> {
    if node.op() != "Cast" {
        return Ok(true);
    }
    let to = integer(node, "to")?;
    Ok([INT32, INT64].map(i64::from).map(Some).contains(&to))
}
