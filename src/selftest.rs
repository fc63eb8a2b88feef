//! A worker tried on itself: known answers, benchmarks, and the synthetic models that both need.

pub mod bench;
pub mod parts;
pub mod proofs;
pub mod sample;
pub mod synthetic_model;
