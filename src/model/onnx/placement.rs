//! Which of the nodes on the host do the work of a device. Shapes and indices may be computed on
//! the host; what reads a weight, or makes or takes floating point numbers that depend on one, may
//! not. Large constants are weights, too: those of layers that no candidate changes.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};

use bytes::Bytes;

use super::frozen::LARGE;
use super::graph::Graph;
use super::operators::output_types;
use super::proto::{
    BOOL, GraphError, GraphProto, NodeProto, TensorProto, bodies, decode_node, integer,
    is_default_domain, sizes,
};
use super::values::types;

/// The maximum nesting of bodies.
const MAX_DEPTH: usize = 64;

/// A node, as ONNX Runtime names it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NodeRef {
    /// Its name; need not be unique.
    pub name: String,
    /// The operator's domain; empty or `ai.onnx` for ONNX's own.
    pub domain: String,
    /// The operator.
    pub operator: String,
}

/// Those of the `host` nodes that compute with weights, in their order.
///
/// `optimised` is the graph that the session runs, with the weights among its inputs, and what was computed
/// from them before, `derived`. A node that it
/// does not have counts as computing. Of nodes that share operator and name, or have none (ONNX
/// Runtime names no node of a function that it expands), all compute if one does.
///
/// # Errors
/// When the graph cannot be decoded, or its bodies are nested too deeply.
pub fn computing(
    optimised: Bytes,
    weights: &HashSet<&str>,
    derived: &HashSet<&str>,
    host: &[NodeRef],
) -> Result<Vec<NodeRef>, GraphError> {
    let graph = Graph::decode(optimised)?;
    let mut tracer = Tracer {
        weights,
        derived,
        scopes: Vec::new(),
        nodes: HashMap::new(),
    };
    count(graph.proto(), &mut tracer.nodes)?;
    tracer.graph(graph.proto(), &[])?;
    let mut asked: HashMap<Key, usize> = HashMap::new();
    for node in host {
        *asked.entry(node.key()).or_default() += 1;
    }
    let harmless = |node: &&NodeRef| {
        let key = node.key();
        let found = tracer.nodes.get(&key);
        found.is_some_and(|found| !found.computes && asked.get(&key) <= Some(&found.count))
    };
    Ok(host.iter().filter(|n| !harmless(n)).cloned().collect())
}

/// A node's name, and its operator with its domain.
type Key = (String, String);

impl NodeRef {
    fn key(&self) -> Key {
        let operator = match is_default_domain(Some(&self.domain)) {
            true => self.operator.clone(),
            false => format!("{}.{}", self.domain, self.operator),
        };
        (self.name.clone(), operator)
    }
}

fn key(node: &NodeProto) -> Key {
    (node.name().to_owned(), node.op())
}

/// What is known of the nodes of a name and an operator.
#[derive(Debug, Default)]
struct Found {
    count: usize,
    computes: bool,
}

/// Counts the nodes of each name and operator, in bodies as well.
fn count(graph: &GraphProto, found: &mut HashMap<Key, Found>) -> Result<(), GraphError> {
    for bytes in &graph.node {
        let node = decode_node(bytes)?;
        found.entry(key(&node)).or_default().count += 1;
        for body in bodies(&node)? {
            count(&body, found)?;
        }
    }
    Ok(())
}

/// What is known of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Value {
    /// It is a weight.
    weight: bool,
    /// It is a weight, or depends on one in more than its shape.
    tainted: bool,
    elem: Option<i32>,
}

impl Value {
    /// Whether it is, or may be, a floating point number that depends on a weight.
    fn heavy(self) -> bool {
        self.tainted && self.elem.is_none_or(|elem| !is_discrete(elem))
    }
}

