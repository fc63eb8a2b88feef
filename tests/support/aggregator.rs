//! An aggregator: publishes jobs and reads results, over the contract and nothing else.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use lapin::options::{
    BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, ExchangeKind};
use serde_json::Value;
use tokio::runtime::Runtime;

use super::jobs::Encoding;
use super::package::MODEL;
use super::wait::{SOON, eventually, eventually_some, secs};

/// lapin's tasks live here; the tests themselves are synchronous.
fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(2).enable_all().build().expect("a runtime")
    })
}

/// A message as it was read.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    pub(crate) routing_key: String,
    pub(crate) message_id: Option<String>,
    pub(crate) correlation_id: Option<String>,
    pub(crate) content_type: Option<String>,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: Vec<u8>,
}

type Inbox = Arc<Mutex<Vec<Message>>>;

/// A connection that publishes jobs and gathers results.
pub(crate) struct Aggregator {
    connection: Connection,
    publishing: Channel,
    namespace: String,
    results: Inbox,
}

impl Aggregator {
    #[track_caller]
    pub(crate) fn connect(url: &str, namespace: &str) -> Self {
        let (connection, publishing) = eventually_some(secs(60), "the broker lets an aggregator in", || {
            runtime().block_on(async {
                let connecting = Connection::connect(url, ConnectionProperties::default());
                let connection = tokio::time::timeout(secs(5), connecting).await.ok()?.ok()?;
                let channel = connection.create_channel().await.ok()?;
                channel.confirm_select(ConfirmSelectOptions::default()).await.ok()?;
                Some((connection, channel))
            })
        });
        Self { connection, publishing, namespace: namespace.to_owned(), results: Inbox::default() }
    }

    /// Declares the jobs exchange and queue as contract 3 has them, for tests that come before any worker.
    #[track_caller]
    pub(crate) fn declare_jobs(&self) {
        let mut arguments = FieldTable::default();
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(20));
        for (name, value) in [
            ("x-queue-type", "quorum"),
            ("x-dead-letter-exchange", &format!("{}.dead", self.namespace)),
            ("x-dead-letter-routing-key", MODEL),
            ("x-dead-letter-strategy", "at-least-once"),
            ("x-overflow", "reject-publish"),
        ] {
            arguments.insert(name.into(), AMQPValue::LongString(value.into()));
        }
        self.declare_jobs_with(arguments);
    }

    /// Declares the jobs queue as an operator might who has not read the contract: a plain one.
    #[track_caller]
    pub(crate) fn declare_plain_jobs(&self) {
        self.declare_jobs_with(FieldTable::default());
    }

    #[track_caller]
    fn declare_jobs_with(&self, arguments: FieldTable) {
        let (exchange, queue) = (format!("{}.jobs", self.namespace), format!("{}.jobs.{MODEL}", self.namespace));
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        runtime().block_on(async {
            let channel = self.connection.create_channel().await.expect("a channel");
            let none = FieldTable::default;
            let declared = channel.exchange_declare(exchange.as_str().into(), ExchangeKind::Direct, durable, none());
            declared.await.expect("the jobs exchange");
            let declared = channel.queue_declare(queue.as_str().into(), QueueDeclareOptions::durable(), arguments);
            declared.await.expect("the jobs queue");
            let key = MODEL.into();
            let bound = channel.queue_bind(queue.into(), exchange.into(), key, QueueBindOptions::default(), none());
            bound.await.expect("the binding");
            channel.close(200, "done".into()).await.ok();
        });
    }

    /// Submits a job as MessagePack under its submission id.
    #[track_caller]
    pub(crate) fn submit(&self, job: &Value) {
        self.submit_as(job, Encoding::MessagePack, |properties| properties);
    }

    /// Submits a job in an encoding, with more properties.
    #[track_caller]
    pub(crate) fn submit_as(
        &self,
        job: &Value,
        encoding: Encoding,
        more: impl FnOnce(BasicProperties) -> BasicProperties,
    ) {
        let properties = BasicProperties::default().with_content_type(encoding.content_type().into());
        self.publish(&encoding.encode(job), more(properties));
    }

    /// Publishes any body to the jobs exchange and waits for the broker's confirm.
    #[track_caller]
    pub(crate) fn publish(&self, body: &[u8], properties: BasicProperties) {
        self.publish_to("jobs", MODEL, true, body, properties);
    }

    /// Sends a control message, to whoever is bound.
    #[track_caller]
    pub(crate) fn control(&self, routing_key: &str, body: &[u8], encoding: Encoding) {
        let properties = BasicProperties::default().with_content_type(encoding.content_type().into());
        self.publish_to("control", routing_key, false, body, properties);
    }

    #[track_caller]
    fn publish_to(&self, exchange: &str, key: &str, mandatory: bool, body: &[u8], properties: BasicProperties) {
        let exchange = format!("{}.{exchange}", self.namespace);
        let options = BasicPublishOptions { mandatory, ..Default::default() };
        let properties = properties.with_delivery_mode(2);
        let confirmation = runtime().block_on(async {
            let sending = self.publishing.basic_publish(exchange.into(), key.into(), options, body, properties);
            let confirm = sending.await.expect("publishing");
            tokio::time::timeout(secs(20), confirm).await.expect("a confirm in time").expect("a confirm")
        });
        assert!(matches!(confirmation, Confirmation::Ack(None)), "not routed or refused: {confirmation:?}");
    }

    /// Starts to gather the results, from the queue that workers declare.
    #[track_caller]
    pub(crate) fn collect_results(&self) {
        let queue = format!("{}.results.{MODEL}", self.namespace);
        eventually(SOON, "a worker declares the results queue", || self.depth(&queue).is_some());
        self.collect(&queue, &self.results);
    }

    /// A queue to reply to, and what arrives there.
    #[track_caller]
    pub(crate) fn reply_queue(&self) -> (String, Inbox) {
        let queue = runtime().block_on(async {
            let channel = self.connection.create_channel().await.expect("a channel");
            let options = QueueDeclareOptions { auto_delete: true, ..Default::default() };
            let options = QueueDeclareOptions { exclusive: true, ..options };
            channel.queue_declare("".into(), options, FieldTable::default()).await.expect("a queue").name().to_string()
        });
        let inbox = Inbox::default();
        self.collect(&queue, &inbox);
        (queue, inbox)
    }

    fn collect(&self, queue: &str, inbox: &Inbox) {
        let inbox = Arc::clone(inbox);
        let mut consumer = runtime().block_on(async {
            let channel = self.connection.create_channel().await.expect("a channel");
            let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
            let consuming = channel.basic_consume(queue.into(), "".into(), options, FieldTable::default());
            consuming.await.expect("a consumer")
        });
        runtime().spawn(async move {
            while let Some(Ok(delivery)) = consumer.next().await {
                let message = Message::new(&delivery);
                inbox.lock().unwrap_or_else(PoisonError::into_inner).push(message);
            }
        });
    }

    /// All results gathered so far.
    pub(crate) fn results(&self) -> Vec<Message> {
        snapshot(&self.results)
    }

    /// The copies of one submission's result gathered so far.
    pub(crate) fn copies(&self, submission_id: &str) -> Vec<Message> {
        self.results().into_iter().filter(|m| m.json()["submission_id"] == submission_id).collect()
    }

    /// Waits for the result of a submission.
    #[track_caller]
    pub(crate) fn result(&self, submission_id: &str) -> Message {
        self.nth_result(submission_id, 1)
    }

    /// Waits for the n-th copy of a submission's result.
    #[track_caller]
    pub(crate) fn nth_result(&self, submission_id: &str, n: usize) -> Message {
        let what = format!("result {n} of {submission_id}");
        eventually_some(secs(60), &what, || self.copies(submission_id).into_iter().nth(n - 1))
    }

    /// Waits until every one of these submissions has a result.
    #[track_caller]
    pub(crate) fn all_results(&self, ids: &[String], deadline: Duration) {
        eventually(deadline, &format!("a result for each of {} jobs", ids.len()), || {
            let results = self.results();
            let answered: std::collections::HashSet<String> =
                results.iter().filter_map(|m| m.json()["submission_id"].as_str().map(str::to_owned)).collect();
            ids.iter().all(|id| answered.contains(id))
        });
    }

    /// Messages that wait in a queue and its consumers, by a passive declare; none if there is no such queue.
    pub(crate) fn depth(&self, queue: &str) -> Option<(u32, u32)> {
        runtime().block_on(async {
            let channel = self.connection.create_channel().await.ok()?;
            let passive = QueueDeclareOptions { passive: true, ..Default::default() };
            let declared = channel.queue_declare(queue.into(), passive, FieldTable::default()).await.ok()?;
            channel.close(200, "done".into()).await.ok();
            Some((declared.message_count(), declared.consumer_count()))
        })
    }

    /// Takes a message out of a queue.
    pub(crate) fn take(&self, queue: &str) -> Option<Message> {
        runtime().block_on(async {
            let channel = self.connection.create_channel().await.ok()?;
            let got = channel.basic_get(queue.into(), BasicGetOptions { no_ack: true }).await.ok()?;
            let message = got.map(|got| Message::new(&got.delivery));
            channel.close(200, "done".into()).await.ok();
            message
        })
    }

    /// Waits for a parked job and takes it.
    #[track_caller]
    pub(crate) fn take_parked(&self) -> Message {
        let queue = format!("{}.dead.{MODEL}", self.namespace);
        eventually_some(secs(30), "a parked job", || self.take(&queue))
    }
}

