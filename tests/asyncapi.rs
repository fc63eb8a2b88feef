//! `schemas/asyncapi.yaml` says what the code says, in the form that AsyncAPI's own schema asks for.
//! `UPDATE=1 cargo test --test asyncapi` writes it anew.

#![expect(
    clippy::unwrap_used,
    reason = "a failed step of a test is a failed test"
)]

use std::fmt::Write as _;
use std::io::Read as _;
use std::path::Path;

use scorer::broker::topology::{Exchange, ExchangeKind, Queue, Topology};
use scorer::broker::{ATTEMPT, is_dead_letter_header};
use scorer::config::{Config, Layers};
use scorer::protocol::failure::Status;
use serde_json::{Map, Value, json};
use strum::VariantArray;

const ABOUT: &str = "What a worker receives and sends over RabbitMQ; a client does the opposite of each operation. \
    Bodies are MessagePack (application/msgpack, the default) or JSON (application/json), as content_type says; a \
    result comes back in the encoding of its job. The first word of every name is amqp.namespace.";

fn topology() -> Topology {
    let config = Config::load(&Layers::default()).unwrap();
    Topology::new(&config.amqp, "{model}")
}

/// The part of a name that stands for it here: without namespace and model.
fn short(name: &str) -> String {
    let (_, rest) = name.split_once('.').unwrap();
    rest.replace(".{model}", "")
}

fn reference(to: &str) -> Value {
    json!({ "$ref": to })
}

/// Which message travels there.
fn message(name: &str) -> &'static str {
    let name = short(name);
    match name.split('.').next().unwrap() {
        "jobs" | "dead" => "job",
        "results" => "result",
        "control" => "control",
        other => panic!("what is in {other}?"),
    }
}

/// A channel; its parameters are those that its address names.
fn channel(address: &str, message: &str, amqp: Value) -> Value {
    let all = [
        ("{model}", "model", "Name of the model."),
        ("{worker}", "worker", "Id of the worker."),
    ];
    let named = all.iter().filter(|(mark, ..)| address.contains(mark));
    let mut parameters: Map<String, Value> = named
        .map(|(_, name, about)| ((*name).to_owned(), json!({ "description": about })))
        .collect();
    if address.contains("{status}") {
        let words: Vec<&str> = Status::VARIANTS.iter().map(|s| s.as_str()).collect();
        let status = json!({ "description": "Status of the result.", "enum": words });
        parameters.insert("status".to_owned(), status);
    }
    let mut channel = json!({
        "address": (!address.is_empty()).then_some(address),
        "messages": { message: reference(&format!("#/components/messages/{message}")) },
        "bindings": { "amqp": amqp },
    });
    if !parameters.is_empty() {
        channel["parameters"] = parameters.into();
    }
    channel
}

fn exchange_channel(exchange: &Exchange, address: &str) -> Value {
    let mut amqp = json!({
        "is": "routingKey",
        "exchange": { "name": exchange.name, "type": exchange.kind, "durable": true, "autoDelete": false },
        "bindingVersion": "0.3.0",
    });
    if !exchange.arguments.is_empty() {
        amqp["x-arguments"] = exchange.arguments.iter().cloned().map(pair).collect();
    }
    channel(address, message(&exchange.name), amqp)
}

fn queue_channel(queue: &Queue) -> Value {
    let amqp = json!({
        "is": "queue",
        "queue": { "name": queue.name, "durable": true, "exclusive": false, "autoDelete": false },
        "x-arguments": queue.arguments.iter().cloned().map(pair).collect::<Value>(),
        "bindingVersion": "0.3.0",
    });
    channel(&queue.name, message(&queue.name), amqp)
}

fn pair<T: serde::Serialize>((name, value): (String, T)) -> (String, Value) {
    (name, serde_json::to_value(value).unwrap())
}

