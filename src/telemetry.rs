//! What operators see of a worker: its status, its metrics, its traces.

#[cfg(feature = "worker")]
pub mod listener;
pub mod metrics;
pub mod progress;
pub mod status;
#[cfg(feature = "worker")]
pub mod traces;
