//! What the broker delivers, and how it is settled.

use std::time::Duration;

use futures_util::StreamExt;
use lapin::Channel;
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicGetOptions, BasicNackOptions};
use lapin::types::{AMQPValue, FieldArray, FieldTable};
use tokio_util::sync::CancellationToken;

use super::{CLOSE_TIMEOUT, bounded};
use crate::broker::{ATTEMPT, BrokerError, LAST_DEATH, Properties, is_dead_letter_header};

/// The most bytes of a sender's headers that a copy of the job keeps. All headers of a message share one
/// frame of 128 KiB with ours, and the broker closes the connection of whoever sends a larger one.
const MOST_HEADERS: usize = 32 * 1024;

/// A consumer's deliveries.
#[derive(Debug)]
pub struct Deliveries {
    channel: Channel,
    consumer: lapin::Consumer,
    tag: String,
    lost: CancellationToken,
    /// Whether they are copies, which nobody else waits for: they are settled when they are taken.
    copies: bool,
}

impl Deliveries {
    pub(super) fn new(
        channel: Channel,
        consumer: lapin::Consumer,
        lost: CancellationToken,
    ) -> Self {
        Self {
            channel,
            tag: consumer.tag().to_string(),
            consumer,
            lost,
            copies: false,
        }
    }

    pub(super) fn of_copies(self) -> Self {
        Self {
            copies: true,
            ..self
        }
    }

    /// The next delivery; `None` when the consumer is gone for whatever reason. Cancel-safe.
    pub async fn next(&mut self) -> Option<Delivery> {
        match self.consumer.next().await {
            Some(Ok(delivery)) => {
                if self.copies {
                    let acker = delivery.acker.clone();
                    // Not waited for here: whoever gives up this call then has lost nothing.
                    tokio::spawn(async move { acker.ack(BasicAckOptions::default()).await });
                }
                Some(Delivery::new(delivery, self.channel.clone()))
            }
            Some(Err(error)) => {
                tracing::warn!(%error, "the consumer failed");
                None
            }
            None => None,
        }
    }

