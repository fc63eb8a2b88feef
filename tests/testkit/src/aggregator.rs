//! An aggregator: publishes jobs and reads results, over the contract and nothing else.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use lapin::options::{
    BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::encoding::Encoding;
use crate::message::Message;
use crate::package::MODEL;
use crate::wait::{SOON, eventually, eventually_some, secs};

/// lapin's tasks live here; the tests themselves are synchronous.
pub fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime")
    })
}

/// What a consumer has gathered; see [`snapshot`].
pub type Inbox = Arc<Mutex<Vec<Message>>>;

/// A connection that publishes jobs and gathers results.
pub struct Aggregator {
    /// The connection, for channels of the test's own.
    pub connection: Connection,
    publishing: Channel,
    /// The prefix of every exchange and queue.
    pub namespace: String,
    results: Inbox,
}

impl Aggregator {
    /// Connects and turns on publisher confirms; waits for a broker that is starting.
    #[track_caller]
    pub fn connect(url: &str, namespace: &str) -> Self {
        let (connection, publishing) =
            eventually_some(secs(60), "the broker lets an aggregator in", || {
                runtime().block_on(async {
                    let connecting = Connection::connect(url, ConnectionProperties::default());
                    let connection = tokio::time::timeout(secs(5), connecting).await.ok()?.ok()?;
                    let channel = connection.create_channel().await.ok()?;
                    channel
                        .confirm_select(ConfirmSelectOptions::default())
                        .await
                        .ok()?;
                    Some((connection, channel))
                })
            });
        Self {
            connection,
            publishing,
            namespace: namespace.to_owned(),
            results: Inbox::default(),
        }
    }

    /// Submits a job as MessagePack under its submission id.
    #[track_caller]
    pub fn submit(&self, job: &Value) {
        self.submit_as(job, Encoding::MessagePack, |properties| properties);
    }

    /// Submits a job in an encoding, with more properties.
    #[track_caller]
    pub fn submit_as(
        &self,
        job: &Value,
        encoding: Encoding,
        more: impl FnOnce(BasicProperties) -> BasicProperties,
    ) {
        let properties =
            BasicProperties::default().with_content_type(encoding.content_type().into());
        self.publish(&encoding.encode(job), more(properties));
    }

    /// Publishes any body to the jobs exchange and waits for the broker's confirm.
    #[track_caller]
    pub fn publish(&self, body: &[u8], properties: BasicProperties) {
        self.publish_to("jobs", MODEL, true, body, properties);
    }

    /// Sends a control message, to whoever is bound.
    #[track_caller]
    pub fn control(&self, routing_key: &str, body: &[u8], encoding: Encoding) {
        let properties =
            BasicProperties::default().with_content_type(encoding.content_type().into());
        self.publish_to("control", routing_key, false, body, properties);
    }

    /// The same in JSON, with somewhere to answer to.
    #[track_caller]
    pub fn ask(&self, routing_key: &str, message: &Value, reply_to: &str) {
        let properties = BasicProperties::default()
            .with_content_type(Encoding::Json.content_type().into())
            .with_correlation_id("asked".into())
            .with_reply_to(reply_to.into());
        let body = Encoding::Json.encode(message);
        self.publish_to("control", routing_key, false, &body, properties);
    }

    #[track_caller]
    fn publish_to(
        &self,
        exchange: &str,
        key: &str,
        mandatory: bool,
        body: &[u8],
        properties: BasicProperties,
    ) {
        let exchange = format!("{}.{exchange}", self.namespace);
        let options = BasicPublishOptions {
            mandatory,
            ..Default::default()
        };
        let properties = properties.with_delivery_mode(2);
        let confirmation = runtime().block_on(async {
            let sending = self.publishing.basic_publish(
                exchange.into(),
                key.into(),
                options,
                body,
                properties,
            );
            let confirm = sending.await.expect("publishing");
            tokio::time::timeout(secs(20), confirm)
                .await
                .expect("a confirm in time")
                .expect("a confirm")
        });
        assert!(
            matches!(confirmation, Confirmation::Ack(None)),
            "not routed or refused: {confirmation:?}"
        );
    }

    /// Starts to gather the results, from the queue that workers declare.
    #[track_caller]
    pub fn collect_results(&self) {
        let queue = format!("{}.results.{MODEL}", self.namespace);
        eventually(SOON, "a worker declares the results queue", || {
            self.depth(&queue).is_some()
        });
        self.collect(&queue, &self.results);
    }

    /// Declares a queue that keeps a copy of every result and outlives the death of any node.
    #[track_caller]
    pub fn keep_results(&self, queue: &str) {
        let exchange = format!("{}.results", self.namespace);
        let mut arguments = FieldTable::default();
        let quorum = AMQPValue::LongString("quorum".into());
        arguments.insert("x-queue-type".into(), quorum);
        runtime().block_on(async {
            let channel = self.connection.create_channel().await.expect("a channel");
            let declared =
                channel.queue_declare(queue.into(), QueueDeclareOptions::durable(), arguments);
            declared.await.expect("a queue");
            let key = format!("{MODEL}.*");
            let bound = channel.queue_bind(
                queue.into(),
                exchange.into(),
                key.into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            );
            bound.await.expect("a binding");
        });
    }

