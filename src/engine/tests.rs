//! What no outside view can show: weights restored bit for bit after every kind of failure, and an
//! audit that notices a single wrong bit. On the real library, with the smallest model there is.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::candidate::{TensorUpdate, Update};
use crate::config::{Config, Layers};
use crate::engine::trial::build;
use crate::model::build::Recipe;
use crate::model::manifest::Objective;
use crate::protocol::job::Rule;

const PATCHES: usize = 100_000;

pub(super) struct Fixture {
    pub(super) engine: Engine,
    pub(super) plan: Plan,
    pub(super) dir: tempfile::TempDir,
}

pub(crate) fn configuration() -> Config {
    let set = [
        "engine.execution_provider=cpu".to_owned(),
        "engine.threads=1".to_owned(),
    ];
    Config::load(&Layers {
        set: &set,
        ..Layers::default()
    })
    .unwrap()
}

/// The package of the hazard model, and the folder it lies in.
pub(crate) fn hazard() -> (Arc<Package>, tempfile::TempDir) {
    let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/model/hazard");
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("package");
    build(&Recipe {
        exclude: Vec::new(),
        graph: model.join("graph.onnx"),
        weights: Some(model.join("checkpoint.safetensors")),
        shards: model.join("shards"),
        name: "hazard".into(),
        version: 1,
        out: out.clone(),
        objective: Objective::causal_lm(16),
    })
    .unwrap();
    (Arc::new(Package::load(&out, false, &[]).unwrap()), dir)
}

pub(super) fn fixture() -> Fixture {
    let (package, dir) = hazard();
    let config = configuration();
    let plan = Plan::new(&package.shards, None, "", package.cut()).unwrap();
    let engine = Engine::load(package, &config.engine, Arc::default()).unwrap();
    Fixture { engine, plan, dir }
}

pub(super) fn touch(tensor: usize, indices: Vec<u32>, values: Vec<f32>) -> TensorUpdate {
    TensorUpdate {
        tensor,
        indices,
        values,
    }
}

/// One to all tensors, one to all entries of each, values large and small.
fn random_update(engine: &Engine, random: &mut StdRng) -> Update {
    let mut update = Update::default();
    for (tensor, info) in engine.package.weights.tensors.iter().enumerate() {
        // The size of the hazardous node has tests of its own.
        if info.name == "size.weight" || random.random_bool(0.3) {
            continue;
        }
        let share = random.random_range(0.01..=1.0);
        let scale = 10_f32.powi(random.random_range(-30..=3));
        let touched: Vec<u32> = (0..u32::try_from(info.numel).unwrap())
            .filter(|_| random.random_bool(share))
            .collect();
        let values: Vec<f32> = touched
            .iter()
            .map(|_| random.random_range(-scale..=scale))
            .collect();
        if !touched.is_empty() {
            update.tensors.push(touch(tensor, touched, values));
        }
    }
    update
}

/// A plan of the same windows many times, and one large change of every value of the first tensors.
fn harmful(engine: &Engine, plan: &Plan, windows: usize) -> (Plan, Patches) {
    let all: Vec<Window> = plan.windows.iter().cycle().take(windows).cloned().collect();
    let update = random_update(engine, &mut StdRng::seed_from_u64(5));
    let large = update.tensors.into_iter().map(|tensor| TensorUpdate {
        values: tensor
            .indices
            .iter()
            .map(|at| if at % 2 == 0 { 9.0 } else { -9.0 })
            .collect(),
        ..tensor
    });
    let update = Update {
        tensors: large.collect(),
        ..Update::default()
    };
    let patches = Patches::new(&engine.package, update, Rule::ParamDiff).unwrap();
    (Plan::excerpt([9; 32], &all), patches)
}

#[test]
fn an_evaluation_ends_at_the_same_window_however_few_windows_memory_suffices_for() {
    let Fixture {
        mut engine,
        plan,
        dir: _kept,
    } = fixture();
    let (plan, patches) = harmful(&engine, &plan, 64);
    let early = Early {
        stop: Stop {
            alpha: 0.05,
            margin: 0.0,
            proven: false,
        },
        finish: false,
    };
    let usual = engine.batch_of(&plan);
    assert_eq!(usual, 8);
    let mut windows = |batch| {
        let evaluation = engine
            .evaluate(&patches, &plan, batch, Some(early))
            .unwrap();
        assert!(evaluation.stopped.is_some(), "{evaluation:?}");
        evaluation.windows
    };
    let expected = windows(usual);
    assert!(expected < 64);
    // Also where they do not come to an end with the micro-batches.
    for batch in [4, 3, 1] {
        assert_eq!(windows(batch), expected, "{batch}");
    }
    engine.compare_weights().unwrap();
}

