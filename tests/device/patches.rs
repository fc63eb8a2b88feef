//! Weights on the device after every kind of failure.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use scorer::candidate::{TensorUpdate, Update};
use scorer::config::Config;
use scorer::engine::Engine;
use scorer::engine::patch::Patches;
use scorer::engine::session::Terminator;
use scorer::engine::trial::build;
use scorer::model::build::Recipe;
use scorer::model::manifest::Objective;
use scorer::model::package::Package;
use scorer::model::plan::Plan;
use scorer::protocol::failure::{Code, Failure};
use scorer::protocol::job::Rule;
use scorer::protocol::state::Detail;
use scorer::telemetry::progress::Progress;
use testkit::package::fixtures;
use testkit::table::TOLERANCE;
use testkit::wait::SOON;

use crate::{config, config_of};

/// Each fault a dozen times.
const PATCHES: usize = 72;

/// An engine on a package of one of the test models, and the plan of all its windows.
struct Fixture {
    engine: Engine,
    plan: Plan,
    progress: Arc<Progress>,
    dir: tempfile::TempDir,
}

impl Fixture {
    fn baselines(&self) -> u64 {
        self.progress.baselines.load(Ordering::Relaxed)
    }
}

fn package(model: &Path, graph: &str, window: usize, out: &Path) -> Arc<Package> {
    build(&Recipe {
        exclude: Vec::new(),
        graph: model.join(graph),
        weights: Some(model.join("checkpoint.safetensors")),
        shards: model.join("shards"),
        name: "model".into(),
        version: 1,
        out: out.to_owned(),
        objective: Objective::causal_lm(window),
    })
    .unwrap();
    Arc::new(Package::load(out, false, &[]).unwrap())
}

fn load(package: Arc<Package>, set: &[&str], dir: tempfile::TempDir) -> Fixture {
    let progress = Arc::new(Progress::default());
    let plan = Plan::new(&package.shards, None, "", package.cut()).unwrap();
    let engine = Engine::load(package, &config(set).engine, Arc::clone(&progress)).unwrap();
    Fixture {
        engine,
        plan,
        progress,
        dir,
    }
}

/// Of the model whose `size.weight` says how much its large node computes: see `tests/model/README.md`.
fn hazard() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let package = package(
        &fixtures().join("hazard"),
        "graph.onnx",
        16,
        &dir.path().join("package"),
    );
    load(package, &[], dir)
}

fn touch(engine: &Engine, tensor: &str, indices: Vec<u32>, values: Vec<f32>) -> TensorUpdate {
    let tensor = engine.package.tensor(tensor).unwrap().index;
    TensorUpdate {
        tensor,
        indices,
        values,
    }
}

/// Up to all entries of each tensor but the hazardous one.
fn random_update(engine: &Engine, random: &mut StdRng) -> Update {
    let mut update = Update::default();
    for info in &engine.package.weights.tensors {
        let share = random.random_range(0.01..=1.0);
        let scale = 10_f32.powi(random.random_range(-30..=3));
        let all = 0..u32::try_from(info.numel).unwrap();
        let indices: Vec<u32> = all.filter(|_| random.random_bool(share)).collect();
        if info.name == "size.weight" || indices.is_empty() {
            continue;
        }
        let values = indices.iter().map(|_| random.random_range(-scale..=scale));
        let values = values.collect();
        update
            .tensors
            .push(touch(engine, &info.name, indices, values));
    }
    update
}

fn score(fixture: &mut Fixture, mut update: Update) -> Result<u64, Failure> {
    update.tensors.sort_by_key(|t| t.tensor);
    let package = Arc::clone(&fixture.engine.package);
    let patches = Patches::new(&package, update, Rule::ParamDiff)?;
    let evaluation = fixture.engine.score(&patches, &fixture.plan, None)?;
    Ok(evaluation.paired.loss_after.to_bits())
}

/// What befalls a patch.
#[derive(Debug, Clone, Copy)]
enum Fault {
    None,
    /// The time is up before the pass begins.
    NoTime,
    /// A node in the middle of the pass asks for 400 terabytes.
    NoMemory,
    /// The same with 40 gigabytes, which no buffer of the device may have.
    NoBuffer,
    /// The pass fails in a node: a matrix with a negative side.
    NoShape,
    /// An index that no decoder would let through.
    NoIndex,
}

const FAULTS: [Fault; 6] = [
    Fault::None,
    Fault::NoTime,
    Fault::NoMemory,
    Fault::NoBuffer,
    Fault::NoShape,
    Fault::NoIndex,
];

