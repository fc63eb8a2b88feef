use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::coalition::tests::source;
use super::super::patch::Patches;
use super::super::tests::{Fixture, fixture, touch};
use super::*;
use crate::candidate::Update;
use crate::protocol::job::Rule;

fn member(id: &str, weight: f64, update: Update) -> Member {
    Member {
        id: id.into(),
        source: source(&update),
        update,
        rule: Rule::ParamDiff,
        weight,
    }
}

/// Updates that move every weight a little.
fn updates(engine: &Engine, count: usize) -> Vec<Update> {
    let mut random = StdRng::seed_from_u64(29);
    let tensors = &engine.package.weights.tensors;
    let mut update = || {
        // The size of the hazardous node is no weight to be moved.
        let moved = tensors
            .iter()
            .enumerate()
            .filter(|(_, t)| t.name != "size.weight");
        let tensors = moved.map(|(tensor, info)| {
            let indices: Vec<u32> = (0..).take(info.numel).collect();
            let value = || random.random_range(-0.05..0.05);
            let values = std::iter::repeat_with(value).take(info.numel);
            touch(tensor, indices, values.collect())
        });
        Update {
            tensors: tensors.collect(),
            versions: None,
        }
    };
    std::iter::repeat_with(&mut update).take(count).collect()
}

fn warm() -> (Engine, Plan, tempfile::TempDir) {
    let Fixture {
        mut engine,
        plan,
        dir,
    } = fixture();
    engine.warm().unwrap();
    (engine, plan, dir)
}

/// Two members of half a weight each.
fn halves(engine: &Engine) -> [Member; 2] {
    let updates = updates(engine, 2);
    [("a", 0), ("b", 1)].map(|(id, at)| member(id, 0.5, updates[at].clone()))
}

fn measured(engine: &mut Engine, plan: &Plan, members: &[Member]) -> Merged {
    let merge = engine.merge(members, OnRejected::Drop, plan, &mut |_, _| Ok(()));
    engine.compare_weights().unwrap();
    match merge.unwrap() {
        Merge::Measured(merged) => *merged,
        Merge::Refused(refused) => panic!("{refused:?}"),
    }
}

fn share(merged: &Merged, at: usize) -> Share {
    merged.members[at].as_ref().unwrap().share
}

#[test]
fn alone_and_together_are_what_scores_of_the_same_weights_say() {
    let (mut engine, plan, _kept) = warm();
    let updates = updates(&engine, 3);
    let ids = ["a", "b", "c"].into_iter().zip(&updates);
    let members: Vec<Member> = ids
        .map(|(id, update)| member(id, 1.0, update.clone()))
        .collect();
    let merged = measured(&mut engine, &plan, &members);
    assert_eq!(merged.passes, 7);
    let package = Arc::clone(&engine.package);
    for (at, update) in updates.into_iter().enumerate() {
        let patches = Patches::new(&package, update, Rule::ParamDiff).unwrap();
        let Worth {
            share,
            effective_entries,
        } = *merged.members[at].as_ref().unwrap();
        assert_eq!(
            share.alone.value,
            engine.score(&patches, &plan, None).unwrap().paired.delta
        );
        assert_eq!(effective_entries, patches.effective_entries);
    }
    let all: Vec<&Member> = members.iter().collect();
    let mut score = |members: &[&Member]| {
        let patches = coalition::patches(&package, members, &|| Ok(())).unwrap();
        engine.score(&patches, &plan, None).unwrap().paired
    };
    let joint = score(&all);
    assert_eq!(merged.joint, joint);
    let last = joint.delta - score(&all[1..]).delta;
    assert!((share(&merged, 0).last.value - last).abs() < 1e-12);
}

#[test]
fn a_member_of_zeros_contributes_nothing_and_two_that_are_equal_alike() {
    let (mut engine, plan, _kept) = warm();
    let mut updates = updates(&engine, 4).into_iter();
    let mut zero = updates.next().unwrap();
    let values = zero.tensors.iter_mut().flat_map(|t| &mut t.values);
    values.for_each(|value| *value = 0.0);
    let copied = updates.next().unwrap();
    let rest: Vec<Update> = updates.collect();
    let members = [
        member("a", 0.3, copied.clone()),
        member("b", 0.7, rest[0].clone()),
        member("c", -0.1, zero),
        member("d", 0.1, rest[1].clone()),
        member("e", 0.3, copied),
    ];
    let merged = measured(&mut engine, &plan, &members);
    let nothing = share(&merged, 2);
    for estimate in [nothing.alone, nothing.last, nothing.contribution] {
        assert_eq!((estimate.value.to_bits(), estimate.stderr), (0, Some(0.0)));
    }
    assert_eq!(share(&merged, 0), share(&merged, 4));
    assert_ne!(share(&merged, 0).contribution.value, 0.0);
    // Three different ones alone, all together, and all but each of the three.
    assert_eq!(merged.passes, 7);
}