#[test]
fn a_hundred_thousand_patches_with_faults_leave_no_bit_changed() {
    let Fixture {
        mut engine,
        plan,
        dir: _kept,
    } = fixture();
    engine.warm().unwrap();
    let size = engine.package.tensor("size.weight").unwrap().index;
    let mut random = StdRng::seed_from_u64(20_260_101);
    let mut outcomes: std::collections::BTreeMap<&str, usize> = std::collections::BTreeMap::new();
    for patch in 0..PATCHES {
        let mut update = random_update(&engine, &mut random);
        engine.obey(Terminator::default());
        match patch % 50 {
            // The time is up before the pass begins.
            7 => {
                let terminator = Terminator::default();
                terminator.terminate();
                engine.obey(terminator);
            }
            // A node in the middle of the pass asks for 400 terabytes.
            17 => update.tensors.push(touch(size, vec![0], vec![1e7])),
            // The pass fails in a node: a matrix with a negative side.
            27 => update.tensors.push(touch(size, vec![0], vec![-4.0])),
            // An index that no decoder would let through.
            37 => update.tensors.push(touch(size, vec![0, 9], vec![0.5; 2])),
            _ => {}
        }
        update.tensors.sort_by_key(|t| t.tensor);
        let outcome = match Patches::new(&engine.package, update, Rule::ParamDiff)
            .and_then(|patches| engine.score(&patches, &plan, None))
        {
            Ok(_) => "scored",
            Err(failure) => failure.code.as_str(),
        };
        *outcomes.entry(outcome).or_default() += 1;
        assert!(engine.is_sound());
        engine
            .compare_weights()
            .unwrap_or_else(|e| panic!("patch {patch} ({outcome}): {e}"));
    }
    for expected in [
        "scored",
        "score_timeout",
        "out_of_memory",
        "inference_failed",
        "candidate_non_finite",
    ] {
        assert!(outcomes.contains_key(expected), "{outcomes:?}");
    }
    engine.obey(Terminator::default());
    engine.audit().unwrap();
}

#[test]
fn out_of_memory_halves_the_micro_batch_of_one_job() {
    let Fixture {
        mut engine,
        plan,
        dir: _kept,
    } = fixture();
    let windows: Vec<Window> = plan.windows.iter().cycle().take(8).cloned().collect();
    let plan = Plan::excerpt([9; 32], &windows);
    let usual = engine.validate(&plan).unwrap();
    let fits = engine.batch_of(&plan) / 2;
    assert_eq!(fits, 4);
    let update = random_update(&engine, &mut StdRng::seed_from_u64(5));
    let patches = Patches::new(&engine.package, update, Rule::ParamDiff).unwrap();
    let mut tried = Vec::new();
    let halved = engine.while_memory_lasts(&plan, |engine, batch| {
        tried.push((batch, engine.session.is_compiled_at_all()));
        match batch > fits {
            true => Err(Failure::new(Code::OutOfMemory, "no memory")),
            false => engine.evaluate(&patches, &plan, batch, None),
        }
    });
    // What the first session reserved is given back before the next is made.
    assert_eq!(tried, [(engine.batch_of(&plan), true), (fits, false)]);
    let mut small = configuration().engine;
    small.micro_batch = fits;
    let package = Arc::clone(&engine.package);
    let mut small = Engine::load(package, &small, Arc::default()).unwrap();
    assert_eq!(
        halved.unwrap().paired,
        small.score(&patches, &plan, None).unwrap().paired
    );
    assert_eq!(engine.pass(&plan).unwrap(), *usual);
    engine.compare_weights().unwrap();
}

#[test]
fn equal_batches_fill_up_little() {
    let most = MicroBatch::Most(8);
    for (windows, batch) in [(1, 1), (5, 5), (8, 8), (9, 5), (17, 6), (64, 8)] {
        assert_eq!(most.of(windows), batch, "{windows} windows");
    }
    assert_eq!(MicroBatch::Fixed(3).of(17), 3);
    // What is filled up is at most an eighth, reached at 57 windows.
    for windows in 17..2_000_usize {
        let batch = most.of(windows);
        let filled = windows.next_multiple_of(batch) - windows;
        assert!(8 * filled <= windows, "{windows} windows");
        assert!(batch <= 8);
    }
}

