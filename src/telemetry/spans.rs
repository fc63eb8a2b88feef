//! Spans as OpenTelemetry has them, named and described by its semantic conventions for messaging and
//! RabbitMQ. The only place that knows OpenTelemetry.

use std::collections::HashMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{
    Span as _, SpanBuilder, SpanKind, Status, TraceContextExt, Tracer, TracerProvider,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider, SpanData, SpanExporter};

use super::traces::{ReceivedJob, Stage, Value};
use crate::config::{Config, tls};

/// How long the end of the worker waits for a collector; other goodbyes take as long beside it.
const FLUSH: Duration = Duration::from_secs(1);
/// Longer than any job waits in a queue.
const LONGEST_WAIT: Duration = Duration::from_secs(7 * 24 * 3600);

/// One for each process, as for logs.
static TRACES: OnceLock<Traces> = OnceLock::new();

struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    /// Who takes part in every message: the worker, the broker.
    parties: Vec<KeyValue>,
}

/// Begins to send spans, if there is an endpoint.
///
/// # Errors
/// When no exporter can be made for it.
pub fn install(config: &Config) -> anyhow::Result<()> {
    let Some(endpoint) = &config.telemetry.otlp_endpoint else {
        return Ok(());
    };
    tls::install_provider();
    let place = format!("{}/v1/traces", endpoint.trim_end_matches('/'));
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_http()
        .with_endpoint(place)
        .build()
        .context("telemetry.otlp_endpoint")?;
    let worker = config.worker_id();
    let provider = SdkTracerProvider::builder()
        .with_resource(resource(&worker))
        .with_batch_exporter(Reporting {
            exporter,
            endpoint: endpoint.clone(),
            failing: AtomicBool::new(false),
        })
        .build();
    let traces = Traces {
        tracer: provider.tracer("scorer"),
        provider,
        parties: parties(config, worker),
    };
    // The first of two workers in one process, which only tests have, keeps it.
    drop(TRACES.set(traces));
    Ok(())
}

/// Who sends; what the environment says of that goes first.
fn resource(worker: &str) -> Resource {
    let ours = Resource::builder_empty().with_attributes([
        KeyValue::new("service.name", "scorer"),
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("service.instance.id", worker.to_owned()),
    ]);
    let said = Resource::builder().build();
    // What the detectors say where nobody has said it.
    let unsaid = |value: &opentelemetry::Value| value.as_str().starts_with("unknown_service");
    let said = said.iter().filter(|(_, value)| !unsaid(value));
    let said = said.map(|(key, value)| KeyValue::new(key.clone(), value.clone()));
    ours.with_attributes(said).build()
}

fn parties(config: &Config, worker: String) -> Vec<KeyValue> {
    let mut parties = vec![
        KeyValue::new("messaging.system", "rabbitmq"),
        KeyValue::new("messaging.client.id", worker),
    ];
    // Which of several nodes is in use changes; these are said once.
    if let [url] = config.amqp.urls.as_slice()
        && let Ok(url) = url::Url::parse(url)
    {
        let tls = url.scheme() == "amqps";
        let port = url.port().unwrap_or(if tls { 5671 } else { 5672 });
        let host = url.host_str().unwrap_or("localhost").to_owned();
        parties.push(KeyValue::new("server.address", host));
        parties.push(KeyValue::new("server.port", i64::from(port)));
    }
    parties
}

/// Sends what is left, for a second at most.
pub async fn flush() {
    let flushing = tokio::task::spawn_blocking(|| {
        if let Some(traces) = TRACES.get()
            && let Err(error) = traces.provider.shutdown_with_timeout(FLUSH)
        {
            tracing::debug!(%error, "the last spans were not delivered");
        }
    });
    if flushing.await.is_err() {
        tracing::warn!("sending the last spans ended early, by a panic");
    }
}

/// Says in the log when a collector stops taking spans, and when it takes them again.
#[derive(Debug)]
struct Reporting {
    exporter: opentelemetry_otlp::SpanExporter,
    endpoint: String,
    failing: AtomicBool,
}

impl SpanExporter for Reporting {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let (spans, endpoint) = (batch.len(), &self.endpoint);
        let sent = self.exporter.export(batch).await;
        match (&sent, self.failing.swap(sent.is_err(), Ordering::Relaxed)) {
            (Err(error), false) => tracing::warn!(
                %error,
                spans,
                %endpoint,
                "spans are lost, these and all until it is said that they are taken again; does telemetry.otlp_endpoint name a collector that speaks OTLP over HTTP (mostly port 4318)?"
            ),
            (Ok(()), true) => tracing::info!(%endpoint, "spans are taken again"),
            (Err(_), true) | (Ok(()), false) => {}
        }
        // It is said: else the batches' own thread says it each time.
        Ok(())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

/// A span, which ends when it is dropped.
#[derive(Debug)]
pub(super) struct Span(Context);

impl Span {
    /// The span of a job that was delivered, if spans are sent.
    pub(super) fn process(job: &ReceivedJob<'_>) -> Option<Self> {
        TRACES.get().map(|traces| Self(traces.process(job)))
    }

    pub(super) fn trace_id(&self) -> String {
        self.0.span().span_context().trace_id().to_string()
    }

