//! The only place that knows lapin. There are two connections, so that a blocked publisher does not stop
//! acknowledgements, and one task per publishing channel, because lapin confuses confirms otherwise. Every
//! wait is bounded. lapin's recovery is not used: a lost link is dropped whole, and its owner makes the
//! next one.

mod connection;
mod delivery;
mod greeting;
mod publisher;

pub use delivery::{Acker, Browser, Deliveries, Delivery};
use publisher::PIPELINE;
pub use publisher::Publisher;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{
    BasicConsumeOptions, BasicQosOptions, ExchangeDeclareOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ErrorKind, Event};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::BrokerError;
use super::nodes::Nodes;
use super::topology::{Argument, Binding, Exchange, ExchangeKind, Topology, of_consumer};

/// For every call on a connection that names no other limit.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(10);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Copies that are on their way to a reader.
const MOST_COPIES: u16 = 500;

/// Classifies an error by its kind; the text is only for people.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "foreign enums: all but two of their cases are failures"
)]
fn failed(what: &str, error: &lapin::Error) -> BrokerError {
    let ErrorKind::ProtocolError(refusal) = error.kind() else {
        return BrokerError::Failed(format!("{what}: {error}"));
    };
    // In the broker's own words.
    let text = format!("{what}: {}", refusal.get_message());
    match refusal.kind() {
        AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED) => BrokerError::Differs(text),
        AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) => BrokerError::Missing(text),
        AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => BrokerError::Forbidden(text),
        _ => BrokerError::Failed(text),
    }
}

/// Whether an error of a connection that is closed says no more than that we closed it.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "a foreign enum: only these are ours"
)]
fn is_ours(error: &lapin::Error) -> bool {
    match error.kind() {
        ErrorKind::InvalidConnectionState(_) | ErrorKind::InvalidChannelState(..) => true,
        // Of a channel, which ended before.
        ErrorKind::ProtocolError(error) => matches!(error.kind(), AMQPErrorKind::Soft(_)),
        _ => false,
    }
}

async fn bounded<T>(
    what: &str,
    call: impl Future<Output = lapin::Result<T>>,
) -> Result<T, BrokerError> {
    within(CALL_TIMEOUT, what, call).await
}

async fn within<T>(
    limit: Duration,
    what: &str,
    call: impl Future<Output = lapin::Result<T>>,
) -> Result<T, BrokerError> {
    match tokio::time::timeout(limit, call).await {
        Ok(done) => done.map_err(|e| failed(what, &e)),
        Err(_) => Err(BrokerError::Failed(format!(
            "{what}: no answer within {} s",
            limit.as_secs()
        ))),
    }
}

/// A pair of connections that lives until either fails.
#[derive(Debug)]
pub struct Link {
    /// The node that it leads to: host and port.
    pub node: String,
    consuming: Arc<Connection>,
    publishing: Arc<Connection>,
    /// The broker's version.
    version: Option<String>,
    /// How long it may take to register a consumer.
    registering: Duration,
    /// Cancelled when the link is lost.
    pub lost: CancellationToken,
    /// Whether the broker blocks our publishes.
    pub blocked: Arc<AtomicBool>,
    forbidden: Arc<AtomicBool>,
    /// Sends results, many in flight: their exchange returns none, or there is a detour.
    pub results: Publisher,
    /// Sends jobs to the retry and dead-letter queues, one at a time, so that a return can be matched to its
    /// message.
    pub jobs: Publisher,
    _dropped: DropGuard,
}

/// The state of a link, shared by its tasks.
#[derive(Debug, Clone, Default)]
struct Signs {
    lost: CancellationToken,
    blocked: Arc<AtomicBool>,
    /// The broker does not permit something that we publish.
    forbidden: Arc<AtomicBool>,
}

impl Link {
    /// Whether it was lost because the broker does not permit something that we publish. The next link
    /// would be lost for the same reason.
    pub fn is_forbidden(&self) -> bool {
        self.forbidden.load(Ordering::Relaxed)
    }

