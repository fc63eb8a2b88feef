//! Likely copies: candidates that change the same weights as an earlier one of somebody else, by the
//! sketches in their results (docs/candidates.md). Only results of one plan can be compared. A number that
//! many have proves nothing: dense updates, for one, all change the same weights, namely all.

use std::collections::{BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};

use serde::Serialize;

use super::contributors::beginning;
use crate::protocol::result::{ScoreBody, similarity};

/// From here on a candidate counts as a copy: more than half of the weights that either changes, both
/// change. Independent updates share next to none.
const ENOUGH: f64 = 0.5;
/// Candidates of each of the two generations that are compared with.
const KEPT: usize = 2000;
/// Contributors that may have a number before it proves nothing; also, never more than half of them.
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
    /// The first candidate of each contributor with a number, by [`Place`].
    holders: HashMap<Place, Vec<u32>>,
    contributors: HashMap<String, BTreeSet<String>>,
}

/// Digest of a plan, a place of the sketch, and the numbers there and at the next place.
type Place = u64;

#[derive(Debug)]
struct Candidate {
    contributor: String,
    submission_id: String,
    plan: String,
    sketch: Vec<Option<u64>>,
}

/// Whose candidate another resembles.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct CopyOf {
    pub(super) name: String,
    pub(super) submission_id: String,
    /// 0 to 1.
    pub(super) similarity: f64,
}

impl Copies {
    /// The most similar of the earlier candidates of others, if it is similar enough. Keeps this one.
    pub(super) fn find(
        &mut self,
        contributor: &str,
        submission_id: &str,
        body: &ScoreBody,
    ) -> Option<CopyOf> {
        let candidate = Candidate {
            contributor: contributor.to_owned(),
            submission_id: submission_id.to_owned(),
            plan: body.plan.clone(),
            sketch: body.candidate.sketch.clone(),
        };
        let places = candidate.places();
        let generations = [&self.before, &self.current].into_iter();
        let similar = generations.flat_map(|generation| generation.similar(&candidate, &places));
        let most = similar.max_by(|a, b| a.similarity.total_cmp(&b.similarity));
        if self.current.candidates.len() >= KEPT {
            self.before = std::mem::take(&mut self.current);
        }
        self.current.keep(candidate, &places);
        most
    }
}

impl Generation {
    fn similar(&self, candidate: &Candidate, places: &[Option<Place>]) -> Vec<CopyOf> {
        let contributors = self.contributors.get(&candidate.plan);
        let few = contributors.map_or(0, |c| c.len() / 2).min(FEW - 1);
        let holders = |place: &Option<Place>| place.and_then(|place| self.holders.get(&place));
        let telling: Vec<bool> = places
            .iter()
            .map(|p| holders(p).is_none_or(|h| h.len() <= few))
            .collect();
        let met = places.iter().zip(&telling).filter(|(_, telling)| **telling);
        let met: BTreeSet<u32> = met
            .filter_map(|(p, _)| holders(p))
            .flatten()
            .copied()
            .collect();
        let met = met
            .iter()
            .filter_map(|at| self.candidates.get(*at as usize));
        met.filter_map(|earlier| candidate.copy_of(earlier, &telling))
            .collect()
    }

    fn keep(&mut self, candidate: Candidate, places: &[Option<Place>]) {
        let at = u32::try_from(self.candidates.len()).unwrap_or(u32::MAX);
        for place in places.iter().flatten() {
            let holders = self.holders.entry(*place).or_default();
            let known = holders
                .iter()
                .filter_map(|at| self.candidates.get(*at as usize));
            let known = known
                .into_iter()
                .any(|c| c.contributor == candidate.contributor);
            if !known && holders.len() < FEW {
                holders.push(at);
            }
        }
        let contributors = self.contributors.entry(candidate.plan.clone()).or_default();
        contributors.insert(candidate.contributor.clone());
        self.candidates.push(candidate);
    }
}

impl Candidate {
    /// One for each pair of neighbouring numbers; none where neither is there.
    fn places(&self) -> Vec<Option<Place>> {
        let next = self.sketch.iter().cycle().skip(1);
        let place = |(at, pair): (usize, (&Option<u64>, &Option<u64>))| {
            let mut digest = DefaultHasher::new();
            (&self.plan, at, pair).hash(&mut digest);
            (pair.0.is_some() || pair.1.is_some()).then(|| digest.finish())
        };
        self.sketch
            .iter()
            .zip(next)
            .enumerate()
            .map(place)
            .collect()
    }

    /// Compares the places that tell something.
    fn copy_of(&self, earlier: &Self, telling: &[bool]) -> Option<CopyOf> {
        let others = earlier.contributor != self.contributor && earlier.plan == self.plan;
        let only = |sketch: &[Option<u64>]| -> Vec<Option<u64>> {
            let places = sketch.iter().zip(telling);
            places
                .map(|(number, telling)| number.filter(|_| *telling))
                .collect()
        };
        let similarity = similarity(&only(&self.sketch), &only(&earlier.sketch))?;
        (others && similarity >= ENOUGH).then(|| CopyOf {
            name: beginning(&earlier.contributor),
            submission_id: earlier.submission_id.clone(),
            similarity,
        })
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
        for n in 0..2 * KEPT + 1 {
            let empty = n % 2 == 0;
            let own = if empty { vec![None; 64] } else { miners.own() };
            assert_eq!(miners.send(&format!("m{}", n % 50), '1', &own), None);
        }
        assert_eq!(miners.send("thief", '1', &first), None);
    }
}
