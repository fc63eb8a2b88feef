//! Every exchange and queue, and the reason for each argument. A worker declares them before it warms up,
//! so that aggregators may start before or after workers.

use std::time::Duration;

use serde::Serialize;

use super::{Outgoing, Properties};
use crate::config::{AmqpConfig, format_duration};

/// An argument of a queue or exchange.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Argument {
    /// Text.
    Text(String),
    /// A number.
    Number(i64),
}

/// Kinds of exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ExchangeKind {
    /// By routing key.
    Direct,
    /// By pattern.
    Topic,
    /// To all.
    Fanout,
}

/// A durable exchange.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Exchange {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: ExchangeKind,
    /// Its arguments.
    pub arguments: Vec<(String, Argument)>,
}

/// A durable quorum queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Queue {
    /// Its name.
    pub name: String,
    /// Its arguments.
    pub arguments: Vec<(String, Argument)>,
}

/// A queue bound to an exchange.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Binding {
    /// From.
    pub exchange: String,
    /// To.
    pub queue: String,
    /// Which messages.
    pub routing_key: String,
}

/// Where a message goes that its exchange returned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detour {
    /// Empty = the default exchange.
    pub exchange: String,
    /// The message's own if there is none here.
    pub routing_key: Option<String>,
}

/// All objects of one model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Topology {
    /// The model; also the routing key of its jobs.
    pub model: String,
    /// Declared first.
    pub exchanges: Vec<Exchange>,
    /// Declared second.
    pub queues: Vec<Queue>,
    /// Made last.
    pub bindings: Vec<Binding>,
    #[serde(skip)]
    namespace: String,
    #[serde(skip)]
    retry_delays: Vec<Duration>,
}

fn text(name: &str, value: impl Into<String>) -> (String, Argument) {
    (name.to_owned(), Argument::Text(value.into()))
}

fn number(name: &str, value: i64) -> (String, Argument) {
    (name.to_owned(), Argument::Number(value))
}

/// The arguments of a consumer of jobs that holds each of them for at most this long, by the broker's
/// version. From 4.3 on the consumer itself says so. Before, some versions would take the argument as well,
/// but fleets that run have the limit that their broker is configured with, and keep it.
pub fn of_consumer(broker: Option<&str>, timeout: Duration) -> Vec<(String, Argument)> {
    const FIRST: (u64, u64) = (4, 3);
    let known = broker.and_then(release).is_some_and(|it| it >= FIRST);
    let timeout = i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX);
    let argument = known.then(|| number("x-consumer-timeout", timeout));
    argument.into_iter().collect()
}

