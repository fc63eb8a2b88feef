//! Runs a package on the CPU before any worker serves it, as `scorer package` does.

use std::sync::Arc;

use super::{Engine, EngineError, check};
use crate::config::{EngineConfig, Provider};
use crate::engine::statistics;
use crate::model;
use crate::model::build::{Built, Recipe, Unfinished};
use crate::model::manifest::PackageError;
use crate::model::package::Package;
use crate::model::plan::Plan;
use crate::protocol::state::Detail;

/// Builds a package that passes the static checks of every worker; it runs no model.
///
/// # Errors
/// Names the file, tensor or initializer and what to do.
pub fn build(recipe: &Recipe) -> Result<Built, PackageError> {
    model::build::build(recipe, &Unfinished::default(), |package| {
        check(&package).map_err(|e| PackageError(e.to_string()))?;
        Ok(Vec::new())
    })
}

/// The outcome of a trial.
#[derive(Debug, Clone, PartialEq)]
pub enum Trial {
    /// The loss on all windows.
    Ran(f64),
    /// This machine cannot run it, and why; another may.
    NotTried(String),
}

/// Loads the package and measures it twice on all windows of the default plan.
///
/// # Errors
/// What any worker would refuse.
pub fn trial(package: Arc<Package>, config: &EngineConfig) -> Result<Trial, EngineError> {
    check(&package)?;
    let mut config = config.clone();
    config.execution_provider = Provider::Cpu;
    match run(package, &config) {
        Ok(loss) => Ok(Trial::Ran(loss)),
        // A limit of this machine, not a fault of the package.
        Err(e) if matches!(e.detail, Detail::EpUnavailable | Detail::OutOfMemory) => {
            Ok(Trial::NotTried(e.message))
        }
        Err(error) => Err(error),
    }
}

fn run(package: Arc<Package>, config: &EngineConfig) -> Result<f64, EngineError> {
    let mut engine = Engine::load(Arc::clone(&package), config, Arc::default())?;
    let plan = Plan::new(&package.shards, None, "", package.cut())
        .map_err(|failure| EngineError::new(Detail::WarmFailed, failure.message))?;
    let (losses, _) = engine.measured_twice(&plan)?;
    Ok(statistics::mean(&losses))
}