#[test]
fn two_members_take_three_passes_and_one_takes_one() {
    let (mut engine, plan, _kept) = warm();
    let members = halves(&engine);
    let merged = measured(&mut engine, &plan, &members);
    assert_eq!((merged.passes, merged.gap.value), (3, 0.0));
    let sum = share(&merged, 0).contribution.value + share(&merged, 1).contribution.value;
    assert!((sum - merged.joint.delta).abs() < 1e-12);

    let alone = measured(&mut engine, &plan, &members[..1]);
    assert_eq!(alone.passes, 1);
    let share = share(&alone, 0);
    assert_eq!(share.contribution.value, alone.joint.delta);
    assert_eq!(
        (share.alone, share.last),
        (share.contribution, share.contribution)
    );
}

#[test]
fn who_is_not_finite_alone_is_left_out_and_nobody_is_for_what_is_not_finite_together() {
    let (mut engine, plan, _kept) = warm();
    let sound = updates(&engine, 2);
    let sound: Vec<Member> = ["b", "c"]
        .into_iter()
        .zip(sound)
        .map(|(id, update)| member(id, 0.5, update))
        .collect();
    let large = |value: f32| Update {
        tensors: vec![touch(0, vec![0], vec![value])],
        versions: None,
    };
    let endless = member("a", 4.0, large(2e38));
    let members = [endless, sound[0].clone(), sound[1].clone()];
    let merged = measured(&mut engine, &plan, &members);
    let refused = merged.members[0].as_ref().unwrap_err();
    assert_eq!(refused.code, Code::CandidateNonFinite);
    let without = measured(&mut engine, &plan, &sound);
    assert_eq!(merged.members[1..], without.members[..]);
    assert_eq!(
        (merged.joint, merged.passes),
        (without.joint, without.passes)
    );

    let refused = |merge: Merge| match merge {
        Merge::Refused(refused) => refused,
        Merge::Measured(merged) => panic!("{merged:?}"),
    };
    let mut nobody = |_, _: &[&Member]| Ok(());
    let strict = engine.merge(&members, OnRejected::Fail, &plan, &mut nobody);
    assert_eq!(refused(strict.unwrap())[0].0, 0);
    let all = engine.merge(&members[..1], OnRejected::Drop, &plan, &mut nobody);
    assert_eq!(refused(all.unwrap()).len(), 1);

    let halves = [member("a", 1.0, large(2e38)), member("b", 1.0, large(2e38))];
    let joint = engine.merge(&halves, OnRejected::Drop, &plan, &mut nobody);
    assert_eq!(joint.unwrap_err().code, Code::NonFiniteLoss);
    engine.audit().unwrap();
}

/// Sums take time, too: what need not run is no reason not to look at the deadline.
#[test]
fn a_merge_of_zeros_runs_nothing_and_can_be_ended_all_the_same() {
    let (mut engine, plan, _kept) = warm();
    let zeros = Update {
        tensors: vec![touch(0, vec![0, 1], vec![0.0, 0.0])],
        versions: None,
    };
    let ids = ["a", "b", "c"];
    let members = ids.map(|id| member(id, 0.5, zeros.clone()));
    let mut heard = 0;
    let mut hears = |passes: Passes, _: &[&Member]| {
        assert_eq!(passes.done, 0);
        heard += 1;
        Ok(())
    };
    let merge = engine.merge(&members, OnRejected::Drop, &plan, &mut hears);
    let Merge::Measured(merged) = merge.unwrap() else {
        panic!("nobody is refused")
    };
    assert_eq!((merged.passes, heard), (0, 7));
    assert_eq!(merged.joint.delta, 0.0);
    engine.session.terminator.terminate();
    let ended = engine.merge(&members, OnRejected::Drop, &plan, &mut |_, _| Ok(()));
    assert_eq!(ended.unwrap_err().code, Code::InferenceFailed);
}

#[test]
fn a_merge_that_is_ended_between_its_passes_leaves_no_bit_changed() {
    let (mut engine, plan, _kept) = warm();
    let members = halves(&engine);
    let mut heard = Vec::new();
    let mut ends = |passes: Passes, members: &[&Member]| {
        heard.push((passes, members.len()));
        match passes.done {
            2 => Err(Failure::new(Code::DeadlineExceeded, "late")),
            _ => Ok(()),
        }
    };
    let ended = engine.merge(&members, OnRejected::Drop, &plan, &mut ends);
    assert_eq!(ended.unwrap_err().code, Code::DeadlineExceeded);
    let passes = |done| Passes { done, most: 3 };
    assert_eq!(heard, [(passes(0), 1), (passes(1), 1), (passes(2), 2)]);
    engine.audit().unwrap();
}
