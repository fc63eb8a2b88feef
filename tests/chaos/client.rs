//! A connection to RabbitMQ that is made again whenever it breaks: how a patient aggregator submits.

use std::time::{Duration, Instant};

use lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, ErrorKind};
use testkit::aggregator::runtime;
use testkit::package::MODEL;
use testkit::wait::secs;

/// Anything but a confirm.
const CALL: Duration = secs(5);
/// A publisher that is blocked waits this long before it takes the connection for dead.
const CONFIRM: Duration = secs(15);
/// Between two tries.
const AGAIN: Duration = Duration::from_millis(200);

/// The broker gives no answer.
#[derive(Debug)]
pub(crate) struct Away;

/// Messages that wait in a queue, and its consumers; none where there is no such queue.
pub(crate) type Depth = Option<(u32, u32)>;

pub(crate) struct Client {
    url: String,
    namespace: String,
    open: Option<(Connection, Channel)>,
}

impl Client {
    pub(crate) fn new(url: &str, namespace: &str) -> Self {
        Self {
            url: patient(url),
            namespace: namespace.to_owned(),
            open: None,
        }
    }

    /// Publishes a job until the broker has confirmed it; false = not within this time.
    pub(crate) fn submit(&mut self, id: &str, body: &[u8], limit: Duration) -> bool {
        let until = Instant::now() + limit;
        while Instant::now() < until {
            if self.try_submit(id, body) {
                return true;
            }
            std::thread::sleep(AGAIN);
        }
        false
    }

    /// One try; false = not confirmed, which says nothing of where the job is.
    fn try_submit(&mut self, id: &str, body: &[u8]) -> bool {
        let exchange = format!("{}.jobs", self.namespace);
        let Ok((_, channel)) = self.open() else {
            return false;
        };
        let properties = BasicProperties::default()
            .with_content_type("application/msgpack".into())
            .with_message_id(id.into())
            .with_delivery_mode(2);
        let options = BasicPublishOptions {
            // Without its queue a job is returned, and that is no submission.
            mandatory: true,
            ..Default::default()
        };
        let confirmed = runtime().block_on(async {
            let publishing = channel.basic_publish(
                exchange.as_str().into(),
                MODEL.into(),
                options,
                body,
                properties,
            );
            let sent = tokio::time::timeout(CONFIRM, publishing).await.ok()?.ok()?;
            tokio::time::timeout(CONFIRM, sent).await.ok()?.ok()
        });
        if confirmed.is_none() {
            self.drop_connection();
        }
        matches!(confirmed, Some(Confirmation::Ack(None)))
    }

    /// Looks at a queue without declaring it.
    pub(crate) fn depth(&mut self, queue: &str) -> Result<Depth, Away> {
        let (connection, _) = self.open()?;
        let asked = runtime().block_on(async {
            let channel = bounded(connection.create_channel()).await?;
            let passive = QueueDeclareOptions {
                passive: true,
                ..Default::default()
            };
            let declaring = channel.queue_declare(queue.into(), passive, FieldTable::default());
            let Ok(declared) = tokio::time::timeout(CALL, declaring).await else {
                return Err(Away);
            };
            match declared {
                Ok(found) => {
                    channel.close(200, "done".into()).await.ok();
                    Ok(Some((found.message_count(), found.consumer_count())))
                }
                Err(error) if is_missing(&error) => Ok(None),
                Err(_) => Err(Away),
            }
        });
        if asked.is_err() {
            self.drop_connection();
        }
        asked
    }

    /// Deletes a queue with all that is in it; one that is not there counts as deleted.
    pub(crate) fn delete(&mut self, queue: &str) -> Result<(), Away> {
        let (connection, _) = self.open()?;
        let deleted = runtime().block_on(async {
            let channel = bounded(connection.create_channel()).await?;
            bounded(channel.queue_delete(queue.into(), QueueDeleteOptions::default())).await?;
            channel.close(200, "done".into()).await.ok();
            Ok(())
        });
        if deleted.is_err() {
            self.drop_connection();
        }
        deleted
    }

    fn open(&mut self) -> Result<&(Connection, Channel), Away> {
        if self.open.is_none() {
            self.open = Some(runtime().block_on(async {
                let connection = connect(&self.url).await?;
                let channel = bounded(connection.create_channel()).await?;
                bounded(channel.confirm_select(ConfirmSelectOptions::default())).await?;
                Ok((connection, channel))
            })?);
        }
        self.open.as_ref().ok_or(Away)
    }

    fn drop_connection(&mut self) {
        if let Some((connection, _)) = self.open.take() {
            runtime().spawn(async move {
                tokio::time::timeout(CALL, connection.close(200, "done".into()))
                    .await
                    .ok();
            });
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.drop_connection();
    }
}

/// The URL with a heartbeat that notices a broker which is frozen.
pub(crate) fn patient(url: &str) -> String {
    format!("{url}?heartbeat=5")
}

/// Connects, or gives up.
pub(crate) async fn connect(url: &str) -> Result<Connection, Away> {
    bounded(Connection::connect(url, ConnectionProperties::default())).await
}

/// An answer in time.
pub(crate) async fn bounded<T>(call: impl Future<Output = lapin::Result<T>>) -> Result<T, Away> {
    let answer = tokio::time::timeout(CALL, call).await;
    answer.map_err(|_| Away)?.map_err(|_| Away)
}

fn is_missing(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(refusal)
        if *refusal.kind() == AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND))
}