    /// Cancels the consumer; returns what was delivered but not taken, which is nothing on a lost link. What was taken can
    /// still be settled.
    pub async fn cancel(&mut self) -> Vec<Delivery> {
        if self.lost.is_cancelled() {
            return Vec::new();
        }
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

/// Takes messages out of a queue one by one.
#[derive(Debug)]
pub struct Browser {
    channel: Channel,
    queue: String,
}

impl Browser {
    pub(super) fn new(channel: Channel, queue: &str) -> Self {
        Self {
            channel,
            queue: queue.to_owned(),
        }
    }

    /// The next message; `None` when there are no more.
    ///
    /// # Errors
    /// When the queue is gone or the broker does not answer.
    pub async fn next(&self) -> Result<Option<Delivery>, BrokerError> {
        let (queue, options) = (self.queue.as_str().into(), BasicGetOptions::default());
        let getting = self.channel.basic_get(queue, options);
        let found = bounded(&self.queue, getting).await?;
        Ok(found.map(|message| Delivery::new(message.delivery, self.channel.clone())))
    }
}

/// A delivered message.
#[derive(Debug)]
pub struct Delivery {
    /// The body.
    pub body: Vec<u8>,
    /// Its properties.
    pub properties: Properties,
    /// Whether the broker has delivered it before.
    pub redelivered: bool,
    /// How often, by the broker's count.
    pub delivery_count: u64,
    /// Settles it, once.
    pub acker: Acker,
}

impl Delivery {
    fn new(delivery: lapin::message::Delivery, channel: Channel) -> Self {
        let source = delivery.properties;
        let mut properties = Properties {
            content_type: source.content_type().as_ref().map(ToString::to_string),
            content_encoding: source.content_encoding().as_ref().map(ToString::to_string),
            message_id: source.message_id().as_ref().map(ToString::to_string),
            correlation_id: source.correlation_id().as_ref().map(ToString::to_string),
            reply_to: source.reply_to().as_ref().map(ToString::to_string),
            priority: *source.priority(),
            timestamp: *source.timestamp(),
            headers: Vec::new(),
            attempt: 1,
        };
        let headers = source.headers().as_ref().map(Headers::of);
        let headers = headers.unwrap_or_default();
        if headers.left_out > 0 {
            tracing::warn!(
                left_out = headers.left_out,
                "headers that are too large are left out of copies of the job"
            );
        }
        let attempt = headers.attempt.and_then(|n| u32::try_from(n).ok());
        properties.attempt = attempt.unwrap_or(1).max(1);
        properties.headers = headers.kept;
        Self {
            body: delivery.data,
            properties,
            redelivered: delivery.redelivered,
            delivery_count: headers.returned.unwrap_or(0),
            acker: Acker {
                acker: delivery.acker,
                _channel: channel,
            },
        }
    }
}

/// The headers of a message, as far as they are read.
#[derive(Debug, Default)]
struct Headers {
    /// Text headers that copies of the message keep.
    kept: Vec<(String, String)>,
    /// How many were left out because of their size.
    left_out: usize,
    attempt: Option<u64>,
    returned: Option<u64>,
}

impl Headers {
    fn of(table: &FieldTable) -> Self {
        let (mut headers, mut size) = (Self::default(), 0);
        // Why a job was dead-lettered comes first, or a sender's headers could crowd it out.
        let (said, others): (Vec<_>, Vec<_>) =
            (table.inner().iter()).partition(|(name, _)| is_dead_letter_header(name.as_str()));
        for (name, value) in said.into_iter().chain(others) {
            match (name.as_str(), number(value), value) {
                (ATTEMPT, Some(n), _) => headers.attempt = Some(n),
                ("x-delivery-count", Some(n), _) => headers.returned = Some(n),
                ("x-death", _, AMQPValue::FieldArray(deaths)) => {
                    // As a text header it is kept by copies of the message.
                    let reason = last_reason(deaths);
                    headers.kept.retain(|(name, _)| name != LAST_DEATH);
                    headers
                        .kept
                        .extend(reason.map(|reason| (LAST_DEATH.to_owned(), reason)));
                }
                (name, _, AMQPValue::LongString(text)) => {
                    let more = name.len() + text.as_bytes().len();
                    if size + more <= MOST_HEADERS {
                        size += more;
                        headers.kept.push((name.to_owned(), text.to_string()));
                    } else {
                        headers.left_out += 1;
                    }
                }
                (_, _, _) => {}
            }
        }
        headers
    }
}

/// Reads the broker's own account of a message's deaths, which begins with the last.
fn last_reason(deaths: &FieldArray) -> Option<String> {
    let Some(AMQPValue::FieldTable(last)) = deaths.as_slice().first() else {
        return None;
    };
    match last.inner().get("reason") {
        Some(AMQPValue::LongString(reason)) => Some(reason.to_string()),
        Some(_) | None => None,
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

/// Settles a delivery, once. The channel that it came by stays open until the last of its deliveries is settled or
/// dropped; what was dropped is requeued when it closes.
#[derive(Debug)]
pub struct Acker {
    acker: lapin::Acker,
    _channel: Channel,
}

impl Acker {
    /// Whether settling can still reach the broker.
    pub fn usable(&self) -> bool {
        self.acker.usable()
    }

    /// Acknowledges. False = the channel is gone, and the broker will deliver again.
    pub async fn ack(self) -> bool {
        matches!(self.acker.ack(BasicAckOptions::default()).await, Ok(true))
    }

    /// Requeues the message. False = the channel is gone, and the broker does so by itself.
    pub async fn hand_back(self) -> bool {
        let options = BasicNackOptions {
            requeue: true,
            ..Default::default()
        };
        matches!(self.acker.nack(options).await, Ok(true))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_senders_headers_never_crowd_out_why_a_job_was_dead_lettered() {
        let mut table = FieldTable::default();
        let text = |length: usize| AMQPValue::LongString("x".repeat(length).into());
        // They sort before and after ours, and come before and after them in the table.
        for name in ["a-first", "x-error-zzz", "zzz"] {
            table.insert(name.into(), text(MOST_HEADERS - 100));
        }
        table.insert("x-error-code".into(), text(10));
        table.insert("x-worker-id".into(), text(10));
        table.insert(ATTEMPT.into(), AMQPValue::LongLongInt(3));
        table.insert("x-delivery-count".into(), AMQPValue::LongInt(2));
        let headers = Headers::of(&table);
        let mut kept: Vec<_> = headers.kept.iter().map(|(name, _)| name.as_str()).collect();
        kept.sort_unstable();
        assert_eq!(kept, ["x-error-code", "x-error-zzz", "x-worker-id"]);
        let numbers = (headers.left_out, headers.attempt, headers.returned);
        assert_eq!(numbers, (2, Some(3), Some(2)));
    }

    #[test]
    fn the_brokers_last_reason_counts_and_not_its_first() {
        let death = |reason: &str| {
            let mut death = FieldTable::default();
            death.insert("reason".into(), AMQPValue::LongString(reason.into()));
            AMQPValue::FieldTable(death)
        };
        let mut table = FieldTable::default();
        let deaths = vec![death("delivery_limit"), death("expired")];
        table.insert("x-death".into(), AMQPValue::FieldArray(deaths.into()));
        let first = AMQPValue::LongString("expired".into());
        table.insert("x-first-death-reason".into(), first);
        // An older copy says something else; the broker's own account counts.
        let stale = AMQPValue::LongString("expired".into());
        table.insert(LAST_DEATH.into(), stale);
        let properties = Properties {
            headers: Headers::of(&table).kept,
            ..Properties::default()
        };
        assert_eq!(
            properties.dead_letter_reason().as_deref(),
            Some("delivery_limit")
        );
        // Copies that we publish do not have the account itself.
        let copy = Properties {
            headers: properties.headers.clone(),
            ..Properties::default()
        };
        assert_eq!(copy.dead_letter_reason().as_deref(), Some("delivery_limit"));
    }
}
