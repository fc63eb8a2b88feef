//! What a verdict costs in forward passes, for each kind of candidate of the test model: measured whole, from the
//! part of the graph that it touches, until it is decided, and both. `cargo bench --bench verdicts`.

#![expect(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a failed step ends the benchmark; what it prints is its answer"
)]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use scorer::candidate;
use scorer::config::{Config, Layers};
use scorer::engine::patch::Patches;
use scorer::engine::{Early, Engine};
use scorer::model::build::Recipe;
use scorer::model::manifest::Objective;
use scorer::model::package::Package;
use scorer::model::plan::Plan;
use scorer::protocol::job::{Format, Rule};
use scorer::protocol::stop::Stop;
use testkit::case::{Case, cases};
use testkit::package::fixtures;

/// Of each figure the median is told.
const ROUNDS: usize = 9;
/// The shards with 16 rows in all; the fifth has one long row.
const SHARDS: [u64; 4] = [59_996, 59_997, 59_999, 60_000];
const STOP: Stop = Stop {
    alpha: 0.01,
    margin: 0.0,
    proven: false,
};
const KINDS: [(&str, &str); 5] = [
    ("honest, all layers", "difference-more-steps"),
    ("honest, one block", "gradient-one-layer"),
    ("inverted", "inverted-gradient-302"),
    ("noise", "noise-large"),
    ("zero", "zero-effect"),
];

fn package(windows_per_row: usize, out: &Path) -> Arc<Package> {
    let dir = out.join(windows_per_row.to_string());
    let recipe = Recipe {
        exclude: Vec::new(),
        graph: fixtures().join("graph-named.onnx"),
        weights: Some(fixtures().join("checkpoint.safetensors")),
        shards: fixtures().join("shards"),
        name: "tinylm".into(),
        version: 1,
        out: dir.clone(),
        objective: Objective::CausalLm {
            window: 128,
            windows_per_row,
            label_shift: 1,
            ignore_index: -100,
        },
    };
    scorer::engine::trial::build(&recipe).expect("the test model is sound");
    Arc::new(Package::load(&dir, false, &[]).expect("the package is sound"))
}

fn engine(package: &Arc<Package>, parts: usize) -> Engine {
    let set = [
        "engine.execution_provider=cpu".to_owned(),
        format!("engine.parts={parts}"),
    ];
    let layers = Layers {
        set: &set,
        ..Layers::default()
    };
    let config = Config::load(&layers).expect("the defaults are sound");
    Engine::load(Arc::clone(package), &config.engine, Arc::default()).expect("it runs")
}

fn patches(package: &Package, case: &Case) -> Patches {
    let set = Config::load(&Layers::default()).expect("the defaults are sound");
    let limits = (&set.candidates).into();
    let rule = match case.learning_rate {
        Some(learning_rate) => Rule::Gradient { learning_rate },
        None => Rule::ParamDiff,
    };
    let bytes = case.bytes();
    let update = candidate::decode(&bytes, Format::BinaryV2, None, package, limits);
    Patches::new(package, update.expect("it is sound"), rule).expect("it is sound")
}

/// Seconds that the engine takes for a candidate, writing and restoring included.
fn cost(engine: &mut Engine, patches: &Patches, plan: &Plan, stop: Option<Stop>) -> f64 {
    let early = stop.map(|stop| Early {
        stop,
        finish: false,
    });
    let began = Instant::now();
    engine.score(patches, plan, early).expect("it is scored");
    began.elapsed().as_secs_f64()
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

fn main() {
    let out = tempfile::tempdir().expect("a temporary directory");
    for windows_per_row in [4, 16] {
        let package = package(windows_per_row, out.path());
        let plan = Plan::new(&package.shards, Some(&SHARDS), "", package.cut());
        let plan = plan.expect("the shards are there");
        println!("\n{} windows, alpha {}\n", plan.windows.len(), STOP.alpha);
        println!("| candidate | whole | parts | stop | both |\n| --- | --- | --- | --- | --- |");
        let (mut whole, mut parts) = (engine(&package, 1), engine(&package, 6));
        for (kind, name) in KINDS {
            let case = cases().iter().find(|case| case.name == name);
            let patches = patches(&package, case.expect("cases.json has it"));
            let mut costs = [const { Vec::new() }; 4];
            // The first round makes the baselines, and is not counted.
            for round in 0..=ROUNDS {
                let began = Instant::now();
                whole.pass(&plan).expect("the model runs");
                let pass = began.elapsed().as_secs_f64();
                let round_costs = [
                    cost(&mut whole, &patches, &plan, None),
                    cost(&mut parts, &patches, &plan, None),
                    cost(&mut whole, &patches, &plan, Some(STOP)),
                    cost(&mut parts, &patches, &plan, Some(STOP)),
                ];
                for (costs, cost) in costs.iter_mut().zip(round_costs) {
                    costs.extend((round > 0).then_some(cost / pass));
                }
            }
            let told = costs.map(|costs| format!("{:.2}", median(costs)));
            println!("| {kind} | {} |", told.join(" | "));
        }
    }
}
