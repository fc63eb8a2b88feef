//! `scorer ctl`: sends a command to workers and waits for their replies.

use std::collections::BTreeSet;
use std::time::Duration;

use clap::Args;
use uuid::Uuid;

use super::topology::link;
use super::{Exit, Fault, Outcome, answer, model_name};
use crate::broker::amqp::{Deliveries, Link};
use crate::broker::topology::Topology;
use crate::broker::{Outgoing, Properties, PublishError};
use crate::config::{Config, format_duration, units};
use crate::protocol::control::{Command, ControlAnswer, ControlMessage, Outcome as Done};
use crate::protocol::encoding::Encoding;
use crate::protocol::heartbeat::Record;
use crate::protocol::message::V1;
use crate::protocol::state::State;
use crate::store::FleetStore;

#[derive(Debug, Args)]
pub(super) struct CtlArgs {
    /// The command to send.
    command: Command,
    /// Send it to this worker only [default: all workers of the model].
    #[arg(long, value_name = "ID")]
    worker: Option<String>,
    /// How long to wait for replies.
    #[arg(long, default_value = "60s", value_parser = units::parse_duration)]
    timeout: Duration,
}

pub(super) async fn ctl(config: &Config, args: CtlArgs) -> Outcome {
    let model = model_name(config)?;
    let (link, topology) = link(config, &model).await?;
    let outcome = ask(config, &link, &topology, &args).await;
    link.close().await;
    outcome
}

async fn ask(config: &Config, link: &Link, topology: &Topology, args: &CtlArgs) -> Outcome {
    let subscribed = link.subscribe(&topology.control_exchange(), &[]).await;
    let (queue, answers) = subscribed.map_err(Fault::unavailable)?;
    // Before anybody is asked: who drains is gone from the records soon.
    let to = Addressees::of(config, &topology.model, args).await;
    let asked = Uuid::new_v4().to_string();
    let (mut received, body) = (false, message(args)?);
    for routing_key in to.keys {
        let outgoing = Outgoing {
            exchange: topology.control_exchange(),
            routing_key,
            body: body.clone(),
            properties: Properties {
                content_type: Some("application/json".into()),
                correlation_id: Some(asked.clone()),
                reply_to: Some(queue.clone()),
                attempt: 1,
                ..Properties::default()
            },
            mandatory: true,
        };
        // One after the other, not pipelined: "returned" is certain here.
        match link.jobs.publish(outgoing).await {
            Ok(()) => received = true,
            Err(PublishError::Unroutable(_)) => {}
            Err(error @ (PublishError::Refused(_) | PublishError::Lost(_))) => {
                return Err(Fault::unavailable(error));
            }
        }
    }
    if !received {
        let why = "no worker received it; scorer status shows which are alive";
        return Err(Fault::new(Exit::Negative, why));
    }
    let replies = Replies {
        asked,
        expected: to.expected,
        all_done: true,
    };
    replies.collect(answers, args.timeout).await
}

/// Who is asked.
struct Addressees {
    keys: Vec<String>,
    /// Who should answer; none = Redis does not say.
    expected: Option<BTreeSet<String>>,
}

impl Addressees {
    /// One worker, or all of the model. What is sent to `all` reaches those of other models too, so it is sent only where
    /// there are none, or where nobody knows.
    async fn of(config: &Config, model: &str, args: &CtlArgs) -> Self {
        let each = |ids: BTreeSet<String>| Self {
            keys: ids.iter().map(|id| format!("worker.{id}")).collect(),
            expected: Some(ids),
        };
        let all = |expected: Option<BTreeSet<String>>| Self {
            keys: vec!["all".into()],
            expected,
        };
        if let Some(id) = &args.worker {
            return each(BTreeSet::from([id.clone()]));
        }
        match live_workers(config).await {
            None => all(None),
            Some(live) => {
                let is_ours = |record: &Record| record.model.name == model;
                let alone = live.iter().all(is_ours);
                let ours = live.into_iter().filter(is_ours);
                let ours = ours.map(|record| record.worker_id).collect();
                if alone { all(Some(ours)) } else { each(ours) }
            }
        }
    }
}

fn message(args: &CtlArgs) -> Result<Vec<u8>, Fault> {
    let message = ControlMessage {
        v: V1,
        command: args.command,
        worker_id: args.worker.clone(),
    };
    Encoding::Json.encode(&message).map_err(Fault::internal)
}

/// The workers of every model; none = Redis does not say.
async fn live_workers(config: &Config) -> Option<Vec<Record>> {
    let store = FleetStore::new(&config.redis);
    let read = store.live_records(None, config.heartbeat.ttl).await;
    let unknown = |error: &crate::store::StoreError| {
        tracing::warn!(%error, "cannot list the workers: those of every model are asked, and replies awaited until --timeout");
    };
    let (_, records) = read.inspect_err(unknown).ok()?;
    let records = records.iter().filter_map(|live| Record::read(&live.text));
    let listening = records
        .filter(|record| !record.worker_id.is_empty() && record.state != State::Stopped.as_str());
    Some(listening.collect())
}

/// Answers to one message.
struct Replies {
    asked: String,
    /// Who has not answered yet; none where it is not known who there is.
    expected: Option<BTreeSet<String>>,
    all_done: bool,
}

impl Replies {
    /// Prints a line for each answer.
    async fn collect(mut self, mut answers: Deliveries, limit: Duration) -> Outcome {
        let deadline = tokio::time::Instant::now() + limit;
        while !self.expected.as_ref().is_some_and(BTreeSet::is_empty) {
            match tokio::time::timeout_at(deadline, answers.next()).await {
                Ok(Some(delivery)) => {
                    let ours = delivery.properties.correlation_id.as_ref() == Some(&self.asked);
                    let reply = ControlAnswer::decode(&delivery.body, delivery.properties.label());
                    if let (true, Ok(reply)) = (ours, reply) {
                        self.take(&reply)?;
                    }
                }
                Ok(None) => {
                    return Err(Fault::unavailable(
                        "the connection to RabbitMQ is lost; the remaining replies are in the event stream",
                    ));
                }
                Err(_) => break,
            }
        }
        for silent in self.expected.iter().flatten() {
            self.all_done = false;
            answer(&format!(
                "{silent}  no answer within {}",
                format_duration(limit)
            ))?;
        }
        Ok(Exit::of_answer(self.all_done))
    }

    fn take(&mut self, reply: &ControlAnswer) -> Outcome {
        if let Some(expected) = &mut self.expected {
            expected.remove(&reply.worker_id);
        }
        self.all_done &= reply.outcome == Done::Done;
        let ControlAnswer {
            worker_id,
            outcome,
            message,
            ..
        } = reply;
        answer(&format!("{worker_id}  {}: {message}", outcome.as_str()))
    }
}
