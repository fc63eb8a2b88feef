//! Requests: who may make them, what happens at once, and who answers them.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::parts::{Part, Parts};
use super::run::Worker;
use super::transition::{Activity, Ask, Next, PAUSED, Reply, Transition, respond};
use crate::model::package::Package;
use crate::protocol::control::Order;
use crate::protocol::state::Detail;

/// How long a worker that ends waits for the last replies to be published.
const LAST_REPLIES: Duration = Duration::from_millis(500);

/// What the operator of the process wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Drain.
    Drain,
    /// End the drain now: hand back what can be handed back.
    EndNow,
}

/// What the worker is asked, and the order to answer, if it was an order.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) ask: Ask,
    pub(super) order: Option<Order>,
}

impl From<Ask> for Request {
    fn from(ask: Ask) -> Self {
        Self { ask, order: None }
    }
}

/// Forwards the operator's wishes to the worker, until no more can come.
pub(super) async fn forward(
    mut wishes: mpsc::Receiver<Wish>,
    parts: Parts,
    hurry: CancellationToken,
) {
    let Parts { requests, watchdog } = parts;
    while let Some(wish) = wishes.recv().await {
        match wish {
            Wish::Drain => {
                watchdog.arm();
                let requests = requests.clone();
                // In a task of its own: a draining worker takes no more requests, and this loop must
                // still hear the next wish.
                tokio::spawn(async move {
                    if requests.send(Ask::Signal.into()).await.is_err() {
                        tracing::debug!("the worker has ended already");
                    }
                });
            }
            Wish::EndNow => {
                watchdog.hurry();
                hurry.cancel();
            }
        }
    }
}

impl Worker {
    /// Takes a request, and answers it where that is possible at once. Absent = carry on.
    pub(super) fn on_request(
        &mut self,
        activity: Activity,
        request: Option<Request>,
    ) -> Option<Transition> {
        let Request { ask, order } = request.unwrap_or_else(|| Ask::Signal.into());
        if let Ask::PartLost(part) = ask {
            self.report_lost(part);
        }
        let response = respond(activity, self.paused, ask);
        self.paused = response.paused;
        if let Some(order) = order {
            self.defer_reply(response.reply, order);
        }
        if response.transition.is_none() {
            self.confirm_pauses();
        }
        response.transition
    }

    /// Performs a transition, up to what follows it.
    pub(super) fn enter(&mut self, transition: Transition) -> Next {
        if let Some((state, detail)) = transition.to {
            self.lifecycle.advance(state, detail);
        }
        self.confirm_pauses();
        transition.next
    }

    fn report_lost(&self, part: Part) {
        let message = "ended although the worker had not; the log says why";
        tracing::error!(part = part.as_str(), "{message}");
        let message = format!("{}: {message}", part.as_str());
        self.status.error(&Detail::PartLost.to_string(), &message);
    }

    fn defer_reply(&mut self, reply: Reply, order: Order) {
        match reply {
            Reply::Nobody => {}
            Reply::Done(message) => order.done(message),
            Reply::Refused(message) => order.refuse(message),
            Reply::AfterTransition => self.pausing.push(order),
            Reply::AfterWarmUp => self.due.push(order),
            Reply::PackageCheck => self.check_package(order),
            Reply::Updater => match &self.updates {
                Some(updates) => updates.look_now(order),
                None => order.refuse("model.update_url is not set: there is nothing to follow"),
            },
        }
    }

    fn confirm_pauses(&mut self) {
        for order in self.pausing.drain(..) {
            order.done(PAUSED);
        }
    }

    /// Reads the package while the worker carries on: only a sound one is worth leaving the queue
    /// for.
    fn check_package(&self, order: Order) {
        let (dir, subset) = (self.dir.clone(), self.config.model.allow_shards_subset);
        let (ours, requests) = (self.topology.model.clone(), self.own_requests.clone());
        tokio::spawn(async move {
            let read = tokio::task::spawn_blocking(move || Package::load(&dir, subset, &[]));
            match read.await {
                Ok(Ok(package)) if package.manifest.name != ours => {
                    let name = &package.manifest.name;
                    order.refuse(format!(
                        "the package is of model {name:?}, this worker serves {ours:?}"
                    ));
                }
                Ok(Ok(_)) => {
                    let (ask, order) = (Ask::Reload, Some(order));
                    if requests.send(Request { ask, order }).await.is_err() {
                        tracing::debug!("the worker has ended already");
                    }
                }
                Ok(Err(error)) => order.refuse(error.to_string()),
                Err(error) => order.fail(error.to_string()),
            }
        });
    }

    /// Drops every open request, which answers it with a failure, and waits for the replies while
    /// the link lasts.
    pub(super) async fn close_requests(&mut self) {
        self.due.clear();
        self.pausing.clear();
        self.requests.close();
        while self.requests.try_recv().is_ok() {}
        self.replies.close();
        if tokio::time::timeout(LAST_REPLIES, self.replies.wait())
            .await
            .is_err()
        {
            tracing::debug!("some requests get no reply");
        }
    }
}