fn channels(topology: &Topology) -> Map<String, Value> {
    let mut all = Map::new();
    for exchange in &topology.exchanges {
        let name = format!("exchange.{}", short(&exchange.name));
        let mut bindings = topology.bindings.iter();
        match bindings.find(|binding| binding.exchange == exchange.name) {
            Some(binding) => {
                let address = binding.routing_key.replace('*', "{status}");
                all.insert(name, exchange_channel(exchange, &address));
            }
            // Every worker binds a queue of its own with these.
            None => {
                assert_eq!(exchange.kind, ExchangeKind::Topic);
                for (end, key) in [("all", "all"), ("worker", "worker.{worker}")] {
                    all.insert(format!("{name}.{end}"), exchange_channel(exchange, key));
                }
            }
        }
    }
    for queue in &topology.queues {
        all.insert(
            format!("queue.{}", short(&queue.name)),
            queue_channel(queue),
        );
    }
    let mut replies = json!({
        "address": null,
        "description": "The queue in reply_to of the message that is answered, on the default exchange.",
        "messages": {},
    });
    for message in ["result", "control_answer"] {
        replies["messages"][message] = reference(&format!("#/components/messages/{message}"));
    }
    all.insert("replies".to_owned(), replies);
    all
}

fn receive(channel: &str, about: &str) -> Value {
    json!({
        "action": "receive",
        "channel": reference(&format!("#/channels/{channel}")),
        "summary": about,
        "bindings": { "amqp": { "ack": true, "bindingVersion": "0.3.0" } },
    })
}

fn send(channel: &str, about: &str) -> Value {
    let amqp = json!({ "deliveryMode": 2, "mandatory": true, "timestamp": true, "bindingVersion": "0.3.0" });
    json!({
        "action": "send",
        "channel": reference(&format!("#/channels/{channel}")),
        "summary": about,
        "bindings": { "amqp": amqp },
    })
}

fn operations(topology: &Topology) -> Value {
    let mut take = receive(
        "queue.jobs",
        "Takes a job; it is acknowledged after its result is confirmed.",
    );
    take["reply"] = json!({ "channel": reference("#/channels/exchange.results") });
    let mut all = json!({
        "take_job": take,
        "send_result": send("exchange.results", "Sends a result; again if a confirm was lost, with the same message_id."),
        "send_result_copy": send("replies", "Sends a second copy of a result, if the job has reply_to."),
        "dead_letter_job": send("exchange.dead", "Sets a job aside, with the reason in its headers."),
    });
    for queue in topology.retry_queues() {
        let rung = short(&queue);
        let delay = rung.rsplit('.').next().unwrap();
        let about = format!("Sends a job back to the jobs queue after {delay}.");
        all[format!("retry_job_after_{delay}")] = send(&format!("queue.{rung}"), &about);
    }
    for (to, about) in [
        ("all", "Obeys a command to every worker."),
        ("worker", "Obeys a command to this worker."),
    ] {
        let mut obey = receive(&format!("exchange.control.{to}"), about);
        obey["bindings"]["amqp"]["ack"] = json!(false);
        obey["reply"] = json!({
            "address": { "location": "$message.header#/reply_to", "description": "The AMQP property reply_to." },
            "channel": reference("#/channels/replies"),
            "messages": [reference("#/channels/replies/messages/control_answer")],
        });
        all[format!("obey_{to}")] = obey;
    }
    all
}

fn described(schema: &str, title: &str, headers: &[(&str, Value)]) -> Value {
    let headers: Map<String, Value> = headers
        .iter()
        .map(|(name, schema)| ((*name).to_owned(), schema.clone()))
        .collect();
    json!({
        "name": schema,
        "title": title,
        "payload": reference(&format!("./{schema}.json")),
        "headers": { "type": "object", "properties": headers },
    })
}

