//! What the tests and benchmarks share: private services, the real binary, and an aggregator that knows nothing but the
//! contract. Jobs, candidates, packages and updates are made from the contract, too: nothing here uses the crate.
//!
//! Every process that is started here leads a process group of its own, and dies with the test process.

#![expect(
    clippy::expect_used,
    clippy::print_stderr,
    reason = "a failed step of a test is a failed test, which shows the logs of its workers"
)]

pub mod aggregator;
pub mod archive;
pub mod broker;
pub mod case;
pub mod clock;
pub mod cluster;
pub mod container;
pub mod crash;
pub mod digest;
pub mod encoding;
pub mod folder;
pub mod hazard;
pub mod http;
pub mod manifest;
pub mod message;
pub mod pace;
pub mod package;
pub mod pickle;
pub mod port;
pub mod process;
pub mod program;
mod reaper;
pub mod redis_cluster;
pub mod redis_sentinel;
pub mod redis_server;
pub mod scrape;
mod shim;
pub mod site;
pub mod stack;
pub mod table;
pub mod topology;
pub mod trainer;
pub mod wait;
pub mod worker;
