use ort::value::Tensor;

use super::*;

fn pass(plan: u8) -> Pass {
    Pass {
        plan: [plan; 32],
        batch: 8,
    }
}

/// The values of a micro-batch that take so many times four bytes, after so many parts.
fn entered(floats: usize, parts: usize) -> Entered {
    let value = Tensor::from_array(([floats], vec![0_f32; floats])).unwrap();
    Entered {
        values: Values::from([("value".to_owned(), value.into_dyn())]),
        parts,
    }
}

/// Which micro-batches of which plans are kept.
fn kept(activations: &Activations) -> Vec<(u8, usize)> {
    let passes = activations.passes.iter();
    let numbers = passes.flat_map(|(pass, entered)| {
        let plan = pass.plan[0];
        entered.keys().map(move |number| (plan, *number))
    });
    let mut numbers: Vec<_> = numbers.collect();
    numbers.sort_unstable();
    numbers
}

#[test]
fn what_is_kept_is_given_back_once() {
    let mut activations = Activations::within(100);
    assert_eq!(activations.take(pass(1), 0).parts, 0);
    activations.put(pass(1), 0, entered(10, 3));
    assert_eq!(activations.bytes(), 40);
    let other = Pass {
        batch: 4,
        ..pass(1)
    };
    for (of, number) in [(pass(2), 0), (pass(1), 1), (other, 0)] {
        assert!(activations.take(of, number).values.is_empty());
    }
    let taken = activations.take(pass(1), 0);
    assert_eq!((taken.parts, taken.bytes()), (3, 40));
    assert_eq!(activations.bytes(), 0);
    activations.put(pass(1), 0, taken);
    assert_eq!(kept(&activations), [(1, 0)]);
}

#[test]
fn other_passes_make_room_the_one_used_longest_ago_first() {
    let mut activations = Activations::within(3 * 4);
    for plan in [1, 2, 3] {
        activations.put(pass(plan), 0, entered(1, 1));
    }
    let again = activations.take(pass(1), 0);
    activations.put(pass(1), 0, again);
    for (number, rest) in [
        (0, vec![(1, 0), (3, 0), (4, 0)]),
        (1, vec![(1, 0), (4, 0), (4, 1)]),
        (2, vec![(4, 0), (4, 1), (4, 2)]),
        // Its own pass makes no room: that would cost as much as it gains.
        (3, vec![(4, 0), (4, 1), (4, 2)]),
    ] {
        let taken = activations.take(pass(4), number);
        assert_eq!(taken.parts, 0);
        activations.put(pass(4), number, entered(1, 1));
        assert_eq!(kept(&activations), rest, "{number}");
        assert!(activations.bytes() <= 3 * 4);
    }
}

#[test]
fn what_is_larger_than_the_budget_is_not_kept() {
    for budget in [0, 3] {
        let mut activations = Activations::within(budget);
        activations.put(pass(1), 0, entered(1, 1));
        assert_eq!((kept(&activations), activations.bytes()), (vec![], 0));
    }
}

#[test]
fn a_plan_is_forgotten_in_every_micro_batch_size() {
    let mut activations = Activations::within(100);
    for (plan, batch) in [(1, 8), (1, 4), (2, 8)] {
        let pass = Pass {
            batch,
            ..pass(plan)
        };
        activations.put(pass, 0, entered(1, 1));
    }
    activations.forget(&[1; 32]);
    assert_eq!(kept(&activations), [(2, 0)]);
    activations.clear();
    assert_eq!(activations.bytes(), 0);
}

#[test]
fn small_values_of_many_plans_do_not_pile_up() {
    let mut activations = Activations::within(u64::MAX);
    for plan in 0..=u8::MAX {
        activations.put(pass(plan), 0, entered(1, 1));
        assert!(activations.passes.len() <= PASSES);
    }
    let last = (u8::MAX as usize + 1 - PASSES)..=u8::MAX as usize;
    let last: Vec<_> = last.map(|plan| (u8::try_from(plan).unwrap(), 0)).collect();
    assert_eq!(kept(&activations), last);
}