fn messages() -> Value {
    let text = |about: &str| json!({ "type": "string", "description": about });
    let trace = [
        ("traceparent", text("W3C trace context.")),
        ("tracestate", text("W3C trace context.")),
    ];
    let dead = [
        (
            "x-error-code",
            text("Of a dead-lettered job: the code of its failure."),
        ),
        (
            "x-error-message",
            text("Of a dead-lettered job: the message of its failure."),
        ),
        (
            "x-worker-id",
            text("Of a dead-lettered job: the worker that set it aside."),
        ),
    ];
    assert!(dead.iter().all(|(name, _)| is_dead_letter_header(name)));
    let attempt = json!({ "type": "integer", "minimum": 1, "description": "Number of this attempt; 1 if absent." });
    let job = [&trace[..], &[(ATTEMPT, attempt)], &dead].concat();
    json!({
        "job": described("score_job.v1", "Job", &job),
        "result": described("score_result.v1", "Result", &trace),
        "control": described("control.v1", "Command to workers", &[]),
        "control_answer": described("control_answer.v1", "A worker's answer to a command", &[]),
    })
}

fn document() -> Value {
    let topology = topology();
    json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": "scorer",
            // Of the messages, which outlive versions of the program.
            "version": "1",
            "description": ABOUT,
            "license": { "name": env!("CARGO_PKG_LICENSE") },
        },
        "defaultContentType": "application/msgpack",
        "channels": channels(&topology),
        "operations": operations(&topology),
        "components": { "messages": messages() },
    })
}

/// Written by hand, since a whole library would serve this one file: maps, lists and JSON's scalars.
fn yaml(value: &Value, indent: usize, out: &mut String) {
    let nested = |value: &Value| match value {
        Value::Object(fields) => !fields.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    };
    let mut line = |start: &str, value: &Value| match nested(value) {
        true => {
            writeln!(out, "{:indent$}{start}", "").unwrap();
            yaml(value, indent + 2, out);
        }
        false => writeln!(out, "{:indent$}{start} {value}", "").unwrap(),
    };
    match value {
        Value::Object(fields) => {
            let mut fields: Vec<_> = fields.iter().collect();
            fields.sort_by_key(|(name, _)| *name);
            fields
                .into_iter()
                .for_each(|(name, value)| line(&format!("{name}:"), value));
        }
        Value::Array(items) => items.iter().for_each(|item| line("-", item)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            panic!("{value} is no document")
        }
    }
}

#[test]
fn the_committed_document_is_the_generated_one() {
    let mut text = "# Generated from the code: UPDATE=1 cargo test --test asyncapi\n".to_owned();
    yaml(&document(), 0, &mut text);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas/asyncapi.yaml");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        text == committed,
        "run: UPDATE=1 cargo test --test asyncapi"
    );
}

/// The specification's own schema; `tests/asyncapi/README.md` says where it is from.
fn specification() -> jsonschema::Validator {
    let packed: &[u8] = include_bytes!("asyncapi/3.0.0.json.gz");
    let mut text = String::new();
    let mut unpacked = flate2::read::GzDecoder::new(packed);
    unpacked.read_to_string(&mut text).unwrap();
    jsonschema::validator_for(&serde_json::from_str(&text).unwrap()).unwrap()
}

#[test]
fn the_document_is_valid_by_the_schema_of_asyncapi() {
    let (validator, document) = (specification(), document());
    let errors: Vec<String> = validator
        .iter_errors(&document)
        .map(|e| format!("{}: {e}", e.instance_path()))
        .collect();
    assert!(errors.is_empty(), "{errors:#?}");
    // It does refuse.
    let mut bent = document;
    bent["operations"]["take_job"]["action"] = json!("juggle");
    assert!(!validator.is_valid(&bent));
}

/// Every place that the document points to.
fn references(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            found.extend(
                fields
                    .get("$ref")
                    .and_then(Value::as_str)
                    .map(str::to_owned),
            );
            fields.values().for_each(|field| references(field, found));
        }
        Value::Array(items) => items.iter().for_each(|item| references(item, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn everything_that_the_document_refers_to_is_there() {
    let document = document();
    let mut found = Vec::new();
    references(&document, &mut found);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas");
    for to in &found {
        let there = match to.strip_prefix('#') {
            Some(place) => document.pointer(place).is_some(),
            None => folder.join(to).is_file(),
        };
        assert!(there, "{to}");
    }
    let files = found.iter().filter(|to| to.starts_with("./"));
    assert_eq!(files.count(), 4, "{found:?}");
}
