//! Publishes messages and waits for their confirms, in one task per channel.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use futures_util::future::{Fuse, FusedFuture};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::{Signs, bounded, failed};
use crate::broker::topology::Detour;
use crate::broker::{ATTEMPT, BrokerError, Outgoing, Properties, PublishError};
use crate::telemetry::metrics::Confirm;
use crate::util::clock;

/// A confirm that takes longer counts as lost. A broker that is paused would never send it.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(30);
/// How many results may be in flight between publish and confirm.
pub(super) const PIPELINE: usize = 64;

type Order = (Outgoing, oneshot::Sender<Result<(), PublishError>>);

/// A handle to the task that owns a publishing channel.
#[derive(Debug, Clone)]
pub struct Publisher {
    orders: mpsc::Sender<Order>,
    returns: Arc<Returns>,
    lost: CancellationToken,
}

/// What is done with messages that the broker returns.
#[derive(Debug, Default)]
struct Returns {
    detour: OnceLock<Detour>,
    warned: AtomicBool,
}

impl Publisher {
    /// `window` messages in flight; of one alone, a return can be matched to its message.
    pub(super) async fn open(
        connection: &Connection,
        window: usize,
        signs: &Signs,
    ) -> Result<Self, BrokerError> {
        let channel = bounded("open a channel", connection.create_channel()).await?;
        let confirms = channel.confirm_select(ConfirmSelectOptions::default());
        bounded("confirms", confirms).await?;
        let (orders, inbox) = mpsc::channel(PIPELINE);
        let returns = Arc::new(Returns::default());
        let sender = Self {
            orders,
            returns: Arc::clone(&returns),
            lost: signs.lost.clone(),
        };
        let publishing = publish_all(channel, inbox, window, returns, signs.clone());
        tokio::spawn(publishing);
        Ok(sender)
    }

    /// From now on a message that is returned is published again, this way. One message is in flight at a
    /// time then, so that it is known which one was returned.
    pub(super) fn detour(&self, detour: Detour) {
        // The first one is kept. Whatever else is found applies to the next link.
        self.returns.detour.get_or_init(|| detour);
    }

    /// Sends a message; returns when the broker has confirmed it.
    ///
    /// # Errors
    /// When it was refused, or its fate is unknown.
    pub async fn publish(&self, message: Outgoing) -> Result<(), PublishError> {
        for name in [&message.exchange, &message.routing_key] {
            if short(name).is_none() {
                let why = format!("{name:?} is longer than a name may be");
                return Err(PublishError::Refused(why));
            }
        }
        let began = Instant::now();
        let outcome = match self.returns.detour.get() {
            Some(detour) => self.send_or_detour(message, detour).await,
            None => self.send(message).await,
        };
        let confirm = match &outcome {
            Ok(()) => Confirm::Confirmed,
            Err(PublishError::Refused(_)) => Confirm::Refused,
            Err(PublishError::Lost(_) | PublishError::Unroutable(_)) => Confirm::Lost,
        };
        crate::telemetry::metrics::confirm(confirm, began.elapsed());
        outcome
    }

    /// Publishes by the detour what is returned. Only when that is returned too is the link given up: the
    /// next one declares the topology again.
    async fn send_or_detour(&self, message: Outgoing, to: &Detour) -> Result<(), PublishError> {
        let mut again = message.clone();
        let outcome = self.send(message).await;
        let Err(PublishError::Unroutable(why)) = &outcome else {
            return outcome;
        };
        if !self.returns.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                %why,
                exchange = again.exchange,
                routing_key = again.routing_key,
                instead = to.routing_key.as_ref().unwrap_or(&to.exchange),
                "no queue takes this, nor is there an alternate exchange that leads to one: such messages are published \
                 elsewhere instead, one at a time. Bind a queue, set a policy with alternate-exchange, or delete what \
                 was declared otherwise, and workers declare it as `scorer topology` prints it"
            );
        }
        again.exchange.clone_from(&to.exchange);
        if let Some(routing_key) = &to.routing_key {
            again.routing_key.clone_from(routing_key);
        }
        let outcome = self.send(again).await;
        if matches!(outcome, Err(PublishError::Unroutable(_))) {
            self.lost.cancel();
        }
        outcome
    }

    async fn send(&self, message: Outgoing) -> Result<(), PublishError> {
        let lost = || PublishError::Lost("the publisher has ended".into());
        let (reply, confirmed) = oneshot::channel();
        self.orders
            .send((message, reply))
            .await
            .map_err(|_| lost())?;
        confirmed.await.map_err(|_| lost())?
    }
}

