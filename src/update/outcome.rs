//! How one look at the update manifest ends, and what the people who asked for it are told.

use crate::protocol::control::Order;

/// How a look ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Followed {
    /// The live version was already served.
    Already(u64),
    /// It is served now.
    Updated(u64),
}

/// Why the live version is not served.
#[derive(Debug, thiserror::Error)]
pub(super) enum UpdateError {
    /// The manifest cannot be read, or must not be trusted.
    #[error("the update manifest: {0}")]
    Manifest(String),
    /// The version failed before.
    #[error("version {0} is not tried again until the manifest changes: {1}")]
    Refused(u64, String),
    /// The last attempt failed for this reason, and its back-off has not passed.
    #[error("{0}")]
    BackingOff(String),
    /// No usable route leads to it.
    #[error("{0}")]
    NoRoute(String),
    /// The worker's folder cannot be written.
    #[error("model.state_dir: {0}")]
    Disk(String),
    /// The weights to start from have changed.
    #[error("the local weights: {0}")]
    Base(String),
    /// It did not prove itself just now.
    #[error("version {0} did not prove itself: {1}")]
    Unproven(u64, String),
    /// The worker cannot take an update now.
    #[error("{0}")]
    NotNow(&'static str),
}

/// Answers an order with the outcome of the look that it asked for.
pub(super) fn answer(order: Order, outcome: &Result<Followed, UpdateError>) {
    match outcome {
        Ok(Followed::Already(version)) => {
            order.done(format!("version {version} is live and served already"));
        }
        Ok(Followed::Updated(version)) => order.done(format!("version {version} is served")),
        Err(error @ (UpdateError::Refused(..) | UpdateError::NotNow(_))) => {
            order.refuse(error.to_string())
        }
        Err(
            error @ (UpdateError::Manifest(_)
            | UpdateError::BackingOff(_)
            | UpdateError::NoRoute(_)
            | UpdateError::Disk(_)
            | UpdateError::Base(_)
            | UpdateError::Unproven(..)),
        ) => order.fail(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::control::{Command, Outcome};

    #[test]
    fn who_asks_for_an_update_is_told_how_it_ended() {
        let why = || "why".to_owned();
        let table = [
            (
                Ok(Followed::Already(9)),
                Outcome::Done,
                "version 9 is live and served already",
            ),
            (
                Ok(Followed::Updated(9)),
                Outcome::Done,
                "version 9 is served",
            ),
            (
                Err(UpdateError::Manifest(why())),
                Outcome::Failed,
                "the update manifest: why",
            ),
            (
                Err(UpdateError::Refused(9, why())),
                Outcome::Refused,
                "version 9 is not tried again until the manifest changes: why",
            ),
            (Err(UpdateError::BackingOff(why())), Outcome::Failed, "why"),
            (Err(UpdateError::NoRoute(why())), Outcome::Failed, "why"),
            (
                Err(UpdateError::Disk(why())),
                Outcome::Failed,
                "model.state_dir: why",
            ),
            (
                Err(UpdateError::Base(why())),
                Outcome::Failed,
                "the local weights: why",
            ),
            (
                Err(UpdateError::Unproven(9, why())),
                Outcome::Failed,
                "version 9 did not prove itself: why",
            ),
            (Err(UpdateError::NotNow("why")), Outcome::Refused, "why"),
        ];
        for (outcome, expected, message) in table {
            let (order, mut answered) = Order::new(Command::Update);
            answer(order, &outcome);
            assert_eq!(
                answered.try_recv(),
                Ok((expected, message.to_owned())),
                "{outcome:?}"
            );
        }
    }
}
