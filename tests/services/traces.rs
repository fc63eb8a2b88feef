//! What a collector is told of jobs, and what jobs care about a collector.

use std::collections::HashMap;
use std::net::TcpListener;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use lapin::types::{AMQPValue, FieldTable};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode as SpanStatus;
use prost::Message as _;
use serde_json::json;
use testkit::aggregator::runtime;
use testkit::case::{honest, honest_job, of_the_last_layer};
use testkit::encoding::Encoding;
use testkit::package::MODEL;
use testkit::port::free_port;
use testkit::stack::Stack;
use testkit::wait::{eventually, eventually_some, now_ms, secs};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

/// A span as it was received, with who sent it.
#[derive(Clone)]
struct Received {
    resource: HashMap<String, String>,
    span: Span,
}

impl Received {
    fn attribute(&self, name: &str) -> Option<String> {
        attributes(&self.span.attributes).remove(name)
    }

    fn id(&self) -> String {
        hex::encode(&self.span.span_id)
    }

    fn parent(&self) -> String {
        hex::encode(&self.span.parent_span_id)
    }

    fn millis(&self) -> f64 {
        let nanos = self.span.end_time_unix_nano - self.span.start_time_unix_nano;
        std::time::Duration::from_nanos(nanos).as_secs_f64() * 1e3
    }

    fn failed(&self) -> bool {
        let status = self.span.status.as_ref();
        status.is_some_and(|s| s.code == SpanStatus::Error as i32)
    }
}

fn attributes(of: &[KeyValue]) -> HashMap<String, String> {
    let attributes = of.iter().map(|a| (a.key.clone(), text(a.value.as_ref())));
    attributes.collect()
}

fn text(value: Option<&AnyValue>) -> String {
    match value.and_then(|v| v.value.clone()) {
        Some(any_value::Value::StringValue(text)) => text,
        Some(any_value::Value::IntValue(n)) => n.to_string(),
        Some(any_value::Value::DoubleValue(n)) => n.to_string(),
        Some(any_value::Value::BoolValue(b)) => b.to_string(),
        other => format!("{other:?}"),
    }
}

/// An OpenTelemetry collector as far as a worker sees it.
struct Collector {
    port: u16,
    spans: Arc<Mutex<Vec<Received>>>,
}

impl Collector {
    fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        listener
            .set_nonblocking(true)
            .expect("a listener for tokio");
        let port = listener.local_addr().expect("a bound address").port();
        let spans: Arc<Mutex<Vec<Received>>> = Arc::default();
        let kept = Arc::clone(&spans);
        let take = move |headers: HeaderMap, body: Bytes| {
            let kept = Arc::clone(&kept);
            async move {
                if headers.get("authorization").is_none_or(|h| h != "a token") {
                    return StatusCode::UNAUTHORIZED;
                }
                let request = ExportTraceServiceRequest::decode(body).expect("a request of OTLP");
                for of in request.resource_spans {
                    let resource = attributes(&of.resource.unwrap_or_default().attributes);
                    let spans = of.scope_spans.into_iter().flat_map(|scope| scope.spans);
                    kept.lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .extend(spans.map(|span| Received {
                            resource: resource.clone(),
                            span,
                        }));
                }
                StatusCode::OK
            }
        };
        let router = Router::new().route("/v1/traces", post(take));
        runtime().spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            axum::serve(listener, router).await
        });
        Self { port, spans }
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn spans(&self) -> Vec<Received> {
        let spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        spans.clone()
    }

    /// The spans of one job, by name, once its own has come.
    #[track_caller]
    fn of_job(&self, id: &str) -> (Received, HashMap<String, Received>) {
        let process = eventually_some(secs(20), "the job's own span", || {
            let mut spans = self.spans().into_iter();
            spans.find(|s| s.attribute("messaging.message.id").as_deref() == Some(id))
        });
        let trace = process.span.trace_id.clone();
        let others = self.spans().into_iter();
        let others = others.filter(|s| s.span.trace_id == trace && s.id() != process.id());
        let others = others.map(|s| (s.span.name.clone(), s)).collect();
        (process, others)
    }
}

fn traced(parent: &str) -> FieldTable {
    let mut headers = FieldTable::default();
    for (name, value) in [("traceparent", parent), ("tracestate", "vendor=1")] {
        headers.insert(name.into(), AMQPValue::LongString(value.into()));
    }
    headers
}

