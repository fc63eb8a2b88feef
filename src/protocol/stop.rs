//! Ending an evaluation early: what a job asks for, and what its result says of it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::protocol::word::words;

/// Allows an evaluation to end before its plan does, once it is decided that the candidate does not help.
///
/// Stopping assumes that no window still to be measured gains more than K times the root mean square of the differences
/// measured so far. Where one candidate may help a few rare windows very much and hurt the rest, ask for `proven`, or do
/// not stop. K is max(8, 2.5 N^(1/4)) for a plan of N windows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Stop {
    /// How often a candidate that does help may be stopped at most, over the choice of windows; above 0, below 0.5.
    #[schemars(extend("exclusiveMinimum" = 0, "exclusiveMaximum" = 0.5))]
    pub alpha: f64,
    /// A candidate whose delta is below this, in nats per target, does not help enough; at least 0.
    #[serde(default)]
    #[schemars(extend("minimum" = 0))]
    pub margin: f64,
    /// Assume only that no loss is negative, and nothing of the windows that are still to be measured.
    #[serde(default)]
    pub proven: bool,
}

impl Stop {
    /// The same, if its numbers are within their bounds.
    ///
    /// # Errors
    /// `field: what is wrong`.
    pub fn checked(self) -> Result<Self, &'static str> {
        if !(self.alpha > 0.0 && self.alpha < 0.5) {
            return Err("alpha: must be above 0 and below 0.5");
        }
        if !(self.margin.is_finite() && self.margin >= 0.0) {
            return Err("margin: must be a finite number of at least 0");
        }
        Ok(self)
    }
}

words! {
    /// What was decided before the plan's end.
    pub enum Decision {
        /// The delta is below 0.
        Worse,
        /// The delta is below the margin.
        Futile,
    }
}

impl Decision {
    /// What the delta is said to be below, in a job with this margin.
    pub fn bound(self, margin: f64) -> f64 {
        match self {
            Self::Worse => 0.0,
            Self::Futile => margin,
        }
    }
}

/// How an evaluation was stopped. The numbers beside it are those of the windows that ran until then.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Stopped {
    /// What was decided.
    pub decision: Decision,
    /// As the job has it.
    pub alpha: f64,
    /// As the job has it.
    pub margin: f64,
    /// As the job has it.
    pub proven: bool,
    /// Windows of the plan.
    pub of: u64,
    /// The delta of the whole plan is at most this, at this alpha.
    pub upper: f64,
    /// The whole plan's numbers, where it was measured to the end all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<Finished>,
}

/// What came of a plan that was measured to its end although it was decided before.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Finished {
    /// Of the whole plan.
    pub delta: f64,
}

impl Stopped {
    /// Whether the whole plan was measured and says otherwise.
    pub fn is_contradicted(&self) -> bool {
        let bound = self.decision.bound(self.margin);
        self.finished
            .is_some_and(|finished| finished.delta >= bound)
    }
}
