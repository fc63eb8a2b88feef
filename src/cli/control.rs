//! `scorer ctl` and `scorer topology`.

use super::{Exit, Fault, Outcome, answer, answer_json, model_name};
use crate::broker::amqp::Link;
use crate::broker::topology::{Argument, Topology};
use crate::broker::{Outgoing, Properties};
use crate::config::Config;
use crate::control::{Command, ControlMessage};
use crate::job::Encoding;
use crate::job::message::V1;

/// Connects and declares, for commands.
pub(super) async fn link(config: &Config, model: &str) -> Result<(Link, Topology), Fault> {
    let unavailable = |e| Fault::new(Exit::Unavailable, e);
    let topology = Topology::new(&config.amqp, model);
    let link = Link::connect(&config.amqp, "scorer-cli")
        .await
        .map_err(unavailable)?;
    link.declare(&topology).await.map_err(unavailable)?;
    Ok((link, topology))
}

pub(super) async fn ctl(config: &Config, command: Command, worker: Option<String>) -> Outcome {
    let model = model_name(config)?;
    let (link, topology) = link(config, &model).await?;
    let message = ControlMessage {
        v: V1,
        command,
        worker_id: worker.clone(),
    };
    let to = worker
        .as_ref()
        .map_or_else(|| "all".to_owned(), |id| format!("worker.{id}"));
    let outgoing = Outgoing {
        exchange: topology.control_exchange(),
        routing_key: to,
        body: Encoding::Json.encode(&message).map_err(Fault::internal)?,
        properties: Properties {
            content_type: Some("application/json".into()),
            attempt: 1,
            ..Properties::default()
        },
        mandatory: true,
    };
    // One message, not pipelined: "returned" is certain here.
    let sent = link.jobs.publish(outgoing).await;
    link.close().await;
    match sent {
        Ok(()) => answer(&format!(
            "{} sent to {}",
            command.as_str(),
            worker.as_deref().unwrap_or("all workers")
        )),
        Err(error) => Err(Fault::new(
            Exit::Negative,
            format!("no worker listens there: {error}"),
        )),
    }
}

pub(super) async fn topology(config: &Config, declare: bool, json: bool) -> Outcome {
    let model = model_name(config)?;
    let topology = Topology::new(&config.amqp, &model);
    if declare {
        link(config, &model).await?.0.close().await;
    }
    if json {
        return answer_json(&topology);
    }
    let shown = |arguments: &[(String, Argument)]| {
        let one = |(name, value): &(String, Argument)| match value {
            Argument::Text(text) => format!(" {name}={text}"),
            Argument::Number(number) => format!(" {name}={number}"),
        };
        arguments.iter().map(one).collect::<String>()
    };
    let exchanges = topology
        .exchanges
        .iter()
        .map(|e| format!("exchange {}{}", e.name, shown(&e.arguments)));
    let queues = topology
        .queues
        .iter()
        .map(|q| format!("queue    {}{}", q.name, shown(&q.arguments)));
    let bindings = topology
        .bindings
        .iter()
        .map(|b| format!("binding  {} -> {} {}", b.exchange, b.queue, b.routing_key));
    answer(
        &exchanges
            .chain(queues)
            .chain(bindings)
            .collect::<Vec<_>>()
            .join("\n"),
    )
}
