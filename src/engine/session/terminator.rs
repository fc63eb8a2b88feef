//! Ending a run, or the compilation before it, from another thread.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ort::session::builder::LoadCanceler;
use ort::session::{NoSelectedOutputs, RunOptions};

use super::SessionError;

/// Ends the runs of one command from another thread. It stays in force: runs that begin later end too,
/// so a call between two runs is not lost.
#[derive(Clone, Default)]
pub struct Terminator(Arc<Mutex<Runs>>);

#[derive(Default)]
struct Runs {
    ended: bool,
    current: Option<Current>,
}

/// What the computing thread is in.
enum Current {
    Run(Arc<RunOptions<NoSelectedOutputs>>),
    Compilation(LoadCanceler),
}

impl Current {
    fn end(&self) -> ort::Result<()> {
        match self {
            Self::Run(options) => options.terminate(),
            Self::Compilation(canceler) => canceler.cancel(),
        }
    }
}

impl std::fmt::Debug for Terminator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Terminator")
    }
}

impl Terminator {
    /// Ends the current run at its next node, and every later run.
    pub fn terminate(&self) {
        let mut runs = self.runs();
        runs.ended = true;
        let told = runs.current.as_ref().map(Current::end);
        if let Some(Err(error)) = told {
            tracing::warn!(%error, "the run could not be terminated");
        }
    }

    /// Whether no run may begin any more.
    pub fn is_terminated(&self) -> bool {
        self.runs().ended
    }

    pub(super) fn begin(&self) -> Result<Arc<RunOptions<NoSelectedOutputs>>, SessionError> {
        let options = Arc::new(RunOptions::new()?);
        self.enter(Current::Run(Arc::clone(&options)))?;
        Ok(options)
    }

    pub(super) fn begin_compilation(&self, canceler: LoadCanceler) -> Result<(), SessionError> {
        self.enter(Current::Compilation(canceler))
    }

    fn enter(&self, current: Current) -> Result<(), SessionError> {
        let mut runs = self.runs();
        if runs.ended {
            return Err(SessionError::Terminated);
        }
        runs.current = Some(current);
        Ok(())
    }

    pub(super) fn end(&self) {
        self.runs().current = None;
    }

    fn runs(&self) -> MutexGuard<'_, Runs> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
