//! The deadline that a job may have, in milliseconds of the wall clock.

use std::time::Duration;

use crate::protocol::failure::{Code, Failure};
use crate::util::clock::unix_ms;

/// Resolves when the job's deadline has passed by the wall clock, which may be set meanwhile.
pub(super) async fn past_deadline(deadline_ms: Option<u64>) -> Failure {
    const LOOK: Duration = Duration::from_secs(1);
    loop {
        if let Err(failure) = check_deadline(deadline_ms) {
            return failure;
        }
        let left = deadline_ms.map(|at| at.saturating_sub(unix_ms()) + 1);
        match left {
            Some(left) => tokio::time::sleep(Duration::from_millis(left).min(LOOK)).await,
            None => std::future::pending().await,
        }
    }
}

/// Refuses a job whose deadline has passed.
///
/// # Errors
/// `deadline_exceeded`.
pub(super) fn check_deadline(deadline_ms: Option<u64>) -> Result<(), Failure> {
    match deadline_ms.filter(|deadline| unix_ms() > *deadline) {
        Some(deadline) => {
            let message = format!(
                "deadline_ms: {deadline} has passed by {} ms",
                unix_ms().saturating_sub(deadline)
            );
            Err(Failure::new(Code::DeadlineExceeded, message))
        }
        None => Ok(()),
    }
}
