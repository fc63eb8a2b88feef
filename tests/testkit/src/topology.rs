//! Exchanges and queues that a test declares itself: as the contract has them, or as an operator might get them wrong.

use lapin::ExchangeKind;
use lapin::options::{
    ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};

use crate::aggregator::{Aggregator, runtime};
use crate::package::MODEL;

impl Aggregator {
    /// Declares the jobs exchange and queue as contract 3 has them, for tests that come before any worker.
    #[track_caller]
    pub fn declare_jobs(&self) {
        let mut arguments = FieldTable::default();
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(20));
        for (name, value) in [
            ("x-queue-type", "quorum"),
            (
                "x-dead-letter-exchange",
                &format!("{}.dead", self.namespace),
            ),
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
    pub fn declare_plain_jobs(&self) {
        self.declare_jobs_with(FieldTable::default());
    }

    /// Declares the queue of parked jobs as an operator might: with room for so many and no more.
    #[track_caller]
    pub fn declare_full_dead(&self, jobs: i32) {
        let queue = format!("{}.dead.{MODEL}", self.namespace);
        let mut arguments = FieldTable::default();
        arguments.insert("x-max-length".into(), AMQPValue::LongInt(jobs));
        for (name, value) in [("x-queue-type", "quorum"), ("x-overflow", "reject-publish")] {
            arguments.insert(name.into(), AMQPValue::LongString(value.into()));
        }
        runtime().block_on(async {
            let channel = self.connection.create_channel().await.expect("a channel");
            let durable = QueueDeclareOptions::durable();
            let declared = channel.queue_declare(queue.as_str().into(), durable, arguments);
            declared.await.expect("the queue of parked jobs");
        });
    }

    /// Declares an exchange of the namespace as an operator might, an internal one or with another
    /// alternate exchange.
    #[track_caller]
    pub fn declare_exchange(
        &self,
        rest: &str,
        kind: ExchangeKind,
        internal: bool,
        alternate: Option<&str>,
    ) {
        let name = format!("{}.{rest}", self.namespace);
        let mut arguments = FieldTable::default();
        if let Some(alternate) = alternate {
            let alternate = AMQPValue::LongString(alternate.into());
            arguments.insert("alternate-exchange".into(), alternate);
        }
        let options = ExchangeDeclareOptions {
            durable: true,
            internal,
            ..Default::default()
        };
        runtime().block_on(async {
            let channel = self.connection.create_channel().await.expect("a channel");
            let declared = channel.exchange_declare(name.into(), kind, options, arguments);
            declared.await.expect("the exchange");
        });
    }

    /// Deletes an exchange of the namespace.
    #[track_caller]
    pub fn delete_exchange(&self, rest: &str) {
        let name = format!("{}.{rest}", self.namespace);
        runtime().block_on(async {
            let channel = self.connection.create_channel().await.expect("a channel");
            let deleted = channel.exchange_delete(name.into(), ExchangeDeleteOptions::default());
            deleted.await.expect("the exchange is deleted");
        });
    }

    /// A queue of its own for results of one status.
    #[track_caller]
    pub fn declare_results_of(&self, status: &str) -> String {
        let (exchange, queue) = (
            format!("{}.results", self.namespace),
            format!("{}.{status}", self.namespace),
        );
        runtime().block_on(async {
            let channel = self.connection.create_channel().await.expect("a channel");
            let mut arguments = FieldTable::default();
            let quorum = AMQPValue::LongString("quorum".into());
            arguments.insert("x-queue-type".into(), quorum);
            let durable = QueueDeclareOptions::durable();
            let declared = channel.queue_declare(queue.as_str().into(), durable, arguments);
            declared.await.expect("the queue");
            let key = format!("{MODEL}.{status}");
            let options = QueueBindOptions::default();
            let bound = channel.queue_bind(
                queue.as_str().into(),
                exchange.into(),
                key.into(),
                options,
                FieldTable::default(),
            );
            bound.await.expect("the binding");
        });
        queue
    }

    #[track_caller]
    fn declare_jobs_with(&self, arguments: FieldTable) {
        let (exchange, queue) = (
            format!("{}.jobs", self.namespace),
            format!("{}.jobs.{MODEL}", self.namespace),
        );
        let durable = ExchangeDeclareOptions {
            durable: true,
            ..Default::default()
        };
        runtime().block_on(async {
            let channel = self.connection.create_channel().await.expect("a channel");
            let none = FieldTable::default;
            let declared = channel.exchange_declare(
                exchange.as_str().into(),
                ExchangeKind::Direct,
                durable,
                none(),
            );
            declared.await.expect("the jobs exchange");
            let declared = channel.queue_declare(
                queue.as_str().into(),
                QueueDeclareOptions::durable(),
                arguments,
            );
            declared.await.expect("the jobs queue");
            let key = MODEL.into();
            let bound = channel.queue_bind(
                queue.into(),
                exchange.into(),
                key,
                QueueBindOptions::default(),
                none(),
            );
            bound.await.expect("the binding");
            channel.close(200, "done".into()).await.ok();
        });
    }
}