/// Integers of 4 to 64 bits, strings and booleans; anything else may be a floating point number.
fn is_discrete(elem: i32) -> bool {
    const UINT8_TO_BOOL: std::ops::RangeInclusive<i32> = 2..=BOOL;
    const UINT32_AND_UINT64: std::ops::RangeInclusive<i32> = 12..=13;
    const UINT4_AND_INT4: std::ops::RangeInclusive<i32> = 21..=22;
    let all = [UINT8_TO_BOOL, UINT32_AND_UINT64, UINT4_AND_INT4];
    all.iter().any(|range| range.contains(&elem))
}

/// Whether a constant is a weight of a layer, by its size. A table of integers is none.
fn is_large(constant: &TensorProto) -> bool {
    let floats = constant.data_type.is_none_or(|elem| !is_discrete(elem));
    floats && sizes(&constant.dims).iter().product::<usize>() >= LARGE
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// It only reads shapes.
    Shape,
    /// What counts are the nodes in its bodies.
    If,
    Loop,
    Scan,
    /// Any other.
    Plain,
}

impl Kind {
    fn of(node: &NodeProto) -> Self {
        match node.op().as_str() {
            "Shape" | "Size" => Self::Shape,
            "If" => Self::If,
            "Loop" => Self::Loop,
            "Scan" => Self::Scan,
            _ => Self::Plain,
        }
    }
}

struct Tracer<'a> {
    weights: &'a HashSet<&'a str>,
    derived: &'a HashSet<&'a str>,
    /// Values by name: of the graph, of the body within it, and so on.
    scopes: Vec<HashMap<String, Value>>,
    nodes: HashMap<Key, Found>,
}