    /// Connects to the first node that answers and opens the publishing channels.
    ///
    /// # Errors
    /// Which nodes were tried and what each said.
    pub async fn connect(nodes: &mut Nodes, name: &str) -> Result<Self, BrokerError> {
        let mut failures = Vec::new();
        for _ in 0..nodes.count() {
            let Some(url) = nodes.take() else { break };
            match Self::connect_to(nodes, &url, name).await {
                Ok(link) => return Ok(link),
                Err(error) => failures.push(error),
            }
        }
        Err(BrokerError::of_all(failures))
    }

    async fn connect_to(nodes: &Nodes, url: &str, name: &str) -> Result<Self, BrokerError> {
        let (consuming, version) = connection::open(nodes, url, &format!("{name}/consume")).await?;
        let (publishing, _) = connection::open(nodes, url, &format!("{name}/publish")).await?;
        let (consuming, publishing) = (Arc::new(consuming), Arc::new(publishing));
        let signs = Signs::default();
        let dropped = signs.lost.clone().drop_guard();
        let node = connection::node(url);
        watch(&consuming, &node, signs.lost.clone(), None);
        let blocked = Some(Arc::clone(&signs.blocked));
        watch(&publishing, &node, signs.lost.clone(), blocked);
        let results = Publisher::open(&publishing, PIPELINE, &signs).await?;
        let jobs = Publisher::open(&publishing, 1, &signs).await?;
        Ok(Self {
            node,
            consuming,
            publishing,
            version,
            registering: nodes.briefly(CALL_TIMEOUT),
            lost: signs.lost,
            blocked: signs.blocked,
            forbidden: signs.forbidden,
            results,
            jobs,
            _dropped: dropped,
        })
    }

    /// Declares the topology. Objects that exist with other arguments are used as they are; if their
    /// exchange could return results, results take a detour from then on.
    ///
    /// # Errors
    /// When the broker refuses for another reason.
    pub async fn declare(&self, topology: &Topology) -> Result<(), BrokerError> {
        self.declare_unbound(topology).await?;
        self.bind(topology, CALL_TIMEOUT).await
    }

    /// The same without the bindings.
    ///
    /// # Errors
    /// As [`Link::declare`].
    pub async fn declare_unbound(&self, topology: &Topology) -> Result<(), BrokerError> {
        let mut otherwise = Vec::new();
        for exchange in &topology.exchanges {
            if !self.declare_exchange(exchange).await? {
                otherwise.push(exchange.name.clone());
            }
        }
        if let Some(detour) = topology.detour(&otherwise) {
            self.results.detour(detour);
        }
        for queue in &topology.queues {
            let options = QueueDeclareOptions {
                durable: true,
                ..Default::default()
            };
            // A mismatch closes the channel, so each declaration has its own.
            let channel = self.channel().await?;
            let declared =
                channel.queue_declare(queue.name.as_str().into(), options, table(&queue.arguments));
            let declared = bounded(&queue.name, declared).await;
            tolerate(&queue.name, declared.map(drop))?;
            close(channel).await;
        }
        Ok(())
    }

    /// Makes the bindings, within a limit for each.
    ///
    /// # Errors
    /// When the broker refuses or does not answer.
    pub async fn bind(&self, topology: &Topology, limit: Duration) -> Result<(), BrokerError> {
        let channel = self.channel().await?;
        for binding in &topology.bindings {
            let what = format!("bind {}", binding.queue);
            within(limit, &what, bound(&channel, binding)).await?;
        }
        close(channel).await;
        Ok(())
    }

    /// False = it exists with other arguments.
    async fn declare_exchange(&self, exchange: &Exchange) -> Result<bool, BrokerError> {
        let kind = match exchange.kind {
            ExchangeKind::Direct => lapin::ExchangeKind::Direct,
            ExchangeKind::Topic => lapin::ExchangeKind::Topic,
            ExchangeKind::Fanout => lapin::ExchangeKind::Fanout,
        };
        let options = ExchangeDeclareOptions {
            durable: true,
            ..Default::default()
        };
        let channel = self.channel().await?;
        let name = exchange.name.as_str();
        let declared =
            channel.exchange_declare(name.into(), kind, options, table(&exchange.arguments));
        let same = tolerate(name, bounded(name, declared).await)?;
        close(channel).await;
        Ok(same)
    }