#[test]
fn the_audit_notices_one_wrong_bit_and_a_changed_file() {
    let Fixture {
        mut engine, dir, ..
    } = fixture();
    engine.warm().unwrap();
    engine.audit().unwrap();

    let weights = &engine.package.weights;
    let right = weights.element(0, 3);
    let wrong = f32::from_bits(right.to_bits() ^ 1);
    let stray = [Patch::at(
        &engine.package,
        0,
        vec![3],
        vec![wrong],
        vec![right],
    )];
    engine.write(&stray).unwrap();
    let error = engine.audit().unwrap_err();
    assert_eq!(error.detail, Detail::RestoreMismatch);
    let name = &engine.package.weights.tensors[0].name;
    assert!(error.message.contains(name), "{error}");
    engine.restore(&stray).unwrap();
    engine.audit().unwrap();

    // Touched but equal is read again and found unchanged; other contents are named.
    let shard = dir.path().join("package/shards/shard_000001.safetensors");
    let contents = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &contents).unwrap();
    engine.audit().unwrap();
    std::fs::write(&shard, &contents[..contents.len() - 1]).unwrap();
    let error = engine.audit().unwrap_err();
    assert_eq!(error.detail, Detail::PackageChanged);
    assert!(error.message.contains("shard_000001"), "{error}");
}

/// The fixture's weights with one of them changed, in a file of their own.
fn moved(package: &Package, dir: &std::path::Path) -> Arc<Package> {
    let checkpoint = dir.join("package/weights.safetensors");
    let mut bytes = std::fs::read(checkpoint).unwrap();
    let (at, tensor) = {
        let views = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let (name, view) = views
            .tensors()
            .into_iter()
            .find(|(n, _)| n != "size.weight")
            .unwrap();
        (view.data().as_ptr().addr() - bytes.as_ptr().addr(), name)
    };
    assert!(package.tensor(&tensor).is_some());
    bytes[at..at + 4].copy_from_slice(&0.5_f32.to_le_bytes());
    let file = dir.join("moved.safetensors");
    std::fs::write(&file, bytes).unwrap();
    Arc::new(package.with_new_weights(2, file, None).unwrap().0)
}

#[test]
fn adopted_weights_give_the_losses_of_a_session_that_never_had_others() {
    let Fixture {
        mut engine,
        plan,
        dir,
    } = fixture();
    engine.warm().unwrap();
    let first = engine.validate(&plan).unwrap();
    let (old, new) = (
        Arc::clone(&engine.package),
        moved(&engine.package, dir.path()),
    );
    assert_ne!(old.weights.weights_id, new.weights.weights_id);
    assert_eq!(new.manifest.version, 2);
    engine.adopt(Arc::clone(&new)).unwrap();
    engine.warm().unwrap();
    let adopted = engine.validate(&plan).unwrap();
    let config = EngineConfig::clone(&configuration().engine);
    let mut fresh = Engine::load(new, &config, Arc::default()).unwrap();
    assert_eq!(adopted, fresh.validate(&plan).unwrap());
    assert_ne!(adopted, first);
    engine.audit().unwrap();
    engine.adopt(old).unwrap();
    engine.warm().unwrap();
    assert_eq!(engine.validate(&plan).unwrap(), first);
}

#[tokio::test]
async fn nothing_is_computed_on_other_weights_than_the_caller_has() {
    let Fixture { engine, plan, dir } = fixture();
    let (old, new) = (
        Arc::clone(&engine.package),
        moved(&engine.package, dir.path()),
    );
    drop(engine);
    let read = move || Ok(old);
    let config = configuration();
    let before = thread::EngineHandle::start(read, &config, Arc::default());
    let before = before.await.unwrap();
    let after = before.turn().await.adopt(new).await.unwrap();
    let plan = Arc::new(plan);
    let limit = std::time::Duration::from_secs(60);
    let stale = before.turn().await.validate(Arc::clone(&plan), limit).await;
    assert_eq!(stale.unwrap_err().code, Code::InferenceFailed);
    assert!(after.turn().await.validate(plan, limit).await.is_ok());
    assert_eq!(after.loss(), None);
}

#[test]
fn no_plan_has_larger_batches_than_the_warm_up_tries() {
    for micro_batch in [
        MicroBatch::Most(8),
        MicroBatch::Most(1),
        MicroBatch::Fixed(4),
    ] {
        for windows in 1..40 {
            let sizes = (1..=windows).map(|length| micro_batch.of(length));
            assert_eq!(sizes.max(), Some(micro_batch.largest(windows)), "{windows}");
        }
    }
}
