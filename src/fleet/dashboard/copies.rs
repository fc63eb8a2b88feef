//! Likely copies: candidates that change the same weights as an earlier one of somebody else, by the
//! sketches in their results (docs/candidates.md). Only results of one plan can be compared. A number that
//! many have proves nothing: dense updates, for one, all change the same weights, namely all.

use std::collections::{BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroU64;

use serde::Serialize;

use crate::protocol::result::{ScoreBody, similarity};

/// From here on a candidate counts as a copy: more than half of the weights that either changes, both
/// change. Independent updates share next to none.
const ENOUGH: f64 = 0.5;
/// Candidates of each of the two generations that are compared with, about a kilobyte each.
const KEPT: usize = 10_000;
/// Contributors that may have the same numbers before these prove nothing; also, never more than half of them.
const FEW: usize = 8;

/// The last candidates: this generation, and the one before it.
#[derive(Debug, Default)]
pub(super) struct Copies {
    current: Generation,
    before: Generation,
}

#[derive(Debug, Default)]
struct Generation {
    candidates: Vec<Candidate>,
    /// The first candidate with a pair of numbers, which tell plans apart. Nearly all pairs have no other.
    first: HashMap<Pair, u32>,
    /// The first of each further contributor.
    further: HashMap<Pair, Vec<u32>>,
    /// By plan.
    contributors: HashMap<Box<str>, BTreeSet<Box<str>>>,
}

/// Digest of a plan, an even place of the sketch, and the numbers there and at the next place. Two of them that
/// are equal by chance cost a comparison and nothing else.
type Pair = u32;

#[derive(Debug)]
struct Candidate {
    contributor: Box<str>,
    submission_id: Box<str>,
    plan: Box<str>,
    sketch: Box<[Number]>,
}

/// In half of the memory that the option takes.
type Number = Option<NonZeroU64>;

/// Whose candidate another resembles.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct CopyOf {
    pub(super) name: String,
    pub(super) submission_id: String,
    /// 0 to 1.
    pub(super) similarity: f64,
}

impl Copies {
    /// The first candidate that is similar enough, if it was another's. Keeps this one.
    pub(super) fn find(
        &mut self,
        contributor: &str,
        submission_id: &str,
        body: &ScoreBody,
    ) -> Option<CopyOf> {
        let candidate = Candidate {
            contributor: contributor.into(),
            submission_id: submission_id.into(),
            plan: body.plan.as_str().into(),
            sketch: numbers(&body.candidate.sketch),
        };
        let pairs = candidate.pairs();
        let generations = [&self.before, &self.current].into_iter();
        let similar = generations.map(|generation| generation.first_similar(&candidate, &pairs));
        // Whose it was first: that may be this contributor, copied by others since.
        let first = similar.flatten().next();
        if self.current.candidates.len() >= KEPT {
            self.before = std::mem::take(&mut self.current);
        }
        self.current.keep(candidate, &pairs);
        first.filter(|(own, _)| !own).map(|(_, copied)| copied)
    }
}

impl Generation {
    fn first_similar(
        &self,
        candidate: &Candidate,
        pairs: &[Option<Pair>],
    ) -> Option<(bool, CopyOf)> {
        let contributors = self.contributors.get(&candidate.plan);
        let few = contributors.map_or(0, |c| c.len() / 2).min(FEW - 1);
        let holders: Vec<Vec<u32>> = pairs.iter().map(|pair| self.holders(*pair)).collect();
        let telling: Vec<bool> = holders.iter().map(|holders| holders.len() <= few).collect();
        let met = holders
            .iter()
            .zip(&telling)
            .filter(|(_, telling)| **telling);
        let met: BTreeSet<u32> = met.flat_map(|(holders, _)| holders).copied().collect();
        let mut met = met
            .iter()
            .filter_map(|at| self.candidates.get(*at as usize));
        met.find_map(|earlier| candidate.copy_of(earlier, &telling))
    }

    fn holders(&self, pair: Option<Pair>) -> Vec<u32> {
        let first = pair.and_then(|pair| self.first.get(&pair));
        let further = pair.and_then(|pair| self.further.get(&pair));
        let further = further.into_iter().flatten();
        first.into_iter().chain(further).copied().collect()
    }

    fn keep(&mut self, candidate: Candidate, pairs: &[Option<Pair>]) {
        let at = u32::try_from(self.candidates.len()).unwrap_or(u32::MAX);
        for pair in pairs.iter().flatten() {
            let holders = self.holders(Some(*pair));
            let known = holders
                .iter()
                .filter_map(|at| self.candidates.get(*at as usize));
            let mut known = known.map(|known| &known.contributor);
            match holders.len() {
                0 => _ = self.first.insert(*pair, at),
                FEW.. => {}
                _ if known.any(|known| *known == candidate.contributor) => {}
                _ => self.further.entry(*pair).or_default().push(at),
            }
        }
        let contributors = self.contributors.entry(candidate.plan.clone()).or_default();
        contributors.insert(candidate.contributor.clone());
        self.candidates.push(candidate);
    }
}