    /// The number of messages that wait in a queue, and of its consumers; `None` if there is no such queue.
    /// Declares nothing.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub async fn depth(&self, queue: &str) -> Result<Option<(u32, u32)>, BrokerError> {
        let passive = QueueDeclareOptions {
            passive: true,
            ..Default::default()
        };
        // A missing queue closes the channel, so each question has its own.
        let channel = self.channel().await?;
        let asked = channel.queue_declare(queue.into(), passive, FieldTable::default());
        match bounded(queue, asked).await {
            Ok(found) => {
                close(channel).await;
                Ok(Some((found.message_count(), found.consumer_count())))
            }
            Err(BrokerError::Missing(_)) => Ok(None),
            Err(
                error @ (BrokerError::Differs(_)
                | BrokerError::Forbidden(_)
                | BrokerError::Denied(_)
                | BrokerError::Failed(_)),
            ) => Err(error),
        }
    }

    /// Reads a queue without a consumer.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub async fn browse(&self, queue: &str) -> Result<Browser, BrokerError> {
        Ok(Browser::new(self.channel().await?, queue))
    }

    async fn channel(&self) -> Result<Channel, BrokerError> {
        bounded("open a channel", self.consuming.create_channel()).await
    }

    /// Registers a consumer; returns when the broker has confirmed it. A link on which that takes too long is
    /// given up.
    ///
    /// # Errors
    /// When the queue is gone or the link is lost.
    pub async fn consume(
        &self,
        queue: &str,
        tag: &str,
        prefetch: u16,
    ) -> Result<Deliveries, BrokerError> {
        self.consume_with(queue, tag, prefetch, &[]).await
    }

    /// The same, where the broker lets a consumer say how long it may hold a delivery.
    ///
    /// # Errors
    /// As [`Link::consume`].
    pub async fn consume_for(
        &self,
        queue: &str,
        tag: &str,
        prefetch: u16,
        timeout: Duration,
    ) -> Result<Deliveries, BrokerError> {
        let arguments = of_consumer(self.version.as_deref(), timeout);
        match self.consume_with(queue, tag, prefetch, &arguments).await {
            // A queue that is not a quorum queue takes no such argument, and has no such limit.
            Err(BrokerError::Differs(why)) if !arguments.is_empty() => {
                tracing::warn!(%why, "the consumer's arguments are refused and left out");
                self.consume(queue, tag, prefetch).await
            }
            consumed @ (Ok(_)
            | Err(
                BrokerError::Differs(_)
                | BrokerError::Missing(_)
                | BrokerError::Forbidden(_)
                | BrokerError::Denied(_)
                | BrokerError::Failed(_),
            )) => consumed,
        }
    }

    async fn consume_with(
        &self,
        queue: &str,
        tag: &str,
        prefetch: u16,
        arguments: &[(String, Argument)],
    ) -> Result<Deliveries, BrokerError> {
        let channel = self.channel().await?;
        let qos = channel.basic_qos(prefetch, BasicQosOptions::default());
        bounded("qos", qos).await?;
        let consume = channel.basic_consume(
            queue.into(),
            tag.into(),
            BasicConsumeOptions::default(),
            table(arguments),
        );
        let what = format!("consume {queue}");
        let consumer = within(self.registering, &what, consume).await;
        if consumer.is_err() && channel.status().connected() {
            // The queue may have lost its leader, and a call to the old one is not passed on to the new one.
            self.lost.cancel();
        }
        Ok(Deliveries::new(channel, consumer?, self.lost.clone()))
    }

    /// Binds an exclusive queue to an exchange and consumes it without acknowledgements; returns its name.
    ///
    /// # Errors
    /// When the broker refuses.
    pub async fn subscribe(
        &self,
        exchange: &str,
        keys: &[String],
    ) -> Result<(String, Deliveries), BrokerError> {
        self.subscribe_within(CALL_TIMEOUT, exchange, keys).await
    }

    /// The same within a limit for each step.
    ///
    /// # Errors
    /// As [`Link::subscribe`].
    pub async fn subscribe_within(
        &self,
        limit: Duration,
        exchange: &str,
        keys: &[String],
    ) -> Result<(String, Deliveries), BrokerError> {
        let channel = self.channel().await?;
        let options = QueueDeclareOptions {
            exclusive: true,
            auto_delete: true,
            ..Default::default()
        };
        let declared = channel.queue_declare("".into(), options, FieldTable::default());
        let queue = within(limit, "declare an exclusive queue", declared).await?;
        let name = queue.name().to_string();
        let what = format!("bind to {exchange}");
        for key in keys {
            let binding = Binding {
                exchange: exchange.to_owned(),
                queue: name.clone(),
                routing_key: key.clone(),
            };
            within(limit, &what, bound(&channel, &binding)).await?;
        }
        // The rest waits at the broker: a reader that is slower than the senders needs no more memory.
        let qos = channel.basic_qos(MOST_COPIES, BasicQosOptions::default());
        bounded("qos", qos).await?;
        let options = BasicConsumeOptions {
            exclusive: true,
            ..Default::default()
        };
        let consume = channel.basic_consume(
            name.as_str().into(),
            "".into(),
            options,
            FieldTable::default(),
        );
        let consumer = within(limit, "consume an exclusive queue", consume).await?;
        let deliveries = Deliveries::new(channel, consumer, self.lost.clone()).of_copies();
        Ok((name, deliveries))
    }

    /// Closes both connections, within a bounded time. Everything that was settled has arrived then.
    pub async fn close(&self) {
        if self.lost.is_cancelled() {
            return;
        }
        self.lost.cancel();
        let closed = [&self.consuming, &self.publishing].map(|c| c.close(200, "bye".into()));
        let closed = futures_util::future::join_all(closed);
        if tokio::time::timeout(CLOSE_TIMEOUT, closed).await.is_err() {
            tracing::debug!("the broker does not confirm that the connections are closed");
        }
    }
}

