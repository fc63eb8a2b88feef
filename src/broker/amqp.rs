//! The only place that knows lapin. Two connections (a blocked publisher must not stop acks), one
//! task per publishing channel (lapin mixes confirms up otherwise), every wait bounded. No library
//! recovery: a lost link is dropped whole, and whoever owns it makes the next one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicGetOptions, BasicNackOptions,
    BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions, ExchangeDeclareOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionBuilder, ConnectionProperties,
    ErrorKind, Event,
};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use url::Url;

use super::topology::{Argument, ExchangeKind, Topology};
use super::{ATTEMPT, BrokerError, Outgoing, Properties, PublishError};
use crate::config::AmqpConfig;
use crate::metrics::Confirm;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// A confirm that takes longer counts as lost: a paused broker would hang it for ever.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(30);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Results in flight between publish and confirm.
const PIPELINE: usize = 64;
/// Bytes of a stranger's headers that a copy of the job keeps: all headers of a message share one
/// frame of 128 KiB with ours, and the broker ends the connection of who sends a larger one.
const MOST_HEADERS: usize = 32 * 1024;
/// How the headers of a parked job begin that say why.
const PARKED: [&str; 3] = ["x-error-", "x-worker-id", "x-first-death-"];

/// The decision is taken from the error's kind; the text is for people only.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "foreign enums: all but two of their cases are failures"
)]
fn failed(what: &str, error: &lapin::Error) -> BrokerError {
    let text = format!("{what}: {error}");
    let ErrorKind::ProtocolError(refusal) = error.kind() else {
        return BrokerError::Failed(text);
    };
    match refusal.kind() {
        AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED) => BrokerError::Differs(text),
        AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) => BrokerError::Missing(text),
        AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => BrokerError::Forbidden(text),
        _ => BrokerError::Failed(text),
    }
}

