//! What every room may use and no room owns.

pub mod backoff;
pub mod blocking;
pub mod clock;
pub mod file_type;
