//! Where the graph is cut into parts. A part is a session of its own, so that a candidate that leaves the first
//! ones alone can start behind them.

use std::collections::{BTreeSet, HashSet};

use ort::value::ValueType;

use super::build::{GraphSource, optimised};
use super::terminator::Terminator;
use super::{Feed, SessionError, Source};
use crate::config::EngineConfig;
use crate::model::onnx::{Boundary, Dataflow, GraphError, Known, Part, choose};

/// The least a part computes with, in elements of weights, where nobody says how many parts there are: each part
/// costs another call of the runtime.
const LEAST_WORK: u64 = 4 << 20;
/// The most parts, where nobody says how many.
const MOST_PARTS: u64 = 16;

/// The places at which a graph is cut.
#[derive(Debug)]
pub(super) struct Cut {
    flow: Dataflow,
    /// The first node of each part but the first.
    at: Vec<usize>,
    /// The values that cross one of the places.
    crossing: BTreeSet<String>,
}

impl Cut {
    /// Finds them for inputs of these sizes. `budget` is what the values that enter the parts may take, in bytes.
    pub(super) fn find(
        config: &EngineConfig,
        source: &Source,
        feeds: &[Feed<'_>],
        weights: &[String],
        budget: u64,
        terminator: &Terminator,
    ) -> Result<(Self, Known), SessionError> {
        let names: HashSet<&str> = weights.iter().map(String::as_str).collect();
        let flow = source.graph.dataflow(&names).map_err(unreadable)?;
        let most = match config.parts {
            0 => (flow.work() / LEAST_WORK).min(MOST_PARTS),
            said => said as u64,
        };
        let whole = |flow| Self {
            flow,
            at: Vec::new(),
            crossing: BTreeSet::new(),
        };
        if most < 2 || weights.is_empty() {
            return Ok((whole(flow), Known::default()));
        }
        let boundaries = flow.boundaries();
        if boundaries.is_empty() {
            return Ok((whole(flow), Known::default()));
        }
        let crossing = boundaries.iter().flat_map(|boundary| &boundary.crossing);
        let crossing = crossing.cloned().collect();
        let known = match known(config, source, feeds, &crossing, terminator) {
            Ok(known) => known,
            // With other outputs the runtime may refuse a graph that it runs as it is.
            Err(SessionError::Model(why) | SessionError::NoKernel(why)) => {
                tracing::info!(why, "the graph runs as one part");
                return Ok((whole(flow), Known::default()));
            }
            Err(error) => return Err(error),
        };
        let bound = (config.parts == 0).then_some(budget);
        let at = places(&boundaries, &known, flow.work(), most, bound);
        let at = useful(at, &flow.first_readers(&names));
        let crossed = boundaries.into_iter().filter(|b| at.contains(&b.at));
        let crossing = crossed.flat_map(|boundary| boundary.crossing).collect();
        Ok((Self { flow, at, crossing }, known))
    }

    /// How many parts there are.
    pub(super) fn parts(&self) -> usize {
        self.at.len() + 1
    }

    /// The first node of each part but the first.
    pub(super) fn places(&self) -> &[usize] {
        &self.at
    }

    /// What is known of the values that cross, for inputs of these sizes.
    pub(super) fn known(
        &self,
        config: &EngineConfig,
        source: &Source,
        feeds: &[Feed<'_>],
        terminator: &Terminator,
    ) -> Result<Known, SessionError> {
        match self.crossing.is_empty() {
            true => Ok(Known::default()),
            false => known(config, source, feeds, &self.crossing, terminator),
        }
    }

    /// The parts, from what is known.
    pub(super) fn apply(&self, source: &Source, known: &Known) -> Result<Vec<Part>, SessionError> {
        match self.at.as_slice() {
            [] => Ok(vec![Part::whole(&source.graph)]),
            at => source
                .graph
                .parts(&self.flow, at, known)
                .map_err(unreadable),
        }
    }
}

/// As many places as there may be parts, or fewer, if what crosses them would not fit the budget.
fn places(
    boundaries: &[Boundary],
    known: &Known,
    work: u64,
    most: u64,
    budget: Option<u64>,
) -> Vec<usize> {
    let fits = |at: &Vec<usize>| {
        let crossed = boundaries.iter().filter(|b| at.contains(&b.at));
        let values: HashSet<&String> = crossed.flat_map(|b| &b.crossing).collect();
        let size = known.size(values);
        // What nobody knows beforehand is counted when it is kept.
        budget.is_none_or(|budget| size.is_some_and(|size| size.bytes <= budget))
    };
    let chosen = (2..=most)
        .rev()
        .map(|parts| choose(boundaries, known, work, parts));
    let mut fitting = chosen.filter(fits);
    fitting.next().unwrap_or_default()
}

/// Those behind which, before the next one, a weight is read for the first time: no candidate starts at another.
fn useful(at: Vec<usize>, readers: &BTreeSet<usize>) -> Vec<usize> {
    let mut next = usize::MAX;
    let mut useful: Vec<usize> = Vec::new();
    for place in at.into_iter().rev() {
        if readers.range(place..next).next().is_some() {
            useful.push(place);
            next = place;
        }
    }
    useful.reverse();
    useful
}

/// What the runtime finds out about these values.
fn known(
    config: &EngineConfig,
    source: &Source,
    feeds: &[Feed<'_>],
    values: &BTreeSet<String>,
    terminator: &Terminator,
) -> Result<Known, SessionError> {
    let exposed = source.graph.exposing(values.iter().cloned());
    let graph = exposed.sized(feeds.iter().map(|f| (f.name, f.shape.as_slice())));
    let graph = GraphSource::Beside(&graph, &source.folder);
    let (optimised, session) = optimised(config, graph, terminator)?;
    let types = session
        .outputs()
        .iter()
        .filter_map(|output| match output.dtype() {
            ValueType::Tensor { ty, shape, .. } => {
                let elem = ort::sys::ONNXTensorElementDataType::from(*ty) as i32;
                Some((output.name(), elem, &shape[..]))
            }
            ValueType::Sequence(_) | ValueType::Map { .. } | ValueType::Optional(_) => None,
        });
    Known::new(optimised.into(), types).map_err(unreadable)
}

fn unreadable(error: GraphError) -> SessionError {
    SessionError::Model(error.to_string())
}