async fn bounded<T>(
    what: &str,
    limit: Duration,
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

/// A pair of connections that lives until the first sign of trouble.
#[derive(Debug)]
pub struct Link {
    consuming: Connection,
    publishing: Connection,
    /// Cancelled when the link is lost.
    pub lost: CancellationToken,
    /// Whether the broker holds our publishes back.
    pub blocked: Arc<AtomicBool>,
    /// Sends results, many in flight; their exchange cannot lose them.
    pub results: Publisher,
    /// Sends jobs to retry and dead queues, one at a time, so that "returned" means this one.
    pub jobs: Publisher,
}

impl Link {
    /// Connects and opens the publishing channels.
    ///
    /// # Errors
    /// What was tried and what the broker said.
    pub async fn connect(config: &AmqpConfig, name: &str) -> Result<Self, BrokerError> {
        let consuming = connect(config, &format!("{name}/consume")).await?;
        let publishing = connect(config, &format!("{name}/publish")).await?;
        let lost = CancellationToken::new();
        let blocked = Arc::new(AtomicBool::new(false));
        watch(&consuming, lost.clone(), None);
        watch(&publishing, lost.clone(), Some(Arc::clone(&blocked)));
        let results = Publisher::open(&publishing, PIPELINE, &lost, &blocked).await?;
        let jobs = Publisher::open(&publishing, 1, &lost, &blocked).await?;
        Ok(Self {
            consuming,
            publishing,
            lost,
            blocked,
            results,
            jobs,
        })
    }

    /// Declares everything; a queue that an operator made with other arguments is used as it is.
    ///
    /// # Errors
    /// When the broker refuses for another reason.
    pub async fn declare(&self, topology: &Topology) -> Result<(), BrokerError> {
        for exchange in &topology.exchanges {
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
            let declared = channel.exchange_declare(
                exchange.name.as_str().into(),
                kind,
                options,
                table(&exchange.arguments),
            );
            tolerate(
                &exchange.name,
                bounded(&exchange.name, CALL_TIMEOUT, declared).await,
            )?;
            close(channel).await;
        }
        for queue in &topology.queues {
            let options = QueueDeclareOptions {
                durable: true,
                ..Default::default()
            };
            // A mismatch closes the channel: one for each declaration.
            let channel = self.channel().await?;
            let declared =
                channel.queue_declare(queue.name.as_str().into(), options, table(&queue.arguments));
            tolerate(
                &queue.name,
                bounded(&queue.name, CALL_TIMEOUT, declared).await.map(drop),
            )?;
            close(channel).await;
        }
        let channel = self.channel().await?;
        for binding in &topology.bindings {
            let bound = channel.queue_bind(
                binding.queue.as_str().into(),
                binding.exchange.as_str().into(),
                binding.routing_key.as_str().into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            );
            bounded(&format!("bind {}", binding.queue), CALL_TIMEOUT, bound).await?;
        }
        close(channel).await;
        Ok(())
    }

    /// Messages that wait in a queue, and its consumers; `None` if there is no such queue. Declares
    /// nothing.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub async fn depth(&self, queue: &str) -> Result<Option<(u32, u32)>, BrokerError> {
        let passive = QueueDeclareOptions {
            passive: true,
            ..Default::default()
        };
        // A queue that is missing closes the channel: one for each question.
        let channel = self.channel().await?;
        let asked = channel.queue_declare(queue.into(), passive, FieldTable::default());
        match bounded(queue, CALL_TIMEOUT, asked).await {
            Ok(found) => {
                close(channel).await;
                Ok(Some((found.message_count(), found.consumer_count())))
            }
            Err(BrokerError::Missing(_)) => Ok(None),
            Err(
                error @ (BrokerError::Differs(_)
                | BrokerError::Forbidden(_)
                | BrokerError::Failed(_)),
            ) => Err(error),
        }
    }

    /// Looks through a queue without a consumer.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub async fn browse(&self, queue: &str) -> Result<Browser, BrokerError> {
        Ok(Browser {
            channel: self.channel().await?,
            queue: queue.to_owned(),
        })
    }

    async fn channel(&self) -> Result<Channel, BrokerError> {
        bounded(
            "open a channel",
            CALL_TIMEOUT,
            self.consuming.create_channel(),
        )
        .await
    }

    /// Registers a consumer; returns once the broker has confirmed it.
    ///
    /// # Errors
    /// When the queue is gone or the link is lost.
    pub async fn consume(
        &self,
        queue: &str,
        tag: &str,
        prefetch: u16,
    ) -> Result<Deliveries, BrokerError> {
        let channel = self.channel().await?;
        bounded(
            "qos",
            CALL_TIMEOUT,
            channel.basic_qos(prefetch, BasicQosOptions::default()),
        )
        .await?;
        let consume = channel.basic_consume(
            queue.into(),
            tag.into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        );
        let consumer = bounded(&format!("consume {queue}"), CALL_TIMEOUT, consume).await?;
        Ok(Deliveries {
            channel,
            consumer,
            tag: tag.to_owned(),
            lost: self.lost.clone(),
        })
    }

    /// An exclusive queue bound to an exchange, consumed without acknowledgement.
    ///
    /// # Errors
    /// When the broker refuses.
    pub async fn subscribe(
        &self,
        exchange: &str,
        keys: &[String],
    ) -> Result<(String, Deliveries), BrokerError> {
        let channel = self.channel().await?;
        let options = QueueDeclareOptions {
            exclusive: true,
            auto_delete: true,
            ..Default::default()
        };
        let queue = bounded(
            "declare an exclusive queue",
            CALL_TIMEOUT,
            channel.queue_declare("".into(), options, FieldTable::default()),
        )
        .await?;
        let name = queue.name().to_string();
        for key in keys {
            let bind = channel.queue_bind(
                name.as_str().into(),
                exchange.into(),
                key.as_str().into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            );
            bounded(&format!("bind to {exchange}"), CALL_TIMEOUT, bind).await?;
        }
        let options = BasicConsumeOptions {
            no_ack: true,
            exclusive: true,
            ..Default::default()
        };
        let consume = channel.basic_consume(
            name.as_str().into(),
            "".into(),
            options,
            FieldTable::default(),
        );
        let consumer = bounded("consume an exclusive queue", CALL_TIMEOUT, consume).await?;
        let tag = consumer.tag().to_string();
        Ok((
            name,
            Deliveries {
                channel,
                consumer,
                tag,
                lost: self.lost.clone(),
            },
        ))
    }

    /// Closes both connections, politely but not for long; what was settled has arrived then.
    pub async fn close(&self) {
        if self.lost.is_cancelled() {
            return;
        }
        self.lost.cancel();
        let closed = [&self.consuming, &self.publishing].map(|c| c.close(200, "bye".into()));
        let closed = futures_util::future::join_all(closed);
        if tokio::time::timeout(CLOSE_TIMEOUT, closed).await.is_err() {
            tracing::debug!("the broker does not answer a goodbye");
        }
    }
}

