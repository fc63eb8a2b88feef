//! `scorer status`: the fleet from Redis, for people and for programs.

use std::io::IsTerminal;

use super::watch::EVERY;
use super::{Exit, Fault, Outcome, answer, answer_json, plain};
use crate::config::Config;
use crate::fleet::findings::{Finding, Losses, Lost, findings};
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
        let mut losses = Losses::default();
        losses.see(&view);
        losses.hear(&observer.events(None).await.unwrap_or_default());
        answer(&told(&view, losses.list()))?;
    }
    Ok(Exit::of_answer(view.ready() > 0))
}

/// The table, the queue, and what is wrong.
fn told(view: &View, lost: &[Lost]) -> String {
    let table = table(view);
    let found = findings(view, None, lost);
    // That nobody is alive is said once.
    let found = found.iter().filter(|finding| finding.text != table);
    let found = found.map(|f| format!("{}: {}{}", f.severity, f.text, names(f)));
    let queue = queue_line(view.queues.as_ref());
    let lines = std::iter::once(table.clone()).chain(queue).chain(found);
    lines.collect::<Vec<_>>().join("\n")
}

pub(super) fn queue_line(queues: Option<&Result<Queues, String>>) -> Option<String> {
    queues.map(|queues| match queues {
        Ok(queues) => format!("queue: {queues}"),
        Err(why) => format!("queue: unknown, {why}"),
    })
}

/// The first of the workers that a finding is about.
pub(super) fn names(finding: &Finding) -> String {
    let mut names: Vec<String> = finding.workers.iter().map(|name| plain(name)).collect();
    if names.len() < finding.count {
        names.push("...".to_owned());
    }
    match finding.workers.is_empty() {
        true => String::new(),
        false => format!(" ({})", names.join(", ")),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::observer::Worker;
    use crate::store::LiveRecord;
    use serde_json::json;

    fn view(workers: Vec<Worker>) -> View {
        View {
            at_ms: 1,
            model: Some("m".into()),
            workers,
            queues: Some(Ok(Queues {
                consumers: 1,
                ..Queues::default()
            })),
        }
    }

    #[test]
    fn an_update_that_failed_is_told_below_the_table() {
        let update = json!({"live_version": 9, "looked_at_ms": 1, "bytes_here": 0, "bytes_wanted": 0,
            "refused": null, "failure": "canary differs"});
        let record = json!({"worker_id": "w\u{1b}1", "ready": true, "state": "ready",
            "model": {"name": "m", "version": 3}, "update": update});
        let record = Record::read(&record.to_string()).unwrap();
        let live = LiveRecord::default();
        let told = told(&view(vec![Worker { record, live }]), &[]);
        let lines: Vec<&str> = told.lines().skip(2).collect();
        let expected = [
            "1 alive, 1 ready",
            "queue: 0 waiting, 0 to be retried, 0 dead-lettered, 1 consumers",
            "warn: 1 worker does not serve the live version 9: canary differs (w\\u{1b}1)",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn that_nobody_is_alive_is_told_once() {
        let told = told(&view(Vec::new()), &[]);
        let lines: Vec<&str> = told.lines().collect();
        let queue = "queue: 0 waiting, 0 to be retried, 0 dead-lettered, 1 consumers";
        assert_eq!(lines, ["no worker is alive", queue]);
    }
}