/// The first two numbers of a version, as in `4.3.6` or `4.3.0-rc.1`.
fn release(version: &str) -> Option<(u64, u64)> {
    let mut numbers = version.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

impl Topology {
    /// The objects for a model.
    pub fn new(config: &AmqpConfig, model: &str) -> Self {
        let mut topology = Self {
            model: model.to_owned(),
            exchanges: Vec::new(),
            queues: Vec::new(),
            bindings: Vec::new(),
            namespace: config.namespace.clone(),
            retry_delays: config.retry_delays.clone(),
        };
        topology.add_jobs();
        topology.add_dead();
        topology.add_results(config.results_queue);
        let control = topology.control_exchange();
        topology.exchange(control, ExchangeKind::Topic, Vec::new());
        topology
    }

    /// Exchange that jobs are published to.
    pub fn jobs_exchange(&self) -> String {
        format!("{}.jobs", self.namespace)
    }

    /// Queue that workers consume.
    pub fn jobs_queue(&self) -> String {
        format!("{}.jobs.{}", self.namespace, self.model)
    }

    /// Queue of a rung of the retry ladder.
    pub fn retry_queue(&self, rung: usize) -> Option<String> {
        let delay = self.retry_delays.get(rung)?;
        Some(format!(
            "{}.retry.{}",
            self.jobs_queue(),
            format_duration(*delay)
        ))
    }

    /// Queues of all rungs.
    pub fn retry_queues(&self) -> Vec<String> {
        (0..self.retry_delays.len())
            .filter_map(|rung| self.retry_queue(rung))
            .collect()
    }

    /// Exchange of dead-lettered jobs.
    pub fn dead_exchange(&self) -> String {
        format!("{}.dead", self.namespace)
    }

    /// Queue of dead-lettered jobs.
    pub fn dead_queue(&self) -> String {
        format!("{}.dead.{}", self.namespace, self.model)
    }

    /// Exchange that results are published to.
    pub fn results_exchange(&self) -> String {
        format!("{}.results", self.namespace)
    }

    /// The default queue of results.
    pub fn results_queue(&self) -> String {
        format!("{}.results.{}", self.namespace, self.model)
    }

    /// Exchange and queue of results that no other queue takes.
    pub fn unrouted(&self) -> String {
        format!("{}.results.unrouted", self.namespace)
    }

    /// Where returned results go. They can be returned if an exchange on their way exists `otherwise` than
    /// here: with another alternate exchange, or without one.
    pub fn detour(&self, otherwise: &[String]) -> Option<Detour> {
        let unrouted = self.unrouted();
        if otherwise.contains(&unrouted) {
            // That exchange may lead nowhere, or be internal; its queue has the same name.
            return Some(Detour {
                exchange: String::new(),
                routing_key: Some(unrouted),
            });
        }
        let returns = otherwise.contains(&self.results_exchange());
        returns.then_some(Detour {
            exchange: unrouted,
            routing_key: None,
        })
    }

    /// A job for the queue that workers consume.
    pub fn job(&self, body: Vec<u8>, properties: Properties) -> Outgoing {
        self.outgoing(self.jobs_exchange(), body, properties)
    }

    /// A job for the queue of dead-lettered ones.
    pub fn dead_letter(&self, body: Vec<u8>, properties: Properties) -> Outgoing {
        self.outgoing(self.dead_exchange(), body, properties)
    }

    fn outgoing(&self, exchange: String, body: Vec<u8>, properties: Properties) -> Outgoing {
        Outgoing {
            exchange,
            routing_key: self.model.clone(),
            body,
            properties,
            mandatory: true,
        }
    }

    /// Exchange of control messages.
    pub fn control_exchange(&self) -> String {
        format!("{}.control", self.namespace)
    }

    fn exchange(&mut self, name: String, kind: ExchangeKind, arguments: Vec<(String, Argument)>) {
        self.exchanges.push(Exchange {
            name,
            kind,
            arguments,
        });
    }

    fn queue(&mut self, name: String, mut arguments: Vec<(String, Argument)>) {
        // Quorum: replicated, and faster than a durable classic queue when measured.
        arguments.insert(0, text("x-queue-type", "quorum"));
        self.queues.push(Queue { name, arguments });
    }

    fn bind(&mut self, exchange: String, queue: String, routing_key: &str) {
        self.bindings.push(Binding {
            exchange,
            queue,
            routing_key: routing_key.to_owned(),
        });
    }

    /// A dead letter must arrive before it is removed here, which needs a queue that refuses when full.
    fn dead_letters(exchange: String, routing_key: &str) -> Vec<(String, Argument)> {
        vec![
            text("x-dead-letter-exchange", exchange),
            text("x-dead-letter-routing-key", routing_key),
            text("x-dead-letter-strategy", "at-least-once"),
            text("x-overflow", "reject-publish"),
        ]
    }

    fn add_jobs(&mut self) {
        let (exchange, queue, model) =
            (self.jobs_exchange(), self.jobs_queue(), self.model.clone());
        self.exchange(exchange.clone(), ExchangeKind::Direct, Vec::new());
        let mut arguments = Self::dead_letters(self.dead_exchange(), &model);
        // A backstop for jobs that kill their worker before it can leave a mark.
        arguments.push(number("x-delivery-limit", 20));
        self.queue(queue.clone(), arguments);
        self.bind(exchange.clone(), queue, &model);
        for (rung, delay) in self.retry_delays.clone().into_iter().enumerate() {
            let Some(name) = self.retry_queue(rung) else {
                continue;
            };
            let mut arguments = Self::dead_letters(exchange.clone(), &model);
            // Per queue, not per message: a message's own limit only applies at the head of the queue.
            arguments.push(number(
                "x-message-ttl",
                i64::try_from(delay.as_millis()).unwrap_or(i64::MAX),
            ));
            self.queue(name, arguments);
        }
    }

    fn add_dead(&mut self) {
        let (exchange, queue, model) =
            (self.dead_exchange(), self.dead_queue(), self.model.clone());
        self.exchange(exchange.clone(), ExchangeKind::Direct, Vec::new());
        self.queue(queue.clone(), Vec::new());
        self.bind(exchange, queue, &model);
    }

    fn add_results(&mut self, with_queue: bool) {
        let (exchange, unrouted) = (self.results_exchange(), self.unrouted());
        self.exchange(unrouted.clone(), ExchangeKind::Fanout, Vec::new());
        self.queue(unrouted.clone(), Vec::new());
        self.bind(unrouted.clone(), unrouted.clone(), "");
        // With many messages in flight a return cannot be matched to its message, so none may be returned.
        self.exchange(
            exchange.clone(),
            ExchangeKind::Topic,
            vec![text("alternate-exchange", unrouted)],
        );
        if with_queue {
            let queue = self.results_queue();
            self.queue(queue.clone(), Vec::new());
            let pattern = format!("{}.*", self.model);
            self.bind(exchange, queue, &pattern);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_consumer_says_how_long_it_may_hold_a_job_where_the_broker_listens() {
        let timeout = Duration::from_secs(90);
        let says = vec![("x-consumer-timeout".to_owned(), Argument::Number(90_000))];
        for (version, expected) in [
            (None, false),
            (Some("3.10.8"), false),
            (Some("3.13.7"), false),
            (Some("4.0.5"), false),
            (Some("4.2.12"), false),
            (Some("4.3.0"), true),
            (Some("4.3.0-rc.1"), true),
            (Some("4.10.0+3.gabc"), true),
            (Some("10.0.1"), true),
            (Some("4"), false),
            (Some("4.x"), false),
            (Some(""), false),
        ] {
            let arguments = of_consumer(version, timeout);
            let expected = if expected { says.clone() } else { Vec::new() };
            assert_eq!(arguments, expected, "{version:?}");
        }
    }
}