    /// A queue to reply to, and what arrives there.
    #[track_caller]
    pub fn reply_queue(&self) -> (String, Inbox) {
        let queue = runtime().block_on(async {
            let channel = self.connection.create_channel().await.expect("a channel");
            let options = QueueDeclareOptions {
                exclusive: true,
                auto_delete: true,
                ..Default::default()
            };
            channel
                .queue_declare("".into(), options, FieldTable::default())
                .await
                .expect("a queue")
                .name()
                .to_string()
        });
        let inbox = Inbox::default();
        self.collect(&queue, &inbox);
        (queue, inbox)
    }

    fn collect(&self, queue: &str, inbox: &Inbox) {
        let inbox = Arc::clone(inbox);
        let mut consumer = runtime().block_on(async {
            let channel = self.connection.create_channel().await.expect("a channel");
            let options = BasicConsumeOptions {
                no_ack: true,
                ..Default::default()
            };
            let consuming =
                channel.basic_consume(queue.into(), "".into(), options, FieldTable::default());
            consuming.await.expect("a consumer")
        });
        runtime().spawn(async move {
            while let Some(Ok(delivery)) = consumer.next().await {
                let message = Message::new(&delivery);
                inbox
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(message);
            }
        });
    }

    /// The results gathered so far.
    pub fn results(&self) -> Vec<Message> {
        snapshot(&self.results)
    }

    /// The copies of one submission's result gathered so far.
    pub fn copies(&self, submission_id: &str) -> Vec<Message> {
        self.results()
            .into_iter()
            .filter(|m| m.json()["submission_id"] == submission_id)
            .collect()
    }

    /// Waits for the result of a submission.
    #[track_caller]
    pub fn result(&self, submission_id: &str) -> Message {
        self.nth_result(submission_id, 1)
    }

    /// Waits for the n-th copy of a submission's result.
    #[track_caller]
    pub fn nth_result(&self, submission_id: &str, n: usize) -> Message {
        let what = format!("result {n} of {submission_id}");
        eventually_some(secs(60), &what, || {
            self.copies(submission_id).into_iter().nth(n - 1)
        })
    }

    /// Waits until every one of these submissions has a result.
    #[track_caller]
    pub fn all_results(&self, ids: &[String], deadline: Duration) {
        eventually(
            deadline,
            &format!("a result for each of {} jobs", ids.len()),
            || {
                let results = self.results();
                let answered: std::collections::HashSet<String> = results
                    .iter()
                    .filter_map(|m| m.json()["submission_id"].as_str().map(str::to_owned))
                    .collect();
                ids.iter().all(|id| answered.contains(id))
            },
        );
    }

    /// Messages that wait in a queue and its consumers, by a passive declare; none if there is no such queue.
    pub fn depth(&self, queue: &str) -> Option<(u32, u32)> {
        runtime().block_on(async {
            let channel = self.connection.create_channel().await.ok()?;
            let passive = QueueDeclareOptions {
                passive: true,
                ..Default::default()
            };
            let declared = channel
                .queue_declare(queue.into(), passive, FieldTable::default())
                .await
                .ok()?;
            channel.close(200, "done".into()).await.ok();
            Some((declared.message_count(), declared.consumer_count()))
        })
    }

    /// Deletes a queue with all it holds.
    #[track_caller]
    pub fn delete(&self, queue: &str) {
        runtime().block_on(async {
            let channel = self.connection.create_channel().await.expect("a channel");
            let options = lapin::options::QueueDeleteOptions::default();
            let deleted = channel.queue_delete(queue.into(), options).await;
            deleted.expect("the queue is deleted");
        });
    }

    /// Waits until a queue holds nothing, waiting or unacknowledged: with its workers gone, what they
    /// did not acknowledge is back in it.
    #[track_caller]
    pub fn expect_empty(&self, queue: &str) {
        eventually(
            SOON,
            &format!("{queue} has no message and no consumer"),
            || self.depth(queue) == Some((0, 0)),
        );
    }

    /// Takes a message out of a queue.
    pub fn take(&self, queue: &str) -> Option<Message> {
        runtime().block_on(async {
            let channel = self.connection.create_channel().await.ok()?;
            let got = channel
                .basic_get(queue.into(), BasicGetOptions { no_ack: true })
                .await
                .ok()?;
            let message = got.map(|got| Message::new(&got.delivery));
            channel.close(200, "done".into()).await.ok();
            message
        })
    }

    /// Waits for a parked job and takes it.
    #[track_caller]
    pub fn take_parked(&self) -> Message {
        let queue = format!("{}.dead.{MODEL}", self.namespace);
        eventually_some(secs(30), "a parked job", || self.take(&queue))
    }
}

impl Drop for Aggregator {
    /// A forgotten connection would go on taking results away from the next one.
    fn drop(&mut self) {
        runtime().block_on(async {
            tokio::time::timeout(secs(1), self.connection.close(200, "done".into()))
                .await
                .ok();
        });
    }
}

/// What an inbox holds now.
pub fn snapshot(inbox: &Inbox) -> Vec<Message> {
    inbox.lock().unwrap_or_else(PoisonError::into_inner).clone()
}
