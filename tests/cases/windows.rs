//! What the bits of a window's loss depend on: the weights, the window, the micro-batch, its place there,
//! and nothing else.

use scorer::engine::Engine;
use scorer::model::package::Package;
use scorer::model::plan::{Plan, Window};

use super::*;

/// Lengths of plans, and the micro-batches that the contract gives them.
const PLANS: [(usize, usize); 4] = [(1, 1), (5, 5), (8, 8), (17, 6)];

fn engine(dir: &Path) -> Engine {
    let package = Arc::new(Package::load(dir, false, &[]).unwrap());
    Engine::load(package, &config(&[]).engine, Arc::default()).unwrap()
}

/// Windows of two choices, twice as many as the longest plan has.
fn windows(package: &Package) -> Vec<Window> {
    let choices = ["", "another"].map(|nonce| {
        let plan = Plan::new(&package.shards, None, nonce, package.cut());
        plan.unwrap().windows
    });
    choices.concat()
}

fn bits(engine: &mut Engine, windows: &[Window]) -> Vec<u64> {
    let losses = engine.pass(&Plan::excerpt([0; 32], windows)).unwrap();
    losses.into_iter().map(f64::to_bits).collect()
}

#[test]
fn a_window_s_bits_depend_on_nothing_that_runs_before_it_or_beside_it() {
    let out = tempfile::tempdir().unwrap();
    let dir = tinylm::package("graph-named.onnx", 1, out.path());
    let mut shared = engine(&dir);
    let all = windows(&shared.package);
    assert!(all.len() >= 34, "{} windows", all.len());
    let alone: Vec<Vec<u64>> = PLANS
        .iter()
        .map(|(length, _)| bits(&mut engine(&dir), &all[..*length]))
        .collect();
    // Each order of lengths finds other sessions compiled, kept or forgotten.
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]] {
        for plan in order {
            let length = PLANS[plan].0;
            assert_eq!(bits(&mut shared, &all[..length]), alone[plan], "{length}");
        }
    }
    // Every second window is replaced; the others keep their places.
    for (plan, (length, batch)) in PLANS.iter().enumerate() {
        let mut mixed = all[..*length].to_vec();
        for at in (1..*length).step_by(2) {
            mixed[at] = all[length + at].clone();
        }
        let found = bits(&mut shared, &mixed);
        for at in (0..*length).step_by(2) {
            assert_eq!(found[at], alone[plan][at], "{at} of {length}");
        }
        // And the place counts from the start of its micro-batch, not of the plan.
        let mut later = all[34 - batch..34].to_vec();
        later.extend_from_slice(&all[..length - batch]);
        let found = bits(&mut shared, &later);
        assert_eq!(found[*batch..], alone[plan][..length - batch], "{length}");
    }
}

#[test]
fn losses_stand_in_the_order_of_the_plan_whatever_the_order_of_measuring() {
    let out = tempfile::tempdir().unwrap();
    let mut engine = engine(&tinylm::package("graph-named.onnx", 1, out.path()));
    let package = Arc::clone(&engine.package);
    let plan = Plan::new(&package.shards, None, "", package.cut()).unwrap();
    assert!(!plan.order.is_sorted());
    let together = engine.pass(&plan).unwrap();
    for (at, window) in plan.windows.iter().enumerate() {
        let alone = engine.pass(&Plan::excerpt([0; 32], std::slice::from_ref(window)));
        let difference = (together[at] - alone.unwrap()[0]).abs();
        assert!(difference < TOLERANCE, "window {at}: {difference}");
    }
}
