//! A job, and what will become of it.

use rand::Rng;
use rand::rngs::StdRng;

use super::merges::Scene;
use super::miners::{self, Habit, Miner};
use crate::protocol::failure::Code;

/// Of a thousand jobs: those that measure the model alone, and those of honest miners that are refused or fail.
const VALIDATIONS: u32 = 10;
const MISHAPS: [(u32, Code); 4] = [
    (3, Code::CandidateShapeMismatch),
    (2, Code::CandidateDigestMismatch),
    (2, Code::DeadlineExceeded),
    (1, Code::CandidateNonFinite),
];

/// What becomes of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// The model is measured.
    Measured,
    /// The candidate is scored.
    Scored,
    /// Candidates are merged.
    Merged(Scene),
    /// It ends without a score.
    Ended(Code),
    /// The candidate cannot be fetched, and the job is retried.
    Unavailable,
}

/// A job.
#[derive(Debug, Clone)]
pub(super) struct Job {
    /// Its number.
    pub(super) number: u64,
    /// The place of the miner.
    pub(super) miner: usize,
    pub(super) epoch: u64,
    /// When it joined the queue.
    pub(super) arrived_ms: u64,
    pub(super) attempt: u32,
    pub(super) redelivered: bool,
    pub(super) fate: Fate,
}

impl Job {
    /// A new one.
    pub(super) fn new(
        number: u64,
        (arrived_ms, epoch): (u64, u64),
        miners: &[Miner],
        random: &mut StdRng,
    ) -> Self {
        let miner = miners::any(miners, random);
        Self {
            number,
            miner,
            epoch,
            arrived_ms,
            attempt: 1,
            redelivered: false,
            fate: fate(miners[miner].habit, random),
        }
    }

    /// The merge with this number, with the number of the next job.
    pub(super) fn merge(number: u64, (arrived_ms, epoch): (u64, u64), merge: u64) -> Self {
        Self {
            number,
            miner: 0,
            epoch,
            arrived_ms,
            attempt: 1,
            redelivered: false,
            fate: Fate::Merged(Scene::of(merge)),
        }
    }

    /// Its name; miners' names may have characters that names of jobs must not.
    pub(super) fn submission_id(&self) -> String {
        let (epoch, number) = (self.epoch, self.number);
        match self.fate {
            Fate::Measured => format!("validation.epoch-{epoch}.{number}"),
            Fate::Merged(_) => format!("merge.epoch-{epoch}.{number}"),
            Fate::Scored | Fate::Ended(_) | Fate::Unavailable => {
                format!("miner-{:02}.epoch-{epoch}.{number}", self.miner + 1)
            }
        }
    }
}

fn fate(habit: Habit, random: &mut StdRng) -> Fate {
    let mut dice = random.random_range(0..1000);
    if dice < VALIDATIONS {
        return Fate::Measured;
    }
    dice -= VALIDATIONS;
    match habit {
        Habit::Malformed if dice < 900 => Fate::Ended(Code::CandidateMalformed),
        Habit::Altered if dice < 700 => Fate::Ended(Code::CandidateDigestMismatch),
        Habit::Gone => Fate::Unavailable,
        Habit::Honest | Habit::Noisy | Habit::Inverted | Habit::Copied => mishap(dice),
        Habit::Malformed | Habit::Altered => Fate::Scored,
    }
}

fn mishap(mut dice: u32) -> Fate {
    for (of_1000, code) in MISHAPS {
        if dice < of_1000 {
            return Fate::Ended(code);
        }
        dice -= of_1000;
    }
    Fate::Scored
}
