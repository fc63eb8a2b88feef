//! Spans of jobs for `telemetry.otlp_endpoint`, named and described by OpenTelemetry's semantic
//! conventions for messaging and RabbitMQ. The only place that knows OpenTelemetry. Where no endpoint
//! is set a [`Trace`] keeps the time of delivery and nothing else.

use std::collections::HashMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{
    Span as _, SpanBuilder, SpanKind, Status, TraceContextExt, Tracer, TracerProvider,
};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider, SpanData, SpanExporter};

use crate::config::{Config, tls};
use crate::protocol::failure::{Code, Failure, Status as Verdict};
use crate::protocol::result::ResultMessage;
use crate::util::clock::Lap;

/// How long the worker waits for a collector before it exits.
const FLUSH: Duration = Duration::from_secs(1);
/// Longer than any job waits in a queue.
const LONGEST_WAIT: Duration = Duration::from_secs(7 * 24 * 3600);

/// One for each process, as for logs.
static TRACES: OnceLock<Traces> = OnceLock::new();

struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    /// Attributes of every span: the worker and the broker.
    parties: Vec<KeyValue>,
}

/// The stages of a scored job, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Stage {
    /// Fetching the candidate.
    Fetch,
    /// Decoding and checking them.
    Decode,
    /// Waiting for the device.
    #[strum(serialize = "device wait")]
    DeviceWait,
    /// Running the unchanged model, if its losses are not known yet.
    Baseline,
    /// Writing the candidate into the weights.
    Patch,
    /// Running the model.
    Forward,
    /// Copying the baseline back.
    Restore,
}

impl Stage {
    fn as_str(self) -> &'static str {
        self.into()
    }
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
    let unsaid = |value: &Value| value.as_str().starts_with("unknown_service");
    let said = said.iter().filter(|(_, value)| !unsaid(value));
    let said = said.map(|(key, value)| KeyValue::new(key.clone(), value.clone()));
    ours.with_attributes(said).build()
}

fn parties(config: &Config, worker: String) -> Vec<KeyValue> {
    let mut parties = vec![
        KeyValue::new("messaging.system", "rabbitmq"),
        KeyValue::new("messaging.client.id", worker),
    ];
    if let Ok(url) = url::Url::parse(&config.amqp.url) {
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

/// A job that was delivered, as far as spans tell of it.
#[derive(Debug)]
pub struct ReceivedJob<'a> {
    /// `traceparent` and `tracestate`, where the sender gave them.
    pub trace_headers: Vec<(String, String)>,
    /// The message's name, if it has one.
    pub message_id: Option<&'a str>,
    /// What its sender tells conversations apart by.
    pub correlation_id: Option<&'a str>,
    /// When it was sent, in unix seconds.
    pub timestamp: Option<u64>,
    /// The size of its body.
    pub bytes: usize,
    /// From 1.
    pub attempt: u32,
    /// The broker delivered it before.
    pub redelivered: bool,
    /// Where it was published.
    pub exchange: String,
    /// Where it waited.
    pub queue: String,
    /// The model it is for.
    pub model: &'a str,
}

/// One delivery of a job, from the broker to what becomes of it. Its span ends with it; without an
/// outcome the broker delivers the job again.
#[derive(Debug)]
pub struct Trace {
    /// When it was delivered.
    pub received: Instant,
    /// Holds the span, where spans are sent.
    context: Option<Context>,
}

impl Trace {
    /// Begins now. The parent is whoever sent the job, if its `traceparent` says so.
    pub fn begin(job: &ReceivedJob<'_>) -> Self {
        let received = Instant::now();
        let context = TRACES.get().map(|traces| traces.process(job));
        Self { received, context }
    }

    /// The same for a job that no broker delivers: without spans.
    pub fn silent() -> Self {
        Self {
            received: Instant::now(),
            context: None,
        }
    }

    /// By which logs and spans are found together.
    pub fn id(&self) -> Option<String> {
        let context = self.context.as_ref()?;
        Some(context.span().span_context().trace_id().to_string())
    }

    /// A stage that is over; returns its milliseconds.
    pub fn stage(&self, stage: Stage, lap: Lap) -> f64 {
        if let (Some(traces), Some(context)) = (TRACES.get(), &self.context) {
            let builder = SpanBuilder::from_name(stage.as_str()).with_kind(SpanKind::Internal);
            traces.record(builder, lap.began, lap.took, context);
        }
        lap.millis()
    }

    /// Begins to publish the result.
    pub fn publish(&self, exchange: &str, routing_key: &str) -> Publishing {
        let span = TRACES.get().zip(self.context.as_ref());
        Publishing(span.map(|(traces, context)| {
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
            context.with_span(traces.tracer.build_with_context(builder, context))
        }))
    }

    /// It was answered; `stored` = with the result of an earlier delivery.
    pub fn answered(&self, message: &ResultMessage, stored: bool) {
        let version = i64::try_from(message.model_version).ok();
        self.tell(
            [
                Some(KeyValue::new("scorer.outcome", "answered")),
                Some(KeyValue::new("scorer.status", message.status.as_str())),
                Some(KeyValue::new(
                    "scorer.submission_id",
                    message.submission_id.clone(),
                )),
                Some(KeyValue::new("scorer.stored", stored)),
                version.map(|version| KeyValue::new("scorer.model_version", version)),
                message.delta().map(|d| KeyValue::new("scorer.delta", d)),
            ],
            message.code(),
            message.status == Verdict::Failed,
        );
    }

    /// It goes into a retry queue.
    pub fn retried(&self, submission_id: &str, failure: Option<&Failure>) {
        let code = failure.map(|failure| failure.code);
        let name = KeyValue::new("scorer.submission_id", submission_id.to_owned());
        let outcome = KeyValue::new("scorer.outcome", "retried");
        self.tell([Some(outcome), Some(name)], code, failure.is_some());
    }

    /// A copy of it goes to the parked jobs, and nobody can be answered.
    pub fn parked(&self, failure: &Failure) {
        let outcome = Some(KeyValue::new("scorer.outcome", "parked"));
        self.tell([outcome], Some(failure.code), true);
    }

    fn tell<const N: usize>(
        &self,
        attributes: [Option<KeyValue>; N],
        code: Option<Code>,
        failed: bool,
    ) {
        let Some(context) = &self.context else { return };
        let span = context.span();
        span.set_attributes(attributes.into_iter().flatten());
        if let Some(code) = code {
            span.set_attribute(KeyValue::new("scorer.code", code.as_str()));
        }
        if failed {
            let kind = code.map_or("none", Code::as_str);
            span.set_attribute(KeyValue::new("error.type", kind));
            span.set_status(Status::error(kind));
        }
    }
}

/// A result on its way to the broker's confirm.
#[derive(Debug)]
pub struct Publishing(Option<Context>);

impl Publishing {
    /// What the result carries of this span, where there is one.
    pub fn headers(&self) -> Option<Vec<(String, String)>> {
        let context = self.0.as_ref()?;
        let mut headers = HashMap::new();
        TraceContextPropagator::new().inject_context(context, &mut headers);
        headers.retain(|_, text: &mut String| !text.is_empty());
        Some(headers.into_iter().collect())
    }

    /// Nobody knows whether the broker has it.
    pub fn lost(self) {
        if let Some(context) = &self.0 {
            let span = context.span();
            span.set_attribute(KeyValue::new("error.type", "not_confirmed"));
            span.set_status(Status::error("not confirmed"));
        }
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

fn count(n: usize) -> Value {
    Value::I64(i64::try_from(n).unwrap_or(i64::MAX))
}
