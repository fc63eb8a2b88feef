//! Keeps a worker connected to its broker: connects, declares, listens for control messages, and starts
//! over when the link is lost. It knows nothing of models or states; the worker watches the link.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::{oneshot, watch};
use tokio_util::task::TaskTracker;

use super::orders::Request;
use super::parts::Parts;
use super::transition::Ask;
use crate::broker::amqp::{CALL_TIMEOUT, Deliveries, Delivery, Link, Publisher};
use crate::broker::nodes::Nodes;
use crate::broker::topology::Topology;
use crate::broker::{BrokerError, Outgoing, Properties};
use crate::config::Config;
use crate::protocol::control::{self, ControlAnswer, Order, Outcome};
use crate::protocol::message::V1;
use crate::protocol::state::Phase;
use crate::telemetry::status::WorkerStatus;
use crate::util::backoff::Backoff;
use crate::worker::lifecycle::{Event, Events};

/// A fleet must be back within 15 s of its broker; after the 30 s that other failures may back off for,
/// the next attempt could be too late.
const LONGEST_WAIT: Duration = Duration::from_secs(8);

/// How long a new link waits for its bindings and for its queue of control messages, once a link before it
/// had them. While a node of the cluster is frozen, RabbitMQ makes none; jobs and results need none that are
/// not there already.
const RESUME: Duration = Duration::from_secs(1);
/// How long they may take altogether: RabbitMQ finds a frozen node after up to 75 s, by default.
const STALL: Duration = Duration::from_secs(120);

/// The control messages of a link.
enum Control {
    /// Its bindings are being made.
    Coming(BoxFuture<'static, Result<Control, BrokerError>>),
    On(Box<Deliveries>),
    /// None are wanted.
    Off,
}

impl Control {
    /// Waits until the bindings are made. Cancel-safe.
    async fn arrive(&mut self) -> Result<(), BrokerError> {
        if let Self::Coming(coming) = self {
            *self = coming.await?;
        }
        Ok(())
    }

    /// The next message; `None` when no more arrive. Cancel-safe.
    async fn next(&mut self) -> Option<Delivery> {
        if let Err(error) = self.arrive().await {
            tracing::warn!(%error, "no control messages");
            return None;
        }
        match self {
            Self::On(deliveries) => deliveries.next().await,
            Self::Coming(_) | Self::Off => std::future::pending().await,
        }
    }
}

/// Makes the link, and hands it out.
pub(super) struct LinkKeeper {
    pub(super) config: Config,
    pub(super) nodes: Nodes,
    pub(super) topology: Arc<Topology>,
    pub(super) status: Arc<WorkerStatus>,
    pub(super) links: watch::Sender<Option<Arc<Link>>>,
    pub(super) parts: Parts,
    pub(super) incarnation: String,
    pub(super) phase: watch::Receiver<Phase>,
    pub(super) events: Events,
    /// Replies still being published.
    pub(super) replies: TaskTracker,
}

impl LinkKeeper {
    /// Runs until its task is aborted.
    pub(super) async fn keep(mut self) {
        let mut backoff = Backoff::between(Duration::from_secs(1), LONGEST_WAIT);
        loop {
            match self.connect().await {
                Ok((link, control)) => {
                    backoff.reset();
                    self.hold(link, control).await;
                }
                Err(error) => {
                    self.status.error("broker_disconnected", &error.to_string());
                    tracing::warn!(%error, "cannot connect to the broker yet");
                }
            }
            tokio::time::sleep(backoff.next_delay()).await;
        }
    }

    async fn connect(&mut self) -> Result<(Arc<Link>, Control), BrokerError> {
        let worker_id = self.config.worker_id();
        let link = Link::connect(&mut self.nodes, &format!("scorer-{worker_id}")).await?;
        let link = Arc::new(link);
        link.declare_unbound(&self.topology).await?;
        let again = self.status.generation.load(Ordering::Relaxed) > 0;
        let limit = if again { STALL } else { CALL_TIMEOUT };
        let mut control = self.control(&link, limit);
        let arrived = match again {
            true => tokio::time::timeout(RESUME, control.arrive()).await,
            false => Ok(control.arrive().await),
        };
        match arrived {
            Ok(arrived) => arrived?,
            Err(_) => tracing::warn!(
                node = %link.node,
                "RabbitMQ does not confirm bindings yet, as while a node of the cluster is frozen: those that were made \
                 before are relied on, and control messages are missed meanwhile"
            ),
        }
        Ok((link, control))
    }

