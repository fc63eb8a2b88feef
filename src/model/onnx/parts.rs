//! A graph cut into parts that run one after the other, each a graph of its own. What a part makes for later
//! ones is its output; what it needs of earlier ones is its input.

use std::collections::{BTreeSet, HashMap, HashSet};

use bytes::Bytes;
use prost::Message;

use super::dataflow::{Boundary, Dataflow};
use super::graph::Graph;
use super::proto::{GraphError, GraphProto, TensorProto, ValueInfo, element_size, value_info};

/// A part of a graph.
#[derive(Debug)]
pub struct Part {
    /// It runs alone, on what enters.
    pub graph: Graph,
    /// The inputs of the whole graph that it reads, weights among them.
    pub inputs: Vec<String>,
    /// The values of earlier parts that it reads.
    pub enters: Vec<String>,
    /// Those of them that depend on weights.
    pub weighted: Vec<String>,
    /// The values that later parts read.
    pub leaves: Vec<String>,
}

/// How much crosses a place. Less is less in the order of the fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Size {
    /// Values whose size depends on others.
    pub unknown: usize,
    /// Of the other values.
    pub bytes: u64,
}

/// What the runtime finds out about values of a graph whose inputs have fixed sizes.
#[derive(Debug, Default)]
pub struct Known {
    constants: HashMap<String, TensorProto>,
    types: HashMap<String, ValueInfo>,
}

impl Known {
    /// From an optimised graph that has the values among its outputs, and their element types and sizes as the
    /// runtime tells them: a negative size is not fixed, and without sizes nothing is known of the shape.
    ///
    /// # Errors
    /// When the graph cannot be decoded.
    pub fn new<'t>(
        optimised: Bytes,
        types: impl Iterator<Item = (&'t str, i32, &'t [i64])>,
    ) -> Result<Self, GraphError> {
        let graph = Graph::decode(optimised)?.model.graph.unwrap_or_default();
        let outputs: HashSet<String> = names(&graph.output).map(str::to_owned).collect();
        let constants = graph.initializer.into_iter();
        let constants = constants.filter(|tensor| outputs.contains(tensor.name()));
        let types = types.map(|(name, elem, sizes)| {
            let size = |size: &i64| Some(*size).filter(|size| *size >= 0);
            let info = match sizes {
                // A single number looks the same, and needs no shape either.
                [] => ValueInfo::new(name, elem, None),
                sizes => value_info(name, elem, sizes.iter().map(size).collect()),
            };
            (name.to_owned(), info)
        });
        Ok(Self {
            constants: constants.map(|t| (t.name().to_owned(), t)).collect(),
            types: types.collect(),
        })
    }

    /// The size of these values, but for the constant ones; none if one of them is no tensor.
    pub fn size<'a>(&self, values: impl IntoIterator<Item = &'a String>) -> Option<Size> {
        let values = values.into_iter();
        let varying = values.filter(|name| !self.constants.contains_key(*name));
        let mut all = Size::default();
        for name in varying {
            let tensor = self.types.get(name)?.tensor()?;
            let element = element_size(tensor.elem_type?)?;
            let sizes = tensor.sizes().unwrap_or_else(|| vec![None]);
            let elements: Option<usize> = sizes.into_iter().product();
            match elements {
                Some(elements) => all.bytes += element * elements as u64,
                None => all.unknown += 1,
            }
        }
        Some(all)
    }
}

/// Chooses the places to cut, by the node behind them: about equal work between them, and as little as possible across them.
///
/// Each of `parts - 1` equal shares of the work, around the ideal place, has one cut at most.
pub fn choose(boundaries: &[Boundary], known: &Known, work: u64, parts: u64) -> Vec<usize> {
    let sized = boundaries.iter().filter_map(|boundary| {
        let size = known.size(&boundary.crossing)?;
        Some((boundary, size))
    });
    let sized: Vec<_> = sized.filter(|(_, size)| *size > Size::default()).collect();
    // In units of `work / parts`, to compare without rounding.
    let around = |share: u64, boundary: &Boundary| {
        let distance = (boundary.work * parts).abs_diff(share * work);
        (2 * distance <= work).then_some(distance)
    };
    let mut chosen: Vec<usize> = Vec::new();
    for share in 1..parts {
        let near = sized.iter().filter_map(|(boundary, size)| {
            let distance = around(share, boundary)?;
            Some((*size, distance, boundary.at))
        });
        let place = near.min().map(|(_, _, at)| at);
        chosen.extend(place.filter(|at| chosen.last().is_none_or(|last| last < at)));
    }
    chosen
}

impl Part {
    /// A graph that is not cut.
    pub fn whole(graph: &Graph) -> Self {
        Self {
            inputs: names(&graph.proto().input).map(str::to_owned).collect(),
            graph: graph.clone(),
            enters: Vec::new(),
            weighted: Vec::new(),
            leaves: Vec::new(),
        }
    }
}

impl Graph {
    /// The same graph with these values among its outputs.
    #[must_use]
    pub fn exposing(&self, values: impl Iterator<Item = String>) -> Self {
        let mut exposed = self.clone();
        // The runtime finds out what type they have.
        let outputs = values.map(|name| ValueInfo {
            name: Some(name),
            r#type: None,
        });
        exposed.proto_mut().output.extend(outputs);
        exposed
    }

