//! End to end: the real binary against a real RabbitMQ and a real Redis, judged by the contract alone.
//!
//! Each file is one promise; `verdict` compares a result with the table for `results`, and `watch` records the queue's
//! consumers beside the heartbeat for `gating`. Tests share one broker and one Redis, each in a namespace of its own; those
//! that break a service start their own.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod client;
mod clock;
mod cluster;
mod commands;
mod control;
mod crash;
mod crash_shim;
mod dashboard;
mod dead;
mod drain;
mod failover;
mod fetching;
mod gating;
mod getting_started;
mod gpu_check;
mod hand_backs;
mod hazards;
mod heartbeat;
mod identity;
mod init;
mod manifests;
mod merge_jobs;
mod merges;
mod metrics;
mod mirror;
mod mismatches;
mod models;
mod otherwise;
mod outages;
mod poison;
mod priority;
mod provider;
mod readme;
mod refusals;
mod released;
mod replays;
mod results;
mod rounds;
mod settling;
mod sharing;
mod stops;
mod tls;
mod topology;
mod traces;
mod trainer;
mod undecodable;
mod update_crashes;
mod updates;
mod verdict;
mod watch;
mod watchers;