/// A number is never near the largest, so that one more has room.
fn numbers(sketch: &[Option<u64>]) -> Box<[Number]> {
    let number = |number: &Option<u64>| number.and_then(|n| NonZeroU64::new(n.saturating_add(1)));
    sketch.iter().map(number).collect()
}

impl Candidate {
    /// One for each two places; none where there is no number.
    fn pairs(&self) -> Vec<Option<Pair>> {
        let pair = |(at, pair): (usize, &[Number])| {
            let mut digest = DefaultHasher::new();
            (&self.plan, at, pair).hash(&mut digest);
            #[expect(clippy::cast_possible_truncation, reason = "half of a digest")]
            let short = digest.finish() as Pair;
            pair.iter().any(Option::is_some).then_some(short)
        };
        self.sketch.chunks(2).enumerate().map(pair).collect()
    }

    /// By the pairs that tell something; whether it was the same contributor's, and what it resembles.
    fn copy_of(&self, earlier: &Self, telling: &[bool]) -> Option<(bool, CopyOf)> {
        let only = |sketch: &[Number]| -> Vec<Option<u64>> {
            let pairs = sketch.chunks(2).zip(telling);
            let numbers =
                pairs.flat_map(|(pair, telling)| pair.iter().map(|n| n.filter(|_| *telling)));
            numbers.map(|number| number.map(NonZeroU64::get)).collect()
        };
        let similarity = similarity(&only(&self.sketch), &only(&earlier.sketch))?;
        let copied = CopyOf {
            name: earlier.contributor.to_string(),
            submission_id: earlier.submission_id.to_string(),
            similarity,
        };
        (similarity >= ENOUGH).then_some((earlier.contributor == self.contributor, copied))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::dashboard::made::scored;
    use crate::protocol::result::Body;
    use rand::rngs::StdRng;
    use rand::{Rng as _, SeedableRng as _};
    use serde_json::json;

    struct Miners {
        copies: Copies,
        random: StdRng,
    }

    type Sketch = Vec<Option<u64>>;

    impl Miners {
        fn new() -> Self {
            Self {
                copies: Copies::default(),
                random: StdRng::seed_from_u64(7),
            }
        }

        fn own(&mut self) -> Sketch {
            (0..64)
                .map(|_| Some(self.random.random_range(0..1 << 53)))
                .collect()
        }

        /// With so many numbers of its own.
        fn changed(&mut self, sketch: &Sketch, own: usize) -> Sketch {
            let mut changed = self.own();
            changed[own..].clone_from_slice(&sketch[own..]);
            changed
        }

        fn send(&mut self, who: &str, plan: char, sketch: &Sketch) -> Option<CopyOf> {
            let plan = plan.to_string().repeat(64);
            let seen = scored(1, json!({"plan": plan, "candidate.sketch": sketch}));
            let Body::Score(body) = &seen.result.body else {
                panic!("it is scored")
            };
            self.copies.find(who, &format!("{who}'s"), body)
        }
    }

    #[test]
    fn who_sends_what_another_has_sent_is_named_with_the_other() {
        let mut miners = Miners::new();
        let first = miners.own();
        assert_eq!(miners.send("a", '1', &first), None);
        for who in ["b", "c", "d"] {
            let own = miners.own();
            assert_eq!(miners.send(who, '1', &own), None);
        }
        let much = miners.changed(&first, 13);
        let found = miners.send("thief", '1', &much).unwrap();
        assert_eq!((&*found.name, &*found.submission_id), ("a", "a's"));
        assert!((found.similarity - 51.0 / 64.0).abs() < 1e-9, "{found:?}");
        let little = miners.changed(&first, 45);
        assert_eq!(miners.send("e", '1', &little), None);
        // One's own candidate again, and the same numbers on another plan, are no copies.
        assert_eq!(miners.send("b", '2', &first), None);
        // Whose it was first copies nobody, although others have copied it since.
        assert_eq!(miners.send("a", '1', &much), None);
        let again = miners.own();
        assert_eq!(miners.send("f", '1', &again), None);
        assert_eq!(miners.send("f", '1', &again), None);
    }

    #[test]
    fn what_everybody_changes_proves_nothing() {
        let mut miners = Miners::new();
        let dense = miners.own();
        for n in 0..40 {
            let found = miners.send(&format!("m{n}"), '1', &dense);
            assert_eq!(found, None, "{n}");
        }
        // Three quarters are what everybody has, the rest is each one's own.
        let mut miners = Miners::new();
        let common = miners.own();
        for n in 0..40 {
            let mostly = miners.changed(&common, 16);
            assert_eq!(miners.send(&format!("m{n}"), '1', &mostly), None, "{n}");
            if n == 20 {
                let found = miners.send("thief", '1', &mostly).unwrap();
                assert_eq!(found.name, "m20");
            }
        }
    }

    #[test]
    fn only_the_last_candidates_are_remembered_and_an_empty_one_resembles_none() {
        let mut miners = Miners::new();
        let first = miners.own();
        miners.send("a", '1', &first);
        for n in 0..=2 * KEPT {
            let empty = n % 2 == 0;
            let own = if empty { vec![None; 64] } else { miners.own() };
            assert_eq!(miners.send(&format!("m{}", n % 50), '1', &own), None);
        }
        assert_eq!(miners.send("thief", '1', &first), None);
    }
}
