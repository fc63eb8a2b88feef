//! The sequential test by which an evaluation may end early: a bet, window by window in the order of measuring, that
//! the candidate does not help. A plan is a finite population and its order is drawn by a hash, so what has been
//! measured is a sample of it without replacement.
//!
//! If the delta of the whole plan is at least a bound, and no window gains more than its ceiling, each factor of the
//! wealth has an expectation of at most 1, given what was measured before. By Ville's inequality the wealth then
//! reaches 1 / alpha with a probability of at most alpha, however often one looks.
//!
//! A loss bounds what a window can gain; the differences so far tell what it may be expected to gain at most. The
//! second is an assumption, so as little as possible hangs on it: a gain that breaks it ends the test, a loss as large
//! takes back what was won, and a sample of some size must have been seen.

use crate::protocol::stop::{Decision, Stop};

/// A shorter plan is measured whole: little could be saved, and there is little to go by.
pub const LEAST_WINDOWS: usize = 32;
/// How much differences vary is not known from fewer windows.
const LEAST_LOOK: usize = 8;
/// Halvings by which the upper bound is found: as many as an f64 has digits.
const HALVINGS: usize = 64;

/// No evaluation of so many windows is decided before this one.
pub fn earliest(windows: usize) -> usize {
    match windows < LEAST_WINDOWS {
        true => windows,
        false => 2 * LEAST_LOOK,
    }
}

/// How many times the root mean square of the differences so far one window may gain in a plan of this length:
/// what the test assumes, unless it is to be proven.
pub fn gain_limit(windows: usize) -> f64 {
    (2.5 * real(windows).powf(0.25)).max(8.0)
}

/// The largest gain of a window over the root mean square of the differences measured before it: what the test
/// assumes to be at most [`gain_limit`]. The differences are in the order of measuring, so many at a time. None for a
/// plan that is too short for the test.
pub fn gain_ratio(differences: &[f64], batch: usize) -> Option<f64> {
    let (mut spread, mut largest) = (Spread::default(), 0.0_f64);
    for differences in differences.chunks(look(batch)) {
        for difference in differences {
            if let Some(known) = spread.known().filter(|known| *known > 0.0) {
                largest = largest.max(difference / known);
            }
            spread.add(*difference);
        }
        spread.look();
    }
    (differences.len() >= LEAST_WINDOWS).then_some(largest)
}

/// Windows between two looks: whole micro-batches.
fn look(batch: usize) -> usize {
    let batch = batch.max(1);
    batch * LEAST_LOOK.div_ceil(batch)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "window counts are far below 2^52"
)]
fn real(windows: usize) -> f64 {
    windows as f64
}

/// How much the differences vary, as far as they are measured.
#[derive(Debug, Default)]
struct Spread {
    windows: f64,
    squares: f64,
    /// The root mean square of those before the last look.
    looked: Option<f64>,
}

impl Spread {
    /// Before the first look nothing is known. Within a look it may grow at once, but it does not shrink.
    fn known(&self) -> Option<f64> {
        let looked = self.looked?;
        Some(looked.max((self.squares / self.windows).sqrt() / 2.0))
    }

    fn add(&mut self, difference: f64) {
        self.windows += 1.0;
        self.squares += difference * difference;
    }

    fn look(&mut self) {
        self.looked = Some((self.squares / self.windows).sqrt());
    }
}

/// What was decided, and from how many windows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Decided {
    /// That the delta is below 0, or only below the margin.
    pub decision: Decision,
    /// The windows that had been measured.
    pub windows: usize,
}

/// The test of one candidate on one plan.
#[derive(Debug)]
pub struct SequentialTest {
    stop: Stop,
    /// Losses before, in the order of measuring.
    before: Vec<f64>,
    /// The largest of them from each window on: no loss becomes negative, so no later window gains more.
    largest: Vec<f64>,
    look: usize,
    limit: f64,
    spread: Spread,
    bets: Vec<Bet>,
    worse: Wealth,
    futile: Wealth,
    /// A window has gained what none was to gain: whatever follows, the plan is measured whole.
    void: bool,
    decided: Option<Decided>,
}

/// A window's difference, and what is known of it before it is measured.
#[derive(Debug, Clone, Copy)]
struct Bet {
    difference: f64,
    /// The most that it may gain.
    ceiling: f64,
    /// The part of that which is assumed; infinite where nothing is.
    assumed: f64,
}

/// The wealth of bets that the delta is below a bound, as a logarithm. It begins at 1.
#[derive(Debug, Clone, Copy)]
struct Wealth {
    /// What the windows that are left gain in sum, if the delta is the bound.
    rest: f64,
    /// Windows that are left.
    left: f64,
    log: f64,
}

impl Wealth {
    fn of(bound: f64, windows: usize) -> Self {
        let left = real(windows);
        Self {
            rest: bound * left,
            left,
            log: 0.0,
        }
    }