    /// Makes the bindings, then subscribes to control messages.
    fn control(&self, link: &Arc<Link>, limit: Duration) -> Control {
        let (link, topology) = (Arc::clone(link), Arc::clone(&self.topology));
        let keys = [
            "all".to_owned(),
            format!("worker.{}", self.config.worker_id()),
        ];
        let wanted = self.config.amqp.control;
        Control::Coming(Box::pin(async move {
            link.bind(&topology, limit).await?;
            if !wanted {
                return Ok(Control::Off);
            }
            let exchange = topology.control_exchange();
            let (_, deliveries) = link.subscribe_within(limit, &exchange, &keys).await?;
            Ok(Control::On(Box::new(deliveries)))
        }))
    }

    /// Hands out the link until it is lost, and takes control messages.
    async fn hold(&self, link: Arc<Link>, mut control: Control) {
        self.status.generation.fetch_add(1, Ordering::Relaxed);
        self.status.facts().node = Some(link.node.clone());
        self.status.connected.store(true, Ordering::Relaxed);
        tracing::info!(node = %link.node, "connected to RabbitMQ");
        self.status.holds_back(Arc::clone(&link.blocked));
        let (lost, publisher) = (link.lost.clone(), link.jobs.clone());
        self.links.send_replace(Some(link));
        loop {
            tokio::select! {
                () = lost.cancelled() => break,
                delivery = control.next() => match delivery {
                    Some(delivery) => self.forward(&delivery, &publisher).await,
                    // No control messages arrive any more: only a new link fixes that.
                    None => lost.cancel(),
                },
            }
        }
        self.status.connected.store(false, Ordering::Relaxed);
        self.status.facts().node = None;
        // A lost link holds nothing back.
        self.status.holds_back(Arc::default());
        self.links.send_replace(None);
    }

    async fn forward(&self, delivery: &Delivery, publisher: &Publisher) {
        let message = match control::decode(&delivery.body, delivery.properties.label()) {
            Ok(message) => message,
            Err(error) => return tracing::warn!(%error, "a control message was refused"),
        };
        let ours = self.config.worker_id();
        if message.worker_id.is_some_and(|id| id != ours) {
            return;
        }
        let command = message.command;
        tracing::info!(command = command.as_str(), "received a control message");
        if command == control::Command::Drain {
            self.parts.watchdog.arm();
        }
        let (order, answered) = Order::new(command);
        self.reply_later(command, answered, &delivery.properties, publisher);
        let request = Request {
            ask: Ask::Command(command),
            order: Some(order),
        };
        if self.parts.requests.send(request).await.is_err() {
            tracing::debug!("the worker has ended already");
        }
    }

    /// Waits for the outcome of a command, in a task, then writes it into the event stream and replies to
    /// the sender.
    fn reply_later(
        &self,
        command: control::Command,
        answered: oneshot::Receiver<(Outcome, String)>,
        asked: &Properties,
        publisher: &Publisher,
    ) {
        let (worker_id, incarnation) = (self.config.worker_id(), self.incarnation.clone());
        let model = self.topology.model.clone();
        let (phase, events) = (self.phase.clone(), self.events.clone());
        let (asked, publisher) = (asked.clone(), publisher.clone());
        self.replies.spawn(async move {
            let (outcome, message) = answered.await.unwrap_or_else(|_| {
                let lost = "the worker ended before it was done";
                (Outcome::Failed, lost.into())
            });
            let sent = events.send(Event::Answered {
                command,
                outcome,
                message: message.clone(),
                phase: *phase.borrow(),
            });
            if sent.is_err() {
                tracing::debug!("no one writes events any more");
            }
            let answer = ControlAnswer {
                v: V1,
                command,
                worker_id,
                incarnation,
                model,
                outcome,
                message,
            };
            if let Err(error) = reply(&answer, asked, &publisher).await {
                tracing::warn!(%error, "the reply to a control message was not published");
            }
        });
    }
}

/// Replies if the sender wants that, in the encoding of the request.
async fn reply(
    answer: &ControlAnswer,
    asked: Properties,
    publisher: &Publisher,
) -> anyhow::Result<()> {
    let Some(queue) = asked.reply_to.as_deref().filter(|queue| !queue.is_empty()) else {
        return Ok(());
    };
    let encoding = asked.encoding();
    let outgoing = Outgoing {
        exchange: String::new(),
        routing_key: queue.to_owned(),
        body: encoding.encode(answer).map_err(anyhow::Error::msg)?,
        properties: Properties {
            content_type: Some(encoding.content_type().into()),
            correlation_id: asked.correlation_id.clone(),
            headers: asked.trace_headers(),
            attempt: 1,
            ..Properties::default()
        },
        mandatory: false,
    };
    Ok(publisher.publish(outgoing).await?)
}
