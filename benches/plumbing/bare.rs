//! The least a worker on this queue can do: consume, publish something the size of a result with a confirm, acknowledge.

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Confirmation, Connection, ConnectionProperties};
use testkit::package::MODEL;

/// Bytes of a result of the bench's jobs.
const RESULT: usize = 900;

/// Runs until it is killed; `window` messages may wait for their confirm.
pub(crate) fn run(url: &str, namespace: &str, prefetch: &str, window: &str) {
    let prefetch = prefetch.parse().expect("a number");
    let window = window.parse().expect("a number");
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let threads = builder.worker_threads(2).enable_all().build();
    threads
        .expect("a runtime")
        .block_on(work(url, namespace, prefetch, window));
}

async fn work(url: &str, namespace: &str, prefetch: u16, window: usize) {
    let connection = Connection::connect(url, ConnectionProperties::default());
    let connection = connection.await.expect("a connection");
    let channel = connection.create_channel().await.expect("a channel");
    let publishing = connection.create_channel().await.expect("a channel");
    let confirms = publishing.confirm_select(ConfirmSelectOptions::default());
    confirms.await.expect("confirms");
    let qos = channel.basic_qos(prefetch, BasicQosOptions::default());
    qos.await.expect("a prefetch");
    let mut consumer = channel
        .basic_consume(
            format!("{namespace}.jobs.{MODEL}").into(),
            "bare".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await
        .expect("a consumer");
    let (exchange, key) = (format!("{namespace}.results"), format!("{MODEL}.scored"));
    let body = vec![b'x'; RESULT];
    let mut settling = FuturesUnordered::new();
    loop {
        tokio::select! {
            Some(()) = settling.next(), if !settling.is_empty() => {}
            delivery = consumer.next(), if settling.len() < window => {
                let delivery = delivery.expect("a live consumer").expect("a delivery");
                let sent = publishing.basic_publish(
                    exchange.as_str().into(),
                    key.as_str().into(),
                    BasicPublishOptions { mandatory: true, ..Default::default() },
                    &body,
                    BasicProperties::default().with_delivery_mode(2),
                );
                let confirm = sent.await.expect("publishing");
                settling.push(async move {
                    let confirmation = confirm.await.expect("a confirm");
                    assert!(matches!(confirmation, Confirmation::Ack(None)), "{confirmation:?}");
                    delivery.ack(BasicAckOptions::default()).await.expect("acknowledging");
                });
            }
        }
    }
}
