//! Helpers without a domain: clock, back-off, blocking work, file types, hardware.

pub mod backoff;
pub mod blocking;
pub mod clock;
pub mod file_type;
#[cfg(feature = "worker")]
pub mod hardware;
