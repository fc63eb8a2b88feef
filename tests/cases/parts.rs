//! What a graph cut into parts computes: whatever a candidate touches, the bits are those of a run from the
//! start.

use std::collections::BTreeMap;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use scorer::candidate::{TensorUpdate, Update};
use scorer::engine::Engine;
use scorer::engine::patch::Patches;
use scorer::model::package::Package;
use scorer::model::plan::Plan;
use scorer::protocol::job::Rule;

use super::architectures::{STATES, cases, packaged};
use super::*;

/// Candidates for each graph.
const CANDIDATES: usize = 12;

/// A few entries of each of these tensors, moved a little.
fn update(package: &Package, tensors: &[usize], random: &mut StdRng) -> Update {
    let touch = |tensor: usize, random: &mut StdRng| {
        let numel = u32::try_from(package.weights.tensors[tensor].numel).unwrap();
        let mut indices: Vec<u32> = (0..8).map(|_| random.random_range(0..numel)).collect();
        indices.sort_unstable();
        indices.dedup();
        let values = indices.iter().map(|_| random.random_range(-0.05..0.05));
        TensorUpdate {
            tensor,
            values: values.collect(),
            indices,
        }
    };
    Update {
        tensors: tensors.iter().map(|t| touch(*t, random)).collect(),
        ..Update::default()
    }
}

/// The tensors that candidates may touch.
fn trainable(package: &Package) -> Vec<usize> {
    let tensors = package.weights.tensors.iter().enumerate();
    let may = |info: &scorer::model::weights::TensorInfo| package.manifest.is_trainable(&info.name);
    let chosen = tensors.filter(|(_, info)| info.numel > 0 && may(info));
    chosen.map(|(tensor, _)| tensor).collect()
}

/// Scores random candidates with activations kept and without, and returns the parts that they started from.
pub(super) fn prove(
    package: &Arc<Package>,
    set: &[&str],
    label: &str,
) -> (usize, BTreeMap<usize, usize>) {
    let engine = |more: &[&str]| {
        let config = config(&[set, more].concat()).engine;
        Engine::load(Arc::clone(package), &config, Arc::default()).unwrap()
    };
    let (mut kept, mut afresh) = (engine(&[]), engine(&["engine.activation_cache=0"]));
    let plan = Plan::new(&package.shards, None, "", package.cut()).unwrap();
    let (mut random, all) = (StdRng::seed_from_u64(7), trainable(package));
    let mut started = BTreeMap::new();
    for number in 0..CANDIDATES {
        // One tensor, a few, half, all.
        let share = [0.0, 0.1, 0.5, 1.0][number % 4];
        let mut touched: Vec<usize> = all.clone();
        touched.retain(|_| random.random_bool(share));
        if touched.is_empty() {
            touched.push(all[random.random_range(0..all.len())]);
        }
        let update = update(package, &touched, &mut random);
        let patches = Patches::new(package, update, Rule::ParamDiff).unwrap();
        let [one, other] =
            [&mut kept, &mut afresh].map(|engine| engine.score(&patches, &plan).unwrap());
        assert_eq!(one.paired, other.paired, "{label}: {touched:?}");
        *started.entry(one.from.unwrap()).or_default() += 1;
    }
    let noop = Patches::new(package, Update::default(), Rule::ParamDiff).unwrap();
    let evaluation = kept.score(&noop, &plan).unwrap();
    assert_eq!(
        (evaluation.paired.delta, evaluation.from),
        (0.0, None),
        "{label}"
    );
    (kept.parts(), started)
}

#[test]
fn starting_late_gives_the_bits_of_starting_at_the_beginning() {
    let mut whole = Vec::new();
    for (name, case) in cases() {
        for state in STATES.iter().filter(|state| !state.refused.contains(&name)) {
            let (_, folder) = packaged(name, case, state).unwrap();
            let package = Arc::new(Package::load(folder.path(), false, &[]).unwrap());
            let label = format!("{name}, {}", state.title);
            let (parts, started) = prove(&package, &["engine.parts=6", "engine.threads=1"], &label);
            println!("{label}: {parts} parts, started {started:?}");
            if parts == 1 {
                whole.push(label);
            }
        }
    }
    assert_eq!(whole, [""; 0]);
}
