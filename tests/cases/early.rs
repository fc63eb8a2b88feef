//! Evaluations that may end early, on the test model: which do, what their results say, and that everything else is
//! as without being asked.

use scorer::engine::Engine;
use scorer::model::package::Package;
use scorer::model::plan::Plan;

use super::*;

/// A package with enough windows: its 17 rows give eight each.
const WINDOWS: u64 = 17 * 8;

fn package() -> (tempfile::TempDir, std::path::PathBuf) {
    let out = tempfile::tempdir().unwrap();
    let dir = out.path().join("package");
    let objective = Objective::CausalLm {
        window: 128,
        windows_per_row: 8,
        label_shift: 1,
        ignore_index: -100,
    };
    let (graph, weights) = ("graph-named.onnx", "checkpoint.safetensors");
    scorer::engine::trial::build(&recipe(&model_dir(), graph, weights, objective, &dir)).unwrap();
    (out, dir)
}

fn case(name: &str) -> Value {
    let table = table(&model_dir());
    let mut cases = table["cases"].as_array().unwrap().iter();
    cases.find(|case| case["name"] == name).unwrap().clone()
}

/// The job of a case, with this `stop`.
fn stopping(name: &str, stop: Value) -> Vec<u8> {
    let mut job = job(&model_dir(), &case(name));
    job["model_version"] = json!(1);
    job["validation"] = json!({"nonce": "early", "stop": stop});
    serde_json::to_vec(&job).unwrap()
}

/// Without what differs from run to run.
fn lasting(mut result: Value) -> Value {
    for field in ["timings_ms", "scored_at_ms"] {
        result.as_object_mut().unwrap().remove(field);
    }
    result
}

const HARMFUL: [&str; 3] = ["noise-large", "noise-list", "inverted-gradient-302"];
const NOT_HARMFUL: [&str; 4] = [
    "difference-more-steps",
    "gradient-large-rate",
    "noise-small",
    "zero-effect",
];

#[tokio::test]
async fn only_what_is_harmful_ends_early_and_nothing_else_changes() {
    let (_kept, dir) = package();
    let pipeline = pipeline(&dir).await;
    for name in NOT_HARMFUL {
        let stop = json!({"alpha": 0.05});
        let asked = lasting(judge(&pipeline, &stopping(name, stop)).await);
        let whole = lasting(judge(&pipeline, &stopping(name, Value::Null)).await);
        assert_eq!(asked, whole, "{name}");
        assert_eq!(asked["windows"], json!(WINDOWS), "{name}");
    }
    for name in HARMFUL {
        let whole = judge(&pipeline, &stopping(name, Value::Null)).await;
        assert_eq!(whole["windows"], json!(WINDOWS), "{name}");
        for (alpha, least) in [(0.05, 32), (0.01, 56)] {
            let stop = json!({"alpha": alpha});
            let result = judge(&pipeline, &stopping(name, stop)).await;
            check_stopped(name, &result, alpha, least);
            let upper = result["stopped"]["upper"].as_f64().unwrap();
            assert!(whole["delta"].as_f64().unwrap() < upper, "{name}: {result}");
        }
    }
}

fn check_stopped(name: &str, result: &Value, alpha: f64, least: u64) {
    let number = |field: &str| result[field].as_f64().unwrap();
    assert_eq!(result["status"], "scored", "{name}: {result}");
    assert_eq!(number("score").to_bits(), 0.0_f64.to_bits(), "{name}");
    assert_eq!(
        [&result["stderr"], &result["ci95"]],
        [&Value::Null; 2],
        "{name}"
    );
    let windows = result["windows"].as_u64().unwrap();
    assert!((least..WINDOWS).contains(&windows), "{name}: {windows}");
    assert_eq!(windows % 8, 0, "{name}: whole micro-batches");
    assert_eq!(result["tokens"], json!(windows * 128), "{name}");
    let delta = number("loss_before") - number("loss_after");
    assert!((number("delta") - delta).abs() < 1e-12, "{name}: {result}");
    let stopped = &result["stopped"];
    assert_eq!(stopped["decision"], "worse", "{name}");
    assert_eq!(stopped["of"], json!(WINDOWS), "{name}");
    let asked = [&stopped["alpha"], &stopped["margin"], &stopped["proven"]];
    assert_eq!(asked, [&json!(alpha), &json!(0.0), &json!(false)], "{name}");
    let upper = stopped["upper"].as_f64().unwrap();
    assert!(number("delta") < upper && upper <= 0.0, "{name}: {result}");
}

