//! Sound models of which tensors have no effect are served, and what is placed or written wrongly is
//! not. On the real library, with models made by hand: `tests/model/inert`.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::super::tests::configuration;
use super::super::{Evaluation, Patches, Warm};
use super::*;
use crate::candidate::{TensorUpdate, Update};
use crate::engine::trial::build;
use crate::model::build::Recipe;
use crate::model::manifest::Objective;
use crate::model::package::MANIFEST;
use crate::model::tensor::Dtype;
use crate::protocol::job::Rule;

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/model/inert")
}

/// A package of one of the models, its manifest bent.
fn bent(name: &str, bend: impl FnOnce(&mut Value)) -> Engine {
    try_bent(name, bend).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn try_bent(name: &str, bend: impl FnOnce(&mut Value)) -> Result<Engine, EngineError> {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("package");
    build(&Recipe {
        exclude: Vec::new(),
        graph: models().join(format!("{name}.onnx")),
        weights: Some(models().join(format!("{name}.safetensors"))),
        shards: models().join("shards"),
        name: name.into(),
        version: 1,
        out: out.clone(),
        objective: Objective::GraphLoss {},
    })
    .unwrap();
    let manifest = out.join(MANIFEST);
    let mut said: Value = serde_json::from_slice(&std::fs::read(&manifest).unwrap()).unwrap();
    bend(&mut said);
    std::fs::write(&manifest, said.to_string()).unwrap();
    let package = Arc::new(Package::load(&out, false, &[]).unwrap());
    // What is loaded is mapped: the folder may go.
    Engine::load(package, &configuration().engine, Arc::default())
}

fn engine(name: &str) -> Engine {
    bent(name, |_| {})
}

fn warm(name: &str) -> Warm {
    let mut engine = engine(name);
    let warm = engine.warm().unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(engine.is_sound(), "{name}");
    engine.compare_weights().unwrap();
    assert_eq!(engine.progress.warming(), None, "{name}");
    warm
}

#[test]
fn what_has_an_effect_on_other_windows_or_beside_other_weights_is_not_inert() {
    // The second expert is reached by the second window; a zero beside the adapter, or before the
    // branch, is random for once; and `margin` allows of small random values only.
    for (model, inert) in [
        ("adapter", [].as_slice()),
        ("gate", &[]),
        ("steep", &[]),
        ("normalised", &["bias"]),
        ("experts", &["experts.2.weight"]),
    ] {
        assert_eq!(warm(model).inert, inert, "{model}");
    }
}

#[test]
fn the_same_weights_are_found_inert_every_time() {
    let mut engine = engine("experts");
    let first = engine.warm().unwrap();
    let again = engine.warm().unwrap();
    assert_eq!(first.inert, again.inert);
    assert_eq!(first.baseline_loss.to_bits(), again.baseline_loss.to_bits());
}

/// The same step for all entries of the tensors named.
fn score(engine: &mut Engine, names: &[&str]) -> (u64, Evaluation) {
    let package = Arc::clone(&engine.package);
    let mut update = Update::default();
    for name in names {
        let tensor = package.tensor(name).unwrap();
        let numel = u32::try_from(tensor.numel).unwrap();
        update.tensors.push(TensorUpdate {
            tensor: tensor.index,
            indices: (0..numel).collect(),
            values: vec![0.125; tensor.numel],
        });
    }
    let patches = Patches::new(&package, update, Rule::ParamDiff).unwrap();
    let plan = Plan::new(&package.shards, None, "", package.cut()).unwrap();
    let evaluation = engine.score(&patches, &plan, None).unwrap();
    (patches.effective_entries, evaluation)
}

#[test]
fn a_whole_update_with_an_inert_tensor_scores_and_its_entries_count() {
    let mut engine = engine("normalised");
    engine.warm().unwrap();
    let (entries, alone) = score(&mut engine, &["bias"]);
    assert_eq!((entries, alone.paired.delta.to_bits()), (4, 0));
    let (entries, whole) = score(&mut engine, &["bias", "head.weight"]);
    assert_eq!(entries, 20);
    let (_, head) = score(&mut engine, &["head.weight"]);
    assert_ne!(whole.paired.delta, 0.0);
    assert_eq!(whole.paired.delta.to_bits(), head.paired.delta.to_bits());
}

/// In `copies` the loss reads `copy` and `folded`; `weight` and `spare` lead to another output.
#[test]
fn a_place_from_which_no_way_leads_to_the_loss_is_wrong() {
    let place = |name: &str, transposed| json!({"initializer": name, "transposed": transposed});
    for (fault, places, named) in [
        ("a stale copy", vec![place("weight", false)], "weight"),
        ("a folded transpose", vec![place("spare", true)], "spare"),
        (
            "a second place that is missing",
            vec![place("copy", false), place("weight", false)],
            "weight",
        ),
        (
            "a first place that is missing",
            vec![place("spare", false), place("folded", true)],
            "spare",
        ),
    ] {
        let places = json!(places);
        let bent = try_bent("copies", |said| {
            said["tensors"]["weight"]["places"] = places
        });
        let error = bent.err().unwrap();
        assert_eq!(error.detail, Detail::ModelLoadFailed, "{fault}");
        let expected = format!("tensors.weight: {named} is read by nothing that loss depends on");
        assert!(error.message.contains(&expected), "{fault}: {error}");
    }
    let right = json!([place("copy", false), place("folded", true)]);
    let mut engine = bent("copies", |said| said["tensors"]["weight"]["places"] = right);
    assert_eq!(engine.warm().unwrap().inert, [] as [&str; 0]);
}

/// The weights in memory of its own, as on a device, written by the graph that `scatter` makes of
/// the usual one.
fn on_a_device(name: &str, scatter: impl Fn(&[u8]) -> Vec<u8>) -> Engine {
    let mut engine = engine(name);
    let (config, dtypes) = (configuration().engine, [Dtype::F32]);
    engine.session.stand_in(&config, &dtypes, scatter).unwrap();
    let package = Arc::clone(&engine.package);
    engine.adopt(package).unwrap();
    engine
}

#[test]
fn entries_that_a_device_drops_are_missed_though_the_loss_moves() {
    let sound = on_a_device("adapter", <[u8]>::to_vec).warm().unwrap();
    assert_eq!(
        sound,
        Warm {
            pass: sound.pass,
            ..warm("adapter")
        }
    );

    // Beyond the twelfth entry of a tensor nothing arrives: of the adapter's that is `base.weight`.
    let dropping = std::fs::read(models().join("dropping-scatter.onnx")).unwrap();
    let usual = crate::model::onnx::scatter_graph(Dtype::F32);
    let faulty = |graph: &[u8]| {
        let scatters = graph == usual;
        if scatters {
            dropping.clone()
        } else {
            graph.to_vec()
        }
    };
    let mut engine = on_a_device("adapter", faulty);
    let error = engine.warm().unwrap_err();
    assert_eq!(error.detail, Detail::WarmFailed);
    for part in ["base.weight", "drops entries"] {
        assert!(error.message.contains(part), "{error}");
    }
    // It wrote nothing there, and so left nothing there.
    engine.compare_weights().unwrap();
}

#[test]
fn a_place_holds_a_matrix_as_it_is_or_column_by_column() {
    let of = |shape: &[usize]| TensorInfo {
        name: "w".into(),
        shape: shape.to_vec(),
        dtype: Dtype::F32,
        numel: shape.iter().product(),
    };
    let values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    let order =
        |shape: &[usize], transposed| in_graph_order(&of(shape), &values, transposed).to_vec();
    assert_eq!(order(&[2, 3], true), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    assert_eq!(order(&[2, 3], false), values);
    assert_eq!(order(&[6], true), values);
    assert!(in_graph_order(&of(&[0, 3]), &[], true).is_empty());
}

#[test]
fn windows_are_taken_in_growing_numbers_and_none_is_left_out() {
    let windows: Vec<u8> = (0..21).collect();
    let taken: Vec<usize> = growing(&windows).map(<[u8]>::len).collect();
    assert_eq!(taken, [1, 1, 2, 4, 8, 5]);
    let all: Vec<u8> = growing(&windows).flatten().copied().collect();
    assert_eq!(all, windows);
    assert_eq!(growing::<u8>(&[]).count(), 0);
}

/// A step that is the same for two classes moves nothing: the softmax takes it away.
#[test]
fn no_two_of_the_first_entries_are_moved_alike() {
    let mut steps: Vec<f32> = (0..100_000).map(irregular).collect();
    assert!(steps.iter().all(|s| (0.5..=1.5).contains(&s.abs())));
    let up = steps.iter().filter(|s| **s > 0.0).count();
    assert!((40_000..60_000).contains(&up), "{up}");
    steps.sort_by(f32::total_cmp);
    assert!(steps.windows(2).all(|pair| pair[0] != pair[1]));
}

#[test]
fn what_is_scattered_keeps_its_sign_and_moves_far_enough() {
    let mut random = StdRng::seed_from_u64(1);
    let mut signs = [false; 2];
    for value in [0.0_f32, 1.0, -1.0, 1e-5, -300.0].repeat(50) {
        let moved = scatter(value, 0.1, &mut random);
        let distance = (moved - value).abs();
        assert!((0.049..=0.101).contains(&distance), "{value} -> {moved}");
        if value == 0.0 {
            signs[usize::from(moved > 0.0)] = true;
        } else {
            assert_eq!(moved.signum(), value.signum());
        }
    }
    assert_eq!(signs, [true, true]);
}

#[test]
fn of_many_inert_tensors_some_are_named() {
    let of = |count: usize| Warm {
        inert: (0..count).map(|n| format!("t{n}")).collect(),
        ..warm("adapter")
    };
    let warm = of(34);
    assert_eq!((warm.named_inert().len(), warm.inert.len()), (32, 34));
    let words = warm.inert_in_words().unwrap();
    assert!(words.ends_with("t30, t31 and 2 more"), "{words}");
    assert!(of(1).inert_in_words().unwrap().ends_with("of t0"));
    assert_eq!(of(0).inert_in_words(), None);
}
