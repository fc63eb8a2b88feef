//! Workers seen from outside, as an aggregator or an operator sees them.

pub mod client;
pub mod dashboard;
pub mod observer;