    /// Adds a stage that is over, and what is said of it.
    pub(super) fn stage(
        &self,
        stage: Stage,
        began: Instant,
        took: Duration,
        said: Option<(&'static str, Value)>,
    ) {
        if let Some(traces) = TRACES.get() {
            let said = said.into_iter().map(|(name, value)| attribute(name, value));
            let builder = SpanBuilder::from_name(<&str>::from(stage))
                .with_kind(SpanKind::Internal)
                .with_attributes(said);
            traces.record(builder, began, took, &self.0);
        }
    }

    /// Begins the span of a result that is published.
    pub(super) fn publish(&self, exchange: &str, routing_key: &str) -> Self {
        let Some(traces) = TRACES.get() else {
            return Self(self.0.clone());
        };
        let destination = format!("{exchange}:{routing_key}");
        let mut attributes = traces.parties.clone();
        attributes.extend([
            KeyValue::new("messaging.operation.name", "publish"),
            KeyValue::new("messaging.operation.type", "send"),
            KeyValue::new("messaging.destination.name", destination.clone()),
            KeyValue::new(
                "messaging.rabbitmq.destination.routing_key",
                routing_key.to_owned(),
            ),
        ]);
        let builder = SpanBuilder::from_name(format!("publish {destination}"))
            .with_kind(SpanKind::Producer)
            .with_attributes(attributes);
        let span = traces.tracer.build_with_context(builder, &self.0);
        Self(self.0.with_span(span))
    }

    pub(super) fn set(&self, name: &'static str, value: Value) {
        self.0.span().set_attribute(attribute(name, value));
    }

    pub(super) fn fail(&self, kind: &'static str, why: &'static str) {
        let span = self.0.span();
        span.set_attribute(KeyValue::new("error.type", kind));
        span.set_status(Status::error(why));
    }

    /// `traceparent` and `tracestate` of what is sent within this span.
    pub(super) fn headers(&self) -> Vec<(String, String)> {
        let mut headers = HashMap::new();
        TraceContextPropagator::new().inject_context(&self.0, &mut headers);
        headers.retain(|_, text: &mut String| !text.is_empty());
        headers.into_iter().collect()
    }
}

impl Traces {
    fn process(&self, job: &ReceivedJob<'_>) -> Context {
        let sent: HashMap<_, _> = job.trace_headers.iter().cloned().collect();
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &sent);
        let destination = format!("{}:{}:{}", job.exchange, job.model, job.queue);
        let mut attributes = self.parties.clone();
        attributes.extend([
            KeyValue::new("messaging.operation.name", "process"),
            KeyValue::new("messaging.operation.type", "process"),
            KeyValue::new("messaging.destination.name", destination.clone()),
            KeyValue::new(
                "messaging.rabbitmq.destination.routing_key",
                job.model.to_owned(),
            ),
            KeyValue::new("messaging.message.body.size", count(job.bytes)),
            KeyValue::new("scorer.attempt", i64::from(job.attempt)),
            KeyValue::new("scorer.redelivered", job.redelivered),
        ]);
        for (name, value) in [
            ("messaging.message.id", job.message_id),
            ("messaging.message.conversation_id", job.correlation_id),
        ] {
            attributes.extend(value.map(|text| KeyValue::new(name, text.to_owned())));
        }
        let builder = SpanBuilder::from_name(format!("process {destination}"))
            .with_kind(SpanKind::Consumer)
            .with_attributes(attributes);
        let context = parent.with_span(self.tracer.build_with_context(builder, &parent));
        // Beside the job's own span; below it where nobody's is above.
        let sent = parent.span().span_context().is_valid();
        self.queue_wait(job, if sent { &parent } else { &context });
        context
    }

    /// The wait in the broker as far as it is certain: `timestamp` has whole seconds, so the wait
    /// shows from the end of the second on. None = it was shorter, or not the first, or nobody said
    /// when it began, or what was said makes no sense.
    fn queue_wait(&self, job: &ReceivedJob<'_>, parent: &Context) {
        if job.redelivered || job.attempt > 1 {
            return;
        }
        let now = SystemTime::now();
        let since = job.timestamp.and_then(|sent| {
            let second = Duration::from_secs(sent.checked_add(1)?);
            UNIX_EPOCH.checked_add(second)
        });
        let sound = |since: &SystemTime| {
            let waited = now.duration_since(*since);
            waited.is_ok_and(|waited| waited < LONGEST_WAIT)
        };
        let Some(since) = since.filter(sound) else {
            return;
        };
        let builder = SpanBuilder::from_name("queue wait")
            .with_kind(SpanKind::Internal)
            .with_start_time(since);
        let mut span = self.tracer.build_with_context(builder, parent);
        span.end_with_timestamp(now);
    }

    fn record(&self, builder: SpanBuilder, began: Instant, took: Duration, parent: &Context) {
        let since = SystemTime::now().checked_sub(began.elapsed());
        let Some((since, until)) = since.and_then(|s| Some((s, s.checked_add(took)?))) else {
            return;
        };
        let builder = builder.with_start_time(since);
        let mut span = self.tracer.build_with_context(builder, parent);
        span.end_with_timestamp(until);
    }
}

fn attribute(name: &'static str, value: Value) -> KeyValue {
    let value = match value {
        Value::Word(word) => word.into(),
        Value::Text(text) => text.into(),
        Value::Flag(flag) => flag.into(),
        Value::Count(n) => count(n),
        Value::Number(n) => n.into(),
    };
    KeyValue::new(name, value)
}

fn count(n: impl TryInto<i64>) -> opentelemetry::Value {
    opentelemetry::Value::I64(n.try_into().unwrap_or(i64::MAX))
}
