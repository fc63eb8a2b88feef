//! `scorer` judges model updates: it takes score jobs from RabbitMQ, measures the held-out loss
//! before and after applying each candidate with ONNX Runtime, and publishes the verdicts.
//!
//! # Rooms
//! Each imports only from those before it in this list; `tests/architecture.rs` holds it to that.
//!
//! - [`util`]: clocks, back-off, blocking work
//! - [`protocol`]: what goes over the wire and into Redis
//! - [`config`]: what the operator says
//! - [`telemetry`]: what operators see of a worker
//! - [`fetch`], [`store`], [`broker`]: files and HTTP, Redis, RabbitMQ
//! - [`model`]: the package on disk
//! - [`candidate`]: a stranger's update, from bytes to checked values
//! - [`engine`]: the model measured with and without an update
//! - [`scoring`]: one job, from delivery to acknowledgement
//! - [`update`]: published versions of the model
//! - [`worker`]: the life of the process
//! - [`fleet`]: workers seen from outside
//! - [`selftest`]: benchmarks and known answers
//! - [`cli`]: the commands
//!
//! # Features
//! `client` has what an aggregator needs, without ONNX Runtime: [`protocol`], [`config`], [`store`],
//! [`broker`], and [`fleet`] without its dashboard. `worker` has the rest, but for candidates in
//! buckets (`buckets`) and spans (`traces`). All are on by default.

pub mod config;
pub mod protocol;
pub mod util;

#[cfg(feature = "client")]
pub mod broker;
#[cfg(feature = "client")]
pub mod fleet;
#[cfg(feature = "client")]
pub mod store;
#[cfg(feature = "client")]
pub mod telemetry;

#[cfg(feature = "worker")]
pub mod candidate;
#[cfg(feature = "worker")]
pub mod cli;
#[cfg(feature = "worker")]
pub mod engine;
#[cfg(feature = "worker")]
pub mod fetch;
#[cfg(feature = "worker")]
pub mod model;
#[cfg(feature = "worker")]
pub mod scoring;
#[cfg(feature = "worker")]
pub mod selftest;
#[cfg(feature = "worker")]
pub mod update;
#[cfg(feature = "worker")]
pub mod worker;
