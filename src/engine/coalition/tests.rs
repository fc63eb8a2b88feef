use super::super::tests::hazard;
use super::*;

fn member(id: &str, weight: f64, rule: Rule, entries: &[(usize, u32, f32)]) -> Member {
    let mut update = Update::default();
    for (tensor, index, value) in entries {
        match update.tensors.last_mut() {
            Some(last) if last.tensor == *tensor => {
                last.indices.push(*index);
                last.values.push(*value);
            }
            Some(_) | None => update.tensors.push(TensorUpdate {
                tensor: *tensor,
                indices: vec![*index],
                values: vec![*value],
            }),
        }
    }
    Member {
        id: id.into(),
        source: source(&update),
        update,
        rule,
        weight,
    }
}

/// Equal updates come from equal bytes here.
pub(in crate::engine) fn source(update: &Update) -> Source {
    Source {
        sha256: Sha256::digest(format!("{update:?}")).into(),
        format: Format::BinaryV2,
        compression: None,
    }
}

/// As the engine sums them, where nobody ends it.
fn patches(package: &Package, members: &[&Member]) -> Result<Patches, Failure> {
    super::patches(package, members, &|| Ok(()))
}

/// What the patches say of an entry: the baseline's value and the new one.
fn entry(patches: &Patches, tensor: usize, index: u32) -> Option<(f32, f32)> {
    let patch = patches.patches.iter().find(|p| p.tensor == tensor)?;
    let at = patch.indices.iter().position(|known| *known == index)?;
    Some((patch.originals[at], patch.values[at]))
}

#[test]
fn members_are_summed_in_f64_and_rounded_once() {
    let (package, _folder) = hazard();
    let old = f64::from(package.weights.element(0, 1));
    let rule = Rule::Gradient { learning_rate: 0.1 };
    let one = member("a", 0.25, rule, &[(0, 1, 0.3), (0, 2, 0.5), (1, 0, 1e-3)]);
    let other = member("b", -0.5, Rule::ParamDiff, &[(0, 1, 0.7)]);
    let patches = patches(&package, &[&one, &other]).unwrap();
    let sum = 0.25 * (-0.1 * f64::from(0.3_f32)) + -0.5 * f64::from(0.7_f32);
    #[expect(clippy::cast_possible_truncation, reason = "this is the rounding")]
    let expected = (old + sum) as f32;
    let (_, new) = entry(&patches, 0, 1).unwrap();
    assert_eq!(new.to_bits(), expected.to_bits());
    assert_eq!(patches.effective_entries, 3);
}

#[test]
fn entries_far_apart_and_everywhere_find_their_weights() {
    let (package, _folder) = hazard();
    for (tensor, info) in package.weights.tensors.iter().enumerate() {
        let last = u32::try_from(info.numel - 1).unwrap();
        let all: Vec<_> = (0..=last).map(|index| (tensor, index, 0.5)).collect();
        let everywhere = member("a", 1.0, Rule::ParamDiff, &all);
        let ends = member("b", 1.0, Rule::ParamDiff, &[(tensor, last, 0.25)]);
        let patches = patches(&package, &[&everywhere, &ends]).unwrap();
        assert_eq!(
            patches.effective_entries, info.numel as u64,
            "{}",
            info.name
        );
        for index in 0..=last {
            let old = package.weights.element(tensor, index);
            let step = if index == last { 0.75 } else { 0.5 };
            assert_eq!(entry(&patches, tensor, index), Some((old, old + step)));
        }
    }
}

#[test]
fn what_leaves_a_weight_as_it_is_is_no_entry() {
    let (package, _folder) = hazard();
    let zero = member("a", 0.5, Rule::ParamDiff, &[(0, 0, 0.0), (0, 1, -0.0)]);
    let tiny = member("b", 0.5, Rule::ParamDiff, &[(0, 2, 1e-30)]);
    let (plus, minus) = (
        member("c", 0.5, Rule::ParamDiff, &[(0, 3, 1.0)]),
        member("d", -0.5, Rule::ParamDiff, &[(0, 3, 1.0)]),
    );
    let none = patches(&package, &[&zero, &tiny, &plus, &minus]).unwrap();
    assert_eq!((none.effective_entries, none.patches.len()), (0, 0));
    assert_eq!(
        stepped(Dtype::F32, -0.0, 0.0).to_bits(),
        (-0.0_f32).to_bits()
    );
}

#[test]
fn a_fingerprint_is_that_of_the_weights() {
    let (package, _folder) = hazard();
    let print = |members: &[&Member]| fingerprint(&patches(&package, members).unwrap());
    let one = member("a", 0.5, Rule::ParamDiff, &[(0, 0, 1.0), (1, 0, 0.5)]);
    let halved = member("b", 1.0, Rule::ParamDiff, &[(0, 0, 0.5), (1, 0, 0.25)]);
    let zero = member("c", 1.0, Rule::ParamDiff, &[(0, 1, 0.0)]);
    assert!(!one.equals(&halved));
    assert_eq!(print(&[&one]), print(&[&halved]));
    assert_eq!(print(&[&one]), print(&[&one, &zero]));
    let first = member("d", 0.5, Rule::ParamDiff, &[(0, 0, 1.0)]);
    let elsewhere = member("e", 0.5, Rule::ParamDiff, &[(0, 1, 1.0)]);
    let prints = [
        print(&[&one]),
        print(&[&first]),
        print(&[&elsewhere]),
        print(&[]),
    ];
    let different: BTreeSet<[u8; 32]> = prints.into_iter().collect();
    assert_eq!(different.len(), prints.len());
}

#[test]
fn a_weight_that_is_not_finite_is_refused_by_its_tensor() {
    let (package, _folder) = hazard();
    let half = |id| member(id, 1.0, Rule::ParamDiff, &[(0, 0, 2e38)]);
    let (one, other) = (half("a"), half("b"));
    assert!(patches(&package, &[&one]).is_ok());
    let failure = patches(&package, &[&one, &other]).unwrap_err();
    assert_eq!(failure.detail["tensor"], package.weights.tensors[0].name);
    let endless = member("c", 1e300, Rule::ParamDiff, &[(0, 0, 2e38)]);
    assert!(patches(&package, &[&endless]).is_err());
}

#[test]
fn passes_are_counted_by_members_that_differ() {
    let of = |values: &[f32]| {
        let members = values
            .iter()
            .map(|value| member("m", 1.0, Rule::ParamDiff, &[(0, 0, *value)]));
        most_passes(&members.collect::<Vec<Member>>())
    };
    assert_eq!(of(&[1.0]), 1);
    assert_eq!((of(&[1.0, 2.0]), of(&[1.0, 1.0])), (3, 2));
    assert_eq!(
        (of(&[1.0, 2.0, 3.0]), of(&[1.0, 2.0, 1.0]), of(&[1.0; 3])),
        (7, 5, 3)
    );
}
