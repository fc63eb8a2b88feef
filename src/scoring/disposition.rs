//! What a verdict means for the delivery that it answers. Pure.

use std::time::Duration;

use crate::protocol::failure::{Code, Failure, Remedy};

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
        let delay = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        let end = self.now_ms.saturating_add(delay);
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

    /// The failure, the attempt, how long the deadline is away in milliseconds, the rungs, what is done.
    type Case = (
        Option<Code>,
        u32,
        Option<i64>,
        &'static [Duration],
        Disposition,
    );

    #[test]
    fn a_verdict_is_answered_retried_or_dead_lettered_by_its_code_attempt_and_deadline() {
        use Code::{
            CandidateMalformed, CandidateUnavailable, DeadlineExceeded, InferenceFailed,
            ModelVersionUnavailable, OutOfMemory, Poisoned, ScoreTimeout,
        };
        use Disposition::{Answer, AnswerAndDeadLetter, AnswerTooLate, Climb};
        let table: &[Case] = &[
            (None, 1, None, &DELAYS, Answer),
            (None, 9, Some(-1), &[], Answer),
            // Refusals and time-outs are answered at once.
            (Some(CandidateMalformed), 1, None, &DELAYS, Answer),
            (Some(ScoreTimeout), 1, None, &DELAYS, Answer),
            (Some(OutOfMemory), 1, None, &DELAYS, Answer),
            (Some(DeadlineExceeded), 1, None, &DELAYS, Answer),
            // Transient failures climb every rung.
            (
                Some(CandidateUnavailable),
                1,
                None,
                &DELAYS,
                Climb { rung: 0 },
            ),
            (
                Some(CandidateUnavailable),
                2,
                None,
                &DELAYS,
                Climb { rung: 1 },
            ),
            (
                Some(CandidateUnavailable),
                3,
                None,
                &DELAYS,
                AnswerAndDeadLetter,
            ),
            (Some(InferenceFailed), 2, None, &DELAYS, Climb { rung: 1 }),
            (
                Some(ModelVersionUnavailable),
                3,
                None,
                &DELAYS,
                AnswerAndDeadLetter,
            ),
            (
                Some(CandidateUnavailable),
                1,
                None,
                &[],
                AnswerAndDeadLetter,
            ),
            // An attempt that says 0 is the first.
            (
                Some(CandidateUnavailable),
                0,
                None,
                &DELAYS,
                Climb { rung: 0 },
            ),
            // Where the rung ends after the deadline there is no other try.
            (
                Some(CandidateUnavailable),
                1,
                Some(5000),
                &DELAYS,
                Climb { rung: 0 },
            ),
            (
                Some(CandidateUnavailable),
                1,
                Some(4999),
                &DELAYS,
                AnswerAndDeadLetter,
            ),
            (
                Some(CandidateUnavailable),
                2,
                Some(29_999),
                &DELAYS,
                AnswerAndDeadLetter,
            ),
            (
                Some(ModelVersionUnavailable),
                1,
                Some(5000),
                &DELAYS,
                Climb { rung: 0 },
            ),
            (
                Some(ModelVersionUnavailable),
                1,
                Some(4999),
                &DELAYS,
                AnswerTooLate,
            ),
            (
                Some(ModelVersionUnavailable),
                2,
                Some(-1),
                &DELAYS,
                AnswerTooLate,
            ),
            (
                Some(ModelVersionUnavailable),
                3,
                Some(-1),
                &DELAYS,
                AnswerAndDeadLetter,
            ),
            // A poisoned job is never tried again.
            (Some(Poisoned), 1, None, &DELAYS, AnswerAndDeadLetter),
        ];
        for (code, attempt, left, delays, expected) in table {
            let tried = Try {
                attempt: *attempt,
                deadline_ms: left.and_then(|left| NOW.checked_add_signed(left)),
                now_ms: NOW,
            };
            let found = dispose(*code, tried, delays);
            assert_eq!(found, *expected, "{code:?} at {tried:?}");
        }
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
