//! What a graph cut into parts computes: whatever a candidate touches, the bits are those of a run from the
//! start.

use std::collections::BTreeMap;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use scorer::candidate::{TensorUpdate, Update};
use scorer::engine::Engine;
use scorer::engine::patch::Patches;
use scorer::engine::session::Terminator;
use scorer::engine::trial::build;
use scorer::model::package::Package;
use scorer::model::plan::Plan;
use scorer::protocol::failure::Code;
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
            [&mut kept, &mut afresh].map(|engine| engine.score(&patches, &plan, None).unwrap());
        assert_eq!(one.paired, other.paired, "{label}: {touched:?}");
        *started.entry(one.from.unwrap()).or_default() += 1;
    }
    let noop = Patches::new(package, Update::default(), Rule::ParamDiff).unwrap();
    let evaluation = kept.score(&noop, &plan, None).unwrap();
    assert_eq!(
        (evaluation.paired.delta, evaluation.from),
        (0.0, None),
        "{label}"
    );
    (kept.parts(), started)
}

/// Sees that a package is cut, and that its candidates do not start at the beginning alone.
fn prove_cut(folder: &Path, label: &str) {
    let package = Arc::new(Package::load(folder, false, &[]).unwrap());
    let (parts, started) = prove(&package, &["engine.parts=6", "engine.threads=1"], label);
    assert!(
        parts > 1 && started.len() > 1,
        "{label}: {parts} parts, started at {started:?}"
    );
}

#[test]
fn starting_late_gives_the_bits_of_starting_at_the_beginning() {
    for (name, case) in cases() {
        for state in STATES.iter().filter(|state| !state.refused.contains(&name)) {
            let (_, folder) = packaged(name, case, state).unwrap();
            prove_cut(folder.path(), &format!("{name}, {}", state.title));
        }
    }
}

#[test]
fn so_do_the_other_models() {
    for (folder, graph, weights) in [
        ("", "graph-named.onnx", "checkpoint.safetensors"),
        ("", "graph-folded.onnx", "checkpoint.safetensors"),
        ("", "graph-two-places.onnx", "checkpoint.safetensors"),
        ("half", "graph-f16.onnx", "checkpoint-f16.safetensors"),
        ("half", "graph-bf16.onnx", "checkpoint-bf16.safetensors"),
        ("inputs", "graph.onnx", "checkpoint.safetensors"),
        ("digits", "graph.onnx", "checkpoint.safetensors"),
    ] {
        let objective = match folder {
            "" => Objective::causal_lm(128),
            "digits" => Objective::GraphLoss {},
            _ => Objective::causal_lm(16),
        };
        let (dir, out) = (model_dir().join(folder), tempfile::tempdir().unwrap());
        build(&recipe(&dir, graph, weights, objective, out.path())).unwrap();
        prove_cut(out.path(), &format!("{folder} {graph}"));
    }
}

/// The test model in parts, whose candidates start at all of them.
fn cut() -> (Arc<Package>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("package");
    let objective = Objective::causal_lm(128);
    build(&recipe(
        &model_dir(),
        "graph-named.onnx",
        "checkpoint.safetensors",
        objective,
        &out,
    ))
    .unwrap();
    (Arc::new(Package::load(&out, false, &[]).unwrap()), dir)
}

/// What befalls a run.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// It is ended after this share of the time it takes.
    Ended(f64),
    /// Values become infinite where the candidate touches the model.
    Overflow,
}

#[test]
fn a_fault_in_any_part_leaves_weights_and_what_is_kept_as_they_were() {
    let (package, _dir) = cut();
    let config = config(&["engine.parts=6"]).engine;
    let mut engine = Engine::load(Arc::clone(&package), &config, Arc::default()).unwrap();
    let plan = Plan::new(&package.shards, None, "", package.cut()).unwrap();
    let (parts, all) = (engine.parts_of_tensors(), trainable(&package));
    let mut random = StdRng::seed_from_u64(13);
    let of = |part: usize| -> Vec<usize> {
        let all = all.iter().copied();
        all.filter(|tensor| parts[*tensor] == Some(part)).collect()
    };
    let known: Vec<Patches> = (0..engine.parts())
        .map(|part| {
            Patches::new(
                &package,
                update(&package, &of(part), &mut random),
                Rule::ParamDiff,
            )
        })
        .collect::<Result<_, _>>()
        .unwrap();
    let score = |engine: &mut Engine, patches: &Patches| engine.score(patches, &plan, None);
    let right: Vec<_> = known
        .iter()
        .map(|p| score(&mut engine, p).unwrap().paired)
        .collect();
    let began = std::time::Instant::now();
    score(&mut engine, &known[0]).unwrap();
    let pass = began.elapsed();
    let shares = [0.0, 0.2, 0.4, 0.6, 0.8];
    let faults = shares
        .map(Fault::Ended)
        .into_iter()
        .chain([Fault::Overflow]);
    let (mut ended, mut overflown) = (0, 0);
    for (fault, part) in faults.flat_map(|fault| (0..known.len()).map(move |part| (fault, part))) {
        let outcome = match fault {
            Fault::Ended(share) => {
                let terminator = Terminator::default();
                engine.obey(terminator.clone());
                let ending = std::thread::spawn(move || {
                    std::thread::sleep(pass.mul_f64(share));
                    terminator.terminate();
                });
                if share == 0.0 {
                    while !ending.is_finished() {
                        std::thread::yield_now();
                    }
                }
                let outcome = score(&mut engine, &known[part]);
                ending.join().unwrap();
                outcome
            }
            Fault::Overflow => {
                let mut huge = update(&package, &of(part), &mut random);
                let values = huge.tensors.iter_mut().flat_map(|t| &mut t.values);
                values.for_each(|value| *value = 3e38);
                let huge = Patches::new(&package, huge, Rule::ParamDiff).unwrap();
                score(&mut engine, &huge)
            }
        };
        engine.obey(Terminator::default());
        match outcome {
            Err(failure) if failure.code == Code::ScoreTimeout => ended += 1,
            Err(failure) if failure.code == Code::NonFiniteLoss => overflown += 1,
            Err(failure) => panic!("{fault:?} in {part}: {failure}"),
            // It was done before its end.
            Ok(_) => {}
        }
        engine.compare_weights().unwrap();
        for (patches, right) in known.iter().zip(&right) {
            assert_eq!(
                score(&mut engine, patches).unwrap().paired,
                *right,
                "{fault:?} in {part}"
            );
        }
    }
    assert!(
        ended >= known.len() && overflown > 0,
        "{ended} ended, {overflown} overflown"
    );
    engine.warm().unwrap();
    engine.audit().unwrap();
}
