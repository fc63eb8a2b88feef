//! The sessions of ONNX Runtime for inputs of one size, one for each part of the graph, which run one after the
//! other.

use std::collections::HashMap;

use ort::memory::MemoryInfo;
use ort::value::{DynTensor, DynValue};

use super::activations::{Entered, Values};
use super::build::{GraphSource, Terms, build};
use super::scratch::{Scratch, host_memory};
use super::{Feed, Placement, SessionError, Source, Terminator};
use crate::config::EngineConfig;
use crate::model::onnx::{NodeRef, OUTPUT, Part};

/// The shape of each input that is no weight, in the order in which they are fed.
pub(super) type Shapes = Vec<Vec<usize>>;

pub(super) fn shapes(feeds: &[Feed<'_>]) -> Shapes {
    feeds.iter().map(|feed| feed.shape.clone()).collect()
}

/// The graph for inputs of one size. They are fixed, so that no shape is computed at run time, and so that the
/// bits of a result depend on nothing but the values.
pub(super) struct Compiled {
    pub(super) shapes: Shapes,
    parts: Vec<Runner>,
}

/// A part.
struct Runner {
    session: ort::session::Session,
    feeds: Vec<String>,
    /// Positions among all weights.
    weights: Vec<usize>,
    enters: Vec<String>,
    /// What it makes for later parts, or the output of the graph.
    makes: Vec<String>,
}

/// What the parts of a run share.
pub(super) struct Run<'a> {
    /// By name.
    pub(super) feeds: HashMap<&'a str, DynTensor>,
    pub(super) weights: &'a [Scratch],
    /// Where the values between parts are.
    pub(super) memory: &'a MemoryInfo<'static>,
    pub(super) terminator: &'a Terminator,
}

/// What the sessions of all parts are held to.
#[derive(Clone, Copy)]
pub(super) struct Demands<'a> {
    pub(super) config: &'a EngineConfig,
    /// The names of all weights.
    pub(super) weights: &'a [String],
    /// Nodes that were found harmless on the host, in another size of the same graph.
    pub(super) harmless: &'a [NodeRef],
    pub(super) terminator: &'a Terminator,
}

impl Compiled {
    /// Makes a session of each part.
    pub(super) fn new(
        demands: Demands<'_>,
        source: &Source,
        feeds: &[Feed<'_>],
        parts: Vec<Part>,
    ) -> Result<(Self, Placement), SessionError> {
        let mut placement = Placement::default();
        let count = parts.len();
        let mut runners = Vec::with_capacity(count);
        for part in parts {
            let sizes = feeds.iter().map(|f| (f.name, f.shape.as_slice()));
            let graph = part.graph.sized(sizes);
            let terms = Terms {
                derived: &part.weighted,
                harmless: demands.harmless,
                shared: count > 1,
                ..Terms::new(demands.weights, demands.terminator)
            };
            let graph = GraphSource::Beside(&graph, &source.folder);
            let (session, placed) = build(demands.config, graph, terms)?;
            placement.add(placed);
            let is_last = runners.len() + 1 == count;
            runners.push(Runner::new(session, part, demands.weights, is_last));
        }
        let compiled = Self {
            shapes: shapes(feeds),
            parts: runners,
        };
        Ok((compiled, placement))
    }

    /// The first part that reads each of the weights.
    pub(super) fn first_readers(&self, weights: usize) -> Vec<usize> {
        let first = |weight: usize| {
            let mut parts = self.parts.iter();
            // One that no part reads has no effect, wherever a run starts.
            parts
                .position(|part| part.weights.contains(&weight))
                .unwrap_or(0)
        };
        (0..weights).map(first).collect()
    }

    /// Runs the parts that are not known, or whose weights differ from the baseline's: those from `touched` on.
    /// Returns the output of the graph, and notes what parts before `touched` made.
    pub(super) fn run(
        &mut self,
        run: &Run<'_>,
        touched: usize,
        entered: &mut Entered,
    ) -> Result<Vec<f32>, SessionError> {
        let last = self.parts.len().saturating_sub(1);
        let start = entered.parts.min(touched).min(last);
        let mut fresh = Values::new();
        for at in start..last {
            let made = self.parts[at].run(run, &fresh, &entered.values)?;
            if at < touched {
                entered.values.extend(made);
                entered.parts = entered.parts.max(at + 1);
            } else {
                fresh.extend(made);
                let is_read =
                    |name: &String| self.parts[at + 1..].iter().any(|p| p.enters.contains(name));
                fresh.retain(|name, _| is_read(name));
            }
        }
        let part = self.parts.get_mut(last).ok_or_else(none)?;
        let made = part.run(run, &fresh, &entered.values)?;
        let output = made
            .iter()
            .find(|(name, _)| name == OUTPUT)
            .ok_or_else(none)?;
        let (_, values) = output.1.try_extract_tensor::<f32>()?;
        Ok(values.to_vec())
    }
}

impl Runner {
    fn new(session: ort::session::Session, part: Part, weights: &[String], is_last: bool) -> Self {
        let place = |name: &String| weights.iter().position(|weight| weight == name);
        let (held, feeds): (Vec<_>, Vec<_>) = part
            .inputs
            .into_iter()
            .partition(|name| place(name).is_some());
        Self {
            session,
            feeds,
            weights: held.iter().filter_map(place).collect(),
            enters: part.enters,
            makes: match is_last {
                true => vec![OUTPUT.to_owned()],
                false => part.leaves,
            },
        }
    }

    /// Runs the part and returns what it makes for later ones, or the output of the graph.
    fn run(
        &mut self,
        run: &Run<'_>,
        fresh: &Values,
        known: &Values,
    ) -> Result<Vec<(String, DynValue)>, SessionError> {
        let mut binding = self.session.create_binding()?;
        for name in &self.feeds {
            let feed = run.feeds.get(name.as_str()).ok_or_else(none)?;
            binding.bind_input(name, feed)?;
        }
        for weight in &self.weights {
            run.weights[*weight].bind(&mut binding)?;
        }
        for name in &self.enters {
            let value = fresh.get(name).or_else(|| known.get(name));
            binding.bind_input(name, value.ok_or_else(none)?)?;
        }
        for name in &self.makes {
            match name.as_str() {
                OUTPUT => binding.bind_output_to_device(name, &host_memory()?)?,
                _ => binding.bind_output_to_device(name, run.memory)?,
            }
        }
        let options = run.terminator.begin()?;
        let result = self.session.run_binding_with_options(&binding, &options);
        run.terminator.end();
        let outputs = result?;
        Ok(outputs
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect())
    }
}

fn none() -> SessionError {
    SessionError::Other("a part of the graph lacks what it reads".into())
}
