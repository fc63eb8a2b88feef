//! What an evaluation costs by the part of the graph that the candidate starts at, and what a mixed stream of
//! candidates costs.

use std::sync::Arc;
use std::time::Instant;

use rand::Rng;
use rand::rngs::StdRng;
use serde::Serialize;

use super::sample::{median, refused, sample};
use crate::config::Config;
use crate::engine::patch::Patches;
use crate::engine::{Engine, EngineError};
use crate::model::package::Package;
use crate::model::plan::Plan;
use crate::protocol::state::Detail;
use crate::util::clock::Lap;

/// More repetitions change the medians little.
const REPETITIONS: usize = 5;
/// Evaluations between two passes of the bare session.
const ROUND: usize = 4;
/// The share of the entries of each touched tensor that a candidate changes.
const DENSITY: f64 = 0.01;
/// Candidates of each kind in a stream.
const OF_A_KIND: usize = 8;

/// The cost of candidates that leave the first parts alone, in passes of a bare session.
#[derive(Debug, Clone, Serialize)]
pub struct Costs {
    /// The same build with the graph in one part, every tensor touched.
    pub ratio_whole: f64,
    /// By the part started from: every tensor touched that no earlier part reads.
    pub ratio_from: Vec<f64>,
    /// The weight with which each part but the first begins.
    pub cuts: Vec<String>,
    /// What is kept between the parts for the plan.
    pub activation_bytes: u64,
    /// A third of the candidates touches one part, a third three adjacent ones, a third all.
    pub mixed: Mixed,
    /// The same, half of them with windows that were not measured before.
    pub mixed_fresh: Mixed,
}

/// Mean cost of the candidates of a stream, in passes of a bare session.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Mixed {
    /// From [`Costs::ratio_from`].
    pub predicted: f64,
    /// In the stream.
    pub measured: f64,
}

/// The engines that are compared, and what they measure.
pub(super) struct Compared<'a> {
    pub(super) package: &'a Arc<Package>,
    pub(super) config: &'a Config,
    pub(super) bare: &'a mut Engine,
    pub(super) plan: &'a Plan,
    pub(super) random: &'a mut StdRng,
}

/// A candidate and the first part that it touches.
struct Candidate {
    from: usize,
    patches: Arc<Patches>,
}

impl Compared<'_> {
    /// Measures all costs in one run.
    pub(super) fn costs(mut self, repetitions: usize) -> Result<Costs, EngineError> {
        let (mut engine, mut whole) = (self.load(None)?, self.load(Some(1))?);
        let last = engine.parts() - 1;
        let candidates = (0..=last).map(|from| self.candidate(&engine, from, last));
        let candidates: Vec<Candidate> = candidates.collect::<Result<_, _>>()?;
        let (mut wholes, mut ratios) = (Vec::new(), vec![Vec::new(); candidates.len()]);
        for repetition in 0..=repetitions.min(REPETITIONS) {
            let one = self.round(&mut whole, self.plan, &candidates[..1])?;
            let rounds = candidates.chunks(ROUND);
            let each = rounds.map(|some| self.round(&mut engine, self.plan, some));
            let each: Vec<Vec<f64>> = each.collect::<Result<_, _>>()?;
            // The first one also measures the baseline and plans memory.
            if repetition > 0 {
                wholes.extend(one);
                let each = ratios.iter_mut().zip(each.concat());
                each.for_each(|(all, ratio)| all.push(ratio));
            }
        }
        let ratio_from: Vec<f64> = ratios.iter().map(|ratios| median(ratios)).collect();
        let activation_bytes = engine.activation_bytes();
        Ok(Costs {
            ratio_whole: median(&wholes),
            mixed: self.stream(&mut engine, &ratio_from, false)?,
            mixed_fresh: self.stream(&mut engine, &ratio_from, true)?,
            ratio_from,
            cuts: engine.partition().cuts,
            activation_bytes,
        })
    }

    fn load(&self, parts: Option<usize>) -> Result<Engine, EngineError> {
        let mut config = self.config.engine.clone();
        config.parts = parts.unwrap_or(config.parts);
        Engine::load(Arc::clone(self.package), &config, Arc::default())
    }

    /// Touches the tensors that these parts are the first to read.
    fn candidate(
        &mut self,
        engine: &Engine,
        from: usize,
        to: usize,
    ) -> Result<Candidate, EngineError> {
        let parts = engine.parts_of_tensors();
        let touched = |tensor: usize| parts[tensor].is_some_and(|p| (from..=to).contains(&p));
        let sample = sample(self.package, self.config, DENSITY, touched, self.random)?;
        let patches = sample.patches;
        Ok(Candidate { from, patches })
    }

    /// The cost of each candidate, next to a pass of the bare session.
    fn round(
        &mut self,
        engine: &mut Engine,
        plan: &Plan,
        candidates: &[Candidate],
    ) -> Result<Vec<f64>, EngineError> {
        let began = Instant::now();
        self.bare.pass(self.plan).map_err(|f| refused(&f))?;
        let bare = Lap::since(began).millis();
        let cost = |candidate: &Candidate| {
            let began = Instant::now();
            let evaluated = engine.score(&candidate.patches, plan, None);
            evaluated.map_err(|f| refused(&f))?;
            Ok(Lap::since(began).millis() / bare)
        };
        candidates.iter().map(cost).collect()
    }

    /// The mean cost of a stream of candidates, in a fixed order.
    fn stream(
        &mut self,
        engine: &mut Engine,
        ratio_from: &[f64],
        fresh: bool,
    ) -> Result<Mixed, EngineError> {
        let last = ratio_from.len() - 1;
        let (mut predicted, mut measured) = (Vec::new(), Vec::new());
        for number in 0..3 * OF_A_KIND {
            let width = [0, 2, last][number % 3].min(last);
            let from = self.random.random_range(0..=last - width);
            let candidate = self.candidate(engine, from, from + width)?;
            let is_new = fresh && number % 2 == 0;
            let nonce = if is_new {
                number.to_string()
            } else {
                String::new()
            };
            let plan = Plan::new(&self.package.shards, None, &nonce, self.package.cut());
            let plan = plan.map_err(|f| EngineError::new(Detail::WarmFailed, f.message))?;
            // A plan that is not known costs a pass of the baseline, too.
            let baseline = if is_new { ratio_from[0] } else { 0.0 };
            predicted.push(ratio_from[candidate.from] + baseline);
            measured.extend(self.round(engine, &plan, std::slice::from_ref(&candidate))?);
        }
        let mean = crate::engine::statistics::mean;
        Ok(Mixed {
            predicted: mean(&predicted),
            measured: mean(&measured),
        })
    }
}