impl Fault {
    /// The change of `size.weight` that causes it, if it is caused by one.
    fn cause(self) -> Option<(Vec<u32>, Vec<f32>)> {
        match self {
            Self::None => None,
            // Of a candidate that changes nothing there is no pass to end.
            Self::NoTime => Some((vec![0], vec![1.0])),
            Self::NoMemory => Some((vec![0], vec![1e7])),
            Self::NoBuffer => Some((vec![0], vec![1e5])),
            Self::NoShape => Some((vec![0], vec![-4.0])),
            Self::NoIndex => Some((vec![0, 9], vec![0.5; 2])),
        }
    }

    fn outcome(self) -> &'static str {
        match self {
            Self::None => "scored",
            Self::NoTime => "score_timeout",
            Self::NoMemory | Self::NoBuffer => "out_of_memory",
            Self::NoShape => "inference_failed",
            Self::NoIndex => "candidate_non_finite",
        }
    }
}

#[test]
fn random_patches_with_faults_leave_no_bit_changed() {
    let mut fixture = hazard();
    fixture.engine.warm().unwrap();
    let mut random = StdRng::seed_from_u64(20_261_129);
    let known = random_update(&fixture.engine, &mut random);
    let bits = score(&mut fixture, known.clone()).unwrap();
    for (patch, fault) in FAULTS.into_iter().cycle().take(PATCHES).enumerate() {
        let mut update = random_update(&fixture.engine, &mut random);
        let cause = fault.cause();
        update.tensors.extend(
            cause.map(|(indices, values)| touch(&fixture.engine, "size.weight", indices, values)),
        );
        let terminator = Terminator::default();
        if matches!(fault, Fault::NoTime) {
            terminator.terminate();
        }
        fixture.engine.obey(terminator);
        let outcome = score(&mut fixture, update);
        let code = outcome.map_or_else(|failure| failure.code.as_str(), |_| "scored");
        assert_eq!(code, fault.outcome(), "patch {patch}");
        let engine = &mut fixture.engine;
        assert!(engine.is_sound(), "patch {patch}, {fault:?}");
        let same = engine.compare_weights();
        same.unwrap_or_else(|e| panic!("patch {patch}, {fault:?}: {e}"));
        engine.obey(Terminator::default());
        let again = score(&mut fixture, known.clone()).unwrap();
        assert_eq!(again, bits, "after patch {patch}, {fault:?}");
    }
    fixture.engine.audit().unwrap();
}

/// The two windows share a micro-batch; each size has a baseline of its own.
#[test]
fn out_of_memory_halves_the_micro_batch_for_one_job() {
    let mut fixture = hazard();
    let mut random = StdRng::seed_from_u64(7);
    let known = random_update(&fixture.engine, &mut random);
    let bits = score(&mut fixture, known.clone()).unwrap();
    assert_eq!(fixture.baselines(), 1);
    let mut greedy = known.clone();
    greedy
        .tensors
        .push(touch(&fixture.engine, "size.weight", vec![0], vec![1e7]));
    let failed = score(&mut fixture, greedy).unwrap_err();
    assert_eq!(failed.code, Code::OutOfMemory, "{failed}");
    assert_eq!(fixture.baselines(), 2, "of one window at a time, too");
    assert_eq!(score(&mut fixture, known).unwrap(), bits);
}

#[test]
fn a_pass_that_is_ended_midway_leaves_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("package");
    let package = package(&fixtures(), "graph-named.onnx", 128, &out);
    // One at a time, so that most of the pass is still to come when its first window is done.
    let mut fixture = load(package, &["engine.micro_batch=1", "engine.parts=4"], dir);
    let known = random_update(&fixture.engine, &mut StdRng::seed_from_u64(3));
    let bits = score(&mut fixture, known.clone()).unwrap();
    let terminator = Terminator::default();
    fixture.engine.obey(terminator.clone());
    let progress = Arc::clone(&fixture.progress);
    let steps = move || progress.counter.load(Ordering::Relaxed);
    let before = steps();
    let after = steps.clone();
    let ended = std::thread::spawn(move || {
        let late = Instant::now() + SOON;
        while steps() == before && Instant::now() < late {
            std::thread::yield_now();
        }
        terminator.terminate();
    });
    let failed = score(&mut fixture, known.clone()).unwrap_err();
    ended.join().unwrap();
    assert_eq!(failed.code, Code::ScoreTimeout, "{failed}");
    let windows = u64::try_from(fixture.plan.windows.len()).unwrap();
    assert!((1..windows).contains(&(after() - before)), "midway");
    fixture.engine.compare_weights().unwrap();
    fixture.engine.obey(Terminator::default());
    assert_eq!(score(&mut fixture, known).unwrap(), bits);
}

