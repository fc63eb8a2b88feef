//! `scorer dead`: lists, shows, requeues and drops dead-lettered jobs.

use std::collections::BTreeMap;

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value, json};

use super::{Exit, Fault, Outcome, answer, answer_json, model_name, plain};
use crate::broker::amqp::{Acker, Delivery, Link};
use crate::broker::nodes::Nodes;
use crate::broker::topology::Topology;
use crate::broker::{Properties, PublishError, is_dead_letter_header};
use crate::config::Config;
use crate::protocol::failure::Code;
use crate::protocol::job::{self, Undecodable};
use crate::protocol::label::Label;
use crate::scoring::disposition::RETURNS_BEFORE_REPUBLISH;
use crate::store::FleetStore;

/// Characters of a text that `show` prints; a candidate may have millions.
const MOST_SHOWN: usize = 200;
/// Bytes of a context that `show` prints as they are.
const MOST_AS_SENT: usize = 4096;

#[derive(Debug, Args)]
pub(super) struct DeadArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Lists the jobs with their error and worker.
    List {
        #[command(flatten)]
        filter: Filter,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Prints the whole jobs as JSON, without the candidates' bytes.
    Show {
        #[command(flatten)]
        filter: Filter,
    },
    /// Puts the jobs back into the job queue as new ones, and clears their record of crashed workers.
    Requeue {
        #[command(flatten)]
        filter: Filter,
    },
    /// Deletes the jobs.
    Drop {
        #[command(flatten)]
        filter: Filter,
    },
}

/// Which jobs; default all.
#[derive(Debug, Clone, Args)]
struct Filter {
    /// Only jobs with this error code, such as `poisoned`.
    #[arg(long)]
    code: Option<String>,
    /// Only jobs with this `submission_id`.
    #[arg(long, value_name = "SUBMISSION_ID")]
    id: Option<String>,
}

/// A dead-lettered job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Parked {
    submission_id: Option<String>,
    model_version: Option<u64>,
    code: Option<String>,
    message: Option<String>,
    worker_id: Option<String>,
    attempt: u32,
    bytes: usize,
}

impl Filter {
    fn takes(&self, parked: &Parked) -> bool {
        let fits =
            |wanted: &Option<String>, found: &Option<String>| wanted.is_none() || wanted == found;
        fits(&self.code, &parked.code) && fits(&self.id, &parked.submission_id)
    }
}

impl Parked {
    fn of(delivery: &Delivery) -> Self {
        let properties = &delivery.properties;
        let (submission_id, model_version) = match job::decode(&delivery.body, properties.label()) {
            Ok(job) => (Some(job.submission_id), job.task.model_version()),
            Err(Undecodable::Named {
                submission_id,
                model_version,
                ..
            }) => (Some(submission_id), model_version),
            Err(Undecodable::Anonymous(_)) => (properties.message_id.clone(), None),
        };
        Self {
            submission_id,
            model_version,
            code: properties.dead_letter_reason(),
            message: properties.dead_letter_message(),
            worker_id: properties.dead_lettered_by(),
            attempt: properties.attempt,
            bytes: delivery.body.len(),
        }
    }
}

pub(super) async fn dead(config: &Config, args: DeadArgs) -> Outcome {
    let model = model_name(config)?;
    let link = Link::connect(&mut Nodes::new(&config.amqp), "scorer-cli")
        .await
        .map_err(Fault::unavailable)?;
    let letters = DeadLetters {
        store: FleetStore::new(&config.redis),
        link: &link,
        topology: Topology::new(&config.amqp, &model),
        left: Vec::new(),
    };
    let outcome = letters.act(args.action).await;
    link.close().await;
    outcome
}

/// The dead-letter queue, while it is browsed.
struct DeadLetters<'a> {
    store: FleetStore,
    link: &'a Link,
    topology: Topology,
    /// Jobs to return unchanged at the end; those returned at once would be delivered again.
    left: Vec<Acker>,
}

