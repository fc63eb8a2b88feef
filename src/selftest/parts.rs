//! What an evaluation costs by the part of the graph that the candidate starts at.

use std::sync::Arc;

use rand::rngs::StdRng;
use serde::Serialize;

use super::sample::{median, refused, sample};
use crate::config::Config;
use crate::engine::patch::Patches;
use crate::engine::{Engine, EngineError};
use crate::model::package::Package;
use crate::model::plan::Plan;
use crate::util::clock::Lap;

/// More repetitions change the medians little, and each runs two passes for each part.
const REPETITIONS: usize = 7;
/// The share of the entries of each touched tensor that a candidate changes.
const DENSITY: f64 = 0.01;

/// The cost of candidates that leave the first parts alone, in passes of a bare session.
#[derive(Debug, Clone, Serialize)]
pub struct Costs {
    /// The same build with the graph in one part, every tensor touched.
    pub ratio_whole: f64,
    /// By the part started from: every tensor touched that no earlier part reads.
    pub ratio_from: Vec<f64>,
    /// The first tensor of each part.
    pub from: Vec<String>,
    /// What is kept between the parts for the plan.
    pub activation_bytes: u64,
}

/// Measures it, each candidate next to a pass of the bare session.
pub(super) fn costs(
    package: &Arc<Package>,
    config: &Config,
    bare: &mut Engine,
    plan: &Plan,
    random: &mut StdRng,
    repetitions: usize,
) -> Result<Costs, EngineError> {
    let load = |parts: usize| {
        let mut config = config.engine.clone();
        if parts > 0 {
            config.parts = parts;
        }
        Engine::load(Arc::clone(package), &config, Arc::default())
    };
    let (mut engine, mut whole) = (load(0)?, load(1)?);
    let parts = engine.parts_of_tensors();
    let starts = (0..engine.parts()).filter(|part| parts.contains(&Some(*part)));
    let starts: Vec<usize> = starts.collect();
    let from = starts.iter().map(|start| {
        let first = parts.iter().position(|part| *part == Some(*start));
        first.map_or_else(String::new, |t| package.weights.tensors[t].name.clone())
    });
    let candidate = |start: &usize, random: &mut StdRng| {
        let touched = |tensor: usize| parts[tensor] >= Some(*start);
        sample(package, config, DENSITY, touched, random).map(|sample| sample.patches)
    };
    let candidates = starts.iter().map(|start| candidate(start, random));
    let candidates: Vec<Arc<Patches>> = candidates.collect::<Result<_, _>>()?;
    let mut ratios = vec![Vec::new(); candidates.len()];
    let mut wholes = Vec::new();
    for repetition in 0..=repetitions.min(REPETITIONS) {
        let mut measure = |engine: &mut Engine, patches: &Patches| {
            let began = std::time::Instant::now();
            bare.pass(plan).map_err(|f| refused(&f))?;
            let bare = Lap::since(began).millis();
            let laps = engine.score(patches, plan).map_err(|f| refused(&f))?.laps;
            let evaluated = laps.apply.millis() + laps.forward.millis() + laps.restore.millis();
            Ok::<_, EngineError>(evaluated / bare)
        };
        let one = measure(&mut whole, &candidates[0])?;
        let each = candidates
            .iter()
            .map(|patches| measure(&mut engine, patches));
        let each: Vec<f64> = each.collect::<Result<_, _>>()?;
        // The first one also measures the baseline and plans memory.
        if repetition > 0 {
            wholes.push(one);
            ratios
                .iter_mut()
                .zip(each)
                .for_each(|(all, ratio)| all.push(ratio));
        }
    }
    Ok(Costs {
        ratio_whole: median(&wholes),
        ratio_from: ratios.iter().map(|ratios| median(ratios)).collect(),
        from: from.collect(),
        activation_bytes: engine.activation_bytes(),
    })
}
