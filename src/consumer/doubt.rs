//! Whether our consumer may be one that the broker lost without a word: it counts consumers and names
//! none. Pure.

/// So often in a row one must be missing: records and counts are of different moments.
const LOOKS: u32 = 2;

/// What is known of consumers that are missing.
#[derive(Debug, Default)]
pub(super) struct Doubt {
    /// So many are missing for reasons that are not ours: their workers have none, or we have
    /// registered anew since.
    explained: u32,
    /// As many as there were, for as long as nobody says how many there should be.
    most: u32,
    looks: u32,
}

/// How many consumers there should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Should {
    /// One for each worker that says that it has one.
    Be(u32),
    /// Redis does not say.
    Unknown,
}

impl Doubt {
    /// Whether more are missing than are explained; `alive` workers beat, if Redis says how many. If
    /// so, it is worth asking how many of them should have one.
    pub(super) fn sees(&mut self, consumers: u32, alive: Option<u32>) -> bool {
        self.most = self.most.max(consumers);
        let missing = alive.unwrap_or(self.most).saturating_sub(consumers);
        self.explained = self.explained.min(missing);
        let more = missing > self.explained;
        if !more {
            self.looks = 0;
            if alive.is_some() {
                self.most = consumers;
            }
        }
        more
    }

    /// Whether it is time to register anew: once for each that is missing, since it may be another's.
    pub(super) fn is_due(&mut self, consumers: u32, alive: Option<u32>, should: Should) -> bool {
        let should = match should {
            Should::Be(number) => number,
            Should::Unknown => self.most,
        };
        let missing = should > consumers;
        self.looks = if missing { self.looks + 1 } else { 0 };
        let due = self.looks >= LOOKS;
        if due || !missing {
            self.explained = alive.unwrap_or(self.most).saturating_sub(consumers);
            self.most = consumers;
            self.looks = 0;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks at consumers, live workers, and those of them that should have one; when we register anew
    /// ours is counted again if it was lost.
    fn renewals(looks: &[(u32, Option<u32>, Should)]) -> Vec<usize> {
        let mut doubt = Doubt::default();
        let due = |(at, (consumers, alive, should)): (usize, &(u32, Option<u32>, Should))| {
            let sees = doubt.sees(*consumers, *alive);
            (sees && doubt.is_due(*consumers, *alive, *should)).then_some(at)
        };
        looks.iter().enumerate().filter_map(due).collect()
    }

    #[test]
    fn a_worker_registers_anew_for_a_consumer_that_is_missing_and_once() {
        use Should::{Be, Unknown};
        let calm = (3, Some(3), Be(3));
        let lost = (2, Some(3), Be(3));
        let paused = (2, Some(3), Be(2));
        let away = |consumers| (consumers, None, Unknown);
        for (what, looks, expected) in [
            ("nothing is missing", vec![calm; 4], vec![]),
            ("ours was lost", vec![calm, lost, lost, calm, calm], vec![2]),
            (
                "another's was lost",
                [vec![calm], vec![lost; 9]].concat(),
                vec![2],
            ),
            (
                "one is paused",
                [vec![calm], vec![paused; 9]].concat(),
                vec![],
            ),
            (
                "a count of another moment",
                vec![calm, lost, calm, lost, calm],
                vec![],
            ),
            (
                "one is paused, then ours is lost",
                vec![
                    paused,
                    paused,
                    (1, Some(3), Be(2)),
                    (1, Some(3), Be(2)),
                    paused,
                ],
                vec![3],
            ),
            (
                "another's is lost, then ours",
                vec![
                    lost,
                    lost,
                    lost,
                    (1, Some(3), Be(3)),
                    (1, Some(3), Be(3)),
                    lost,
                ],
                vec![1, 4],
            ),
            (
                "Redis is away",
                [vec![calm], vec![away(3); 9]].concat(),
                vec![],
            ),
            (
                "Redis is away, and was never there",
                vec![away(1), away(2), away(3), away(3)],
                vec![],
            ),
            (
                "a worker had left before Redis went",
                vec![calm, (2, Some(2), Be(2)), away(2), away(2), away(2)],
                vec![],
            ),
            (
                "Redis is away, and one is lost",
                vec![calm, away(3), away(2), away(2), away(2), away(2)],
                vec![3],
            ),
            (
                "Redis is away, and ours is lost again",
                vec![away(3), away(2), away(2), away(3), away(2), away(2)],
                vec![2, 5],
            ),
        ] {
            assert_eq!(renewals(&looks), expected, "{what}");
        }
    }
}
