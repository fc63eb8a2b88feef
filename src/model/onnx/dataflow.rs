//! The nodes of a graph in a line, what each reads and makes, and the places between them where few values
//! cross. A graph is cut there, so that a part of it can be run without what comes before.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::graph::Graph;
use super::proto::{GraphError, GraphProto, NodeProto, ValueInfo, bodies, decode_node, sizes};

/// More values than these cross no place that is considered.
const MOST_CROSSING: usize = 32;

/// Operators that look entries up in a weight instead of computing with all of it.
const LOOKUPS: [&str; 3] = ["Gather", "GatherElements", "GatherND"];

/// The nodes of a graph and how they depend on each other.
#[derive(Debug)]
pub struct Dataflow {
    pub(super) steps: Vec<Step>,
    /// The step that makes a value.
    pub(super) makers: HashMap<String, usize>,
    /// The last step that reads a value and is [`Step::fed`].
    last_reads: HashMap<String, usize>,
    /// No node reads what a later one makes. ONNX demands it, and the runtime does without.
    in_order: bool,
}

/// A node.
#[derive(Debug)]
pub(super) struct Step {
    /// In bodies as well, whose own values may be among them.
    pub(super) reads: Vec<String>,
    pub(super) makes: Vec<String>,
    /// It depends on what is fed to the graph. What depends on weights and constants alone has no place in the
    /// line: each part that reads it computes it.
    pub(super) fed: bool,
    /// It depends on a weight.
    pub(super) weighted: bool,
    /// Elements of the weights and constants that it computes with.
    work: u64,
}

/// A place between two nodes where the graph may be cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Boundary {
    /// The first node behind it.
    pub at: usize,
    /// Elements of weights that are computed with before it.
    pub work: u64,
    /// The values that are made before it and read behind it.
    pub crossing: Vec<String>,
}

impl Graph {
    /// How the nodes depend on each other; `weights` are among the graph's inputs.
    ///
    /// # Errors
    /// When a node cannot be decoded.
    pub fn dataflow(&self, weights: &HashSet<&str>) -> Result<Dataflow, GraphError> {
        let graph = self.proto();
        let mut tracer = Tracer::new(graph, weights);
        let mut steps = Vec::with_capacity(graph.node.len());
        for bytes in &graph.node {
            steps.push(tracer.step(&decode_node(bytes)?)?);
        }
        bury(&mut steps, graph.output.iter().map(ValueInfo::name));
        let makes = |(at, step): (usize, &Step)| {
            let names = step.makes.clone().into_iter();
            names.map(move |name| (name, at)).collect::<Vec<_>>()
        };
        let makers: HashMap<String, usize> = steps.iter().enumerate().flat_map(makes).collect();
        let follows = |at, name: &String| makers.get(name).is_none_or(|maker| *maker <= at);
        let mut numbered = steps.iter().enumerate();
        let in_order = numbered.all(|(at, step)| step.reads.iter().all(|name| follows(at, name)));
        let mut last_reads = HashMap::new();
        for (at, step) in steps.iter().enumerate().filter(|(_, step)| step.fed) {
            last_reads.extend(step.reads.iter().map(|name| (name.clone(), at)));
        }
        Ok(Dataflow {
            steps,
            makers,
            last_reads,
            in_order,
        })
    }
}

impl Dataflow {
    /// Elements of weights that all nodes compute with.
    pub fn work(&self) -> u64 {
        self.steps.iter().map(|step| step.work).sum()
    }

    /// Of the places between two nodes that compute with weights, those that the fewest values cross: the first and
    /// the last of them. There are none in a graph whose nodes are not in order.
    pub fn boundaries(&self) -> Vec<Boundary> {
        if !self.in_order {
            return Vec::new();
        }
        let counts = &self.counts();
        let all = self.work();
        let mut work = 0;
        let mut places: Vec<(u64, usize)> = Vec::new();
        for (at, step) in self.steps.iter().enumerate() {
            if work > 0 && work < all && counts[at] <= MOST_CROSSING {
                places.push((work, at));
            }
            work += step.work;
        }
        let between = places.chunk_by(|one, next| one.0 == next.0);
        let narrowest = between.flat_map(|places| {
            let least = places.iter().map(|(_, at)| counts[*at]).min();
            let narrow = places
                .iter()
                .filter(move |(_, at)| Some(counts[*at]) == least);
            let narrow: Vec<_> = narrow.copied().collect();
            let last = narrow.last().copied().filter(|_| narrow.len() > 1);
            narrow.first().copied().into_iter().chain(last)
        });
        let narrowest: Vec<(u64, usize)> = narrowest.collect();
        let crossing = self.crossing(narrowest.iter().map(|(_, at)| *at));
        let found = narrowest.iter().zip(crossing);
        let boundary = |(&(work, at), crossing)| Boundary { at, work, crossing };
        found.map(boundary).collect()
    }

