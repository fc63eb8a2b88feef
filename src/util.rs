//! Helpers without a domain: clock, back-off, blocking work, file types.

pub mod backoff;
pub mod blocking;
pub mod clock;
pub mod file_type;
