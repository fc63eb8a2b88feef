//! What the story starts with: how much is to be done, and the jobs that are retried already.

use super::job::{Fate, Job};
use super::part::Part;
use super::tide::Tide;
use super::{Demo, FIRST_JOB, RETRIED_S, SMALL, miners, record};

/// What the fleet can do in the busiest hour, of what it is asked to do; and a small one.
const HEADROOM: f64 = 1.03;
const SMALL_HEADROOM: f64 = 1.35;
/// Larger ones have fewer jobs for each worker.
const LARGE: usize = 400;
/// When it leaves each of the retry queues.
const RETRY_ENDS_S: [f64; 3] = [5.0, 35.0, RETRIED_S];
/// Jobs that are tried for the last time when the story starts.
const LAST_TRIES: u64 = 2;

/// What is to be done and how fast workers are, so that all of them together just do it.
pub(super) fn plan(parts: &[(usize, Part)], start_ms: u64) -> (Tide, f64) {
    let workers = parts.len() as f64;
    let (rate, headroom) = match parts.len() {
        ..SMALL => (workers / 3.0, SMALL_HEADROOM),
        SMALL..LARGE => (workers * 0.3, HEADROOM),
        LARGE.. => (workers * 0.2, HEADROOM),
    };
    let counted = parts.iter().filter(|(_, part)| part.is_counted());
    let power = |(place, part): &(usize, Part)| 1.0 / record::gpu(*place, *part).1;
    let whole: f64 = counted.clone().map(power).sum();
    let rack = counted.filter(|(_, part)| *part == Part::Rack).map(power);
    let tide = Tide {
        start_ms,
        rate,
        capable: rate * headroom,
        rack: rack.sum::<f64>() / whole,
    };
    (tide, 1000.0 * whole / (rate * headroom))
}

impl Demo {
    /// Jobs that have been retried for some time already, and a few that are tried for the last time.
    pub(super) fn begin_retries(&mut self) {
        let Some((miner, share)) = miners::gone(&self.verdicts.miners) else {
            return;
        };
        let waiting = (self.tide.rate * share * RETRIED_S).ceil() as u64;
        for number in 0..waiting {
            let age_s = RETRIED_S * (number as f64 + 0.9) / waiting as f64;
            let attempt = RETRY_ENDS_S.partition_point(|end_s| *end_s < age_s);
            let job = self.unavailable(number, miner, age_s);
            let due_ms = self.tide.at_ms(RETRY_ENDS_S[attempt] - age_s);
            let attempt = attempt as u32 + 1;
            self.line.retry_at(Job { attempt, ..job }, due_ms);
        }
        let attempt = RETRY_ENDS_S.len() as u32 + 1;
        let oldest_s = self.line.oldest_ms(self.at_ms).unwrap_or(0) as f64 / 1000.0;
        for number in waiting..waiting + LAST_TRIES {
            let job = self.unavailable(number, miner, oldest_s);
            self.line.give_back(Job { attempt, ..job });
        }
    }

    fn unavailable(&self, number: u64, miner: usize, age_s: f64) -> Job {
        Job {
            number: FIRST_JOB - 10_000 + number,
            miner,
            epoch: self.tide.epoch(-age_s),
            arrived_ms: self.tide.at_ms(-age_s),
            attempt: 1,
            redelivered: false,
            fate: Fate::Unavailable,
        }
    }
}
