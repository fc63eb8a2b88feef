//! Stands in for `spans` in a build without the feature `traces`: there are none.

use std::time::{Duration, Instant};

use super::traces::{ReceivedJob, Stage, Value};
use crate::config::Config;

/// Refuses what this build cannot do.
///
/// # Errors
/// When spans are asked for.
pub fn install(config: &Config) -> anyhow::Result<()> {
    anyhow::ensure!(
        config.telemetry.otlp_endpoint.is_none(),
        "telemetry.otlp_endpoint: this scorer is built without the feature `traces`"
    );
    Ok(())
}

/// Has nothing to send.
pub async fn flush() {}

/// There is none.
#[derive(Debug)]
pub(super) enum Span {}

impl Span {
    pub(super) fn process(_: &ReceivedJob<'_>) -> Option<Self> {
        None
    }

    pub(super) fn trace_id(&self) -> String {
        match *self {}
    }

    pub(super) fn stage(
        &self,
        _: Stage,
        _: Instant,
        _: Duration,
        _: Option<(&'static str, Value)>,
    ) {
        match *self {}
    }

    pub(super) fn publish(&self, _: &str, _: &str) -> Self {
        match *self {}
    }

    pub(super) fn set(&self, _: &'static str, _: Value) {
        match *self {}
    }

    pub(super) fn fail(&self, _: &'static str, _: &'static str) {
        match *self {}
    }

    pub(super) fn headers(&self) -> Vec<(String, String)> {
        match *self {}
    }
}
