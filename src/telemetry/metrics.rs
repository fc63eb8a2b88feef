//! What Prometheus reads at `telemetry.metrics_addr`: every name, its unit and its meaning. The only
//! place that knows the prometheus crate. The parts of the worker report through the functions below,
//! which do nothing before [`install`]; what has a present value is asked for at every scrape.

use std::cell::RefCell;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus::{
    Counter, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec,
    Opts, Registry, TextEncoder, exponential_buckets,
};
use tokio::net::TcpListener;

use crate::protocol::failure::{Code, Failure};
use crate::protocol::heartbeat::Record;
use crate::protocol::result::{Body, ResultMessage};
use crate::protocol::state::State;
use crate::telemetry::status::WorkerStatus;

/// One for each process, as for logs.
static METRICS: OnceLock<Metrics> = OnceLock::new();

/// What happened since the start.
struct Metrics {
    registry: Registry,
    /// Whoever scrapes at the same time waits: a gauge is cleared before it is set.
    present: Mutex<Present>,
    jobs: IntCounterVec,
    job_seconds: Histogram,
    stage_seconds: HistogramVec,
    duplicates: IntCounter,
    redelivered: IntCounter,
    retried: IntCounterVec,
    parked: IntCounterVec,
    confirms: IntCounterVec,
    confirm_seconds: Histogram,
    warmups: IntCounterVec,
    heartbeats: IntCounterVec,
    store_calls: IntCounterVec,
}

/// What is true now.
struct Present {
    build: GaugeVec,
    state: GaugeVec,
    detail: GaugeVec,
    changed: Gauge,
    ready: Gauge,
    version: Gauge,
    connected: Gauge,
    consuming: Gauge,
    blocked: Gauge,
    in_flight: Gauge,
    buffered: Gauge,
    busy: Counter,
    resident: Gauge,
    started: Gauge,
}

/// A metric, as the reference describes it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Description {
    /// Its name, with the unit.
    pub name: String,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// The names of its labels.
    pub labels: Vec<String>,
    /// What it says.
    pub help: String,
}

/// Every metric that a worker exports.
///
/// # Errors
/// When two metrics have one name.
pub fn descriptions() -> anyhow::Result<Vec<Description>> {
    let registry = Registry::new();
    let make = Maker::new(&registry);
    Metrics::made_by(&make, registry.clone())?;
    Ok(make.made.into_inner())
}

/// Registers what it makes, and remembers how it is described.
struct Maker<'a> {
    registry: &'a Registry,
    made: RefCell<Vec<Description>>,
}

impl<'a> Maker<'a> {
    fn new(registry: &'a Registry) -> Self {
        Self {
            registry,
            made: RefCell::default(),
        }
    }

    fn add<C>(&self, kind: &'static str, made: prometheus::Result<C>) -> prometheus::Result<C>
    where
        C: prometheus::core::Collector + Clone + 'static,
    {
        let made = made?;
        self.registry.register(Box::new(made.clone()))?;
        let described = made.desc().into_iter().map(|desc| Description {
            name: desc.fq_name.clone(),
            kind,
            labels: desc.variable_labels.clone(),
            help: desc.help.clone(),
        });
        self.made.borrow_mut().extend(described);
        Ok(made)
    }

    fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.add("counter", IntCounter::new(name, help))
    }

    fn counters(&self, name: &str, help: &str, of: &[&str]) -> prometheus::Result<IntCounterVec> {
        self.add("counter", IntCounterVec::new(Opts::new(name, help), of))
    }

    fn gauge(&self, name: &str, help: &str) -> prometheus::Result<Gauge> {
        self.add("gauge", Gauge::new(name, help))
    }

    fn gauges(&self, name: &str, help: &str, of: &[&str]) -> prometheus::Result<GaugeVec> {
        self.add("gauge", GaugeVec::new(Opts::new(name, help), of))
    }