async fn bound(channel: &Channel, binding: &Binding) -> lapin::Result<()> {
    let options = QueueBindOptions::default();
    let (queue, exchange) = (binding.queue.as_str(), binding.exchange.as_str());
    let key = binding.routing_key.as_str().into();
    let made = channel.queue_bind(queue.into(), exchange.into(), key, options, table(&[]));
    made.await
}

/// Tells when a connection is lost, and closes it when its link is.
fn watch(
    connection: &Arc<Connection>,
    node: &str,
    lost: CancellationToken,
    blocked: Option<Arc<AtomicBool>>,
) {
    let node = node.to_owned();
    let mut events = connection.events_listener();
    let connection = Arc::clone(connection);
    tokio::spawn(async move {
        // When this task ends, however it ends, nothing else notices that the link is lost.
        let _lost = lost.clone().drop_guard();
        loop {
            let event = tokio::select! {
                // Both connections may be lost at once, each for its own reason.
                biased;
                event = events.next() => event,
                () = lost.cancelled() => {
                    // Dropped alone, it would stay open while the broker has a call to answer, and that call
                    // could end as a consumer that nobody knows of.
                    let closed = connection.close(200, "bye".into());
                    drop(tokio::time::timeout(CLOSE_TIMEOUT, closed).await);
                    return;
                }
            };
            match event {
                Some(Event::ConnectionBlocked(reason)) => {
                    tracing::warn!(%reason, "RabbitMQ blocks our publishes");
                    blocked
                        .iter()
                        .for_each(|b| b.store(true, Ordering::Relaxed));
                }
                Some(Event::ConnectionUnblocked) => blocked
                    .iter()
                    .for_each(|b| b.store(false, Ordering::Relaxed)),
                // Errors of a channel arrive here too, perhaps when the connection was closed by us. The user of the
                // channel gets them as well.
                Some(_) if connection.status().connected() => {}
                Some(Event::Error(error)) => {
                    if !is_ours(&error) {
                        tracing::warn!(%node, %error, "a connection to RabbitMQ is lost");
                    }
                    return;
                }
                Some(_) | None => return,
            }
        }
    });
}

