//! Which workers the table shows, and in which order.

use crate::protocol::heartbeat::Record;

/// What the rows are sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::Display)]
#[strum(serialize_all = "lowercase")]
pub(super) enum Order {
    Name,
    State,
    #[strum(serialize = "jobs/s")]
    Rate,
    #[strum(serialize = "p95")]
    Slowest,
}

impl Order {
    pub(super) fn next(self) -> Self {
        match self {
            Self::Name => Self::State,
            Self::State => Self::Rate,
            Self::Rate => Self::Slowest,
            Self::Slowest => Self::Name,
        }
    }
}

/// Which rows are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::Display)]
#[strum(serialize_all = "lowercase")]
pub(super) enum Shown {
    All,
    Ready,
    #[strum(serialize = "not ready")]
    NotReady,
}

impl Shown {
    pub(super) fn next(self) -> Self {
        match self {
            Self::All => Self::NotReady,
            Self::NotReady => Self::Ready,
            Self::Ready => Self::All,
        }
    }

    pub(super) fn takes(self, record: &Record) -> bool {
        match self {
            Self::All => true,
            Self::Ready => record.ready,
            Self::NotReady => !record.ready,
        }
    }
}
