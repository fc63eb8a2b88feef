//! How fast a worker answers jobs.

use std::collections::VecDeque;

/// The most looks a sparkline shows.
pub(super) const KEPT: u16 = 12;
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Jobs per second of one incarnation of a worker, at the last looks, oldest first.
#[derive(Debug, Default)]
pub(super) struct Pace {
    seen: Option<(u64, u64)>,
    rates: VecDeque<f64>,
}

impl Pace {
    #[expect(clippy::cast_precision_loss, reason = "jobs between two looks")]
    pub(super) fn note(&mut self, at_ms: u64, answered: u64) {
        if let Some((then, before)) = self.seen.replace((at_ms, answered)) {
            let seconds = at_ms.saturating_sub(then) as f64 / 1e3;
            if seconds > 0.0 {
                self.rates
                    .push_back(answered.saturating_sub(before) as f64 / seconds);
            }
        }
        if self.rates.len() > usize::from(KEPT) {
            self.rates.pop_front();
        }
    }

    pub(super) fn now(&self) -> Option<f64> {
        self.rates.back().copied()
    }

    /// The last looks, as many as there is room for.
    pub(super) fn sparkline(&self, room: u16) -> String {
        let surplus = self.rates.len().saturating_sub(room.into());
        let rates = || self.rates.iter().skip(surplus);
        let most = rates().copied().fold(0.0, f64::max);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "0 to 7"
        )]
        let bar = |rate: &f64| match most > 0.0 {
            true => BARS[((rate / most * 7.0).round() as usize).min(7)],
            false => BARS[0],
        };
        rates().map(bar).collect()
    }
}
