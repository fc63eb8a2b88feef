//! Running a package once before anybody serves it, as `scorer package` does: on the CPU, which
//! every machine has.

use std::sync::Arc;

use super::{Engine, EngineError, check};
use crate::config::{EngineConfig, Provider};
use crate::failure::Code;
use crate::lifecycle::Detail;
use crate::package::Package;
use crate::package::plan::Plan;
use crate::score;

/// What came of it.
#[derive(Debug, Clone, PartialEq)]
pub enum Trial {
    /// The loss on all windows.
    Ran(f64),
    /// This machine cannot say, and why; another may.
    NotTried(String),
}

/// Loads the package and measures it on all windows of the default plan.
///
/// # Errors
/// What any worker would refuse.
pub fn trial(package: Arc<Package>, config: &EngineConfig) -> Result<Trial, EngineError> {
    check(&package)?;
    let mut config = config.clone();
    config.execution_provider = Provider::Cpu;
    let mut engine = match Engine::load(Arc::clone(&package), &config, Arc::default()) {
        Ok(engine) => engine,
        // Says something of this machine, and nothing of the package.
        Err(e) if matches!(e.detail, Detail::EpUnavailable | Detail::OutOfMemory) => {
            return Ok(Trial::NotTried(e.message));
        }
        Err(error) => return Err(error),
    };
    let refused = |f: crate::failure::Failure| EngineError::new(Detail::WarmFailed, f.message);
    let plan = Plan::new(&package.shards, None, "", package.cut()).map_err(refused)?;
    match engine.validate(&plan) {
        Ok(losses) => Ok(Trial::Ran(score::mean(&losses))),
        Err(failure) if failure.code == Code::OutOfMemory => Ok(Trial::NotTried(failure.message)),
        Err(failure) => Err(refused(failure)),
    }
}
