//! `scorer` judges model updates: it takes score jobs from RabbitMQ, measures the held-out loss
//! before and after applying each candidate with ONNX Runtime, and publishes the verdicts.
//!
//! # Layout
//! In the order data flows: [`config`] is what we are told; [`job`] decodes what is asked;
//! [`candidate`] fetches and checks a stranger's update; [`package`] holds the model and its
//! held-out data; [`engine`] measures; [`score`] and [`result`] turn losses into a verdict;
//! [`failure`] is every way not to have one. [`lifecycle`] is what state the worker is in.

pub mod bench;
pub mod broker;
pub mod candidate;
pub mod cli;
pub mod client;
pub mod clock;
pub mod config;
pub mod consumer;
pub mod control;
pub mod crash;
pub mod dashboard;
pub mod engine;
pub mod failure;
pub mod fetch;
pub mod fleet;
pub mod health;
pub mod heartbeat;
mod host;
pub mod job;
pub mod lifecycle;
pub mod listener;
pub mod looks;
pub mod metrics;
pub mod offload;
pub mod package;
pub mod pipeline;
pub mod prove;
pub mod result;
pub mod retry;
pub mod schema;
pub mod score;
pub mod store;
pub mod systemd;
pub mod traces;
pub mod unsettled;
pub mod update;
pub mod waiting;
pub mod worker;