#[test]
fn starting_late_gives_the_bits_of_starting_at_the_beginning() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("package");
    let package = package(&fixtures(), "graph-folded.onnx", 128, &out);
    let set = ["engine.parts=6", "engine.activation_cache=0"];
    let mut afresh = load(Arc::clone(&package), &set, tempfile::tempdir().unwrap());
    let mut kept = load(package, &set[..1], dir);
    let mut random = StdRng::seed_from_u64(11);
    let mut started = BTreeSet::new();
    for part in kept.engine.parts_of_tensors().into_iter().flatten() {
        if !started.insert(part) {
            continue;
        }
        let mut update = random_update(&kept.engine, &mut random);
        let parts = kept.engine.parts_of_tensors();
        update
            .tensors
            .retain(|touched| parts[touched.tensor] >= Some(part));
        let whole = score(&mut afresh, update.clone()).unwrap();
        assert_eq!(score(&mut kept, update).unwrap(), whole, "from {part}");
    }
    assert_eq!(started.len(), kept.engine.parts());
    assert!(kept.engine.activation_bytes() > 0);
}

#[test]
fn adopted_weights_give_the_bits_of_a_session_that_never_had_others() {
    let mut fixture = hazard();
    let first = fixture.engine.validate(&fixture.plan).unwrap();
    let old = Arc::clone(&fixture.engine.package);
    let new = moved(&old, fixture.dir.path());
    fixture.engine.adopt(Arc::clone(&new)).unwrap();
    let adopted = fixture.engine.validate(&fixture.plan).unwrap();
    let mut fresh = load(new, &[], tempfile::tempdir().unwrap());
    assert_eq!(adopted, fresh.engine.validate(&fresh.plan).unwrap());
    assert_ne!(adopted, first);
    fixture.engine.adopt(old).unwrap();
    assert_eq!(fixture.engine.validate(&fixture.plan).unwrap(), first);
}

/// The package with the first weight of its embedding changed.
fn moved(package: &Package, dir: &Path) -> Arc<Package> {
    let mut bytes = std::fs::read(dir.join("package/weights.safetensors")).unwrap();
    let embedding = {
        let views = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let view = views.tensor("embed.weight").unwrap();
        view.data().as_ptr().addr() - bytes.as_ptr().addr()
    };
    bytes[embedding..embedding + 4].copy_from_slice(&0.5_f32.to_le_bytes());
    let file = dir.join("moved.safetensors");
    std::fs::write(&file, bytes).unwrap();
    Arc::new(package.with_new_weights(2, file, None).unwrap().0)
}

/// The device drops what an operator makes beyond its largest buffer, without an error, and each window alone fits.
#[test]
fn a_batch_of_which_the_device_drops_the_end_is_refused() {
    let dir = wide(16, &fixtures().join("elsewhere/shards"));
    let load = |config: &Config| loaded(dir.path(), config);
    let error = load(&config(&[])).warm().unwrap_err();
    assert_eq!(error.detail, Detail::WarmFailed, "{error}");
    assert!(
        error.message.contains("lower engine.micro_batch"),
        "{error}"
    );
    let losses = |config: &Config| {
        let mut engine = load(config);
        let package = Arc::clone(&engine.package);
        let plan = Plan::new(&package.shards, None, "", package.cut());
        engine.pass(&plan.unwrap()).unwrap()
    };
    let small = losses(&config(&["engine.micro_batch=2"]));
    let host = losses(&config_of(&["engine.execution_provider=cpu"]));
    for (one, other) in small.iter().zip(&host) {
        assert!((one - other).abs() < TOLERANCE, "{small:?} {host:?}");
    }
}

/// The same of a single window: its loss is wrong, and equally wrong in every run and every place.
#[test]
fn a_window_of_which_the_device_drops_the_end_is_refused() {
    let shards = tempfile::tempdir().unwrap();
    let tokens: Vec<u8> = (0..66_i32).flat_map(|n| (n % 7).to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::I32, vec![1, 66], &tokens);
    let shard = safetensors::serialize([("tokens", view.unwrap())], None);
    std::fs::write(shards.path().join("shard_1.safetensors"), shard.unwrap()).unwrap();
    let dir = wide(65, shards.path());
    let error = loaded(dir.path(), &config(&[])).warm().unwrap_err();
    assert_eq!(error.detail, Detail::WarmFailed, "{error}");
    assert!(error.message.contains("on the CPU and"), "{error}");
}

/// A package of the graph whose layer makes far more than it is given.
fn wide(window: usize, shards: &Path) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    build(&Recipe {
        exclude: Vec::new(),
        graph: fixtures().join("elsewhere/wide.onnx"),
        weights: None,
        shards: shards.to_owned(),
        name: "wide".into(),
        version: 1,
        out: dir.path().to_owned(),
        objective: Objective::causal_lm(window),
    })
    .unwrap();
    dir
}

fn loaded(dir: &Path, config: &Config) -> Engine {
    let package = Arc::new(Package::load(dir, false, &[]).unwrap());
    Engine::load(package, &config.engine, Arc::default()).unwrap()
}