async fn publish_all(
    channel: Channel,
    mut inbox: mpsc::Receiver<Order>,
    window: usize,
    returns: Arc<Returns>,
    signs: Signs,
) {
    let lost = signs.lost.clone();
    // When this task ends, however it ends, nothing can be published on the link any more.
    let _lost = lost.clone().drop_guard();
    let mut pending: FuturesUnordered<futures_util::future::BoxFuture<'static, bool>> =
        FuturesUnordered::new();
    // One publish at a time, but beside the confirms: a broker that blocks publishes still confirms.
    let sending = Fuse::terminated();
    tokio::pin!(sending);
    loop {
        let detour = returns.detour.get().is_some();
        let window = if detour { 1 } else { window };
        let may_send = sending.is_terminated() && pending.len() < window;
        tokio::select! {
            Some(healthy) = pending.next(), if !pending.is_empty() => {
                if !healthy {
                    return lost.cancel();
                }
            }
            (sent, alone, reply) = &mut sending, if !sending.is_terminated() => match sent {
                Ok(confirm) => {
                    let settled = settle(confirm, alone, signs.clone(), reply);
                    pending.push(Box::pin(settled));
                }
                Err(error) => {
                    drop(reply.send(Err(error)));
                    return lost.cancel();
                }
            },
            order = inbox.recv(), if may_send => match order {
                Some((message, reply)) => {
                    // The detour may have become known during the wait.
                    let alone = pending.is_empty() && returns.detour.get().is_some();
                    let sent = send(&channel, message, &signs);
                    sending.set(sent.map(move |sent| (sent, alone, reply)).fuse());
                }
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
    signs: &Signs,
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
    match in_time(publish, &signs.blocked, CONFIRM_TIMEOUT).await {
        Some(sent) => sent.map_err(|error| lost_by(&error, signs)),
        None => Err(PublishError::Lost(
            "the broker did not take a publish in time".into(),
        )),
    }
}

/// Without its exchange a message reaches no queue; otherwise its fate is unknown. Notes whether the broker does not
/// permit it.
fn lost_by(error: &lapin::Error, signs: &Signs) -> PublishError {
    match failed("publish", error) {
        BrokerError::Missing(_) => return PublishError::Unroutable(error.to_string()),
        BrokerError::Forbidden(_) => signs.forbidden.store(true, Ordering::Relaxed),
        BrokerError::Differs(_) | BrokerError::Denied(_) | BrokerError::Failed(_) => {}
    }
    PublishError::Lost(error.to_string())
}

/// Time does not count while the broker says that it blocks publishes, because it is short of memory or
/// disk. Giving up the link would return every job, again and again, until all are dead-lettered.
async fn in_time<T>(
    work: impl Future<Output = T>,
    blocked: &AtomicBool,
    limit: Duration,
) -> Option<T> {
    tokio::select! {
        biased;
        done = work => Some(done),
        () = clock::had_while(limit, || !blocked.load(Ordering::Relaxed)) => None,
    }
}

/// Tells the sender what became of its message; false = the channel can no longer be trusted. A return
/// while it was `alone` in flight is this message, and its sender knows what to do.
async fn settle(
    confirm: lapin::PublisherConfirm,
    alone: bool,
    signs: Signs,
    reply: oneshot::Sender<Result<(), PublishError>>,
) -> bool {
    let (outcome, healthy) = match in_time(confirm, &signs.blocked, CONFIRM_TIMEOUT).await {
        Some(Ok(Confirmation::Ack(None))) => (Ok(()), true),
        Some(Ok(Confirmation::Ack(Some(returned)))) => {
            let why = returned.reply_text.to_string();
            (Err(PublishError::Unroutable(why)), alone)
        }
        Some(Ok(Confirmation::Nack(_))) => {
            (Err(PublishError::Refused("a queue is full".into())), true)
        }
        Some(Ok(Confirmation::NotRequested)) => {
            (Err(PublishError::Lost("confirms are off".into())), false)
        }
        Some(Err(error)) => (Err(lost_by(&error, &signs)), false),
        None => (
            Err(PublishError::Lost(format!(
                "not confirmed in {} s: does every queue bound there have a leader?",
                CONFIRM_TIMEOUT.as_secs()
            ))),
            false,
        ),
    };
    // A sender that is gone no longer needs to know.
    drop(reply.send(outcome));
    healthy
}

/// Text of at most 255 bytes, AMQP's limit for names. lapin's own conversion panics beyond it.
fn short(text: &str) -> Option<ShortString> {
    ShortString::try_new(text).ok()
}

/// Text that does not fit is left out: a sender's `message_id` may fill all of the 255 bytes, and the id of
/// the answer made from it is longer.
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
    if let Some(text) = fitting(&source.content_encoding) {
        target = target.with_content_encoding(text);
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
    if let Some(priority) = source.priority {
        target = target.with_priority(priority);
    }
    if let Some(seconds) = source.timestamp {
        target = target.with_timestamp(seconds);
    }
    target
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn time_for_a_confirm_does_not_count_while_the_broker_blocks_publishes() {
        let limit = Duration::from_secs(30);
        let blocked = AtomicBool::new(true);
        let late = async {
            tokio::time::sleep(limit * 10).await;
            blocked.store(false, Ordering::Relaxed);
            // The whole limit is left, not what remains of the last thirty seconds.
            tokio::time::sleep(limit.mul_f64(0.9)).await;
        };
        assert_eq!(in_time(late, &blocked, limit).await, Some(()));
        let never = std::future::pending::<()>();
        assert_eq!(in_time(never, &blocked, limit).await, None);
    }

    #[test]
    fn a_missing_exchange_is_no_lost_link() {
        use lapin::protocol::{AMQPError, AMQPErrorKind, AMQPHardError, AMQPSoftError};
        let of = |kind: AMQPErrorKind| {
            let error = lapin::ErrorKind::ProtocolError(AMQPError::new(kind, "why".into()));
            let signs = Signs::default();
            let outcome = lost_by(&error.into(), &signs);
            let forbidden = signs.forbidden.load(Ordering::Relaxed);
            (matches!(outcome, PublishError::Unroutable(_)), forbidden)
        };
        let (soft, hard) = (AMQPErrorKind::Soft, AMQPErrorKind::Hard);
        assert_eq!(of(soft(AMQPSoftError::NOTFOUND)), (true, false));
        assert_eq!(of(soft(AMQPSoftError::ACCESSREFUSED)), (false, true));
        assert_eq!(of(hard(AMQPHardError::CONNECTIONFORCED)), (false, false));
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