#[test]
fn a_collector_is_told_of_every_stage_below_the_senders_span() {
    let (stack, collector) = (Stack::shared(), Collector::start());
    let worker = stack.worker_with("w1", |s| {
        s.set("telemetry.otlp_endpoint", collector.url())
            .set("engine.parts", 4)
            .env("OTEL_EXPORTER_OTLP_HEADERS", "authorization=a%20token")
            .env("OTEL_BSP_SCHEDULE_DELAY", "200")
            .env("OTEL_SERVICE_NAME", "judges")
    });
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let sent = now_ms() / 1000 - 5;
    let mut job = of_the_last_layer().job("good");
    job["validation"] = json!({"nonce": "n"});
    aggregator.submit_as(&job, Encoding::MessagePack, |properties| {
        properties
            .with_message_id("good".into())
            .with_correlation_id("round 7".into())
            .with_timestamp(sent)
            .with_headers(traced(&format!("00-{TRACE}-{PARENT}-01")))
    });
    let result = aggregator.result("good");
    let (process, others) = collector.of_job("good");

    assert_eq!(hex::encode(&process.span.trace_id), TRACE);
    assert_eq!(process.parent(), PARENT);
    assert_eq!(process.span.kind, SpanKind::Consumer as i32);
    assert!(!process.failed());
    for (name, value) in [("service.name", "judges"), ("service.instance.id", "w1")] {
        assert_eq!(process.resource.get(name).map(String::as_str), Some(value));
    }
    let exchange = stack.object("jobs");
    let destination = format!("{exchange}:{MODEL}:{}", stack.jobs_queue());
    assert_eq!(process.span.name, format!("process {destination}"));
    for (name, value) in [
        ("messaging.system", "rabbitmq"),
        ("messaging.operation.name", "process"),
        ("messaging.operation.type", "process"),
        ("messaging.destination.name", &destination),
        ("messaging.rabbitmq.destination.routing_key", MODEL),
        ("messaging.message.conversation_id", "round 7"),
        ("messaging.client.id", "w1"),
        ("server.address", "127.0.0.1"),
        ("scorer.outcome", "answered"),
        ("scorer.status", "scored"),
        ("scorer.submission_id", "good"),
        ("scorer.attempt", "1"),
        ("scorer.stored", "false"),
    ] {
        assert_eq!(process.attribute(name).as_deref(), Some(value), "{name}");
    }
    let delta = result.json()["delta"].to_string();
    assert_eq!(process.attribute("scorer.delta"), Some(delta));

    let timings = &result.json()["timings_ms"];
    for (name, timing) in [
        ("fetch", "fetch"),
        ("decode", "decode"),
        ("device wait", "queued"),
        ("patch", "apply"),
        ("restore", "restore"),
    ] {
        let stage = &others[name];
        assert_eq!(stage.parent(), process.id(), "{name}");
        let millis = timings[timing].as_f64().expect("a time");
        assert!((stage.millis() - millis).abs() < 1e-3, "{name}: {millis}");
        // Begun and ended between the delivery and the end of the whole.
        assert!(stage.span.start_time_unix_nano + 1_000_000 >= process.span.start_time_unix_nano);
        assert!(stage.span.end_time_unix_nano <= process.span.end_time_unix_nano + 1_000_000);
    }
    let part = others["forward"].attribute("scorer.part");
    let part: usize = part.expect("a part").parse().expect("a number");
    assert!((1..4).contains(&part), "behind the first layer: {part}");
    let running = others["forward"].millis() + others["baseline"].millis();
    let forward = timings["forward"].as_f64().expect("a time");
    assert!((running - forward).abs() < 1e-3, "{running} for {forward}");

    let wait = &others["queue wait"];
    assert_eq!(wait.parent(), PARENT, "beside the job's own span");
    assert!(wait.millis() > 3000.0 && wait.millis() < 120_000.0);

    let publish = &others[&format!("publish {}:{MODEL}.scored", stack.object("results"))];
    assert_eq!(publish.span.kind, SpanKind::Producer as i32);
    assert_eq!(publish.parent(), process.id());
    // Whoever reads the result goes on below the span that published it.
    assert_eq!(
        result.headers["traceparent"],
        format!("00-{TRACE}-{}-01", publish.id())
    );
    assert_eq!(result.headers["tracestate"], "vendor=1");
    assert!(worker.log().contains(TRACE), "logs name the trace");
    worker.drain();
}

