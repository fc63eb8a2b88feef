//! Reads a queue for as long as it lives, over every loss of the broker and of the queue itself.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use testkit::aggregator::runtime;
use testkit::message::Message;
use tokio::task::JoinHandle;

use crate::client::{Away, bounded, connect, patient};

/// Between two tries.
const AGAIN: Duration = Duration::from_millis(500);
const UNACKNOWLEDGED: u16 = 100;

/// Called with each message, and whether the broker has delivered it before.
type Take = dyn Fn(&Message, bool) + Send + Sync;

/// A reader of one queue.
pub(crate) struct Inbox(JoinHandle<()>);

impl Inbox {
    pub(crate) fn open(url: &str, queue: String, take: Arc<Take>) -> Self {
        let url = patient(url);
        Self(runtime().spawn(async move {
            loop {
                read(&url, &queue, &take).await.ok();
                tokio::time::sleep(AGAIN).await;
            }
        }))
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Reads until something breaks. A message is acknowledged once it is taken, so none is lost with
/// a connection; it may come again.
async fn read(url: &str, queue: &str, take: &Arc<Take>) -> Result<(), Away> {
    let connection = connect(url).await?;
    let channel = bounded(connection.create_channel()).await?;
    bounded(channel.basic_qos(UNACKNOWLEDGED, BasicQosOptions::default())).await?;
    let options = BasicConsumeOptions::default();
    let consuming = channel.basic_consume(queue.into(), "".into(), options, FieldTable::default());
    let Ok(mut consumer) = bounded(consuming).await else {
        connection.close(200, "done".into()).await.ok();
        return Err(Away);
    };
    while let Some(Ok(delivery)) = consumer.next().await {
        take(&Message::new(&delivery), delivery.redelivered);
        bounded(delivery.ack(BasicAckOptions::default())).await?;
    }
    bounded(connection.close(200, "done".into())).await
}
