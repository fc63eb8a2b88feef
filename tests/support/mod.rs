//! The harness: real private services, the real binary, and an aggregator that knows nothing
//! but the contract.
//!
//! Every process started here leads a process group of its own. A guardian shell holds the
//! reading end of a pipe whose writing end only the test process has; when the test process is
//! gone, however it went, the guardian kills every group that is left and removes its folders.

pub(crate) mod aggregator;
pub(crate) mod broker;
pub(crate) mod cluster;
pub(crate) mod crash;
pub(crate) mod declare;
pub(crate) mod http;
pub(crate) mod jobs;
pub(crate) mod manifest;
pub(crate) mod message;
pub(crate) mod pace;
pub(crate) mod package;
pub(crate) mod process;
pub(crate) mod redis_server;
pub(crate) mod site;
pub(crate) mod stack;
pub(crate) mod trainer;
pub(crate) mod wait;
pub(crate) mod watch;
pub(crate) mod worker;
