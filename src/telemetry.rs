//! What operators see of a worker: its status, its metrics, its traces.

pub mod listener;
pub mod metrics;
pub mod progress;
pub mod status;
pub mod traces;
