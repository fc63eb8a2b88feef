//! Declares the jobs queue ahead of any worker, rightly or wrongly.

use lapin::ExchangeKind;
use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};

use super::aggregator::{Aggregator, runtime};
use super::package::MODEL;

impl Aggregator {
    /// Declares the jobs exchange and queue as contract 3 has them, for tests that come before any worker.
    #[track_caller]
    pub(crate) fn declare_jobs(&self) {
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
    pub(crate) fn declare_plain_jobs(&self) {
        self.declare_jobs_with(FieldTable::default());
    }

    /// Declares the queue of parked jobs as an operator might: with room for so many and no more.
    #[track_caller]
    pub(crate) fn declare_full_dead(&self, jobs: i32) {
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