impl DeadLetters<'_> {
    async fn act(mut self, action: Action) -> Outcome {
        let outcome = match action {
            Action::List { filter, json } => self.list(&filter, json).await,
            Action::Show { filter } => self.show(&filter).await,
            Action::Requeue { filter } => self.requeue(&filter).await,
            Action::Drop { filter } => self.drop(&filter).await,
        };
        for acker in self.left {
            acker.hand_back().await;
        }
        outcome
    }

    async fn list(&mut self, filter: &Filter, as_json: bool) -> Outcome {
        let mut found = Vec::new();
        let looking = self.each(filter, async |letters, parked, delivery| {
            found.push(parked);
            letters.leave(delivery).await
        });
        let count = looking.await?;
        if as_json {
            answer_json(&found)?;
        } else if !found.is_empty() {
            answer(&table(&found))?;
        }
        self.verdict(count, "in the dead-letter queue")
    }

    async fn show(&mut self, filter: &Filter) -> Outcome {
        let looking = self.each(filter, async |letters, parked, delivery| {
            answer_json(&whole(&parked, &delivery).map_err(Fault::internal)?)?;
            letters.leave(delivery).await
        });
        let count = looking.await?;
        self.verdict(count, "in the dead-letter queue")
    }

    async fn requeue(&mut self, filter: &Filter) -> Outcome {
        let going = self.each(filter, async |letters, parked, delivery| {
            if parked.code.as_deref() == Some(Code::Poisoned.as_str()) {
                letters.forget_deaths(&parked).await?;
            }
            letters.publish_anew(delivery).await
        });
        let count = going.await?;
        self.verdict(count, "put back into the job queue")
    }

    async fn drop(&mut self, filter: &Filter) -> Outcome {
        let dropping = self.each(filter, async |_, _, delivery| {
            settled(delivery.acker.ack().await)
        });
        let count = dropping.await?;
        self.verdict(count, "dropped")
    }

    /// Acts on each job of the filter that was there at the beginning; how many there were.
    async fn each(
        &mut self,
        filter: &Filter,
        mut act: impl AsyncFnMut(&mut Self, Parked, Delivery) -> Result<(), Fault>,
    ) -> Result<usize, Fault> {
        let (queue, mut found) = (self.topology.dead_queue(), 0);
        let Some((count, _)) = self.link.depth(&queue).await.map_err(Fault::unavailable)? else {
            return Ok(0);
        };
        let browser = self.link.browse(&queue).await.map_err(Fault::unavailable)?;
        for _ in 0..count {
            let Some(delivery) = browser.next().await.map_err(Fault::unavailable)? else {
                break;
            };
            let parked = Parked::of(&delivery);
            if filter.takes(&parked) {
                act(self, parked, delivery).await?;
                found += 1;
            } else {
                self.leave(delivery).await?;
            }
        }
        Ok(found)
    }

    /// Leaves a job in the queue. The broker counts its returns, and would drop it at a limit.
    async fn leave(&mut self, delivery: Delivery) -> Result<(), Fault> {
        if delivery.delivery_count < RETURNS_BEFORE_REPUBLISH {
            self.left.push(delivery.acker);
            return Ok(());
        }
        let copy = self
            .topology
            .dead_letter(delivery.body, delivery.properties);
        match self.link.jobs.publish(copy).await {
            Ok(()) => settled(delivery.acker.ack().await),
            // The queue is full; that must not keep anybody from emptying it.
            Err(PublishError::Refused(_)) => {
                self.left.push(delivery.acker);
                Ok(())
            }
            Err(error @ (PublishError::Unroutable(_) | PublishError::Lost(_))) => {
                Err(Fault::unavailable(error))
            }
        }
    }

    /// Publishes the job as a new one, and deletes the dead-lettered one once the broker has it.
    async fn publish_anew(&self, delivery: Delivery) -> Result<(), Fault> {
        let fresh = self.topology.job(delivery.body, fresh(delivery.properties));
        let sent = self.link.jobs.publish(fresh).await;
        sent.map_err(Fault::unavailable)?;
        settled(delivery.acker.ack().await)
    }

    /// Deletes the crash marks, or the next worker would answer `poisoned` again without scoring the job.
    async fn forget_deaths(&self, parked: &Parked) -> Result<(), Fault> {
        let Some(id) = &parked.submission_id else {
            return Ok(());
        };
        let model = &self.topology.model;
        let forgotten = self.store.forget_deaths(model, id).await;
        forgotten.map_err(|e| {
            let text = format!(
                "{id}: its crash marks cannot be deleted, so it stays in the dead-letter queue: {e}"
            );
            Fault::unavailable(text)
        })
    }

    fn verdict(&self, found: usize, done: &str) -> Outcome {
        let queue = self.topology.dead_queue();
        match found {
            0 => Err(Fault::new(
                Exit::Negative,
                format!("{queue}: no such dead-lettered job"),
            )),
            1 => say(&format!("1 job {done}")),
            n => say(&format!("{n} jobs {done}")),
        }
    }
}

/// Standard output holds the list alone.
#[expect(
    clippy::print_stderr,
    clippy::unnecessary_wraps,
    reason = "a remark for a person"
)]
fn say(text: &str) -> Outcome {
    eprintln!("{text}");
    Ok(Exit::Done)
}

fn settled(acknowledged: bool) -> Result<(), Fault> {
    match acknowledged {
        true => Ok(()),
        false => Err(Fault::unavailable(
            "the connection to RabbitMQ was lost: jobs that were not settled are still in the dead-letter queue",
        )),
    }
}

