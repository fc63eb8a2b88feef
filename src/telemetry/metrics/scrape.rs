//! `GET /metrics`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;

use super::present::Work;
use super::{METRICS, Metrics};
use crate::telemetry::listener::{self, Limits};
use crate::telemetry::progress::Progress;
use crate::telemetry::status::WorkerStatus;

/// Binds the address, if there is one; from here on events are counted.
///
/// # Errors
/// When the address cannot be bound.
pub async fn install(address: Option<&str>) -> anyhow::Result<Option<TcpListener>> {
    let Some(address) = address else {
        return Ok(None);
    };
    let listener = TcpListener::bind(address).await;
    let listener = listener.with_context(|| format!("telemetry.metrics_addr: {address}"))?;
    // A second worker in one process, as in tests, finds the first one's.
    drop(METRICS.set(Metrics::new()?));
    Ok(Some(listener))
}

/// Answers `GET /metrics` until the process ends.
pub fn serve(bound: TcpListener, status: Arc<WorkerStatus>) {
    let answer = move || std::future::ready(answer(&status));
    let routes = Router::new().route("/metrics", get(answer));
    tokio::spawn(listener::serve(bound, routes, Limits::SHORT));
}

fn answer(status: &WorkerStatus) -> Response {
    let record = status.record();
    let (Some(metrics), Some(record)) = (METRICS.get(), record) else {
        return (StatusCode::SERVICE_UNAVAILABLE, "the worker is starting\n").into_response();
    };
    let text = metrics
        .families(&record, &work(&status.progress))
        .and_then(|families| prometheus::TextEncoder::new().encode_to_string(&families));
    match text {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

fn work(progress: &Progress) -> Work {
    let now = |count: &AtomicU64| count.load(Ordering::Relaxed);
    let activations = &progress.activations;
    Work {
        busy: Duration::from_micros(now(&progress.worked_us)),
        activation_bytes: now(&activations.bytes),
        hits: now(&activations.hits),
        misses: now(&activations.misses),
    }
}
