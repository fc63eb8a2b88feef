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

    /// Consumers, live workers, and how many of them should have one.
    type Look = (u32, Option<u32>, Should);

    const CALM: Look = (3, Some(3), Should::Be(3));
    const LOST: Look = (2, Some(3), Should::Be(3));
    const BOTH_LOST: Look = (1, Some(3), Should::Be(3));
    const PAUSED: Look = (2, Some(3), Should::Be(2));

    /// Without Redis.
    fn away(consumers: u32) -> Look {
        (consumers, None, Should::Unknown)
    }

    /// After which looks we register anew.
    #[track_caller]
    fn expect(what: &str, looks: &[Look], expected: &[usize]) {
        let mut doubt = Doubt::default();
        let due = |(at, (consumers, alive, should)): (usize, &Look)| {
            let sees = doubt.sees(*consumers, *alive);
            (sees && doubt.is_due(*consumers, *alive, *should)).then_some(at)
        };
        let renewals: Vec<usize> = looks.iter().enumerate().filter_map(due).collect();
        assert_eq!(renewals, expected, "{what}");
    }

    #[test]
    fn a_worker_registers_anew_for_a_consumer_that_is_missing_and_once() {
        let first = |first: Look, then: Look| [vec![first], vec![then; 9]].concat();
        expect("nothing is missing", &[CALM; 4], &[]);
        expect("ours was lost", &[CALM, LOST, LOST, CALM, CALM], &[2]);
        expect("another's was lost", &first(CALM, LOST), &[2]);
        expect("one is paused", &first(CALM, PAUSED), &[]);
        expect("of another moment", &[CALM, LOST, CALM, LOST, CALM], &[]);
        let lost = (1, Some(3), Should::Be(2));
        let looks = [PAUSED, PAUSED, lost, lost, PAUSED];
        expect("one is paused, then ours is lost", &looks, &[3]);
        let looks = [LOST, LOST, LOST, BOTH_LOST, BOTH_LOST, LOST];
        expect("another's is lost, then ours", &looks, &[1, 4]);
    }

    #[test]
    fn without_redis_only_a_consumer_that_was_there_is_missing() {
        let looks = [vec![CALM], vec![away(3); 9]].concat();
        expect("Redis goes", &looks, &[]);
        let looks = [away(1), away(2), away(3), away(3)];
        expect("it was never there", &looks, &[]);
        let left = (2, Some(2), Should::Be(2));
        let looks = [CALM, left, away(2), away(2), away(2)];
        expect("a worker had left before", &looks, &[]);
        let looks = [CALM, away(3), away(2), away(2), away(2), away(2)];
        expect("one is lost", &looks, &[3]);
        let looks = [away(3), away(2), away(2), away(3), away(2), away(2)];
        expect("ours is lost, and again", &looks, &[2, 5]);
    }
}