    fn seconds(&self, name: &str, help: &str) -> prometheus::Result<Histogram> {
        let options = HistogramOpts::new(name, help).buckets(buckets()?);
        self.add("histogram", Histogram::with_opts(options))
    }
}

/// From half a millisecond, each twice the one before, to 524 seconds.
fn buckets() -> prometheus::Result<Vec<f64>> {
    exponential_buckets(0.0005, 2.0, 21)
}

impl Metrics {
    fn new() -> prometheus::Result<Self> {
        let metrics = Self::empty()?;
        // A series that begins with its first event has no zero to rise from.
        for outcome in ["confirmed", "refused", "lost"] {
            metrics.confirms.with_label_values(&[outcome]);
        }
        for outcome in ["succeeded", "failed"] {
            metrics.warmups.with_label_values(&[outcome]);
        }
        for outcome in ["written", "failed"] {
            metrics.heartbeats.with_label_values(&[outcome]);
        }
        for outcome in StoreCall::ALL {
            metrics.store_calls.with_label_values(&[outcome.as_str()]);
        }
        Ok(metrics)
    }

    fn empty() -> prometheus::Result<Self> {
        let registry = Registry::new();
        Self::made_by(&Maker::new(&registry), registry.clone())
    }

    fn made_by(make: &Maker<'_>, registry: Registry) -> prometheus::Result<Self> {
        let stages = HistogramOpts::new(
            "scorer_stage_duration_seconds",
            "Stages of scored jobs: queued, fetch, decode, apply, forward, restore.",
        );
        let stages = stages.buckets(buckets()?);
        Ok(Self {
            present: Mutex::new(Present::new(make)?),
            jobs: make.counters(
                "scorer_jobs_total",
                "Answered jobs, by kind, status and, where there is one, error code; else the code is scored.",
                &["kind", "status", "code"],
            )?,
            job_seconds: make.seconds(
                "scorer_job_duration_seconds",
                "From a job's delivery to its confirmed result.",
            )?,
            stage_seconds: make.add("histogram", HistogramVec::new(stages, &["stage"]))?,
            duplicates: make.counter(
                "scorer_jobs_duplicates_total",
                "Jobs answered with a stored result.",
            )?,
            redelivered: make.counter(
                "scorer_jobs_redelivered_total",
                "Deliveries that the broker marked as redelivered.",
            )?,
            retried: make.counters(
                "scorer_jobs_retried_total",
                "Jobs put into a retry queue, by the error that they met.",
                &["code"],
            )?,
            parked: make.counters(
                "scorer_jobs_parked_total",
                "Jobs of which a copy was put into the queue of dead jobs.",
                &["code"],
            )?,
            confirms: make.counters(
                "scorer_confirms_total",
                "Published messages that the broker confirmed, refused, or of which nobody knows (lost).",
                &["outcome"],
            )?,
            confirm_seconds: make.seconds(
                "scorer_confirm_duration_seconds",
                "From publishing a message to what the broker says of it.",
            )?,
            warmups: make.counters("scorer_warmups_total", "Warm-ups.", &["outcome"])?,
            heartbeats: make.counters(
                "scorer_heartbeats_total",
                "Beats that Redis took (written) or not (failed).",
                &["outcome"],
            )?,
            store_calls: make.counters(
                "scorer_store_calls_total",
                "What jobs asked of Redis: answered, refused (too old, full, not permitted), failed (no answer) or, for a second after a failure, skipped.",
                &["outcome"],
            )?,
            registry,
        })
    }

