//! `scorer status`: the fleet from Redis, for people and for programs.

use std::io::IsTerminal;

use super::watch::EVERY;
use super::{Exit, Fault, Outcome, answer, answer_json, plain};
use crate::config::Config;
use crate::fleet::observer::{Observer, Queues, View};
use crate::protocol::heartbeat::Record;

pub(super) async fn status(config: &Config, as_json: bool, watch: bool) -> Outcome {
    let mut observer = Observer::new(config, known_model(config)?);
    let outcome = match (watch, as_json, std::io::stdout().is_terminal()) {
        (false, _, _) => once(&mut observer, as_json).await,
        (true, false, true) => super::watch::watch(&mut observer).await,
        (true, _, _) => again_and_again(&mut observer, as_json).await,
    };
    observer.close().await;
    outcome
}

/// The model of the command; none = every model.
pub(super) fn known_model(config: &Config) -> Result<Option<String>, Fault> {
    match (&config.model.name, &config.model.dir) {
        (None, None) => Ok(None),
        (_, _) => super::model_name(config).map(Some),
    }
}

async fn again_and_again(observer: &mut Observer<'_>, as_json: bool) -> Outcome {
    loop {
        let exit = match once(observer, as_json).await {
            // The view goes on, to show when Redis is back.
            Err(fault) if fault.exit == Exit::Unavailable => {
                answer(&format!("unknown: {}", fault.message))?;
                Exit::Unavailable
            }
            looked @ (Ok(_) | Err(_)) => looked?,
        };
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            _ = tokio::signal::ctrl_c() => return Ok(exit),
        }
    }
}

async fn once(observer: &mut Observer<'_>, as_json: bool) -> Outcome {
    let view = observer.look().await;
    let view = view.map_err(Fault::unavailable)?;
    if as_json {
        answer_json(&view.report())?;
    } else {
        answer(&(table(&view) + &line(view.queues.as_ref())))?;
    }
    Ok(Exit::of_answer(view.ready() > 0))
}

fn line(queues: Option<&Result<Queues, String>>) -> String {
    match queues {
        None => String::new(),
        Some(Ok(queues)) => format!("\nqueue: {queues}"),
        Some(Err(why)) => format!("\nqueue: unknown, {why}"),
    }
}

fn cells(record: &Record) -> [String; 9] {
    let version = |n: Option<u64>| n.map_or_else(|| "?".into(), |n| n.to_string());
    let millis = |ms: Option<f64>| ms.map_or_else(|| "-".into(), |ms| format!("{ms:.1}"));
    let (model, jobs) = (&record.model, &record.jobs);
    [
        plain(&record.worker_id),
        format!("{} v{}", plain(&model.name), version(model.version)),
        plain(&record.state),
        plain(&record.state_detail),
        jobs.scored.to_string(),
        jobs.rejected.to_string(),
        jobs.failed.to_string(),
        millis(jobs.p50_ms),
        millis(jobs.p95_ms),
    ]
}

fn table(view: &View) -> String {
    let (alive, ready) = (view.workers.len(), view.ready());
    if alive == 0 {
        return "no worker is alive".into();
    }
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header([
        "WORKER", "MODEL", "STATE", "DETAIL", "SCORED", "REJECTED", "FAILED", "P50 MS", "P95 MS",
    ]);
    table.add_rows(view.workers.iter().map(|worker| cells(&worker.record)));
    format!("{table}\n{alive} alive, {ready} ready")
}