    /// The nodes that read one of these weights before any other node does, directly or through what is computed
    /// from weights alone.
    pub fn first_readers(&self, weights: &HashSet<&str>) -> BTreeSet<usize> {
        let mut seen: HashSet<&str> = HashSet::new();
        let mut first = BTreeSet::new();
        for (at, step) in self.steps.iter().enumerate().filter(|(_, step)| step.fed) {
            let mut pending: Vec<&str> = step.reads.iter().map(String::as_str).collect();
            while let Some(name) = pending.pop() {
                if !seen.insert(name) {
                    continue;
                }
                let maker = self.makers.get(name).map(|maker| &self.steps[*maker]);
                if let Some(maker) = maker.filter(|maker| !maker.fed) {
                    pending.extend(maker.reads.iter().map(String::as_str));
                } else if weights.contains(name) {
                    first.insert(at);
                }
            }
        }
        first
    }

    /// How many values cross the place before each node.
    fn counts(&self) -> Vec<usize> {
        let mut ends = vec![0_usize; self.steps.len() + 1];
        let mut crossing = 0_usize;
        let count = |(at, step): (usize, &Step)| {
            crossing -= ends[at];
            let before = crossing;
            for name in step.makes.iter().filter(|_| step.fed) {
                if let Some(last) = self.last_reads.get(name) {
                    crossing += 1;
                    ends[last + 1] += 1;
                }
            }
            before
        };
        self.steps.iter().enumerate().map(count).collect()
    }

    /// The values that are made before each of these nodes and read from it on. The nodes are in the order of the graph.
    fn crossing(&self, nodes: impl Iterator<Item = usize>) -> Vec<Vec<String>> {
        let (mut open, mut seen): (Vec<(&String, usize)>, usize) = (Vec::new(), 0);
        let before = |at: usize| {
            let made = self.steps[seen..at].iter().filter(|step| step.fed);
            let made = made.flat_map(|step| &step.makes);
            open.extend(made.filter_map(|name| Some((name, *self.last_reads.get(name)?))));
            open.retain(|(_, last)| *last >= at);
            seen = at;
            open.iter().map(|(name, _)| (*name).clone()).collect()
        };
        nodes.map(before).collect()
    }
}

/// Follows values through the nodes.
struct Tracer {
    fed: HashSet<String>,
    weighted: HashSet<String>,
    /// Elements of weights and constants, and of what is computed from them alone.
    elements: HashMap<String, u64>,
}

impl Tracer {
    fn new(graph: &GraphProto, weights: &HashSet<&str>) -> Self {
        let inputs = graph.input.iter();
        let (held, fed): (Vec<_>, Vec<_>) = inputs.partition(|i| weights.contains(i.name()));
        let of = |sizes: Vec<usize>| sizes.into_iter().map(|size| size as u64).product();
        let inputs = held.iter().map(|input| {
            let sizes = input.tensor().and_then(|tensor| tensor.sizes());
            let sizes = sizes.unwrap_or_default().into_iter().flatten().collect();
            (input.name().to_owned(), of(sizes))
        });
        let constants = graph.initializer.iter();
        let constants = constants.map(|t| (t.name().to_owned(), of(sizes(&t.dims))));
        Self {
            elements: inputs.chain(constants).collect(),
            fed: fed.iter().map(|input| input.name().to_owned()).collect(),
            weighted: held.iter().map(|input| input.name().to_owned()).collect(),
        }
    }

    fn step(&mut self, node: &NodeProto) -> Result<Step, GraphError> {
        let mut reads = node.input.clone();
        for body in bodies(node)? {
            read_in(&body, &mut reads)?;
        }
        reads.retain(|name| !name.is_empty());
        let any = |of: &HashSet<String>| reads.iter().any(|name| of.contains(name));
        let (fed, weighted) = (any(&self.fed), any(&self.weighted));
        let elements = reads.iter().filter_map(|name| self.elements.get(name));
        // What is computed from weights is about as large as the largest of them.
        let elements: u64 = match fed {
            true => elements.sum(),
            false => elements.copied().max().unwrap_or_default(),
        };
        let makes: Vec<String> = node
            .output
            .iter()
            .filter(|n| !n.is_empty())
            .cloned()
            .collect();
        if fed {
            self.fed.extend(makes.iter().cloned());
        } else if let Some(first) = makes.first() {
            self.elements.insert(first.clone(), elements);
        }
        if weighted {
            self.weighted.extend(makes.iter().cloned());
        }
        let looks_up = LOOKUPS.contains(&node.op().as_str());
        Ok(Step {
            work: if fed && !looks_up { elements } else { 0 },
            reads,
            makes,
            fed,
            weighted,
        })
    }
}

/// What no output depends on is as if it were not there.
fn bury<'a>(steps: &mut [Step], outputs: impl Iterator<Item = &'a str>) {
    let mut wanted: HashSet<String> = outputs.map(str::to_owned).collect();
    for step in steps.iter_mut().rev() {
        if step.makes.iter().any(|name| wanted.contains(name)) {
            wanted.extend(step.reads.iter().cloned());
        } else {
            (step.fed, step.work) = (false, 0);
        }
    }
}

/// Adds what a body reads, at any depth.
fn read_in(body: &GraphProto, reads: &mut Vec<String>) -> Result<(), GraphError> {
    reads.extend(body.output.iter().map(|output| output.name().to_owned()));
    for bytes in &body.node {
        let node = decode_node(bytes)?;
        reads.extend(node.input.iter().cloned());
        for inner in bodies(&node)? {
            read_in(&inner, reads)?;
        }
    }
    Ok(())
}