    /// Cuts the graph before these nodes, in their order.
    ///
    /// # Errors
    /// When a value that crosses a cut is not known.
    pub fn parts(
        &self,
        flow: &Dataflow,
        cuts: &[usize],
        known: &Known,
    ) -> Result<Vec<Part>, GraphError> {
        let ends = cuts.iter().copied().chain([flow.steps.len()]);
        let mut start = 0;
        let ranges = ends.map(|end| std::mem::replace(&mut start, end)..end);
        let spans: Vec<_> = ranges.map(|range| Span::of(flow, range, known)).collect();
        let later = |at: usize| spans[at + 1..].iter().flat_map(|span| &span.enters);
        let parts = spans.iter().enumerate().map(|(at, span)| {
            let wanted: HashSet<&String> = later(at).collect();
            let made = span.steps.iter().flat_map(|step| &flow.steps[*step].makes);
            let leaves = made.filter(|name| wanted.contains(name)).cloned();
            self.part(flow, span, leaves.collect(), known)
        });
        parts.collect()
    }

    fn part(
        &self,
        flow: &Dataflow,
        span: &Span,
        leaves: Vec<String>,
        known: &Known,
    ) -> Result<Part, GraphError> {
        let whole = self.proto();
        let steps = span.steps.iter().map(|at| &flow.steps[*at]);
        let made: HashSet<&str> = steps.flat_map(|s| &s.makes).map(String::as_str).collect();
        let reads = |name: &str| span.reads.contains(name);
        let inputs = whole.input.iter().filter(|input| reads(input.name()));
        let inputs: Vec<ValueInfo> = inputs.cloned().collect();
        let is_made = |output: &&ValueInfo| made.contains(output.name());
        let outputs = whole.output.iter().filter(is_made).cloned();
        let constants = whole.initializer.iter().filter(|held| reads(held.name()));
        let folded = span.constants.iter().filter_map(|n| known.constants.get(n));
        let graph = GraphProto {
            node: span
                .steps
                .iter()
                .map(|at| whole.node[*at].clone())
                .collect(),
            initializer: constants.chain(folded).cloned().collect(),
            input: [inputs.clone(), known.typed(&span.enters)?].concat(),
            output: [outputs.collect(), known.typed(&leaves)?].concat(),
            value_info: told(whole, &made),
            ..whole.clone()
        };
        let mut model = self.model.clone();
        model.graph = Some(graph);
        let is_weighted = |name: &&String| {
            let maker = flow.makers.get(*name);
            maker.is_some_and(|at| flow.steps[*at].weighted)
        };
        Ok(Part {
            graph: Self { model },
            inputs: names(&inputs).map(str::to_owned).collect(),
            weighted: span.enters.iter().filter(is_weighted).cloned().collect(),
            enters: span.enters.clone(),
            leaves,
        })
    }
}

impl Known {
    /// What the values are, to declare them; none of them is constant.
    fn typed(&self, values: &[String]) -> Result<Vec<ValueInfo>, GraphError> {
        let typed = values.iter().map(|name| {
            let found = self.types.get(name).cloned();
            found.ok_or_else(|| GraphError(format!("nothing is known of its value {name}")))
        });
        typed.collect()
    }
}

/// The nodes of a part, and what they read.
struct Span {
    /// In the order of the graph.
    steps: BTreeSet<usize>,
    reads: HashSet<String>,
    /// Values of earlier parts, in the order in which they are made.
    enters: Vec<String>,
    /// Values of earlier parts that are always the same.
    constants: Vec<String>,
}

impl Span {
    /// The nodes of a range and whatever else they need that depends on nothing that is fed.
    fn of(flow: &Dataflow, range: std::ops::Range<usize>, known: &Known) -> Self {
        let mut pending: Vec<usize> = range.clone().filter(|at| flow.steps[*at].fed).collect();
        let mut steps: BTreeSet<usize> = pending.iter().copied().collect();
        let (mut reads, mut earlier) = (HashSet::new(), BTreeSet::new());
        while let Some(at) = pending.pop() {
            for name in &flow.steps[at].reads {
                reads.insert(name.clone());
                let Some(maker) = flow.makers.get(name).copied() else {
                    continue;
                };
                if !flow.steps[maker].fed {
                    if steps.insert(maker) {
                        pending.push(maker);
                    }
                } else if maker < range.start {
                    earlier.insert((maker, name.clone()));
                }
            }
        }
        let earlier = earlier.into_iter().map(|(_, name)| name);
        let (constants, enters) = earlier.partition(|name| known.constants.contains_key(name));
        Self {
            steps,
            reads,
            enters,
            constants,
        }
    }
}

fn names(values: &[ValueInfo]) -> impl Iterator<Item = &str> {
    values.iter().map(ValueInfo::name)
}

/// What the graph says of the values that are made.
fn told(graph: &GraphProto, made: &HashSet<&str>) -> Vec<Vec<u8>> {
    let is_made = |bytes: &&Vec<u8>| {
        let info = ValueInfo::decode(bytes.as_slice());
        info.is_ok_and(|info| made.contains(info.name()))
    };
    graph.value_info.iter().filter(is_made).cloned().collect()
}

#[cfg(test)]
mod tests;
