//! What a verdict means for the delivery it answers. Pure.

use std::time::Duration;

use crate::protocol::failure::{Code, Failure, Remedy};
use crate::protocol::result::Body;
use crate::util::clock::unix_ms;

/// Before RabbitMQ 4.3 every return counts against the queue's delivery limit of 20; from here on
/// a message is handed back as a fresh one instead.
pub const RETURNS_BEFORE_REPUBLISH: u64 = 10;

/// How a judged delivery is settled; always publish, confirm, then acknowledge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// Publish the result.
    Answer,
    /// Publish the job to this rung of the retry ladder.
    Climb {
        /// From 0.
        rung: usize,
    },
    /// Publish the result and park a copy of the job.
    AnswerAndPark,
}

/// Decides how a verdict is settled. `attempt` counts from 1.
pub fn dispose(
    verdict: &Result<Body, Failure>,
    attempt: u32,
    deadline_ms: Option<u64>,
    delays: &[Duration],
) -> Disposition {
    let Err(failure) = verdict else {
        return Disposition::Answer;
    };
    match failure.code.remedy() {
        Remedy::Answer => Disposition::Answer,
        Remedy::Park => Disposition::AnswerAndPark,
        Remedy::Retry => {
            let rung = usize::try_from(attempt.saturating_sub(1)).unwrap_or(usize::MAX);
            match delays.get(rung) {
                Some(delay) if !ends_too_late(*delay, deadline_ms) => Disposition::Climb { rung },
                Some(_) if failure.code == Code::ModelVersionUnavailable => Disposition::Answer,
                Some(_) | None => Disposition::AnswerAndPark,
            }
        }
    }
}

fn ends_too_late(delay: Duration, deadline_ms: Option<u64>) -> bool {
    let delay = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
    deadline_ms.is_some_and(|deadline| unix_ms().saturating_add(delay) > deadline)
}

/// A newer job whose next rung would end after its deadline is answered `deadline_exceeded`.
pub fn too_late_for_the_next_rung(
    failure: &Failure,
    attempt: u32,
    deadline_ms: Option<u64>,
    delays: &[Duration],
) -> bool {
    let rung = usize::try_from(attempt.saturating_sub(1)).unwrap_or(usize::MAX);
    failure.code == Code::ModelVersionUnavailable
        && delays
            .get(rung)
            .is_some_and(|d| ends_too_late(*d, deadline_ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DELAYS: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(30)];

    fn failed(code: Code) -> Result<Body, Failure> {
        Err(Failure::new(code, "x"))
    }

    #[test]
    fn transient_failures_climb_every_rung_and_are_then_answered_and_parked() {
        let verdict = failed(Code::CandidateUnavailable);
        assert_eq!(
            dispose(&verdict, 1, None, &DELAYS),
            Disposition::Climb { rung: 0 }
        );
        assert_eq!(
            dispose(&verdict, 2, None, &DELAYS),
            Disposition::Climb { rung: 1 }
        );
        assert_eq!(
            dispose(&verdict, 3, None, &DELAYS),
            Disposition::AnswerAndPark
        );
        assert_eq!(dispose(&verdict, 1, None, &[]), Disposition::AnswerAndPark);
    }

    #[test]
    fn refusals_and_time_outs_are_answered_at_once() {
        for code in [
            Code::CandidateMalformed,
            Code::ScoreTimeout,
            Code::OutOfMemory,
            Code::DeadlineExceeded,
        ] {
            assert_eq!(
                dispose(&failed(code), 1, None, &DELAYS),
                Disposition::Answer
            );
        }
    }

    #[test]
    fn a_poisoned_job_is_answered_and_parked_and_never_tried_again() {
        let verdict = failed(Code::Poisoned);
        assert_eq!(
            dispose(&verdict, 1, None, &DELAYS),
            Disposition::AnswerAndPark
        );
    }

    #[test]
    fn a_newer_job_that_cannot_wait_is_answered_at_once() {
        let failure = Failure::new(Code::ModelVersionUnavailable, "x");
        let soon = Some(unix_ms() + 100);
        assert!(too_late_for_the_next_rung(&failure, 1, soon, &DELAYS));
        assert_eq!(
            dispose(&Err(failure), 1, soon, &DELAYS),
            Disposition::Answer
        );
    }
}
