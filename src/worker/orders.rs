//! What a worker makes of what it is asked: at once, after the next warm-up, or not at all; and who
//! is told.

use std::time::Duration;

use tokio::sync::mpsc;

use super::{Leaving, Request, Step, Stop, Worker};
use crate::model::package::Package;
use crate::protocol::control::{Command, Order};
use crate::protocol::state::{Detail, State};

/// What the last answers get to leave.
const LAST_ANSWERS: Duration = Duration::from_millis(500);

impl Worker {
    /// What a request means for a worker that takes jobs or waits. `None` = it goes on as before.
    pub(super) fn heed(&mut self, request: Option<Request>) -> Option<Leaving> {
        match request {
            None | Some(Request::Signal) => Some(Leaving::drain(Detail::DrainSignal)),
            Some(Request::Command(order)) => self.obey(order),
            Some(Request::Lost(part)) => {
                let message = "has ended although the worker has not; see the log for why";
                tracing::error!(part = part.as_str(), "{message}");
                let said = format!("{}: {message}", part.as_str());
                self.status.error(&Detail::PartLost.to_string(), &said);
                let then = Step::Stop(Stop::PartLost(part));
                Some(Leaving::to(State::Draining, Detail::PartLost, then))
            }
            Some(Request::Reload(order)) => {
                let leaving = Leaving::to(State::Reloading, Detail::ReloadRequest, Step::Reload);
                Some(leaving.answering(order))
            }
        }
    }

    fn obey(&mut self, order: Order) -> Option<Leaving> {
        match order.command {
            Command::Drain => {
                order.done("draining: what can be done in time is answered, the rest handed back");
                Some(Leaving::drain(Detail::DrainControl))
            }
            Command::Pause => {
                self.paused = true;
                Some(Leaving::degraded(Detail::Paused, Step::Again).answering(order))
            }
            Command::Resume => {
                let was = std::mem::replace(&mut self.paused, false);
                order.done(if was {
                    "no longer paused"
                } else {
                    "was not paused"
                });
                None
            }
            Command::Rewarm => {
                let leaving = Leaving::to(State::Warming, Detail::Rewarm, Step::Rewarm);
                Some(leaving.answering(order))
            }
            Command::Reload => {
                self.verify(order);
                None
            }
            Command::Update => {
                self.look_now(order);
                None
            }
        }
    }

    fn look_now(&self, order: Order) {
        let Some(follower) = &self.follower else {
            return order.refuse("model.update_url is not set: there is nothing to follow");
        };
        match follower.orders.try_send(order) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(order)) => {
                order.refuse("too many have asked; it looks soon")
            }
            Err(mpsc::error::TrySendError::Closed(order)) => {
                order.fail("nobody follows updates any more; see the worker's log")
            }
        }
    }

    /// Reads the package while the worker goes on. Only a sound one is worth leaving the queue for.
    fn verify(&self, order: Order) {
        let (dir, subset) = (self.dir.clone(), self.config.model.allow_shards_subset);
        let (ours, asking) = (self.topology.model.clone(), self.asking.clone());
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
                    if asking.send(Request::Reload(order)).await.is_err() {
                        tracing::debug!("the worker has ended already");
                    }
                }
                Ok(Err(error)) => order.refuse(error.to_string()),
                Err(error) => order.fail(error.to_string()),
            }
        });
    }

    /// While a model is loaded or proven only a drain ends that.
    pub(super) fn heed_while_warming(&mut self, request: Option<Request>) -> Option<Leaving> {
        let mut leaving = self.heed(request)?;
        match (&leaving.then, leaving.order.take()) {
            (Step::Stop(_), _) => return Some(leaving),
            (Step::Reload, Some(order)) => {
                order.refuse("the worker is warming up; ask again when that is over");
            }
            (_, order) => {
                leaving.order = order;
                self.take_note(&mut leaving);
            }
        }
        None
    }

    /// Answers who asked for it, now or after the warm-up that it leads to.
    pub(super) fn take_note(&mut self, leaving: &mut Leaving) {
        match (leaving.order.take(), &leaving.then) {
            (Some(order), Step::Rewarm | Step::Reload) => self.due.push(order),
            (Some(order), _) => order.done("paused: no jobs are taken"),
            (None, _) => {}
        }
    }

    /// Nothing that was asked for will be done any more; says so while there is a link.
    pub(super) async fn dismiss(&mut self) {
        self.due.clear();
        self.requests.close();
        while self.requests.try_recv().is_ok() {}
        self.answers.close();
        if tokio::time::timeout(LAST_ANSWERS, self.answers.wait())
            .await
            .is_err()
        {
            tracing::debug!("some who asked get no answer");
        }
    }
}

impl Leaving {
    fn answering(self, order: Order) -> Self {
        Self {
            order: Some(order),
            ..self
        }
    }
}
