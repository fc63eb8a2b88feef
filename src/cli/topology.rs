//! `scorer topology`, and the connection of every command that needs one.

use super::{Fault, Outcome, answer, answer_json, model_name};
use crate::broker::BrokerError;
use crate::broker::amqp::Link;
use crate::broker::nodes::Nodes;
use crate::broker::topology::{Argument, Topology};
use crate::config::Config;

/// Connects, and declares the topology.
pub(super) async fn link(config: &Config, model: &str) -> Result<(Link, Topology), Fault> {
    let topology = Topology::new(&config.amqp, model);
    let link = Link::connect(&mut Nodes::new(&config.amqp), "scorer-cli")
        .await
        .map_err(Fault::unavailable)?;
    match link.declare(&topology).await {
        // A user who may only publish learns from the publish whether the queue exists.
        Ok(()) | Err(BrokerError::Forbidden(_)) => Ok((link, topology)),
        Err(
            error @ (BrokerError::Differs(_)
            | BrokerError::Missing(_)
            | BrokerError::Denied(_)
            | BrokerError::Failed(_)),
        ) => Err(Fault::unavailable(error)),
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
