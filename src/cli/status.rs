//! `scorer status`: the fleet from Redis, for people and for programs.

use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

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
    let mut workers: Vec<Value> = records
        .iter()
        .filter_map(|text| serde_json::from_str(text).ok())
        .filter(Value::is_object)
        .collect();
    for worker in &mut workers {
        let age = at_ms.saturating_sub(worker["at_ms"].as_u64().unwrap_or(at_ms));
        worker["age_ms"] = json!(age);
    }
    workers.sort_by_key(|w| (text(&w["model"]["name"]), text(&w["worker_id"])));
    let ready = workers.iter().filter(|w| w["ready"] == json!(true)).count();
    if as_json {
        let mut report = json!({
            "at_ms": at_ms, "alive": workers.len(), "ready": ready, "workers": workers,
        });
        if let Some(Ok(queues)) = queues {
            report["queue"] = json!(queues);
        }
        answer_json(&report)?;
    } else {
        answer(&(table(&workers, ready) + &line(queues)))?;
    }
    Ok(if ready > 0 {
        Exit::Done
    } else {
        Exit::Negative
    })
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

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn table(workers: &[Value], ready: usize) -> String {
    if workers.is_empty() {
        return "no worker is alive".into();
    }
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header([
        "WORKER", "MODEL", "STATE", "DETAIL", "SCORED", "REJECTED", "FAILED", "P50 MS", "P95 MS",
    ]);
    for w in workers {
        let jobs = &w["jobs"];
        let millis = |v: &Value| {
            v.as_f64()
                .map_or_else(|| "-".into(), |ms| format!("{ms:.1}"))
        };
        table.add_row([
            text(&w["worker_id"]),
            format!(
                "{} v{}",
                text(&w["model"]["name"]),
                w["model"]["version"]
                    .as_u64()
                    .map_or("?".into(), |v| v.to_string())
            ),
            text(&w["state"]),
            text(&w["state_detail"]),
            jobs["scored"].to_string(),
            jobs["rejected"].to_string(),
            jobs["failed"].to_string(),
            millis(&jobs["p50_ms"]),
            millis(&jobs["p95_ms"]),
        ]);
    }
    format!("{table}\n{} alive, {ready} ready", workers.len())
}
