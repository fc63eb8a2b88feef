//! From the losses of an evaluation to its outcome, whether it ran to the plan's end or was ended before.

use super::sequential::{SequentialTest, gain_ratio};
use super::statistics::{Paired, paired};
use super::{Early, Evaluation, Laps};
use crate::model::plan::Plan;
use crate::protocol::failure::{Code, Failure};
use crate::protocol::stop::{Decision, Finished, Stop, Stopped};

/// Watches an evaluation that may end early.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) test: SequentialTest,
    pub(super) early: Early,
}

impl Watch {
    /// Takes the losses of the next windows; whether no others are needed.
    pub(super) fn ends(&mut self, after: &[f64]) -> bool {
        self.test.measured(after);
        self.test.decided().is_some() && !self.early.finish
    }

    /// The early end, if there was one.
    pub(super) fn end(&self) -> Option<End> {
        let Early { stop, finish } = self.early;
        self.test.decided().map(|decided| End {
            decision: decided.decision,
            windows: decided.windows,
            upper: self.test.upper(decided.decision),
            stop,
            finish,
        })
    }
}

/// What was decided before the plan's end.
#[derive(Debug, Clone, Copy)]
pub(super) struct End {
    decision: Decision,
    /// Windows measured by then.
    windows: usize,
    upper: f64,
    stop: Stop,
    /// The plan was measured to its end all the same.
    finish: bool,
}

/// The losses of a plan's windows, before and after.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measured<'a> {
    pub(super) plan: &'a Plan,
    /// Windows of a micro-batch.
    pub(super) batch: usize,
    pub(super) before: &'a [f64],
    /// NaN where an evaluation did not come that was ended early.
    pub(super) after: &'a [f64],
}

impl Measured<'_> {
    /// The outcome, with the part of the graph that the passes started at, and the time that they took.
    ///
    /// # Errors
    /// When the candidate makes a loss non-finite.
    pub(super) fn evaluation(
        self,
        end: Option<End>,
        from: Option<usize>,
        laps: Laps,
    ) -> Result<Evaluation, Failure> {
        let all: Vec<usize> = (0..self.before.len()).collect();
        let is_whole = end.is_none_or(|end| end.finish);
        if is_whole {
            self.check_finite()?;
        }
        let ran = end.map_or(all.clone(), |end| self.first(end.windows));
        let stopped = end.map(|end| Stopped {
            decision: end.decision,
            alpha: end.stop.alpha,
            margin: end.stop.margin,
            proven: end.stop.proven,
            of: all.len() as u64,
            upper: end.upper,
            finished: end.finish.then(|| Finished {
                delta: self.paired(&all).delta,
            }),
        });
        let paired = self.paired(&ran);
        let tokens = ran.iter().filter_map(|at| self.plan.targets.get(*at)).sum();
        Ok(Evaluation {
            paired: match stopped {
                // The windows were not chosen without looking at them.
                Some(_) => Paired {
                    stderr: None,
                    ci95: None,
                    ..paired
                },
                None => paired,
            },
            windows: ran.len() as u64,
            tokens,
            stopped,
            gain_ratio: is_whole.then(|| self.gain_ratio()).flatten(),
            from,
            laps,
        })
    }

    fn check_finite(self) -> Result<(), Failure> {
        match self.after.iter().position(|loss| !loss.is_finite()) {
            None => Ok(()),
            Some(window) => {
                let message = format!("the candidate makes the loss of window {window} non-finite");
                Err(Failure::new(Code::NonFiniteLoss, message))
            }
        }
    }

    /// The places of the windows that were measured first, in the order of the plan.
    fn first(self, windows: usize) -> Vec<usize> {
        let mut places: Vec<usize> = self.plan.order.iter().copied().take(windows).collect();
        places.sort_unstable();
        places
    }

    fn paired(self, places: &[usize]) -> Paired {
        let of = |losses: &[f64]| places.iter().map(|at| losses[*at]).collect::<Vec<f64>>();
        paired(&of(self.before), &of(self.after))
    }

    fn gain_ratio(self) -> Option<f64> {
        let order = self.plan.order.iter();
        let differences: Vec<f64> = order.map(|at| self.before[*at] - self.after[*at]).collect();
        gain_ratio(&differences, self.batch)
    }
}
