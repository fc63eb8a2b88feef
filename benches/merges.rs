//! What a merge costs in forward passes, by the number of its members, on the test model and on one of 100 million
//! parameters: `cargo bench --bench merges`. Every member changes one weight in a hundred.

#![expect(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a failed step ends the benchmark; what it prints is its answer"
)]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use scorer::candidate::{TensorUpdate, Update};
use scorer::config::{Config, Layers};
use scorer::engine::Engine;
use scorer::engine::coalition::{Member, Source};
use scorer::engine::merge::{Merge, Merged};
use scorer::model::package::Package;
use scorer::model::plan::Plan;
use scorer::protocol::job::{Format, Rule};
use scorer::protocol::merge::OnRejected;
use scorer::selftest::synthetic_model::{HUNDRED_MILLION, make};
use testkit::package::sound;

/// Weights for each one that a member changes.
const EVERY: u32 = 100;

fn engine(dir: &Path) -> (Engine, Plan) {
    let set = ["engine.execution_provider=cpu".to_owned()];
    let layers = Layers {
        set: &set,
        ..Layers::default()
    };
    let config = Config::load(&layers).expect("the defaults are sound");
    let package = Package::load(dir, false, &[]).expect("the package is sound");
    let plan = Plan::new(&package.shards, None, "", package.cut()).expect("it has windows");
    let engine = Engine::load(Arc::new(package), &config.engine, Arc::default());
    let mut engine = engine.expect("it runs");
    engine.warm().expect("it is sound");
    (engine, plan)
}

fn members(package: &Package, count: usize) -> Vec<Member> {
    let mut random = StdRng::seed_from_u64(29);
    let mut member = |at: usize| {
        let weights = package.weights.tensors.iter().enumerate();
        let tensors = weights.map(|(tensor, info)| {
            let numel = u32::try_from(info.numel).expect("a tensor of fewer than 2^32 weights");
            let first = random.random_range(0..EVERY.min(numel));
            let indices: Vec<u32> = (first..numel).step_by(EVERY as usize).collect();
            let values = indices.iter().map(|_| random.random_range(-1e-3..1e-3));
            let values = values.collect();
            TensorUpdate {
                tensor,
                indices,
                values,
            }
        });
        Member {
            id: format!("{at:02}"),
            source: Source {
                sha256: [u8::try_from(at).expect("fewer than 256"); 32],
                format: Format::Safetensors,
                compression: None,
            },
            update: Update {
                tensors: tensors.collect(),
                versions: None,
            },
            rule: Rule::ParamDiff,
            weight: 0.5,
        }
    };
    (0..count).map(&mut member).collect()
}

fn merged(engine: &mut Engine, plan: &Plan, members: &[Member]) -> Merged {
    let merge = engine.merge(members, OnRejected::Drop, plan, &mut |_, _| Ok(()));
    match merge.expect("it is measured") {
        Merge::Measured(merged) => *merged,
        Merge::Refused(refused) => unreachable!("{refused:?}"),
    }
}

/// The most memory that this process has had, in megabytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().nth(1));
    kilobytes
        .and_then(|text| text.parse::<u64>().ok())
        .expect("a number")
        / 1024
}

fn compare(name: &str, dir: &Path, counts: &[usize]) {
    let (mut engine, plan) = engine(dir);
    let package = Arc::clone(&engine.package);
    for &count in counts {
        let members = members(&package, count);
        let mut ratios = Vec::new();
        let (mut seconds, mut passes) = (0.0, 0);
        // The baseline is there from the warm-up on, or from the first round.
        for _ in 0..3 {
            let began = Instant::now();
            engine.pass(&plan).expect("the model runs");
            let pass = began.elapsed().as_secs_f64();
            let began = Instant::now();
            passes = merged(&mut engine, &plan, &members).passes;
            seconds = began.elapsed().as_secs_f64();
            ratios.push(seconds / pass);
        }
        ratios.sort_by(f64::total_cmp);
        println!(
            "| {name} | {count} | {passes} | {:.1} | {seconds:.2} s | {} MB |",
            ratios[ratios.len() / 2],
            peak()
        );
    }
}

fn main() {
    println!("| model | members | passes | cost in forward passes | time | memory |");
    println!("| --- | --- | --- | --- | --- | --- |");
    compare("test model", sound(), &[2, 8, 32, 64]);
    let out = tempfile::tempdir().expect("a temporary directory");
    make(HUNDRED_MILLION, out.path()).expect("a writable directory");
    compare("100 million", out.path(), &[8]);
}
