//! Keeps a worker linked to its broker: connect, declare, listen for control messages, and again
//! when the link is lost. It knows nothing of models or states; whoever serves watches the link.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::Request;
use super::watchdog::Watchdog;
use crate::broker::BrokerError;
use crate::broker::amqp::{Deliveries, Delivery, Link};
use crate::broker::topology::Topology;
use crate::config::Config;
use crate::control;
use crate::heartbeat::Vitals;
use crate::retry::Backoff;

/// A fleet is to be back within 15 s of its broker: with the 30 s that other failures may wait for,
/// the next try could come too late for that.
const LONGEST_WAIT: Duration = Duration::from_secs(8);

/// What it takes to make a link, and who is told of it.
pub(super) struct Keeper {
    pub(super) config: Config,
    pub(super) topology: Arc<Topology>,
    pub(super) vitals: Arc<Vitals>,
    pub(super) links: watch::Sender<Option<Arc<Link>>>,
    pub(super) requests: mpsc::Sender<Request>,
    pub(super) watchdog: Watchdog,
}

impl Keeper {
    /// Runs until its task is aborted.
    pub(super) async fn keep(self) {
        let mut backoff = Backoff::between(Duration::from_secs(1), LONGEST_WAIT);
        loop {
            match self.connect().await {
                Ok((link, control)) => {
                    backoff.reset();
                    self.hold(link, control).await;
                }
                Err(error) => {
                    self.vitals.error("broker_disconnected", &error.to_string());
                    tracing::warn!(%error, "no link to the broker yet");
                }
            }
            tokio::time::sleep(backoff.wait()).await;
        }
    }

    async fn connect(&self) -> Result<(Link, Option<Deliveries>), BrokerError> {
        let worker_id = self.config.worker_id();
        let link = Link::connect(&self.config.amqp, &format!("scorer-{worker_id}")).await?;
        link.declare(&self.topology).await?;
        if !self.config.amqp.control {
            return Ok((link, None));
        }
        let keys = ["all".to_owned(), format!("worker.{worker_id}")];
        let exchange = self.topology.control_exchange();
        let (_, control) = link.subscribe(&exchange, &keys).await?;
        Ok((link, Some(control)))
    }

    /// Offers the link until it is lost.
    async fn hold(&self, link: Link, mut control: Option<Deliveries>) {
        self.vitals.generation.fetch_add(1, Ordering::Relaxed);
        self.vitals.connected.store(true, Ordering::Relaxed);
        if let Ok(mut blocked) = self.vitals.blocked.lock() {
            *blocked = Arc::clone(&link.blocked);
        }
        let lost = link.lost.clone();
        self.links.send_replace(Some(Arc::new(link)));
        loop {
            let heard = async {
                match &mut control {
                    Some(control) => control.next().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = lost.cancelled() => break,
                delivery = heard => match delivery {
                    Some(delivery) => self.forward(&delivery).await,
                    // Deaf to control messages: only a new link mends that.
                    None => lost.cancel(),
                },
            }
        }
        self.vitals.connected.store(false, Ordering::Relaxed);
        self.links.send_replace(None);
    }

    async fn forward(&self, delivery: &Delivery) {
        let message = match control::decode(&delivery.body, delivery.properties.encoding()) {
            Ok(message) => message,
            Err(error) => return tracing::warn!(%error, "a control message is refused"),
        };
        let ours = self.config.worker_id();
        if message.worker_id.is_some_and(|id| id != ours) {
            return;
        }
        let command = message.command;
        tracing::info!(command = command.as_str(), "asked by a control message");
        if command == control::Command::Drain {
            self.watchdog.arm();
        }
        if self.requests.send(Request::Command(command)).await.is_err() {
            tracing::debug!("the worker has ended already");
        }
    }
}