/// Workers that run the graph in other parts, keep less, or have done other jobs before.
#[tokio::test]
async fn a_job_ends_at_the_same_window_wherever_it_runs() {
    let (_kept, dir) = package();
    let stop = || json!({"alpha": 0.05});
    let mut found = Vec::new();
    for (set, before) in [
        (&[][..], &[][..]),
        (&["engine.activation_cache=0"], &["noise-large"]),
        (&["engine.parts=1"], &["zero-effect", "difference-one-step"]),
        (&["engine.threads=1"], &["noise-small"]),
    ] {
        let pipeline = pipeline_with(&dir, &config(set)).await;
        for name in before {
            judge(&pipeline, &stopping(name, Value::Null)).await;
        }
        found.push(lasting(
            judge(&pipeline, &stopping("inverted-gradient-302", stop())).await,
        ));
    }
    assert!(found[0]["stopped"].is_object(), "{}", found[0]);
    for other in &found[1..] {
        assert_eq!(other, &found[0]);
    }
}

#[tokio::test]
async fn one_that_is_finished_to_check_it_says_the_same_and_what_the_whole_plan_says() {
    let (_kept, dir) = package();
    let stopping_only = pipeline_with(&dir, &config(&["worker.finish_stopped=0"])).await;
    let finishing = pipeline_with(&dir, &config(&["worker.finish_stopped=1"])).await;
    for name in HARMFUL {
        let stop = || json!({"alpha": 0.01});
        let whole = judge(&finishing, &stopping(name, Value::Null)).await;
        let stopped = lasting(judge(&stopping_only, &stopping(name, stop())).await);
        let mut finished = lasting(judge(&finishing, &stopping(name, stop())).await);
        assert!(stopped["stopped"].get("finished").is_none(), "{name}");
        let shown = finished["stopped"]
            .as_object_mut()
            .unwrap()
            .remove("finished");
        assert_eq!(shown.unwrap(), json!({"delta": whole["delta"]}), "{name}");
        assert_eq!(finished, stopped, "{name}");
        // And the weights are what they were.
        let again = judge(&finishing, &stopping(name, Value::Null)).await;
        assert_eq!(lasting(again), lasting(whole), "{name}");
    }
}

#[tokio::test]
async fn futile_is_what_helps_less_than_the_margin() {
    let (_kept, dir) = package();
    let pipeline = pipeline(&dir).await;
    let decided = async |name: &str, stop: Value| {
        let result = judge(&pipeline, &stopping(name, stop)).await;
        (
            result["stopped"]["decision"].clone(),
            result["stopped"]["upper"].as_f64(),
        )
    };
    let margin = 0.01;
    let (decision, upper) = decided("noise-small", json!({"alpha": 0.05, "margin": margin})).await;
    assert_eq!(decision, "futile");
    assert!((0.0..=margin).contains(&upper.unwrap()), "{upper:?}");
    let (decision, upper) = decided("noise-large", json!({"alpha": 0.05, "margin": margin})).await;
    assert_eq!(decision, "worse");
    assert!(upper.unwrap() < 0.0, "{upper:?}");
    // Small harm proves nothing without an assumption; large harm does.
    for (name, expected) in [
        ("inverted-difference-303", Value::Null),
        ("noise-large", json!("worse")),
    ] {
        let (decision, _) = decided(name, json!({"alpha": 0.05, "proven": true})).await;
        assert_eq!(decision, expected, "{name}");
    }
}

/// A candidate that touches the last parts alone saves both what comes before them and the windows left.
#[test]
fn a_stop_saves_what_is_left_from_the_part_that_the_candidate_starts_at() {
    use scorer::candidate::{TensorUpdate, Update};
    use scorer::engine::Early;
    use scorer::engine::patch::Patches;
    use scorer::protocol::job::Rule;
    use scorer::protocol::stop::Stop;

    let (_kept, dir) = package();
    let package = Arc::new(Package::load(&dir, false, &[]).unwrap());
    let mut engine =
        Engine::load(Arc::clone(&package), &config(&[]).engine, Arc::default()).unwrap();
    let last = engine.parts_of_tensors().iter().copied().max().flatten();
    let tensor = engine
        .parts_of_tensors()
        .iter()
        .position(|part| *part == last)
        .unwrap();
    let numel = u32::try_from(package.weights.tensors[tensor].numel).unwrap();
    let values = (0..numel).map(|n| if n % 2 == 0 { 1.0 } else { -1.0 });
    let update = Update {
        tensors: vec![TensorUpdate {
            tensor,
            values: values.collect(),
            indices: (0..numel).collect(),
        }],
        ..Update::default()
    };
    let patches = Patches::new(&package, update, Rule::ParamDiff).unwrap();
    let plan = Plan::new(&package.shards, None, "", package.cut()).unwrap();
    let stop = Stop {
        alpha: 0.05,
        margin: 0.0,
        proven: false,
    };
    let early = Some(Early {
        stop,
        finish: false,
    });
    engine.score(&patches, &plan, None).unwrap();
    let evaluation = engine.score(&patches, &plan, early).unwrap();
    assert!(
        evaluation.from > Some(0) && evaluation.from == last,
        "{evaluation:?}"
    );
    assert!(
        evaluation.stopped.is_some() && evaluation.windows < WINDOWS,
        "{evaluation:?}"
    );
}