impl Tracer<'_> {
    fn value(&self, name: &str) -> Value {
        let found = self.scopes.iter().rev().find_map(|scope| scope.get(name));
        found.copied().unwrap_or_default()
    }

    /// Follows the values of a graph or body with these inputs, and returns its outputs.
    fn graph(&mut self, graph: &GraphProto, inputs: &[Value]) -> Result<Vec<Value>, GraphError> {
        if self.scopes.len() > MAX_DEPTH {
            let message = format!("has more than {MAX_DEPTH} bodies within each other");
            return Err(GraphError(message));
        }
        let types = types(graph)?;
        let elem = |name: &str| types.get(name).and_then(|t| t.elem_type);
        let mut scope = HashMap::new();
        let large = graph.initializer.iter().filter(|t| is_large(t));
        let large: HashSet<&str> = large.map(TensorProto::name).collect();
        let initializers = graph.initializer.iter().map(|t| (t.name(), None));
        let given = inputs.iter().map(Some).chain(std::iter::repeat(None));
        let formals = graph.input.iter().zip(given);
        for (name, given) in initializers.chain(formals.map(|(i, given)| (i.name(), given))) {
            let outermost = self.scopes.is_empty();
            let weight = outermost && self.weights.contains(name) || large.contains(name);
            let derived = outermost && self.derived.contains(name);
            let given = given.copied().unwrap_or_default();
            let value = Value {
                weight,
                tainted: weight || derived || given.tainted,
                elem: elem(name).or(given.elem),
            };
            scope.insert(name.to_owned(), value);
        }
        self.scopes.push(scope);
        for bytes in &graph.node {
            let node = decode_node(bytes)?;
            let outputs = self.node(&node)?;
            let of = |at: usize| self.value(node.input.get(at)?).elem;
            // The runtime does not write the types of values into the graph.
            let made = output_types(&node, of)?.into_iter();
            let made = made.chain(std::iter::repeat(None));
            for ((name, tainted), made) in node.output.iter().zip(outputs).zip(made) {
                let value = Value {
                    weight: false,
                    tainted,
                    elem: elem(name).or(made),
                };
                self.judge(&node, value.heavy());
                if let Some(scope) = self.scopes.last_mut() {
                    scope.insert(name.clone(), value);
                }
            }
        }
        let outputs = graph.output.iter().map(|o| self.value(o.name())).collect();
        self.scopes.pop();
        Ok(outputs)
    }

    /// Notes whether a node computes.
    fn judge(&mut self, node: &NodeProto, computes: bool) {
        let counts = Kind::of(node) == Kind::Plain && computes;
        if let Some(found) = self.nodes.get_mut(&key(node)) {
            found.computes |= counts;
        }
    }

    /// Judges a node by its inputs, and returns which of its outputs are tainted.
    fn node(&mut self, node: &NodeProto) -> Result<Vec<bool>, GraphError> {
        let given = node.input.iter().filter(|name| !name.is_empty());
        let reads_heavy = given
            .map(|name| self.value(name))
            .any(|v| v.weight || v.heavy());
        self.judge(node, reads_heavy);
        let inputs: Vec<Value> = node.input.iter().map(|name| self.value(name)).collect();
        let held = bodies(node)?;
        let any = inputs.iter().any(|input| input.tainted);
        match Kind::of(node) {
            Kind::Shape => Ok(vec![false; node.output.len()]),
            Kind::Plain if held.is_empty() => Ok(vec![any; node.output.len()]),
            Kind::Plain => self.unknown(node, &held, any),
            Kind::If => self.control(node, &held, &inputs, 1, 0),
            Kind::Loop => {
                let carried = inputs.len().saturating_sub(2);
                self.control(node, &held, &inputs, 2, carried)
            }
            Kind::Scan => {
                let scanned = integer(node, "num_scan_inputs")?.unwrap_or(0);
                let scanned = usize::try_from(scanned).unwrap_or(0);
                let carried = inputs.len().saturating_sub(scanned);
                self.control(node, &held, &inputs, 0, carried)
            }
        }
    }

    /// An operator with bodies whose rules are not known: if one input is tainted, all within is.
    fn unknown(
        &mut self,
        node: &NodeProto,
        held: &[GraphProto],
        mut tainted: bool,
    ) -> Result<Vec<bool>, GraphError> {
        for body in held {
            let formal = Value {
                tainted,
                ..Value::default()
            };
            let made = self.graph(body, &vec![formal; body.input.len()])?;
            tainted |= made.iter().any(|value| value.tainted);
        }
        self.judge(node, tainted);
        Ok(vec![tainted; node.output.len()])
    }

    /// An If, Loop or Scan. Its first `steering` inputs decide how often which body runs; of the
    /// others the first `carried` are handed from one turn to the next.
    fn control(
        &mut self,
        node: &NodeProto,
        held: &[GraphProto],
        inputs: &[Value],
        steering: usize,
        carried: usize,
    ) -> Result<Vec<bool>, GraphError> {
        let is_loop = Kind::of(node) == Kind::Loop;
        let (steers, fed) = inputs.split_at(steering.min(inputs.len()));
        let mut steered = steers.iter().any(|value| value.tainted);
        let mut fed = fed.to_vec();
        let mut outputs: Vec<bool> = fed.iter().take(carried).map(|v| v.tainted).collect();
        outputs.resize(node.output.len(), false);
        loop {
            let before = fed.clone();
            for body in held {
                // A Loop's body takes the turn and the condition first, and returns a condition first.
                let own = if is_loop { 2 } else { 0 };
                let formals = [&vec![Value::default(); own][..], &fed].concat();
                let mut made = self.graph(body, &formals)?.into_iter();
                if is_loop {
                    steered |= made.next().is_some_and(|again| again.tainted);
                }
                for (at, made) in made.enumerate() {
                    if let Some(output) = outputs.get_mut(at) {
                        *output |= made.tainted;
                    }
                    if let Some(next) = fed.get_mut(at).filter(|_| at < carried) {
                        next.tainted |= made.tainted;
                    }
                }
            }
            // This terminates: values only become tainted.
            if fed == before {
                break;
            }
        }
        Ok(outputs
            .into_iter()
            .map(|tainted| tainted || steered)
            .collect())
    }
}
