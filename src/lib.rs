//! `scorer` judges model updates: it takes score jobs from RabbitMQ, measures the held-out loss
//! before and after applying each candidate with ONNX Runtime, and publishes the verdicts.
//!
//! # Layout
//! The rooms, each importing only from those above it; `tests/architecture.rs` holds the order.

pub mod broker;
pub mod candidate;
pub mod cli;
pub mod config;
pub mod engine;
pub mod fetch;
pub mod fleet;
pub mod model;
pub mod protocol;
pub mod scoring;
pub mod selftest;
pub mod store;
pub mod telemetry;
pub mod update;
pub mod util;
pub mod worker;