/// What an inbox holds now.
pub(crate) fn snapshot(inbox: &Inbox) -> Vec<Message> {
    inbox.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

impl Message {
    fn new(delivery: &lapin::message::Delivery) -> Self {
        let properties = &delivery.properties;
        let headers = properties.headers().iter().flat_map(|t| t.inner().iter());
        Self {
            routing_key: delivery.routing_key.to_string(),
            message_id: properties.message_id().as_ref().map(ToString::to_string),
            correlation_id: properties.correlation_id().as_ref().map(ToString::to_string),
            content_type: properties.content_type().as_ref().map(ToString::to_string),
            headers: headers.map(|(key, value)| (key.to_string(), text(value))).collect(),
            body: delivery.data.clone(),
        }
    }

    /// The body, decoded as its content type says; numbers that are no numbers become null.
    pub(crate) fn json(&self) -> Value {
        match self.content_type.as_deref() {
            Some("application/json") => serde_json::from_slice(&self.body).expect("a JSON result"),
            _ => rmpv::ext::from_value(self.message_pack()).expect("a result without odd types"),
        }
    }

    /// The body as MessagePack.
    pub(crate) fn message_pack(&self) -> rmpv::Value {
        rmpv::decode::read_value(&mut self.body.as_slice()).expect("a MessagePack result")
    }

    /// The same, by its AMQP name, or a failed test.
    #[track_caller]
    pub(crate) fn id(&self) -> &str {
        self.message_id.as_deref().expect("a message_id")
    }
}

fn text(value: &AMQPValue) -> String {
    match value {
        AMQPValue::LongString(s) => String::from_utf8_lossy(s.as_bytes()).into_owned(),
        AMQPValue::ShortString(s) => s.to_string(),
        AMQPValue::LongInt(n) => n.to_string(),
        AMQPValue::LongLongInt(n) => n.to_string(),
        AMQPValue::ShortInt(n) => n.to_string(),
        other => format!("{other:?}"),
    }
}