/// The properties as the sender set them, for the first attempt.
fn fresh(properties: Properties) -> Properties {
    let headers = properties.headers.into_iter();
    let headers = headers.filter(|(name, _)| !is_dead_letter_header(name));
    Properties {
        headers: headers.collect(),
        // It does not wait since then.
        timestamp: None,
        attempt: 1,
        ..properties
    }
}

fn table(found: &[Parked]) -> String {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header([
        "SUBMISSION",
        "VERSION",
        "CODE",
        "WORKER",
        "ATTEMPT",
        "BYTES",
        "MESSAGE",
    ]);
    let text = |text: &Option<String>| text.as_deref().map_or_else(|| "?".into(), plain);
    table.add_rows(found.iter().map(|parked| {
        [
            text(&parked.submission_id),
            parked
                .model_version
                .map_or_else(|| "?".into(), |v| v.to_string()),
            text(&parked.code),
            text(&parked.worker_id),
            parked.attempt.to_string(),
            parked.bytes.to_string(),
            plain(parked.message.as_deref().unwrap_or_default()),
        ]
    }));
    table.to_string()
}

/// A parked job, with what the parked copy carries.
#[derive(Serialize)]
struct Whole {
    #[serde(flatten)]
    known: Value,
    job: Box<RawValue>,
}

fn whole(parked: &Parked, delivery: &Delivery) -> serde_json::Result<Whole> {
    let properties = &delivery.properties;
    let headers: Map<String, Value> = properties
        .headers
        .iter()
        .map(|(name, text)| (name.clone(), json!(text)))
        .collect();
    Ok(Whole {
        known: json!({
            "submission_id": parked.submission_id, "code": parked.code, "message": parked.message,
            "worker_id": parked.worker_id, "attempt": parked.attempt, "bytes": parked.bytes,
            "headers": headers, "content_type": properties.content_type,
            "content_encoding": properties.content_encoding, "message_id": properties.message_id,
            "correlation_id": properties.correlation_id, "reply_to": properties.reply_to,
        }),
        job: as_sent(&properties.label(), &delivery.body)?,
    })
}

/// The job as it was sent: a context of JSON to the digit.
fn as_sent(label: &Label, body: &[u8]) -> serde_json::Result<Box<RawValue>> {
    let job = match label.decode(body) {
        Ok(job) => shown(&job),
        Err(why) => json!({ "undecodable": why }),
    };
    let Value::Object(fields) = job else {
        return to_raw_value(&job);
    };
    let fields = fields
        .iter()
        .map(|(name, field)| Ok((name.as_str(), to_raw_value(field)?)));
    let mut fields: BTreeMap<&str, Box<RawValue>> = fields.collect::<serde_json::Result<_>>()?;
    let text = label.encoding().context_text(body);
    if let Some(text) = text.filter(|text| text.get().len() <= MOST_AS_SENT) {
        fields.insert("context", text);
    }
    to_raw_value(&fields)
}

/// A job's body as JSON, long texts and bytes by their size.
fn shown(value: &rmpv::Value) -> Value {
    use rmpv::Value as Packed;
    let size = |bytes: usize| json!(format!("({bytes} bytes)"));
    match value {
        Packed::Nil => Value::Null,
        Packed::Boolean(is) => json!(is),
        Packed::Integer(_) => serde_json::to_value(value).unwrap_or_default(),
        Packed::F32(number) => json!(number),
        Packed::F64(number) => json!(number),
        Packed::String(text) => match text.as_str() {
            Some(text) if text.len() <= MOST_SHOWN => json!(text),
            Some(_) | None => size(text.as_bytes().len()),
        },
        Packed::Binary(bytes) | Packed::Ext(_, bytes) => size(bytes.len()),
        Packed::Array(values) => values.iter().map(shown).collect(),
        Packed::Map(pairs) => {
            let name = |key: &Packed| key.as_str().map_or_else(|| key.to_string(), str::to_owned);
            let pairs = pairs.iter().map(|(key, value)| (name(key), shown(value)));
            Value::Object(pairs.collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::encoding::Encoding;

    #[test]
    fn a_job_is_shown_as_it_was_sent_but_for_what_is_long() {
        let long = "x".repeat(MOST_SHOWN + 1);
        let body = format!(r#"{{"v": 7.0, "data": "{long}", "context": {{"a": [1.10, 1e400]}}}}"#);
        let text = as_sent(&Encoding::Json.into(), body.as_bytes()).unwrap();
        let expected = r#"{"context":{"a":[1.10,1e400]},"data":"(201 bytes)","v":7}"#;
        assert_eq!(text.get(), expected);
        let text = as_sent(&Label::default(), b"{}").unwrap();
        assert!(text.get().starts_with(r#"{"undecodable":"looks like JSON"#));
    }
}