fn table(arguments: &[(String, Argument)]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        let value = match value {
            Argument::Text(text) => AMQPValue::LongString(text.as_str().into()),
            Argument::Number(number) => AMQPValue::LongLongInt(*number),
        };
        table.insert(name.as_str().into(), value);
    }
    table
}

/// Tolerates an object that exists with other arguments: false = it does, and is used as it is.
fn tolerate(name: &str, declared: Result<(), BrokerError>) -> Result<bool, BrokerError> {
    match declared {
        Err(error @ BrokerError::Differs(_)) => {
            tracing::warn!(%name, "exists with other arguments and is used as it is: {error}");
            Ok(false)
        }
        Ok(())
        | Err(
            BrokerError::Missing(_)
            | BrokerError::Forbidden(_)
            | BrokerError::Denied(_)
            | BrokerError::Failed(_),
        ) => declared.map(|()| true),
    }
}

async fn close(channel: Channel) {
    drop(tokio::time::timeout(CLOSE_TIMEOUT, channel.close(200, "done".into())).await);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Layers};
    use lapin::protocol::{AMQPError, AMQPHardError};

    fn refusal(kind: AMQPErrorKind, text: &str) -> lapin::Error {
        ErrorKind::ProtocolError(AMQPError::new(kind, text.into())).into()
    }

    #[test]
    fn an_error_is_judged_by_its_kind_and_never_by_its_text() {
        let soft = |kind| refusal(AMQPErrorKind::Soft(kind), "whatever the broker says");
        let differs = failed("q", &soft(AMQPSoftError::PRECONDITIONFAILED));
        assert!(matches!(differs, BrokerError::Differs(_)), "{differs}");
        assert_eq!(tolerate("q", Err(differs)), Ok(false));
        let missing = failed("q", &soft(AMQPSoftError::NOTFOUND));
        assert!(matches!(missing, BrokerError::Missing(_)), "{missing}");
        let text = "PRECONDITION_FAILED - NOT_FOUND";
        let forbidden = failed("q", &soft(AMQPSoftError::ACCESSREFUSED));
        assert!(
            matches!(forbidden, BrokerError::Forbidden(_)),
            "{forbidden}"
        );
        assert!(is_ours(&soft(AMQPSoftError::NOTFOUND)));
        let forced = AMQPErrorKind::Hard(AMQPHardError::CONNECTIONFORCED);
        assert!(!is_ours(&refusal(forced, "the node stops")));
        for other in [
            soft(AMQPSoftError::RESOURCELOCKED),
            refusal(AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED), text),
            std::io::Error::other(text).into(),
        ] {
            let failed = failed("q", &other);
            assert!(matches!(failed, BrokerError::Failed(_)), "{failed}");
            assert_eq!(tolerate("q", Err(failed.clone())), Err(failed));
        }
    }

    #[tokio::test]
    async fn a_node_that_says_nothing_costs_its_time_and_every_reason_is_given() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let place = silent.local_addr().unwrap();
        let urls = [place.to_string(), "127.0.0.1:1".to_owned()];
        let urls = urls.map(|place| format!("amqp://u:hunter2@{place}"));
        let set = [format!("amqp.url={urls:?}")];
        let layers = Layers {
            set: &set,
            ..Layers::default()
        };
        let config = Config::load(&layers).unwrap();
        let mut nodes = Nodes::new(&config.amqp).within(Duration::from_secs(1));
        let failed = Link::connect(&mut nodes, "test").await.unwrap_err();
        let failed = failed.to_string();
        for part in [
            "RabbitMQ: no node can be used: ",
            &format!("connect to {place}: no answer within 1 s"),
            "connect to 127.0.0.1:1: ",
        ] {
            assert!(failed.contains(part), "{failed}");
        }
        assert!(!failed.contains("hunter2"), "{failed}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_without_an_answer_is_never_tolerated() {
        let call = std::future::pending::<lapin::Result<()>>();
        let late = bounded("q", call).await;
        assert!(matches!(late, Err(BrokerError::Failed(_))), "{late:?}");
        assert_eq!(tolerate("q", late.clone()), late.map(|()| true));
    }
}
