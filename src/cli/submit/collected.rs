//! The results of submitted jobs, printed as they arrive.

use std::collections::BTreeMap;

use indicatif::ProgressBar;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::job::Submission;
use crate::broker::amqp::{Deliveries, Delivery};
use crate::cli::progress::styled;
use crate::cli::{Fault, answer, plain};
use crate::protocol::json as text;

/// The jobs that still wait for their results.
pub(super) struct Collected {
    /// Jobs without a result, by name: several may share one.
    pub(super) waiting: BTreeMap<String, usize>,
    pub(super) all_scored: bool,
    json: bool,
    pub(super) bar: ProgressBar,
}

impl Collected {
    pub(super) fn new(jobs: &[Submission], json: bool) -> Self {
        let mut waiting = BTreeMap::new();
        for job in jobs {
            *waiting.entry(job.id.clone()).or_default() += 1;
        }
        let bar = ProgressBar::new(jobs.len() as u64);
        let bar = styled(bar, "{bar:40} {pos}/{len} results, {elapsed}");
        Self {
            waiting,
            all_scored: true,
            json,
            bar,
        }
    }

    /// Collects results; if sending fails, those of the jobs that were sent.
    pub(super) async fn fill(
        &mut self,
        jobs: &[Submission],
        sending: impl Future<Output = Result<(), (usize, Fault)>>,
        mut deliveries: Deliveries,
        lost: &CancellationToken,
    ) -> Result<(), Fault> {
        let gone =
            || Fault::unavailable("the connection to RabbitMQ was lost while waiting for results");
        let mut sent = None;
        tokio::pin!(sending);
        while sent.is_none() || !self.waiting.is_empty() {
            tokio::select! {
                biased;
                delivery = deliveries.next() => {
                    let delivery = delivery.ok_or_else(gone)?;
                    self.take(&delivery)?;
                }
                outcome = &mut sending, if sent.is_none() => {
                    let unsent = outcome.as_ref().err().map_or(jobs.len(), |(at, _)| *at);
                    for job in jobs.iter().skip(unsent) {
                        self.settle(&job.id);
                    }
                    sent = Some(outcome.map_err(|(_, fault)| fault));
                }
                () = lost.cancelled() => return Err(gone()),
            }
        }
        sent.unwrap_or(Ok(()))
    }

    /// Prints a result, unless it is a redelivered copy.
    fn take(&mut self, delivery: &Delivery) -> Result<(), Fault> {
        let result = delivery.properties.label().decode(&delivery.body);
        let result = serde_json::to_value(result.map_err(Fault::internal)?);
        let result = result.map_err(Fault::internal)?;
        if !self.settle(result["submission_id"].as_str().unwrap_or_default()) {
            return Ok(());
        }
        self.all_scored &= result["status"] == "scored";
        let shown = match self.json {
            // The text as received, so that the context keeps every digit.
            true => text::compact(&String::from_utf8_lossy(&delivery.body)),
            false => line(&result),
        };
        self.bar.inc(1);
        self.bar.suspend(|| answer(&shown)).map(drop)
    }

    /// Takes one job of this name off the list; false = there is none.
    fn settle(&mut self, name: &str) -> bool {
        let Some(count) = self.waiting.get_mut(name) else {
            return false;
        };
        *count -= 1;
        if *count == 0 {
            self.waiting.remove(name);
        }
        true
    }
}

fn line(result: &Value) -> String {
    let id = result["submission_id"].as_str().unwrap_or_default();
    if let Some(stopped) = result.get("stopped") {
        return format!(
            "{id}  stopped  {}: delta at most {:+.6}, after {} of {} windows",
            stopped["decision"].as_str().unwrap_or_default(),
            stopped["upper"].as_f64().unwrap_or_default(),
            result["windows"],
            stopped["of"],
        );
    }
    if result["joint"].is_object() {
        return merge_lines(id, result);
    }
    match (
        &result["status"],
        result["delta"].as_f64(),
        result["stderr"].as_f64(),
    ) {
        (_, Some(delta), stderr) => format!("{id}  scored  delta {}", estimate(delta, stderr)),
        (_, None, _) if result["loss"].is_number() => format!("{id}  loss {}", result["loss"]),
        (status, None, _) => format!(
            "{id}  {}  {}: {}",
            status.as_str().unwrap_or_default(),
            result["error"]["code"].as_str().unwrap_or_default(),
            plain(result["error"]["message"].as_str().unwrap_or_default())
        ),
    }
}

/// What a merge is worth, and below it each member: those that contribute most come first.
fn merge_lines(id: &str, result: &Value) -> String {
    let number = |of: &Value, field: &str| {
        let value = of[field].as_f64().unwrap_or_default();
        estimate(value, of["stderr"].as_f64())
    };
    let guide = match result["gap"]["large"].as_bool() {
        Some(true) => ", the gap is large: the contributions are a guide, not a measure",
        Some(false) | None => "",
    };
    let head = format!(
        "{id}  scored  joint delta {}{guide}",
        number(&result["joint"], "delta")
    );
    let mut members: Vec<&Value> = result["members"].as_array().into_iter().flatten().collect();
    let value = |member: &Value| member["contribution"]["value"].as_f64();
    members.sort_by(|a, b| {
        let (a, b) = (value(a), value(b));
        b.unwrap_or(f64::NEG_INFINITY)
            .total_cmp(&a.unwrap_or(f64::NEG_INFINITY))
    });
    let member = |member: &&Value| {
        let id = member["id"].as_str().unwrap_or_default();
        match value(member) {
            Some(_) => format!(
                "    {id}  contributes {}, alone {}",
                number(&member["contribution"], "value"),
                number(&member["alone"], "delta"),
            ),
            None => format!(
                "    {id}  left out  {}: {}",
                member["error"]["code"].as_str().unwrap_or_default(),
                plain(member["error"]["message"].as_str().unwrap_or_default())
            ),
        }
    };
    let lines = std::iter::once(head).chain(members.iter().map(member));
    lines.collect::<Vec<String>>().join("\n")
}

fn estimate(value: f64, stderr: Option<f64>) -> String {
    match stderr {
        Some(stderr) => format!("{value:+.6} +- {stderr:.6}"),
        None => format!("{value:+.6}"),
    }
}
