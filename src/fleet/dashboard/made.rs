//! Results and fleets that tests make.
#![cfg(test)]

use serde_json::{Value, json};

use super::verdict::SeenResult;
use crate::fleet::observer::{Queues, View, Worker};
use crate::protocol::document::from_json;
use crate::protocol::encoding::Encoding;
use crate::protocol::heartbeat::Record;
use crate::protocol::result::ResultMessage;
use crate::store::LiveRecord;

const SCORED: &str = include_str!("../../../schemas/examples/valid/score_result.v1-scored.json");
const MERGED: &str = include_str!("../../../schemas/examples/valid/score_result.v1-merge.json");
const REJECTED: &str =
    include_str!("../../../schemas/examples/valid/score_result.v1-rejected.json");

/// An example of the schema, with these fields in place of its own.
fn seen(example: &str, at_ms: u64, fields: Value) -> SeenResult {
    let mut result: Value = from_json(example.as_bytes()).unwrap();
    for (name, value) in fields.as_object().unwrap() {
        let place = name.split('.').fold(&mut result, |at, name| &mut at[name]);
        *place = value.clone();
    }
    let body = result.to_string();
    SeenResult {
        at_ms,
        result: ResultMessage::decode(body.as_bytes(), Encoding::Json).unwrap(),
        key: Some(body),
        trace_id: None,
    }
}

pub(super) fn scored(at_ms: u64, fields: Value) -> SeenResult {
    seen(SCORED, at_ms, fields)
}

pub(super) fn merged(at_ms: u64, fields: Value) -> SeenResult {
    seen(MERGED, at_ms, fields)
}

pub(super) fn rejected(at_ms: u64, fields: Value) -> SeenResult {
    seen(REJECTED, at_ms, fields)
}

/// A fleet of these workers: id, and fields of the record beside those that it gets here.
pub(super) fn fleet(at_ms: u64, workers: &[(&str, Value)]) -> View {
    let worker = |(id, fields): &(&str, Value)| {
        let mut record = json!({
            "worker_id": id, "incarnation": format!("{id}-1"), "ready": true, "state": "ready",
            "state_detail": "serving", "host": "h",
            // By a clock of its own.
            "at_ms": 9_100_000, "last_state_change_at_ms": 9_040_000,
            "model": {"name": "m", "version": 7},
            "jobs": {"scored": 0, "p50_ms": 2.0, "p95_ms": 5.0},
        });
        for (name, value) in fields.as_object().unwrap() {
            record[name] = value.clone();
        }
        Worker {
            record: Record::read(&record.to_string()).unwrap(),
            live: LiveRecord::default(),
        }
    };
    View {
        model: Some("m".into()),
        at_ms,
        workers: workers.iter().map(worker).collect(),
        queues: Some(Ok(Queues::default())),
    }
}
