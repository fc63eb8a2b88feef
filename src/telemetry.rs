//! What operators see of a worker: status, metrics and traces.

#[cfg(feature = "worker")]
pub mod listener;
pub mod metrics;
#[cfg(all(feature = "worker", not(feature = "traces")))]
mod no_spans;
#[cfg(feature = "worker")]
pub mod progress;
#[cfg(feature = "traces")]
mod spans;
#[cfg(feature = "worker")]
pub mod status;
#[cfg(feature = "worker")]
pub mod traces;
#[cfg(feature = "worker")]
pub mod waits;
