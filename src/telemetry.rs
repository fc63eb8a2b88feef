//! What operators see of a worker: status, metrics and traces.

pub mod listener;
pub mod metrics;
pub mod progress;
pub mod status;
pub mod traces;