#[test]
fn what_has_no_sound_parent_begins_a_trace_and_what_fails_says_so() {
    let (stack, collector) = (Stack::shared(), Collector::start());
    let worker = stack.worker_with("w1", |s| {
        s.set("telemetry.otlp_endpoint", collector.url())
            .set("amqp.retry_delays", r#"["1s"]"#)
            .env("OTEL_EXPORTER_OTLP_HEADERS", "authorization=a%20token")
    });
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let mut bad = honest().job("bad");
    let candidate = bad["candidate"].as_object_mut().expect("a map");
    candidate.retain(|key, _| key != "sha256" && key != "size");
    candidate["data"] = json!("AAAA");
    let mut newer = honest_job("newer", "newer");
    newer["model_version"] = 99.into();
    for (id, job) in [("bad", &bad), ("newer", &newer)] {
        aggregator.submit_as(job, Encoding::Json, |properties| {
            properties
                .with_message_id(id.into())
                .with_headers(traced("00-1"))
        });
    }
    // As `scorer submit` sends it: it says when, and carries no trace.
    let since = now_ms() / 1000 - 5;
    aggregator.submit_as(
        &honest_job("alone", "n"),
        Encoding::MessagePack,
        |properties| {
            properties
                .with_message_id("alone".into())
                .with_timestamp(since)
        },
    );
    aggregator.result("alone");
    aggregator.result("newer");
    let rejected = aggregator.result("bad");
    // What is still held is sent before the end.
    worker.drain();

    let (process, _) = collector.of_job("bad");
    assert_eq!(process.parent(), "", "a root");
    let service = process.resource.get("service.name").map(String::as_str);
    assert_eq!(service, Some("scorer"));
    assert!(
        !process.failed(),
        "the candidate is at fault, not the worker"
    );
    let code = process.attribute("scorer.code");
    assert_eq!(code.as_deref(), Some("candidate_malformed"));
    assert_eq!(rejected.json()["error"]["code"].as_str(), code.as_deref());
    let of_newer: Vec<_> = collector
        .spans()
        .into_iter()
        .filter(|s| s.attribute("messaging.message.id").as_deref() == Some("newer"))
        .map(|s| (s.attribute("scorer.outcome"), s.failed()))
        .collect();
    let said = |outcome: &str| (Some(outcome.to_owned()), true);
    assert_eq!(of_newer, [said("retried"), said("answered")]);
    let (alone, others) = collector.of_job("alone");
    assert_eq!(others["queue wait"].parent(), alone.id(), "in one trace");
    let waits = collector.spans().into_iter();
    let waits = waits.filter(|s| s.span.name == "queue wait").count();
    assert_eq!(waits, 1, "nobody says when the others were sent");
    assert!(
        worker
            .log()
            .contains(r#""submission_id":"newer","attempt":1"#)
    );
    let newer = collector.of_job("newer").0;
    assert_eq!(
        newer.attribute("error.type").as_deref(),
        Some("model_version_unavailable")
    );
}

#[test]
fn a_collector_that_is_away_or_silent_costs_nothing_but_its_spans() {
    let stack = Stack::shared();
    // It takes connections and never answers.
    let silent = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let silent_port = silent.local_addr().expect("a bound address").port();
    for (id, port, said) in [("away", free_port(), true), ("silent", silent_port, false)] {
        let worker = stack.worker_with(id, |s| {
            s.set(
                "telemetry.otlp_endpoint",
                format!("http://127.0.0.1:{port}"),
            )
            .env("OTEL_BSP_SCHEDULE_DELAY", "100")
            .env("OTEL_EXPORTER_OTLP_TIMEOUT", "1000")
        });
        worker.ready();
        let aggregator = stack.aggregator();
        aggregator.collect_results();
        for n in 0..3 {
            aggregator.submit(&honest_job(&format!("{id}{n}"), "n"));
            aggregator.result(&format!("{id}{n}"));
        }
        if said {
            eventually(secs(20), "the log says once what is lost", || {
                worker.log().contains("telemetry.otlp_endpoint")
            });
        }
        worker.drain();
        let said = worker.log().matches("spans are lost").count();
        assert!(said <= 1, "once, not each time");
    }
}

#[test]
fn no_secret_is_logged_whoever_is_away() {
    let (stack, port) = (Stack::shared(), free_port());
    let secret = "hunter2";
    let worker = stack.worker_with("w1", |s| {
        s.set(
            "amqp.url",
            format!("amqp://me:{secret}@127.0.0.1:{port}/%2f"),
        )
        .set(
            "redis.url",
            format!("redis://me:{secret}@127.0.0.1:{port}/0"),
        )
        .set(
            "model.update_url",
            format!("http://127.0.0.1:{port}/manifest.json?token={secret}"),
        )
        .set(
            "telemetry.otlp_endpoint",
            format!("http://127.0.0.1:{port}"),
        )
        .set("telemetry.log", "debug")
        .env(
            "OTEL_EXPORTER_OTLP_HEADERS",
            &format!("authorization={secret}"),
        )
    });
    for said in ["me:hidden@", "redis://", "manifest.json"] {
        eventually(secs(30), said, || worker.log().contains(said));
    }
    worker.terminate();
    worker.exit_code(secs(20));
    assert!(!worker.log().contains(secret), "{}", worker.log());
}
