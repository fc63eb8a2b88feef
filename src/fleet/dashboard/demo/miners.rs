//! Who sends updates, and what they are like.

use rand::Rng;
use rand::rngs::StdRng;

/// What a miner's updates are like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Habit {
    /// They help.
    Honest,
    /// They neither help nor harm.
    Noisy,
    /// They harm: their sign is wrong.
    Inverted,
    /// They do not parse.
    Malformed,
    /// Their digests are wrong.
    Altered,
    /// They cannot be fetched.
    Gone,
    /// They are those of [`LEADER`].
    Copied,
}

/// How many miners there are.
const MINERS: usize = 40;
/// The miner whose updates are copied, by its place.
pub(super) const LEADER: usize = 2;
/// The miners that are not honest, by their place.
const HABITS: [(usize, Habit); 10] = [
    (4, Habit::Noisy),
    (7, Habit::Inverted),
    (10, Habit::Copied),
    (12, Habit::Noisy),
    (13, Habit::Gone),
    (16, Habit::Copied),
    (18, Habit::Malformed),
    (22, Habit::Noisy),
    (25, Habit::Altered),
    (30, Habit::Noisy),
];
/// Names that a page must not take for more than text, and one as long as some are.
const NAMES: [(usize, &str); 2] = [
    (9, "<b>miner</b>"),
    (
        28,
        "5HGjWAeFDfFCWPsjFQdVV2Msvz2XtMktvgocEZcCj68kUMaw-hotkey-of-miner",
    ),
];

/// One of them.
#[derive(Debug)]
pub(super) struct Miner {
    pub(super) name: String,
    pub(super) habit: Habit,
    /// How much its updates help: 1 = as usual.
    pub(super) skill: f64,
    /// The share of this one and all before it in the submissions.
    up_to: f64,
}

/// All of them; some send far more than others.
pub(super) fn miners(random: &mut StdRng) -> Vec<Miner> {
    let weight = |place: usize| eagerness(habit(place)) / (place as f64 + 1.0).powf(0.8);
    let whole: f64 = (0..MINERS).map(weight).sum();
    let mut up_to = 0.0;
    let miner = |place| {
        up_to += weight(place) / whole;
        let name = NAMES.iter().find(|(known, _)| *known == place);
        Miner {
            name: name.map_or_else(|| format!("miner-{:02}", place + 1), |(_, n)| (*n).into()),
            habit: habit(place),
            skill: random.random_range(0.4..2.0),
            up_to,
        }
    };
    (0..MINERS).map(miner).collect()
}

fn habit(place: usize) -> Habit {
    let known = HABITS.iter().find(|(known, _)| *known == place);
    known.map_or(Habit::Honest, |(_, habit)| *habit)
}

/// How much it sends, compared with an honest one in its place.
fn eagerness(habit: Habit) -> f64 {
    match habit {
        Habit::Honest | Habit::Noisy | Habit::Inverted | Habit::Copied => 1.0,
        Habit::Malformed | Habit::Altered => 0.7,
        Habit::Gone => 0.25,
    }
}

/// The place of the one whose updates cannot be fetched, and its share in the submissions.
pub(super) fn gone(miners: &[Miner]) -> Option<(usize, f64)> {
    let place = miners.iter().position(|miner| miner.habit == Habit::Gone)?;
    let before = place
        .checked_sub(1)
        .map_or(0.0, |before| miners[before].up_to);
    Some((place, miners[place].up_to - before))
}

/// Whoever sends the next one.
pub(super) fn any(miners: &[Miner], random: &mut StdRng) -> usize {
    let share: f64 = random.random();
    let place = miners.partition_point(|miner| miner.up_to < share);
    place.min(miners.len().saturating_sub(1))
}
