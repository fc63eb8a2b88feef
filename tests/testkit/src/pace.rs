//! Jobs that take a while: of the hazard model, whose loop can be made as long as a test needs.

use serde_json::Value;

use crate::aggregator::Aggregator;
use crate::hazard::hazard_job;

/// Turns of the loop: enough to be measured, few enough to be quick.
const PROBE: f64 = 20_000.0;

/// How fast a worker of this machine is.
pub struct Pace {
    turns_per_second: f64,
}

impl Pace {
    /// Measures it with two jobs; the first also makes the baseline.
    #[track_caller]
    pub fn measure(aggregator: &Aggregator) -> Self {
        let forward = |id: &str| {
            aggregator.submit(&looping(id, PROBE));
            let result = aggregator.result(id).json();
            let forward = result["timings_ms"]["forward"].as_f64();
            forward.unwrap_or_else(|| panic!("a scored probe: {result}"))
        };
        forward("probe-1");
        let milliseconds = forward("probe-2");
        Self {
            turns_per_second: PROBE * 1000.0 / milliseconds,
        }
    }

    /// A job that computes for about so long, and can be ended at any time.
    pub fn job(&self, submission_id: &str, seconds: f64) -> Value {
        looping(submission_id, self.turns_per_second * seconds)
    }
}

fn looping(submission_id: &str, turns: f64) -> Value {
    #[expect(clippy::cast_possible_truncation, reason = "a number of turns")]
    let size = -turns as f32;
    hazard_job(submission_id, size)
}
