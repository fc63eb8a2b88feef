//! Workers seen from outside, as an aggregator or an operator sees them.

pub mod client;
#[cfg(feature = "worker")]
pub mod dashboard;
pub mod observer;