async fn connect(config: &AmqpConfig, name: &str) -> Result<Connection, BrokerError> {
    let shown = crate::config::redact(&config.url);
    let mut url =
        Url::parse(&config.url).map_err(|e| BrokerError::Failed(format!("amqp.url: {e}")))?;
    if !url.query_pairs().any(|(key, _)| key == "heartbeat") {
        url.query_pairs_mut()
            .append_pair("heartbeat", &config.heartbeat.as_secs().max(1).to_string());
    }
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let tls = config.tls.read();
    let tls = tls.map_err(|(key, why)| BrokerError::Failed(format!("amqp.tls.{key}: {why}")))?;
    let tls = OwnedTLSConfig {
        identity: tls.identity.map(|(cert, key)| OwnedIdentity::PKCS8 {
            pem: cert.into(),
            key: key.into(),
        }),
        cert_chain: tls.ca,
    };
    let connecting = async {
        let builder = ConnectionBuilder::new()?.with_uri_str(url.to_string());
        let builder = builder.with_properties(properties);
        builder.with_tls_config(tls).connect().await
    };
    bounded(&format!("connect to {shown}"), CONNECT_TIMEOUT, connecting).await
}

fn watch(connection: &Connection, lost: CancellationToken, blocked: Option<Arc<AtomicBool>>) {
    let mut events = connection.events_listener();
    let status = connection.status().clone();
    tokio::spawn(async move {
        loop {
            let event = tokio::select! {
                // Both connections may go at once, and each has its reason.
                biased;
                event = events.next() => event,
                () = lost.cancelled() => return,
            };
            match event {
                Some(Event::ConnectionBlocked(reason)) => {
                    tracing::warn!(%reason, "RabbitMQ holds our publishes back");
                    blocked
                        .iter()
                        .for_each(|b| b.store(true, Ordering::Relaxed));
                }
                Some(Event::ConnectionUnblocked) => blocked
                    .iter()
                    .for_each(|b| b.store(false, Ordering::Relaxed)),
                // Errors of a channel arrive here too, while the connection lives; whoever uses the
                // channel is told as well.
                Some(_) if status.connected() => {}
                Some(Event::Error(error)) => {
                    // These kinds say only that we have closed it ourselves.
                    let ours = matches!(
                        error.kind(),
                        ErrorKind::InvalidConnectionState(_) | ErrorKind::InvalidChannelState(..)
                    );
                    if !ours {
                        tracing::warn!(%error, "a connection to RabbitMQ is lost");
                    }
                    return lost.cancel();
                }
                Some(_) | None => return lost.cancel(),
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

fn tolerate(name: &str, declared: Result<(), BrokerError>) -> Result<(), BrokerError> {
    match declared {
        Err(error @ BrokerError::Differs(_)) => {
            tracing::warn!(%name, "exists with other arguments and is used as it is: {error}");
            Ok(())
        }
        Ok(())
        | Err(BrokerError::Missing(_) | BrokerError::Forbidden(_) | BrokerError::Failed(_)) => {
            declared
        }
    }
}

async fn close(channel: Channel) {
    drop(tokio::time::timeout(CLOSE_TIMEOUT, channel.close(200, "done".into())).await);
}

/// A stream of deliveries and the way to end it.
#[derive(Debug)]
pub struct Deliveries {
    channel: Channel,
    consumer: lapin::Consumer,
    tag: String,
    lost: CancellationToken,
}

impl Deliveries {
    /// The next delivery; `None` when the consumer is gone, however it went. Cancel-safe.
    pub async fn next(&mut self) -> Option<Delivery> {
        match self.consumer.next().await {
            Some(Ok(delivery)) => Some(Delivery::new(delivery)),
            Some(Err(error)) => {
                tracing::warn!(%error, "the consumer failed");
                None
            }
            None => None,
        }
    }

    /// Takes the consumer off the queue; returns what was delivered but not begun. What was begun
    /// can be settled as long as this lives: dropping it closes the channel.
    pub async fn cancel(&mut self) -> Vec<Delivery> {
        let cancel = self
            .channel
            .basic_cancel(self.tag.as_str().into(), BasicCancelOptions::default());
        let wait = match tokio::time::timeout(CLOSE_TIMEOUT, cancel).await {
            Ok(Ok(())) => CLOSE_TIMEOUT,
            Ok(Err(error)) => {
                tracing::debug!(%error, "the consumer was gone already");
                CLOSE_TIMEOUT
            }
            Err(_) => {
                tracing::warn!("the broker does not answer; its link is given up");
                self.lost.cancel();
                Duration::ZERO
            }
        };
        let mut left = Vec::new();
        while let Ok(Some(delivery)) = tokio::time::timeout(wait, self.next()).await {
            left.push(delivery);
        }
        left
    }
}

/// Takes one message after the other out of a queue; what is not settled goes back when this goes.
#[derive(Debug)]
pub struct Browser {
    channel: Channel,
    queue: String,
}

impl Browser {
    /// The next message; none when there is no other.
    ///
    /// # Errors
    /// When the queue is gone or the broker does not answer.
    pub async fn next(&self) -> Result<Option<Delivery>, BrokerError> {
        let (queue, options) = (self.queue.as_str().into(), BasicGetOptions::default());
        let getting = self.channel.basic_get(queue, options);
        let found = bounded(&self.queue, CALL_TIMEOUT, getting).await?;
        Ok(found.map(|message| Delivery::new(message.delivery)))
    }
}

/// A delivered message.
#[derive(Debug)]
pub struct Delivery {
    /// The body.
    pub body: Vec<u8>,
    /// What came with it.
    pub properties: Properties,
    /// Whether the broker has delivered it before.
    pub redelivered: bool,
    /// How often, as the broker counts.
    pub delivery_count: u64,
    /// Settles it, once.
    pub acker: Acker,
}

impl Delivery {
    fn new(delivery: lapin::message::Delivery) -> Self {
        let source = delivery.properties;
        let mut properties = Properties {
            content_type: source.content_type().as_ref().map(ToString::to_string),
            message_id: source.message_id().as_ref().map(ToString::to_string),
            correlation_id: source.correlation_id().as_ref().map(ToString::to_string),
            reply_to: source.reply_to().as_ref().map(ToString::to_string),
            timestamp: *source.timestamp(),
            headers: Vec::new(),
            attempt: 1,
        };
        let (mut delivery_count, mut kept, mut left_out) = (0, 0, 0);
        // What a worker says of a parked job comes first, or a sender's headers could crowd it out.
        let headers = source.headers().iter().flat_map(|table| table.inner());
        let (said, others): (Vec<_>, Vec<_>) = headers.partition(|(name, _)| {
            PARKED
                .iter()
                .any(|prefix| name.as_str().starts_with(prefix))
        });
        for (name, value) in said.into_iter().chain(others) {
            match (name.as_str(), number(value), value) {
                (ATTEMPT, Some(n), _) => properties.attempt = u32::try_from(n).unwrap_or(1).max(1),
                ("x-delivery-count", Some(n), _) => delivery_count = n,
                (name, _, AMQPValue::LongString(text)) => {
                    let size = name.len() + text.as_bytes().len();
                    if kept + size <= MOST_HEADERS {
                        kept += size;
                        properties.headers.push((name.to_owned(), text.to_string()));
                    } else {
                        left_out += 1;
                    }
                }
                (_, _, _) => {}
            }
        }
        if left_out > 0 {
            tracing::warn!(
                left_out,
                "headers that are too large are left out of copies of the job"
            );
        }
        Self {
            body: delivery.data,
            properties,
            redelivered: delivery.redelivered,
            delivery_count,
            acker: Acker(delivery.acker),
        }
    }
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "a foreign enum: only numbers are counts"
)]
fn number(value: &AMQPValue) -> Option<u64> {
    match value {
        AMQPValue::ShortShortInt(n) => u64::try_from(*n).ok(),
        AMQPValue::ShortShortUInt(n) => Some(u64::from(*n)),
        AMQPValue::ShortInt(n) => u64::try_from(*n).ok(),
        AMQPValue::ShortUInt(n) => Some(u64::from(*n)),
        AMQPValue::LongInt(n) => u64::try_from(*n).ok(),
        AMQPValue::LongUInt(n) => Some(u64::from(*n)),
        AMQPValue::LongLongInt(n) => u64::try_from(*n).ok(),
        _ => None,
    }
}

/// Settles a delivery, once.
#[derive(Debug)]
pub struct Acker(lapin::Acker);

impl Acker {
    /// Whether settling can still reach the broker.
    pub fn usable(&self) -> bool {
        self.0.usable()
    }

    /// Acknowledges. False = the broker will deliver again: the channel is gone.
    pub async fn ack(self) -> bool {
        matches!(self.0.ack(BasicAckOptions::default()).await, Ok(true))
    }

    /// Gives the message back for somebody else. False = the broker does so by itself.
    pub async fn hand_back(self) -> bool {
        let options = BasicNackOptions {
            requeue: true,
            ..Default::default()
        };
        matches!(self.0.nack(options).await, Ok(true))
    }
}

type Order = (Outgoing, oneshot::Sender<Result<(), PublishError>>);

/// A handle to the task that owns a publishing channel.
#[derive(Debug, Clone)]
pub struct Publisher(mpsc::Sender<Order>);

impl Publisher {
    async fn open(
        connection: &Connection,
        window: usize,
        lost: &CancellationToken,
        blocked: &Arc<AtomicBool>,
    ) -> Result<Self, BrokerError> {
        let channel = bounded("open a channel", CALL_TIMEOUT, connection.create_channel()).await?;
        bounded(
            "confirms",
            CALL_TIMEOUT,
            channel.confirm_select(ConfirmSelectOptions::default()),
        )
        .await?;
        let (orders, inbox) = mpsc::channel(PIPELINE);
        let publishing = publish_all(channel, inbox, window, lost.clone(), Arc::clone(blocked));
        tokio::spawn(publishing);
        Ok(Self(orders))
    }

    /// Sends a message; returns when the broker has confirmed it.
    ///
    /// # Errors
    /// When it was refused, or when nobody knows.
    pub async fn publish(&self, message: Outgoing) -> Result<(), PublishError> {
        for name in [&message.exchange, &message.routing_key] {
            if short(name).is_none() {
                let why = format!("{name:?} is longer than a name may be");
                return Err(PublishError::Refused(why));
            }
        }
        let began = Instant::now();
        let outcome = self.send(message).await;
        let confirm = match &outcome {
            Ok(()) => Confirm::Confirmed,
            Err(PublishError::Refused(_)) => Confirm::Refused,
            Err(PublishError::Lost(_) | PublishError::Unroutable(_)) => Confirm::Lost,
        };
        crate::metrics::confirm(confirm, began.elapsed());
        outcome
    }

    async fn send(&self, message: Outgoing) -> Result<(), PublishError> {
        let lost = || PublishError::Lost("the publisher has ended".into());
        let (reply, confirmed) = oneshot::channel();
        self.0.send((message, reply)).await.map_err(|_| lost())?;
        confirmed.await.map_err(|_| lost())?
    }
}

async fn publish_all(
    channel: Channel,
    mut inbox: mpsc::Receiver<Order>,
    window: usize,
    lost: CancellationToken,
    blocked: Arc<AtomicBool>,
) {
    // However this task ends, nobody publishes on the link any more.
    let _lost = lost.clone().drop_guard();
    let mut pending: FuturesUnordered<futures_util::future::BoxFuture<'static, bool>> =
        FuturesUnordered::new();
    loop {
        tokio::select! {
            Some(healthy) = pending.next(), if !pending.is_empty() => {
                if !healthy {
                    return lost.cancel();
                }
            }
            order = inbox.recv(), if pending.len() < window => match order {
                Some((message, reply)) => match send(&channel, message).await {
                    Ok(confirm) => {
                        pending.push(Box::pin(settle(confirm, Arc::clone(&blocked), reply)));
                    }
                    Err(error) => {
                        drop(reply.send(Err(error)));
                        return lost.cancel();
                    }
                },
                None => break,
            },
            () = lost.cancelled() => return,
        }
    }
    while pending.next().await.is_some() {}
}

async fn send(
    channel: &Channel,
    message: Outgoing,
) -> Result<lapin::PublisherConfirm, PublishError> {
    let options = BasicPublishOptions {
        mandatory: message.mandatory,
        ..Default::default()
    };
    let publish = channel.basic_publish(
        message.exchange.as_str().into(),
        message.routing_key.as_str().into(),
        options,
        &message.body,
        properties(&message.properties),
    );
    match tokio::time::timeout(CONFIRM_TIMEOUT, publish).await {
        Ok(sent) => sent.map_err(|e| PublishError::Lost(e.to_string())),
        Err(_) => Err(PublishError::Lost("a publish was not taken in time".into())),
    }
}

/// While the broker holds publishes back (it is short of memory or disk), and says so, the time
/// does not run: giving the link up would return every job, again and again, until they are parked.
async fn in_time<T>(
    confirm: impl Future<Output = T>,
    blocked: &AtomicBool,
    limit: Duration,
) -> Option<T> {
    tokio::pin!(confirm);
    loop {
        match tokio::time::timeout(limit, &mut confirm).await {
            Ok(confirmed) => return Some(confirmed),
            Err(_) if blocked.load(Ordering::Relaxed) => {}
            Err(_) => return None,
        }
    }
}

/// Tells the sender what became of its message; false = the channel can no longer be trusted.
async fn settle(
    confirm: lapin::PublisherConfirm,
    blocked: Arc<AtomicBool>,
    reply: oneshot::Sender<Result<(), PublishError>>,
) -> bool {
    let (outcome, healthy) = match in_time(confirm, &blocked, CONFIRM_TIMEOUT).await {
        Some(Ok(Confirmation::Ack(None))) => (Ok(()), true),
        Some(Ok(Confirmation::Ack(Some(returned)))) => {
            let why = returned.reply_text.to_string();
            (Err(PublishError::Unroutable(why)), false)
        }
        Some(Ok(Confirmation::Nack(_))) => {
            (Err(PublishError::Refused("a queue is full".into())), true)
        }
        Some(Ok(Confirmation::NotRequested)) => {
            (Err(PublishError::Lost("confirms are off".into())), false)
        }
        Some(Err(error)) => (Err(PublishError::Lost(error.to_string())), false),
        None => (
            Err(PublishError::Lost(format!(
                "not confirmed in {} s: does every queue bound there have a leader?",
                CONFIRM_TIMEOUT.as_secs()
            ))),
            false,
        ),
    };
    // A sender that has gone no longer needs to know.
    drop(reply.send(outcome));
    healthy
}

/// Text of at most 255 bytes, AMQP's limit for names; lapin's own conversion panics beyond it.
fn short(text: &str) -> Option<ShortString> {
    ShortString::try_new(text).ok()
}

/// Text that does not fit is left out: a stranger's `message_id` may fill all of the 255 bytes, and
/// the id of the answer made from it is longer.
fn properties(source: &Properties) -> BasicProperties {
    const PERSISTENT: u8 = 2;
    let mut headers = FieldTable::default();
    for (name, value) in &source.headers {
        if let Some(name) = short(name) {
            headers.insert(name, AMQPValue::LongString(value.as_str().into()));
        }
    }
    if source.attempt > 1 {
        headers.insert(
            ATTEMPT.into(),
            AMQPValue::LongLongInt(source.attempt.into()),
        );
    }
    let mut target = BasicProperties::default()
        .with_delivery_mode(PERSISTENT)
        .with_headers(headers);
    let fitting = |text: &Option<String>| text.as_deref().and_then(short);
    if let Some(text) = fitting(&source.content_type) {
        target = target.with_content_type(text);
    }
    if let Some(text) = fitting(&source.message_id) {
        target = target.with_message_id(text);
    }
    if let Some(text) = fitting(&source.correlation_id) {
        target = target.with_correlation_id(text);
    }
    if let Some(text) = fitting(&source.reply_to) {
        target = target.with_reply_to(text);
    }
    if let Some(seconds) = source.timestamp {
        target = target.with_timestamp(seconds);
    }
    target
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapin::protocol::{AMQPError, AMQPHardError};

    fn refusal(kind: AMQPErrorKind, text: &str) -> lapin::Error {
        ErrorKind::ProtocolError(AMQPError::new(kind, text.into())).into()
    }

    #[test]
    fn an_error_is_judged_by_its_kind_and_never_by_its_text() {
        let soft = |kind| refusal(AMQPErrorKind::Soft(kind), "whatever the broker says");
        let differs = failed("q", &soft(AMQPSoftError::PRECONDITIONFAILED));
        assert!(matches!(differs, BrokerError::Differs(_)), "{differs}");
        assert_eq!(tolerate("q", Err(differs)), Ok(()));
        let missing = failed("q", &soft(AMQPSoftError::NOTFOUND));
        assert!(matches!(missing, BrokerError::Missing(_)), "{missing}");
        let text = "PRECONDITION_FAILED - NOT_FOUND";
        let forbidden = failed("q", &soft(AMQPSoftError::ACCESSREFUSED));
        assert!(
            matches!(forbidden, BrokerError::Forbidden(_)),
            "{forbidden}"
        );
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
    async fn the_time_of_a_confirm_does_not_run_while_the_broker_holds_back() {
        let limit = Duration::from_millis(10);
        let blocked = AtomicBool::new(true);
        let late = async {
            tokio::time::sleep(limit * 10).await;
            blocked.store(false, Ordering::Relaxed);
        };
        assert_eq!(in_time(late, &blocked, limit).await, Some(()));
        let never = std::future::pending::<()>();
        assert_eq!(in_time(never, &blocked, limit).await, None);
    }

    #[tokio::test]
    async fn a_call_without_an_answer_is_never_tolerated() {
        let call = std::future::pending::<lapin::Result<()>>();
        let late = bounded("q", Duration::ZERO, call).await;
        assert!(matches!(late, Err(BrokerError::Failed(_))), "{late:?}");
        assert_eq!(tolerate("q", late.clone()), late);
    }

    #[test]
    fn text_that_is_too_long_for_amqp_is_left_out() {
        let long = Some("x".repeat(256));
        let source = Properties {
            content_type: Some("application/json".into()),
            message_id: long.clone(),
            correlation_id: Some("x".repeat(255)),
            reply_to: long,
            ..Properties::default()
        };
        let target = properties(&source);
        assert_eq!((target.message_id(), target.reply_to()), (&None, &None));
        assert!(target.content_type().is_some() && target.correlation_id().is_some());
    }
}
