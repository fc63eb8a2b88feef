//! Workers seen from outside, as an aggregator or an operator sees them.

pub mod client;
#[cfg(feature = "worker")]
pub mod dashboard;
#[cfg(feature = "worker")]
pub mod findings;
pub mod observer;
#[cfg(feature = "worker")]
pub mod pace;
#[cfg(feature = "worker")]
pub mod waiting;
