//! `scorer manifest`: writes and checks the manifest by which workers follow a model's versions.

mod add;
mod check;
mod entry;
mod published;

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{Fault, Outcome};
use crate::config::Config;
use crate::model::package::Package;
use add::{AddArgs, LiveArgs};
use check::CheckArgs;

#[derive(Debug, Args)]
pub(super) struct ManifestArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Adds a file to the manifest, once a worker with the package could use it.
    Add(Box<AddArgs>),
    /// Names the version that workers are to serve: an older one is a way back.
    Live(LiveArgs),
    /// Fetches the manifest and every file from each of its mirrors, and goes the way of a worker that has nothing but
    /// the package: digests, sizes, names, shapes, the signature, and the loss of the live version on the CPU.
    Check(CheckArgs),
}

pub(super) async fn manifest(config: Config, args: ManifestArgs) -> Outcome {
    match args.action {
        Action::Add(args) => blocking(move || add::add(&config, *args)).await,
        Action::Live(args) => blocking(move || add::live(&config, &args)).await,
        Action::Check(args) => check::check(&config, args).await,
    }
}

async fn blocking(work: impl FnOnce() -> Outcome + Send + 'static) -> Outcome {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(Fault::internal)?
}

/// The package that versions are for: of the argument, else of the configuration.
fn package(config: &Config, model: Option<PathBuf>) -> Result<Package, Fault> {
    let configured = config.model.dir.clone().map(|dir| ("model.dir", dir));
    let named = model.map(|dir| ("--model", dir)).or(configured);
    let missing = || Fault::usage("--model: missing, and model.dir is not set");
    let (name, dir) = named.ok_or_else(missing)?;
    let loaded = Package::load(&dir, config.model.allow_shards_subset, &[]);
    loaded.map_err(|e| Fault::data(format!("{name}: {e}")))
}
