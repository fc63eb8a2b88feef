//! Whether our consumer may be one that the broker lost without a word: it counts consumers and names
//! none. Pure.

/// So often in a row one must be missing: records and counts are of different moments.
const LOOKS: u32 = 2;

/// In a fleet of more workers than this, while some are away, it is asked how many should have a consumer
/// only at each so many looks: to ask costs Redis a record for each.
const SMALL_FLEET: u32 = 64;
const SELDOM: u32 = 10;

/// What is known of consumers that are missing.
#[derive(Debug, Default)]
pub(super) struct Doubt {
    /// For so many we have registered anew already: they are others'.
    tried: u32,
    /// As many as there should be, for as long as nobody says it.
    most: u32,
    /// In a row, at which one was missing.
    looks: u32,
    /// All of them.
    all: u32,
}

impl Doubt {
    /// Whether it is time to ask how many there should be, where more workers live than consume.
    pub(super) fn asks(&mut self, alive: u32) -> bool {
        self.all = self.all.wrapping_add(1);
        alive <= SMALL_FLEET || self.looks > 0 || self.all.is_multiple_of(SELDOM)
    }

    /// Whether it is time to register anew: once for each that is missing, since it may be another's.
    /// There should be one for each worker that says that it has one, if Redis tells.
    pub(super) fn is_due(&mut self, consumers: u32, should: Option<u32>) -> bool {
        self.most = should.unwrap_or(self.most).max(consumers);
        let missing = self.most - consumers;
        self.tried = self.tried.min(missing);
        if missing == self.tried {
            self.looks = 0;
            return false;
        }
        self.looks += 1;
        if self.looks < LOOKS {
            return false;
        }
        (self.tried, self.looks) = (missing, 0);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Consumers, and how many there should be, if Redis tells.
    type Look = (u32, Option<u32>);

    const CALM: Look = (3, Some(3));
    const LOST: Look = (2, Some(3));
    const BOTH_LOST: Look = (1, Some(3));
    const PAUSED: Look = (2, Some(2));

    /// After which looks we register anew.
    #[track_caller]
    fn expect(what: &str, looks: &[Look], expected: &[usize]) {
        let mut doubt = Doubt::default();
        let looks = looks.iter().enumerate();
        let due = looks.filter(|(_, (consumers, should))| doubt.is_due(*consumers, *should));
        let renewals: Vec<usize> = due.map(|(at, _)| at).collect();
        assert_eq!(renewals, expected, "{what}");
    }

    fn ever(first: Look, then: Look) -> Vec<Look> {
        [vec![first], vec![then; 9]].concat()
    }

    #[test]
    fn a_worker_registers_anew_for_a_consumer_that_is_missing_and_once() {
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