    fn stake(&mut self, bet: Bet) {
        if bet.difference <= -bet.assumed {
            // Windows vary more than those before it did: what these have won says little.
            self.log = self.log.min(0.0);
        } else if bet.ceiling < f64::INFINITY {
            // What they gain on average. To count on less is to win less.
            let needed = (self.rest / self.left).min(bet.ceiling / 2.0);
            self.log += ((bet.ceiling - bet.difference) / (bet.ceiling - needed)).ln();
        }
        self.rest -= bet.difference;
        self.left -= 1.0;
    }
}

impl SequentialTest {
    /// Of a plan with these losses before, in the order of measuring and so many at a time. Where a loss may be
    /// negative, only the differences so far tell how much a window may gain.
    pub fn new(stop: Stop, before: Vec<f64>, batch: usize, may_be_negative: bool) -> Self {
        let mut largest = before.clone();
        if may_be_negative {
            largest.fill(f64::INFINITY);
        }
        for at in (1..largest.len()).rev() {
            largest[at - 1] = largest[at - 1].max(largest[at]);
        }
        Self {
            look: look(batch),
            limit: gain_limit(before.len()),
            spread: Spread::default(),
            bets: Vec::with_capacity(before.len()),
            worse: Wealth::of(0.0, before.len()),
            futile: Wealth::of(stop.margin, before.len()),
            void: before.len() < LEAST_WINDOWS,
            decided: None,
            stop,
            largest,
            before,
        }
    }

    /// What was decided, once it was.
    pub fn decided(&self) -> Option<Decided> {
        self.decided
    }

    /// Takes the losses after of the next windows.
    pub fn measured(&mut self, after: &[f64]) {
        for after in after {
            if self.void || self.decided.is_some() {
                return;
            }
            self.bet(*after);
            if self.bets.len().is_multiple_of(self.look) {
                self.spread.look();
                self.decided = self.may_decide().then(|| self.decision()).flatten();
            }
        }
    }

    fn bet(&mut self, after: f64) {
        let at = self.bets.len();
        let assumed = self.assumed();
        let bet = Bet {
            difference: self.before[at] - after,
            ceiling: self.largest[at].min(assumed),
            assumed,
        };
        // A loss that is not finite refuses the candidate, once the plan is measured.
        self.void = bet.difference >= bet.ceiling || !bet.difference.is_finite();
        self.worse.stake(bet);
        if self.stop.margin > 0.0 {
            self.futile.stake(bet);
        }
        self.spread.add(bet.difference);
        self.bets.push(bet);
    }

    /// The most that the next window is assumed to gain. Nothing is assumed where nothing has differed.
    fn assumed(&self) -> f64 {
        let known = match self.spread.known() {
            Some(known) if !self.stop.proven => known.max(self.stop.margin),
            Some(_) | None => return f64::INFINITY,
        };
        match known > 0.0 {
            true => self.limit * known,
            false => f64::INFINITY,
        }
    }

    /// Not after the first look alone; and after the last window nothing is left to save.
    fn may_decide(&self) -> bool {
        let (measured, windows) = (self.bets.len(), self.before.len());
        !self.void && self.is_sample(measured) && measured > self.look && measured < windows
    }

    /// Whether enough has been measured, to the nearest look, for an assumption on the rest. Of windows that are unlike the
    /// others, as many as the square root of the plan's, none is among them about as seldom as alpha says.
    fn is_sample(&self, measured: usize) -> bool {
        let least = self.enough() * real(self.before.len()).sqrt();
        self.stop.proven || real(measured) + real(self.look) / 2.0 >= least
    }

    fn decision(&self) -> Option<Decided> {
        let enough = self.enough();
        let decision = match (self.worse.log >= enough, self.futile.log >= enough) {
            (true, _) => Decision::Worse,
            (false, true) => Decision::Futile,
            (false, false) => return None,
        };
        Some(Decided {
            decision,
            windows: self.bets.len(),
        })
    }

    fn enough(&self) -> f64 {
        -self.stop.alpha.ln()
    }

    /// The delta of the whole plan is at most this, once that is decided: the smallest bound that the same bets would have
    /// decided.
    pub fn upper(&self, decision: Decision) -> f64 {
        let decides = |bound: f64| {
            let mut wealth = Wealth::of(bound, self.before.len());
            self.bets.iter().for_each(|bet| wealth.stake(*bet));
            wealth.log >= self.enough()
        };
        let decided = decision.bound(self.stop.margin);
        let (mut step, mut low, mut high) = (1.0, decided, decided);
        // The lower the bound, the less is won by betting on it.
        while low.is_finite() && decides(low) {
            (high, low, step) = (low, low - step, step * 2.0);
        }
        for _ in 0..HALVINGS {
            let middle = low + (high - low) / 2.0;
            match decides(middle) {
                true => high = middle,
                false => low = middle,
            }
        }
        high
    }
}

#[cfg(test)]
mod tests;
