//! Following a model: a worker that serves one version gets the next. Beside the worker, which goes on
//! serving, the [`Updater`] reads the manifest that training publishes, finds the route from the
//! weights that are here to the live ones ([`route`]), downloads its files ([`download`]), and makes
//! the new weights of them ([`prepare`], [`build`]) in the worker's own folder ([`state`]). Then it
//! offers them to the worker, when it holds the fleet's [`rollout_lease`]. Nothing here touches the
//! engine.

pub mod build;
mod channels;
pub mod download;
pub mod inspection;
mod known_manifest;
mod outcome;
mod prepare;
mod rollout_lease;
pub mod route;
pub mod state;
mod updater;

pub use channels::{PreparedUpdate, UpdaterHandle};
pub use updater::Updater;

use std::sync::Arc;

use crate::model::package::Package;
use state::StateDir;

/// What the worker serves, and where it keeps newer weights.
#[derive(Debug, Clone)]
struct Served {
    package: Arc<Package>,
    state: Arc<StateDir>,
}
