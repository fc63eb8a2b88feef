//! What each member of a merge is worth: from per-window losses of the coalitions to estimates, by pairs of equal
//! windows throughout. The half-sum of what a member changes alone and what it changes as the last to join is its
//! Shapley value where the loss is quadratic in the weights; the gap is what the half-sums leave unexplained.

use super::statistics::{Estimate, Paired, differences, estimate, paired};

/// A gap beyond this share of the largest contribution is large: where it is smaller, 98 of 100 games have no error
/// beyond this share.
const LARGE_SHARE: f64 = 0.03;
/// And beyond so many of its standard errors: a smaller one may be the windows' doing.
const LARGE_ERRORS: f64 = 2.0;

/// The losses of the two coalitions that tell what a member is worth, in the order of the plan.
#[derive(Debug, Clone, Copy)]
pub struct MemberLosses<'a> {
    /// With this member alone.
    pub alone: &'a [f64],
    /// With all others.
    pub without: &'a [f64],
}

/// What a member is worth.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// The change of the loss by this member alone.
    pub alone: Estimate,
    /// The change by the last member to join.
    pub last: Estimate,
    /// The mean of both.
    pub contribution: Estimate,
}

/// What the contributions do not sum to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gap {
    /// The joint change minus the sum of the contributions.
    pub value: f64,
    /// Its standard error; none below two windows.
    pub stderr: Option<f64>,
    /// Whether the contributions are a guide rather than a measure.
    pub large: bool,
}

/// A merge in numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Shares {
    /// Of all members together.
    pub joint: Paired,
    /// Of each of them.
    pub members: Vec<Share>,
    /// What is between the two.
    pub gap: Gap,
}

/// From the losses of the unchanged model, of all members together, and of each member's coalitions.
pub fn shares(before: &[f64], joint: &[f64], members: &[MemberLosses<'_>]) -> Shares {
    let mut unexplained = differences(before, joint);
    let share = |member: &MemberLosses<'_>| {
        let alone = differences(before, member.alone);
        let last = differences(member.without, joint);
        let halves: Vec<f64> = alone
            .iter()
            .zip(&last)
            .map(|(a, l)| (a + l) / 2.0)
            .collect();
        let rest = unexplained.iter_mut().zip(&halves);
        rest.for_each(|(rest, half)| *rest -= half);
        Share {
            alone: estimate(&alone),
            last: estimate(&last),
            contribution: estimate(&halves),
        }
    };
    let members: Vec<Share> = members.iter().map(share).collect();
    if members.len() <= 2 {
        // The half-sums of two are their Shapley values, whatever the loss; what rounding left is no gap.
        unexplained.fill(0.0);
    }
    Shares {
        joint: paired(before, joint),
        gap: gap(&unexplained, &members),
        members,
    }
}

fn gap(unexplained: &[f64], members: &[Share]) -> Gap {
    let Estimate { value, stderr, .. } = estimate(unexplained);
    let contributions = members.iter().map(|share| share.contribution.value.abs());
    let allowed = contributions.fold(0.0, f64::max) * LARGE_SHARE;
    // One window says nothing of its error.
    let beyond = value.abs() > LARGE_ERRORS * stderr.unwrap_or_default();
    Gap {
        value,
        stderr,
        large: value.abs() > allowed && beyond,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: [f64; 4] = [3.0, 2.5, 3.25, 2.0];

    fn less(by: f64) -> Vec<f64> {
        let windows = BEFORE.iter().zip(1_u8..);
        windows.map(|(b, at)| b - by * f64::from(at)).collect()
    }

    fn of<'a>(alone: &'a [f64], without: &'a [f64]) -> MemberLosses<'a> {
        MemberLosses { alone, without }
    }

    #[test]
    fn two_members_sum_to_the_joint_change_and_leave_no_gap() {
        let (one, other, joint) = (less(0.1), less(0.3), less(0.7));
        let both = [of(&one, &other), of(&other, &one)];
        let shares = shares(&BEFORE, &joint, &both);
        let [one, other] = shares.members[..] else {
            panic!("{shares:?}")
        };
        let sum = one.contribution.value + other.contribution.value;
        assert!((sum - shares.joint.delta).abs() < 1e-15);
        assert!(other.contribution.value > one.contribution.value);
        let none = Gap {
            value: 0.0,
            stderr: Some(0.0),
            large: false,
        };
        assert_eq!(shares.gap, none);
    }

    #[test]
    fn who_changes_nothing_contributes_exactly_nothing() {
        let (one, joint) = (less(0.1), less(0.1));
        let shares = shares(&BEFORE, &joint, &[of(&one, &BEFORE), of(&BEFORE, &joint)]);
        let nothing = estimate(&[0.0; 4]);
        let zero = shares.members[1];
        assert_eq!(
            (zero.alone, zero.last, zero.contribution),
            (nothing, nothing, nothing)
        );
    }

    #[test]
    fn the_error_of_a_contribution_is_that_of_its_half_sums() {
        // Alone and last err in opposite directions: their half-sum is the same in every window.
        let alone: Vec<f64> = vec![2.9, 2.3, 3.15, 1.8];
        let without: Vec<f64> = vec![2.7, 2.1, 2.95, 1.6];
        let joint: Vec<f64> = vec![2.5, 2.0, 2.75, 1.5];
        let share = shares(&BEFORE, &joint, &[of(&alone, &without)]).members[0];
        assert!((share.contribution.value - 0.15).abs() < 1e-15);
        assert!(share.contribution.stderr.unwrap() < 1e-15);
        assert!(share.alone.stderr.unwrap() > 0.02);
    }

    #[test]
    fn a_gap_is_large_beyond_three_per_cent_and_two_errors() {
        // Three equal members: each contributes 0.1 in every window, as far as the half-sum tells.
        let large = |joint: &[f64]| {
            let alone: Vec<f64> = BEFORE.iter().map(|b| b - 0.1).collect();
            let without: Vec<f64> = joint.iter().map(|j| j + 0.1).collect();
            let members = [of(&alone, &without); 3];
            shares(&BEFORE, joint, &members).gap.large
        };
        let joint =
            |by: [f64; 4]| -> Vec<f64> { BEFORE.iter().zip(by).map(|(b, d)| b - d).collect() };
        assert!(!large(&joint([0.3; 4])));
        assert!(!large(&joint([0.3029; 4])), "below 3 %");
        assert!(large(&joint([0.3031; 4])), "beyond");
        assert!(
            !large(&joint([0.31, 0.31, 0.31, 0.29])),
            "one window in four"
        );
        assert!(large(&joint([0.25; 4])), "to either side");
    }

    #[test]
    fn one_window_has_no_errors() {
        let member = of(&[1.5], &[1.75]);
        let shares = shares(&[2.0], &[1.0], &[member; 3]);
        assert_eq!(shares.members[0].contribution.stderr, None);
        assert_eq!(shares.gap.stderr, None);
        assert!(shares.gap.large);
        assert_eq!(shares.joint.ci95, None);
    }
}
