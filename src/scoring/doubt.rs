//! Whether our consumer may be one that the broker has lost silently: the broker counts consumers but does
//! not name them. Pure.

/// A consumer must be missing at so many looks in a row: heartbeats and the broker's count are of
/// different moments.
const LOOKS: u32 = 2;
/// In a larger fleet, of which some workers are away, the number of expected consumers is asked for only
/// at every [`SELDOM`]th look, because Redis has to read a record for each worker.
const SMALL_FLEET: u32 = 64;
const SELDOM: u32 = 10;

/// What is known of missing consumers.
#[derive(Debug, Default)]
pub(super) struct Doubt {
    /// For so many missing ones we have registered again already, so they are others'.
    tried: u32,
    /// How many consumers there should be, or the most that were seen while Redis does not tell.
    expected: u32,
    /// At so many looks in a row one was missing.
    missed: u32,
    /// All looks.
    looks: u32,
}

impl Doubt {
    /// Whether to ask how many consumers there should be, where more workers are alive than consume.
    pub(super) fn asks(&mut self, alive: u32) -> bool {
        self.looks = self.looks.wrapping_add(1);
        alive <= SMALL_FLEET || self.missed > 0 || self.looks.is_multiple_of(SELDOM)
    }

    /// Whether to register again: once for each missing consumer, since it may be another's. `expected`
    /// is the number of workers that say they have a consumer, if Redis tells.
    pub(super) fn is_due(&mut self, consumers: u32, expected: Option<u32>) -> bool {
        self.expected = expected.unwrap_or(self.expected).max(consumers);
        let missing = self.expected - consumers;
        self.tried = self.tried.min(missing);
        if missing == self.tried {
            self.missed = 0;
            return false;
        }
        self.missed += 1;
        if self.missed < LOOKS {
            return false;
        }
        (self.tried, self.missed) = (missing, 0);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many consumers there are, and should be, if Redis tells.
    type Look = (u32, Option<u32>);

    const CALM: Look = (3, Some(3));
    const LOST: Look = (2, Some(3));
    const BOTH_LOST: Look = (1, Some(3));
    const PAUSED: Look = (2, Some(2));

    /// After which looks we register again.
    #[track_caller]
    fn expect(what: &str, looks: &[Look], expected: &[usize]) {
        let mut doubt = Doubt::default();
        let looks = looks.iter().enumerate();
        let due = looks.filter(|(_, (consumers, expected))| doubt.is_due(*consumers, *expected));
        let renewals: Vec<usize> = due.map(|(at, _)| at).collect();
        assert_eq!(renewals, expected, "{what}");
    }

    fn ever(first: Look, then: Look) -> Vec<Look> {
        [vec![first], vec![then; 9]].concat()
    }

    #[test]
    fn a_worker_registers_again_for_a_consumer_that_is_missing_and_once() {
        expect("nothing is missing", &[CALM; 4], &[]);
        expect("ours was lost", &[CALM, LOST, LOST, CALM, CALM], &[2]);
        expect("another's was lost", &ever(CALM, LOST), &[2]);
        expect("one is paused", &ever(CALM, PAUSED), &[]);
        expect("of another moment", &[CALM, LOST, CALM, LOST, CALM], &[]);
        let lost = (1, Some(2));
        let looks = [PAUSED, PAUSED, lost, lost, PAUSED];
        expect("one is paused, then ours is lost", &looks, &[3]);
        let looks = ever(PAUSED, LOST);
        expect("one is back, and ours was lost meanwhile", &looks, &[2]);
        let looks = [LOST, LOST, LOST, BOTH_LOST, BOTH_LOST, LOST];
        expect("another's is lost, then ours", &looks, &[1, 4]);
    }

    #[test]
    fn a_large_fleet_is_asked_seldom_unless_one_is_missing() {
        let mut doubt = Doubt::default();
        assert!((0..30).all(|_| doubt.asks(SMALL_FLEET)));
        let asked = (0..30).filter(|_| doubt.asks(SMALL_FLEET + 1));
        assert_eq!(asked.count(), 3);
        assert!(!doubt.is_due(99, Some(100)));
        assert!(doubt.asks(100), "to make sure");
        assert!(doubt.is_due(99, Some(100)));
        assert!(!doubt.asks(100));
    }

    #[test]
    fn without_redis_only_a_consumer_that_was_there_is_missing() {
        let away = |consumers| (consumers, None);
        expect("Redis goes", &ever(CALM, away(3)), &[]);
        let looks = [away(1), away(2), away(3), away(3)];
        expect("it was never there", &looks, &[]);
        let looks = [CALM, PAUSED, away(2), away(2), away(2)];
        expect("a worker had left before", &looks, &[]);
        let looks = [CALM, away(3), away(2), away(2), away(2), away(2)];
        expect("one is lost", &looks, &[3]);
        let looks = [away(3), away(2), away(2), away(3), away(2), away(2)];
        expect("ours is lost, and again", &looks, &[2, 5]);
    }
}