    fn render(&self, record: &Record, busy: Duration) -> prometheus::Result<String> {
        let present = self.present.lock();
        let present = present.unwrap_or_else(PoisonError::into_inner);
        present.update(record, busy);
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

impl Present {
    fn new(make: &Maker<'_>) -> prometheus::Result<Self> {
        Ok(Self {
            build: make.gauges(
                "scorer_build_info",
                "1, and what runs here.",
                &[
                    "version",
                    "git",
                    "model",
                    "worker_id",
                    "execution_provider",
                    "device",
                ],
            )?,
            state: make.gauges("scorer_state", "1 for the state of the worker.", &["state"])?,
            detail: make.gauges("scorer_state_detail", "1, and why.", &["detail"])?,
            changed: make.gauge(
                "scorer_state_change_timestamp_seconds",
                "When the state last changed.",
            )?,
            ready: make.gauge(
                "scorer_ready",
                "Whether jobs can be trusted to this worker.",
            )?,
            version: make.gauge("scorer_model_version", "The version that is served.")?,
            connected: make.gauge("scorer_broker_connected", "Whether RabbitMQ is connected.")?,
            consuming: make.gauge("scorer_broker_consuming", "Whether it has our consumer.")?,
            blocked: make.gauge("scorer_broker_blocked", "Whether it holds publishes back.")?,
            in_flight: make.gauge("scorer_jobs_in_flight", "Jobs that are scored.")?,
            buffered: make.gauge("scorer_jobs_buffered", "Jobs held behind them.")?,
            busy: make.add(
                "counter",
                Counter::new(
                    "scorer_device_busy_seconds_total",
                    "Time in which the computing thread has worked.",
                ),
            )?,
            resident: make.gauge("process_resident_memory_bytes", "Resident memory.")?,
            started: make.gauge("process_start_time_seconds", "When the process began.")?,
        })
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "times, versions and bytes below 2^53"
    )]
    fn update(&self, record: &Record, busy: Duration) {
        let truth = |gauge: &Gauge, is: bool| gauge.set(f64::from(u8::from(is)));
        let git = record.build.git.as_deref().unwrap_or_default();
        let engine = &record.engine;
        self.build.reset();
        self.build
            .with_label_values(&[
                record.build.version.as_str(),
                git,
                &record.model.name,
                &record.worker_id,
                &engine.execution_provider,
                &engine.device,
            ])
            .set(1.0);
        for state in State::ALL {
            let gauge = self.state.with_label_values(&[state.as_str()]);
            truth(&gauge, record.state == state.as_str());
        }
        self.detail.reset();
        self.detail
            .with_label_values(&[record.state_detail.as_str()])
            .set(1.0);
        self.changed
            .set(record.last_state_change_at_ms as f64 / 1e3);
        truth(&self.ready, record.ready);
        self.version
            .set(record.model.version.unwrap_or_default() as f64);
        truth(&self.connected, record.broker.connected);
        truth(&self.consuming, record.broker.consuming);
        truth(&self.blocked, record.broker.blocked);
        self.in_flight.set(record.jobs.in_flight as f64);
        self.buffered.set(record.jobs.buffered as f64);
        self.busy.reset();
        self.busy.inc_by(busy.as_secs_f64());
        self.resident.set(record.memory.rss_bytes as f64);
        self.started.set(record.started_at_ms as f64 / 1e3);
    }
}

/// Takes the address, if there is one; from here on what happens is counted.
///
/// # Errors
/// When the address is not ours to use.
pub async fn install(address: Option<&str>) -> anyhow::Result<Option<TcpListener>> {
    let Some(address) = address else {
        return Ok(None);
    };
    let listener = TcpListener::bind(address).await;
    let listener = listener.with_context(|| format!("telemetry.metrics_addr: {address}"))?;
    // Whoever comes second finds what is there.
    drop(METRICS.set(Metrics::new()?));
    Ok(Some(listener))
}

/// Answers `GET /metrics` until the process ends.
pub fn serve(listener: TcpListener, status: Arc<WorkerStatus>) {
    let answer = move || std::future::ready(answer(&status));
    let routes = Router::new().route("/metrics", get(answer));
    tokio::spawn(crate::telemetry::listener::serve(
        listener,
        routes,
        crate::telemetry::listener::Limits::SHORT,
    ));
}

fn answer(status: &WorkerStatus) -> Response {
    let record = status.record();
    let (Some(metrics), Some(record)) = (METRICS.get(), record) else {
        return (StatusCode::SERVICE_UNAVAILABLE, "the worker is starting\n").into_response();
    };
    let busy = Duration::from_micros(status.progress.worked_us.load(Ordering::Relaxed));
    match metrics.render(&record, busy) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

/// A job was answered, so long after its delivery; a stored result went through no stages.
pub fn answered(message: &ResultMessage, took: Duration, stored: bool) {
    let Some(metrics) = METRICS.get() else { return };
    let code = message.code().map_or("scored", Code::as_str);
    let labels = [message.kind.as_str(), message.status.as_str(), code];
    metrics.jobs.with_label_values(&labels).inc();
    metrics.job_seconds.observe(took.as_secs_f64());
    if let (false, Body::Score(body)) = (stored, &message.body) {
        let times = &body.timings_ms;
        for (stage, millis) in [
            ("queued", times.queued),
            ("fetch", times.fetch),
            ("decode", times.decode),
            ("apply", times.apply),
            ("forward", times.forward),
            ("restore", times.restore),
        ] {
            let stage = metrics.stage_seconds.with_label_values(&[stage]);
            stage.observe(millis / 1e3);
        }
    }
}

/// A job was answered with a stored result.
pub fn duplicate() {
    if let Some(metrics) = METRICS.get() {
        metrics.duplicates.inc();
    }
}

/// The broker delivered a job again.
pub fn redelivered() {
    if let Some(metrics) = METRICS.get() {
        metrics.redelivered.inc();
    }
}

/// A job was put into a retry queue.
pub fn retried(failure: Option<&Failure>) {
    if let Some(metrics) = METRICS.get() {
        let code = failure.map_or("none", |failure| failure.code.as_str());
        metrics.retried.with_label_values(&[code]).inc();
    }
}

/// A copy of a job was put into the queue of dead jobs.
pub fn parked(failure: &Failure) {
    if let Some(metrics) = METRICS.get() {
        let code = failure.code.as_str();
        metrics.parked.with_label_values(&[code]).inc();
    }
}

/// What the broker said of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confirm {
    /// It is safe.
    Confirmed,
    /// It was not taken.
    Refused,
    /// Nobody knows.
    Lost,
}

/// The broker said, or did not say, what became of a message.
pub fn confirm(outcome: Confirm, took: Duration) {
    let Some(metrics) = METRICS.get() else { return };
    let outcome = match outcome {
        Confirm::Confirmed => "confirmed",
        Confirm::Refused => "refused",
        Confirm::Lost => "lost",
    };
    metrics.confirms.with_label_values(&[outcome]).inc();
    metrics.confirm_seconds.observe(took.as_secs_f64());
}

/// A warm-up ended.
pub fn warmed(succeeded: bool) {
    if let Some(metrics) = METRICS.get() {
        let outcome = if succeeded { "succeeded" } else { "failed" };
        metrics.warmups.with_label_values(&[outcome]).inc();
    }
}

/// A beat was sent.
pub fn beat(written: bool) {
    if let Some(metrics) = METRICS.get() {
        let outcome = if written { "written" } else { "failed" };
        metrics.heartbeats.with_label_values(&[outcome]).inc();
    }
}

/// What became of something that jobs asked of Redis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreCall {
    /// It was done.
    Answered,
    /// Redis does not do it.
    Refused,
    /// There was no answer.
    Failed,
    /// It was not asked, a moment after a failure.
    Skipped,
}

impl StoreCall {
    const ALL: [Self; 4] = [Self::Answered, Self::Refused, Self::Failed, Self::Skipped];

    fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

/// Something was asked of Redis for jobs.
pub fn store_call(outcome: StoreCall) {
    if let Some(metrics) = METRICS.get() {
        let outcome = outcome.as_str();
        metrics.store_calls.with_label_values(&[outcome]).inc();
    }
}
