//! What a verdict means for the delivery that it answers. Pure.

use std::time::Duration;

use crate::protocol::failure::{Code, Failure, Remedy};
use crate::util::clock::millis;

/// Before RabbitMQ 4.3 every return counts against the queue's delivery limit of 20. After this many,
/// a job is published again instead of being returned.
pub const RETURNS_BEFORE_REPUBLISH: u64 = 10;

/// How a judged delivery is settled; always publish, confirm, then acknowledge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// Publish the result.
    Answer,
    /// Publish the result as [`too_late`]: the job would come back after its deadline.
    AnswerTooLate,
    /// Publish the job to this rung of the retry ladder.
    Climb {
        /// From 0.
        rung: usize,
    },
    /// Publish the result and dead-letter a copy of the job.
    AnswerAndDeadLetter,
}

/// When a job was tried, and how long it may go on.
#[derive(Debug, Clone, Copy)]
pub struct Try {
    /// From 1.
    pub attempt: u32,
    /// The job's deadline, by the wall clock.
    pub deadline_ms: Option<u64>,
    /// The time now.
    pub now_ms: u64,
}

/// Decides how a verdict is settled. `code` is that of its failure, if it is one; `delays` are those of
/// the retry ladder's rungs.
pub fn dispose(code: Option<Code>, tried: Try, delays: &[Duration]) -> Disposition {
    let Some(code) = code else {
        return Disposition::Answer;
    };
    match code.remedy() {
        Remedy::Answer => Disposition::Answer,
        Remedy::Park => Disposition::AnswerAndDeadLetter,
        Remedy::Retry => {
            let rung = usize::try_from(tried.attempt.saturating_sub(1)).unwrap_or(usize::MAX);
            match delays.get(rung) {
                Some(delay) if !tried.ends_too_late(*delay) => Disposition::Climb { rung },
                Some(_) if code == Code::ModelVersionUnavailable => Disposition::AnswerTooLate,
                Some(_) | None => Disposition::AnswerAndDeadLetter,
            }
        }
    }
}

impl Try {
    fn ends_too_late(self, delay: Duration) -> bool {
        let end = self.now_ms.saturating_add(millis(delay));
        self.deadline_ms.is_some_and(|deadline| end > deadline)
    }
}

/// The failure of a job for a newer version that would still be newer at its deadline.
pub(super) fn too_late(failure: Failure) -> Failure {
    let message = format!(
        "{}; it would still be newer when its deadline passes",
        failure.message
    );
    Failure {
        code: Code::DeadlineExceeded,
        message,
        detail: failure.detail,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DELAYS: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(30)];
    const NOW: u64 = 1_000_000;
    const CLIMB_0: Disposition = Disposition::Climb { rung: 0 };
    const CLIMB_1: Disposition = Disposition::Climb { rung: 1 };

    /// The failure, the attempt, milliseconds until the deadline, rungs, and what is done.
    type Case = (Option<Code>, u32, Option<i64>, usize, Disposition);

    #[track_caller]
    fn expect(table: &[Case]) {
        for (code, attempt, left, rungs, expected) in table {
            let tried = Try {
                attempt: *attempt,
                deadline_ms: left.and_then(|left| NOW.checked_add_signed(left)),
                now_ms: NOW,
            };
            let found = dispose(*code, tried, &DELAYS[..*rungs]);
            assert_eq!(found, *expected, "{code:?} at {tried:?}");
        }
    }

    #[test]
    fn results_and_refusals_are_answered_and_transient_failures_climb_every_rung() {
        use Disposition::{Answer, AnswerAndDeadLetter};
        let unavailable = Some(Code::CandidateUnavailable);
        expect(&[
            (None, 1, None, 2, Answer),
            (None, 9, Some(-1), 0, Answer),
            (Some(Code::CandidateMalformed), 1, None, 2, Answer),
            (Some(Code::ScoreTimeout), 1, None, 2, Answer),
            (Some(Code::OutOfMemory), 1, None, 2, Answer),
            (Some(Code::DeadlineExceeded), 1, None, 2, Answer),
            (unavailable, 1, None, 2, CLIMB_0),
            (unavailable, 2, None, 2, CLIMB_1),
            (unavailable, 3, None, 2, AnswerAndDeadLetter),
            (unavailable, 1, None, 0, AnswerAndDeadLetter),
            // An attempt that says 0 is the first.
            (unavailable, 0, None, 2, CLIMB_0),
            (Some(Code::InferenceFailed), 2, None, 2, CLIMB_1),
            (Some(Code::Poisoned), 1, None, 2, AnswerAndDeadLetter),
        ]);
    }

    #[test]
    fn no_rung_ends_after_the_deadline() {
        use Disposition::{AnswerAndDeadLetter, AnswerTooLate};
        let unavailable = Some(Code::CandidateUnavailable);
        let newer = Some(Code::ModelVersionUnavailable);
        expect(&[
            (unavailable, 1, Some(5000), 2, CLIMB_0),
            (unavailable, 1, Some(4999), 2, AnswerAndDeadLetter),
            (unavailable, 2, Some(29_999), 2, AnswerAndDeadLetter),
            (newer, 1, Some(5000), 2, CLIMB_0),
            (newer, 1, Some(4999), 2, AnswerTooLate),
            (newer, 2, Some(-1), 2, AnswerTooLate),
            (newer, 3, Some(-1), 2, AnswerAndDeadLetter),
            (newer, 3, None, 2, AnswerAndDeadLetter),
        ]);
    }

    #[test]
    fn a_newer_job_that_cannot_wait_says_why_it_was_newer() {
        let newer = Failure::new(Code::ModelVersionUnavailable, "model_version: 8").with("job", 8);
        let failure = too_late(newer.clone());
        assert_eq!(failure.code, Code::DeadlineExceeded);
        assert!(failure.message.starts_with(&newer.message), "{failure}");
        assert_eq!(failure.detail, newer.detail);
    }
}
