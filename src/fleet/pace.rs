//! How fast workers answer jobs, and how busy their devices are: from one look to the next.

use std::collections::{BTreeMap, VecDeque};

use crate::fleet::observer::{View, Worker};

/// Looks that are kept.
const LOOKS: usize = 120;
/// A rate is the mean over this time.
const MEAN_MS: u64 = 10_000;

/// The paces of all live workers.
#[derive(Debug, Clone, Default)]
pub struct Paces {
    /// By incarnation.
    paces: BTreeMap<String, Pace>,
}

/// The pace of one incarnation of a worker.
#[derive(Debug, Clone, Default)]
pub struct Pace {
    /// When it was last seen, and what it had answered by then.
    seen: Option<(u64, u64)>,
    /// Oldest first.
    steps: VecDeque<Step>,
    /// Whether the device computed at a look; the lowest bit is the last look.
    computed: u128,
    looks: usize,
}

/// What happened between two looks.
#[derive(Debug, Clone, Copy)]
struct Step {
    ms: u64,
    jobs: u64,
}

/// Jobs per second over the last of these steps, as far as the mean goes.
#[expect(clippy::cast_precision_loss, reason = "jobs of some seconds")]
fn mean<'a>(steps: impl DoubleEndedIterator<Item = &'a Step>) -> f64 {
    let mut sum = Step { ms: 0, jobs: 0 };
    for step in steps.rev() {
        sum.ms = sum.ms.saturating_add(step.ms);
        sum.jobs = sum.jobs.saturating_add(step.jobs);
        if sum.ms >= MEAN_MS {
            break;
        }
    }
    match sum.ms {
        0 => 0.0,
        ms => sum.jobs as f64 * 1e3 / ms as f64,
    }
}

impl Paces {
    /// Takes one look at each worker, and forgets those that are gone.
    pub fn see(&mut self, view: &View) {
        let mut before = std::mem::take(&mut self.paces);
        for Worker { record, .. } in &view.workers {
            let known = before.remove_entry(&record.incarnation);
            // Records without an incarnation share one entry; the first of them counts.
            let (incarnation, mut pace) =
                known.unwrap_or_else(|| (record.incarnation.clone(), Pace::default()));
            let busy = record.progress.busy_ms > 0;
            pace.note(view.at_ms, record.jobs.answered(), busy);
            self.paces.entry(incarnation).or_insert(pace);
        }
    }

    /// The pace of an incarnation that was seen at the last look.
    pub fn of(&self, incarnation: &str) -> Option<&Pace> {
        self.paces.get(incarnation)
    }

    /// Jobs per second of all of them.
    pub fn rate(&self) -> f64 {
        self.paces.values().map(Pace::rate).sum()
    }

    /// The share of the last looks at which the device of a ready worker computed; none if nobody is ready.
    #[expect(clippy::cast_precision_loss, reason = "workers are few")]
    pub fn busy(&self, view: &View, looks: usize) -> Option<f64> {
        let ready = view.workers.iter().filter(|worker| worker.record.ready);
        let shares = ready.filter_map(|worker| self.of(&worker.record.incarnation));
        let (count, sum) = shares.fold((0_usize, 0.0), |(count, sum), pace| {
            (count + 1, sum + pace.busy(looks))
        });
        (count > 0).then(|| sum / count as f64)
    }
}

impl Pace {
    /// Takes a look: when, what the worker has answered since its start, whether its device computes.
    pub fn note(&mut self, at_ms: u64, answered: u64, busy: bool) {
        self.computed = self.computed << 1 | u128::from(busy);
        self.looks = (self.looks + 1).min(LOOKS);
        let Some((then, before)) = self.seen.replace((at_ms, answered)) else {
            return;
        };
        let (ms, jobs) = (at_ms.saturating_sub(then), answered.saturating_sub(before));
        if ms > 0 {
            self.steps.push_back(Step { ms, jobs });
        }
        if self.steps.len() > LOOKS {
            self.steps.pop_front();
        }
    }

    /// Jobs per second, mean of the last 10 s; 0 before the second look.
    pub fn rate(&self) -> f64 {
        mean(self.steps.iter())
    }

    /// The same at each look but the first, oldest first, at most 120.
    pub fn rates(&self) -> impl Iterator<Item = f64> {
        (1..=self.steps.len()).map(|end| mean(self.steps.range(..end)))
    }

    /// The share of the last looks, at most 120, at which the device computed.
    #[expect(clippy::cast_precision_loss, reason = "at most 120")]
    pub fn busy(&self, looks: usize) -> f64 {
        let looks = looks.min(self.looks);
        let busy = (0..looks).filter(|look| self.computed >> look & 1 == 1);
        match looks {
            0 => 0.0,
            _ => busy.count() as f64 / looks as f64,
        }
    }

    /// Whether the device computed at each of the last looks, oldest first, at most 120.
    pub fn busy_looks(&self) -> impl Iterator<Item = bool> {
        (0..self.looks)
            .rev()
            .map(|look| self.computed >> look & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_the_mean_of_ten_seconds() {
        let mut pace = Pace::default();
        assert_eq!(pace.rate(), 0.0);
        pace.note(1000, 500, false);
        assert_eq!((pace.rate(), pace.rates().count()), (0.0, 0));
        // 100 jobs in the first second, then one a second.
        pace.note(2000, 600, false);
        assert_eq!(pace.rate(), 100.0);
        for second in 1..=10_u64 {
            pace.note(2000 + second * 1000, 600 + second, false);
        }
        assert_eq!(pace.rate(), 1.0);
        let rates: Vec<f64> = pace.rates().collect();
        assert_eq!(
            (rates.len(), rates[0], rates[1], rates[10]),
            (11, 100.0, 50.5, 1.0)
        );
    }

    #[test]
    fn looks_at_the_same_time_or_back_in_time_make_no_rate() {
        let mut pace = Pace::default();
        for (at_ms, answered) in [(5000, 1), (5000, 9), (4000, 9), (4500, 8)] {
            pace.note(at_ms, answered, false);
        }
        assert_eq!(pace.rates().collect::<Vec<_>>(), [0.0]);
    }

    #[test]
    fn busy_is_a_share_of_the_looks_asked_for() {
        let mut pace = Pace::default();
        assert_eq!(pace.busy(10), 0.0);
        for look in 0..200 {
            pace.note(look * 1000, 0, look >= 190);
        }
        assert_eq!((pace.busy(10), pace.busy(20)), (1.0, 0.5));
        assert_eq!(pace.busy(usize::MAX), 10.0 / 120.0);
        let looks: Vec<bool> = pace.busy_looks().collect();
        assert_eq!((looks.len(), looks[109], looks[110]), (120, false, true));
        assert_eq!(pace.rates().count(), LOOKS);
    }
}
