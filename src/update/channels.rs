//! What connects a worker with its updater, which runs in a task of its own.

use std::sync::Arc;

use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::Served;
use super::state::StateDir;
use crate::engine::EngineError;
use crate::model::package::{Package, WeightsFile};
use crate::protocol::control::Order;

/// Orders that wait for a look; more are refused.
const ORDERS: usize = 16;

/// New weights, checked and on the disk, to be served in place of the old ones.
#[derive(Debug)]
pub struct PreparedUpdate {
    /// The package with the new weights.
    pub package: Arc<Package>,
    /// Where they are; none for the package's own.
    pub weights: Option<WeightsFile>,
    /// Of the manifest that names them: a version that was refused is tried again when it changes.
    pub manifest_sha256: String,
    /// Whether they proved themselves.
    pub outcome: oneshot::Sender<Result<(), EngineError>>,
}

/// The worker's end.
#[derive(Debug)]
pub struct UpdaterHandle {
    offers: mpsc::Receiver<PreparedUpdate>,
    served: watch::Sender<Option<Served>>,
    orders: mpsc::Sender<Order>,
    newer: Arc<Notify>,
}

/// The updater's end.
#[derive(Debug)]
pub(super) struct WorkerHandle {
    offers: mpsc::Sender<PreparedUpdate>,
    /// What the worker serves, once it does.
    pub(super) served: watch::Receiver<Option<Served>>,
    /// Orders to look now.
    pub(super) orders: mpsc::Receiver<Order>,
    /// Notified of jobs for a newer version.
    pub(super) newer: Arc<Notify>,
}

pub(super) fn channels() -> (UpdaterHandle, WorkerHandle) {
    let (offering, offers) = mpsc::channel(1);
    let (serving, served) = watch::channel(None);
    let (ordering, orders) = mpsc::channel(ORDERS);
    let newer = Arc::new(Notify::new());
    let updater = UpdaterHandle {
        offers,
        served: serving,
        orders: ordering,
        newer: Arc::clone(&newer),
    };
    let worker = WorkerHandle {
        offers: offering,
        served,
        orders,
        newer,
    };
    (updater, worker)
}

impl UpdaterHandle {
    /// The next new weights; none if the updater is gone.
    pub async fn offered(&mut self) -> Option<PreparedUpdate> {
        self.offers.recv().await
    }

    /// Tells the updater what is served, and where newer weights are kept.
    pub fn now_serving(&self, package: &Arc<Package>, state: &Arc<StateDir>) {
        self.served.send_replace(Some(Served {
            package: Arc::clone(package),
            state: Arc::clone(state),
        }));
    }

    /// Passes on an order to look for a new version now; the updater answers it.
    pub fn look_now(&self, order: Order) {
        match self.orders.try_send(order) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(order)) => {
                order.refuse("too many updates were asked for; the next look comes soon")
            }
            Err(mpsc::error::TrySendError::Closed(order)) => {
                order.fail("the updater has ended; see the worker's log")
            }
        }
    }

    /// To be notified of jobs for a newer version.
    pub fn newer(&self) -> Arc<Notify> {
        Arc::clone(&self.newer)
    }
}

impl WorkerHandle {
    /// Offers new weights, and waits until the worker has tried them. None if it did not.
    pub(super) async fn offer(
        &self,
        package: Arc<Package>,
        weights: Option<WeightsFile>,
        manifest_sha256: String,
    ) -> Option<Result<(), EngineError>> {
        let (outcome, tried) = oneshot::channel();
        let update = PreparedUpdate {
            package,
            weights,
            manifest_sha256,
            outcome,
        };
        self.offers.send(update).await.ok()?;
        tried.await.ok()
    }
}
