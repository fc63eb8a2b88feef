//! Building a session on the configured execution provider, and no other.

use ort::session::Session;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};

use super::library::{environment, shares_threads, threads};
use super::placement::{Optimised, Placement, RECORD};
use super::provider::{Register, row};
use super::terminator::Terminator;
use super::{SessionError, arena};
use crate::config::EngineConfig;
use crate::model::onnx::NodeRef;

/// `kOrtSessionOptionsModelExternalInitializersFileFolderPath`.
const EXTERNAL_FOLDER: &str = "session.model_external_initializers_file_folder_path";

/// Where a session reads its graph.
#[derive(Debug, Clone, Copy)]
pub(super) enum GraphSource<'a> {
    /// Memory; the graph has no external data.
    Bytes(&'a [u8]),
    /// Memory, with the external data in this folder.
    Beside(&'a [u8], &'a std::path::Path),
}

/// What the making of a session is held to.
#[derive(Clone, Copy)]
pub(super) struct Terms<'a> {
    /// What computes with these must be on the device.
    pub(super) weights: &'a [String],
    /// So must what computes with these, which an earlier part computed with weights.
    pub(super) derived: &'a [String],
    /// Nodes that were found harmless on the host, in another size of the same graph.
    pub(super) harmless: &'a [NodeRef],
    /// It computes in memory that it shares with other parts.
    pub(super) shared: bool,
    /// Ends what compiles for too long.
    pub(super) terminator: &'a Terminator,
}

impl<'a> Terms<'a> {
    pub(super) fn new(weights: &'a [String], terminator: &'a Terminator) -> Self {
        Self {
            weights,
            derived: &[],
            harmless: &[],
            shared: false,
            terminator,
        }
    }
}

/// A session whose nodes are on the provider: all of them, or all that compute with weights.
pub(super) fn build(
    config: &EngineConfig,
    graph: GraphSource<'_>,
    terms: Terms<'_>,
) -> Result<(Session, Placement), SessionError> {
    let row = row(config.execution_provider);
    let built = build_by(row.register, row.name(), config, graph, terms)?;
    (row.check_chosen)().map_err(|reason| row.unavailable(&reason))?;
    Ok(built)
}

pub(super) fn build_by(
    register: Register,
    provider: &str,
    config: &EngineConfig,
    graph: GraphSource<'_>,
    terms: Terms<'_>,
) -> Result<(Session, Placement), SessionError> {
    let terminator = terms.terminator;
    let prepared = || register(config, builder(config, terms.shared)?);
    let session = commit(prepared()?, graph, terminator)?;
    let placement = Placement::of(&session, provider)?;
    if are_among(&placement.host_nodes, terms.harmless) {
        return Ok((session, placement));
    }
    // What depends on a weight, only the graph after optimisation tells. Most sessions need not write it, and
    // before another is made this one gives back its memory.
    drop(session);
    let optimised = Optimised::new()?;
    let builder = prepared()?.with_optimized_model_path(optimised.path());
    let session = commit(builder.map_err(|e| refused(e.into()))?, graph, terminator)?;
    let placement = Placement::of(&session, provider)?;
    placement.judge(optimised.read()?, terms.weights, terms.derived, provider)?;
    Ok((session, placement))
}

/// The graph after the optimisations that are the same for every provider, in a file and in a session.
pub(super) fn optimised(
    config: &EngineConfig,
    graph: GraphSource<'_>,
    terminator: &Terminator,
) -> Result<(Vec<u8>, Session), SessionError> {
    let optimised = Optimised::new()?;
    let builder = (row(config.execution_provider).register)(config, builder(config, false)?)?;
    let prepare = || -> ort::Result<SessionBuilder> {
        let builder = builder.with_optimization_level(GraphOptimizationLevel::Level1)?;
        Ok(builder.with_optimized_model_path(optimised.path())?)
    };
    let session = commit(prepare().map_err(refused)?, graph, terminator)?;
    Ok((optimised.read()?, session))
}

/// Whether these are nodes that are known. One without a name may be any, and of those that share one there
/// may not be more.
fn are_among(nodes: &[NodeRef], known: &[NodeRef]) -> bool {
    let mut left: Vec<&NodeRef> = known.iter().collect();
    nodes.iter().all(|node| {
        let at = left.iter().position(|known| *known == node);
        let found = at.map(|at| left.swap_remove(at));
        found.is_some() && !node.name.is_empty()
    })
}

fn commit(
    mut builder: SessionBuilder,
    graph: GraphSource<'_>,
    terminator: &Terminator,
) -> Result<Session, SessionError> {
    terminator.begin_compilation(builder.canceler())?;
    let session = match graph {
        GraphSource::Bytes(bytes) => builder.commit_from_memory(bytes),
        // Without the folder, ONNX Runtime looks for the files in the working directory.
        GraphSource::Beside(bytes, folder) => builder
            .with_config_entry(EXTERNAL_FOLDER, folder.to_string_lossy())
            .map_err(ort::Error::from)
            .and_then(|mut builder| builder.commit_from_memory(bytes)),
    };
    terminator.end();
    session.map_err(refused)
}

fn refused(error: ort::Error) -> SessionError {
    let text = format!("ONNX Runtime refuses the graph: {error}");
    match SessionError::from(error) {
        kept @ (SessionError::OutOfMemory(_)
        | SessionError::NoKernel(_)
        | SessionError::Lost(_)
        | SessionError::Terminated
        | SessionError::Unavailable(_)) => kept,
        SessionError::Model(_) | SessionError::Other(_) => SessionError::Model(text),
    }
}

/// A builder with what is the same for every provider.
fn builder(config: &EngineConfig, shared: bool) -> Result<SessionBuilder, SessionError> {
    let environment = environment(config)?;
    let pool = (row(config.execution_provider).pool)(config).filter(|_| shared);
    let share = |builder: SessionBuilder| -> ort::Result<SessionBuilder> {
        match pool {
            Some(pool) => match arena::share(environment, &pool) {
                Ok(()) => Ok(builder.with_env_allocators()?),
                Err(error) => {
                    tracing::warn!(%error, "the parts of the graph cannot share their memory, so they take more of it");
                    Ok(builder)
                }
            },
            None => Ok(builder),
        }
    };
    let prepare = || -> ort::Result<SessionBuilder> {
        let mut builder = Session::builder(environment)?;
        if !shares_threads(config) {
            builder = builder
                .with_independent_thread_pool()?
                .with_intra_threads(threads(config))?
                .with_intra_op_spinning(false)?;
        }
        let builder = builder
            .with_deterministic_compute(config.deterministic)?
            .with_config_entry(RECORD, "1")?;
        share(builder)
    };
    prepare().map_err(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_may_be_another_is_not_known() {
        let node = |name: &str| NodeRef {
            name: name.into(),
            domain: String::new(),
            operator: "Cast".into(),
        };
        let known = [node("a"), node("twice"), node("twice"), node("")];
        assert!(are_among(&[], &known));
        assert!(are_among(
            &[node("twice"), node("a"), node("twice")],
            &known
        ));
        assert!(!are_among(&[node("b")], &known));
        assert!(!are_among(&[node("a"), node("a")], &known));
        assert!(!are_among(&[node("")], &known));
    }
}
