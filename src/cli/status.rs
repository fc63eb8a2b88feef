//! `scorer status`: the fleet from Redis, for people and for programs.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Exit, Fault, Outcome, answer, answer_json};
use crate::config::Config;
use crate::store::read_fleet;

const EVERY: Duration = Duration::from_secs(1);

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
    let read = read_fleet(&config.redis, model.as_deref(), config.heartbeat.ttl).await;
    let (at_ms, records) = read.map_err(|e| Fault::new(Exit::Unavailable, e))?;
    let mut workers: Vec<Value> = records
        .iter()
        .filter_map(|text| serde_json::from_str(text).ok())
        .collect();
    for worker in &mut workers {
        let age = at_ms.saturating_sub(worker["at_ms"].as_u64().unwrap_or(at_ms));
        worker["age_ms"] = json!(age);
    }
    workers.sort_by_key(|w| (text(&w["model"]["name"]), text(&w["worker_id"])));
    let ready = workers.iter().filter(|w| w["ready"] == json!(true)).count();
    if as_json {
        answer_json(
            &json!({ "at_ms": at_ms, "alive": workers.len(), "ready": ready, "workers": workers }),
        )?;
    } else {
        answer(&table(&workers, ready))?;
    }
    Ok(if ready > 0 {
        Exit::Done
    } else {
        Exit::Negative
    })
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
