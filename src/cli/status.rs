//! `scorer status`: the fleet from Redis, for people and for programs.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{Exit, Fault, Outcome, answer, answer_json};
use crate::broker::BrokerError;
use crate::broker::amqp::Link;
use crate::broker::topology::Topology;
use crate::config::Config;
use crate::store::read_fleet;

const EVERY: Duration = Duration::from_secs(1);
/// A broker that does not answer may delay the fleet's view by this much, and never prevents it.
const BROKER_LIMIT: Duration = Duration::from_secs(2);

/// What waits at the broker for one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
struct Queues {
    jobs: u32,
    retry: u32,
    dead: u32,
    consumers: u32,
}

/// What the table shows of a heartbeat record; whatever is missing there is left open here.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Row {
    worker_id: Option<String>,
    at_ms: Option<u64>,
    ready: bool,
    state: Option<String>,
    state_detail: Option<String>,
    model: Model,
    jobs: Jobs,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Model {
    name: Option<String>,
    version: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Jobs {
    scored: Option<u64>,
    rejected: Option<u64>,
    failed: Option<u64>,
    p50_ms: Option<f64>,
    p95_ms: Option<f64>,
}

/// A record whose values nobody looks into.
type Record = BTreeMap<String, Box<RawValue>>;

#[derive(Debug, Serialize)]
struct Report {
    alive: usize,
    at_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    queue: Option<Queues>,
    ready: usize,
    workers: Vec<Record>,
}

pub(super) async fn status(config: &Config, as_json: bool, watch: bool) -> Outcome {
    loop {
        let exit = once(config, as_json).await?;
        if !watch {
            return Ok(exit);
        }
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            _ = tokio::signal::ctrl_c() => return Ok(exit),
        }
    }
}

async fn once(config: &Config, as_json: bool) -> Outcome {
    let model = match (&config.model.name, &config.model.dir) {
        (None, None) => None,
        (_, _) => Some(super::model_name(config)?),
    };
    let (read, queues) = tokio::join!(
        read_fleet(&config.redis, model.as_deref(), config.heartbeat.ttl),
        queues(config, model.as_deref())
    );
    let (at_ms, records) = read.map_err(|e| Fault::new(Exit::Unavailable, e))?;
    let mut workers: Vec<(Row, &str)> = records
        .iter()
        .filter_map(|text| Some((serde_json::from_str(text).ok()?, text.as_str())))
        .collect();
    workers.sort_by(|(a, _), (b, _)| a.name().cmp(&b.name()));
    let ready = workers.iter().filter(|(row, _)| row.ready).count();
    if as_json {
        let aged = workers
            .iter()
            .filter_map(|(row, text)| aged(row, text, at_ms));
        answer_json(&Report {
            alive: workers.len(),
            at_ms,
            queue: queues.and_then(Result::ok),
            ready,
            workers: aged.collect(),
        })?;
    } else {
        let rows = workers.iter().map(|(row, _)| row);
        answer(&(table(rows, ready) + &line(queues)))?;
    }
    Ok(if ready > 0 {
        Exit::Done
    } else {
        Exit::Negative
    })
}

/// The record as it was written, with its age.
fn aged(row: &Row, text: &str, at_ms: u64) -> Option<Record> {
    let mut record: Record = serde_json::from_str(text).ok()?;
    let age = at_ms.saturating_sub(row.at_ms.unwrap_or(at_ms));
    let age = serde_json::value::to_raw_value(&age).ok()?;
    record.insert("age_ms".into(), age);
    Some(record)
}

/// Asks the broker, where it is known for which model; there may be none yet.
async fn queues(config: &Config, model: Option<&str>) -> Option<Result<Queues, String>> {
    let topology = Topology::new(&config.amqp, model?);
    let asking = async {
        let link = Link::connect(&config.amqp, "scorer-status").await?;
        let depths = depths(&link, &topology).await;
        link.close().await;
        depths
    };
    let answered = tokio::time::timeout(BROKER_LIMIT, asking).await;
    Some(match answered {
        Ok(depths) => depths.map_err(|e| e.to_string()),
        Err(_) => Err(format!(
            "RabbitMQ: no answer within {} s",
            BROKER_LIMIT.as_secs()
        )),
    })
}

async fn depths(link: &Link, topology: &Topology) -> Result<Queues, BrokerError> {
    let mut queues = Queues::default();
    if let Some((jobs, consumers)) = link.depth(&topology.jobs_queue()).await? {
        (queues.jobs, queues.consumers) = (jobs, consumers);
    }
    for rung in topology.retry_queues() {
        queues.retry += link.depth(&rung).await?.map_or(0, |(jobs, _)| jobs);
    }
    let dead = link.depth(&topology.dead_queue()).await?;
    queues.dead = dead.map_or(0, |(jobs, _)| jobs);
    Ok(queues)
}

fn line(queues: Option<Result<Queues, String>>) -> String {
    match queues {
        None => String::new(),
        Some(Ok(q)) => format!(
            "\nqueue: {} waiting, {} to be tried again, {} parked, {} consumers",
            q.jobs, q.retry, q.dead, q.consumers
        ),
        Some(Err(why)) => format!("\nqueue: unknown, {why}"),
    }
}

impl Row {
    fn name(&self) -> (&Option<String>, &Option<String>) {
        (&self.model.name, &self.worker_id)
    }

    fn cells(&self) -> [String; 9] {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let number = |n: Option<u64>| n.map_or_else(|| "?".into(), |n| n.to_string());
        let millis = |ms: Option<f64>| ms.map_or_else(|| "-".into(), |ms| format!("{ms:.1}"));
        [
            text(&self.worker_id),
            format!("{} v{}", text(&self.model.name), number(self.model.version)),
            text(&self.state),
            text(&self.state_detail),
            number(self.jobs.scored),
            number(self.jobs.rejected),
            number(self.jobs.failed),
            millis(self.jobs.p50_ms),
            millis(self.jobs.p95_ms),
        ]
    }
}

fn table<'a>(rows: impl ExactSizeIterator<Item = &'a Row>, ready: usize) -> String {
    let alive = rows.len();
    if alive == 0 {
        return "no worker is alive".into();
    }
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header([
        "WORKER", "MODEL", "STATE", "DETAIL", "SCORED", "REJECTED", "FAILED", "P50 MS", "P95 MS",
    ]);
    table.add_rows(rows.map(Row::cells));
    format!("{table}\n{alive} alive, {ready} ready")
}
