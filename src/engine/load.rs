//! Loads a package into an engine: checks that package and graph fit together, and builds the session.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::objective::{self, Measure};
use super::session::{Session, SessionError, Source, rewrites};
use super::{Engine, EngineError, MicroBatch, Slot};
use crate::config::EngineConfig;
use crate::model::onnx::{Graph, Head, Rewrite, Untrainable, WeightSpec};
use crate::model::package::Package;
use crate::model::plan::Plan;
use crate::model::tensor::Dtype;
use crate::model::weights::transpose;
use crate::protocol::state::Detail;
use crate::telemetry::progress::Progress;

/// How a session holds the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    /// As inputs, to be patched.
    Inputs,
    /// As constants.
    Constants,
}

impl Engine {
    /// Builds the session and fills the scratch weights.
    ///
    /// # Errors
    /// What is missing or wrong, with its `state_detail`.
    pub fn load(
        package: Arc<Package>,
        config: &EngineConfig,
        progress: Arc<Progress>,
    ) -> Result<Self, EngineError> {
        Self::build(package, config, progress, Hold::Inputs)
    }

    /// Loads the model with constant weights, as a reference that cannot be patched.
    ///
    /// # Errors
    /// As [`Engine::load`].
    pub fn load_bare(package: Arc<Package>, config: &EngineConfig) -> Result<Self, EngineError> {
        Self::build(package, config, Arc::default(), Hold::Constants)
    }

    fn build(
        package: Arc<Package>,
        config: &EngineConfig,
        progress: Arc<Progress>,
        hold: Hold,
    ) -> Result<Self, EngineError> {
        progress.activations.bytes.store(0, Ordering::Relaxed);
        let broken = |message: String| EngineError::new(Detail::ModelLoadFailed, message);
        let (graph, measure, fixed) = fit(&package).map_err(broken)?;
        let (slots, specs) = layout(&package);
        let rewrites = rewrites(config);
        let (slots, source, specs) = match hold {
            Hold::Inputs => {
                let (source, specs) = source(graph, specs, rewrites, &package).map_err(broken)?;
                (slots, source, specs)
            }
            Hold::Constants => {
                let source = bare_source(&package, graph, &specs, rewrites).map_err(broken)?;
                (Vec::new(), source, Vec::new())
            }
        };
        let micro_batch = fixed.map_or(MicroBatch::Most(config.micro_batch), MicroBatch::Fixed);
        let windows = windows(&package)?;
        let usual_batch = micro_batch.of(windows);
        let feeds = measure.feeds(&package, &[], usual_batch);
        let micro_batches = windows.div_ceil(usual_batch);
        let session = Session::new(config, source, &feeds, specs, micro_batches);
        let session = session.map_err(|e| refused(&package, config, &e))?;
        progress.forget_pace();
        Ok(Self {
            session,
            slots,
            micro_batch,
            usual_batch,
            measure,
            baselines: HashMap::new(),
            proven: None,
            sound: true,
            progress,
            package,
        })
    }

    /// Replaces the weights by those of another version of the package. It clears baselines and proofs, so
    /// the engine must warm up next.
    ///
    /// # Errors
    /// When the device fails; the weights are then a mix of versions, and the engine is unsound.
    pub fn adopt(&mut self, package: Arc<Package>) -> Result<(), EngineError> {
        self.sound = false;
        self.session.forget_activations(None);
        self.baselines.clear();
        self.proven = None;
        let _busy = self.progress.begin_proof();
        for slot in &self.slots {
            self.progress.moved();
            let bytes = graph_bytes(&package, slot.tensor, slot.transposed);
            let filled = self.session.fill(slot.weight, &bytes);
            filled.map_err(|e| EngineError::from_session(&e, Detail::ModelLoadFailed))?;
        }
        self.package = package;
        self.sound = true;
        Ok(())
    }
}

/// Checks that package and graph fit together, as far as possible without a session.
///
/// # Errors
/// What does not fit, by name.
pub fn check(package: &Package) -> Result<(), EngineError> {
    let broken = |message| EngineError::new(Detail::ModelLoadFailed, message);
    fit(package).map(|_| ()).map_err(broken)
}

/// The graph, how to feed and read it, and its fixed batch size, if it has one.
fn fit(package: &Package) -> Result<(Graph, Measure, Option<usize>), String> {
    let graph = Graph::decode(package.graph.clone()).map_err(|e| e.to_string())?;
    let entries = package.manifest.tensors.values();
    let places = entries.flat_map(|entry| &entry.places);
    let names: Vec<&str> = places.map(|place| place.initializer.as_str()).collect();
    let (measure, fixed) = Measure::new(package, &graph, &names)?;
    check_trainable(package, &graph, objective::head(package))?;
    Ok((graph, measure, fixed))
}

/// The error for a session that could not be built, with advice if the provider lacks a kernel.
fn refused(package: &Package, config: &EngineConfig, error: &SessionError) -> EngineError {
    let mut refused = EngineError::from_session(error, Detail::ModelLoadFailed);
    if matches!(error, SessionError::NoKernel(_)) {
        let mut tensors = package.weights.tensors.iter();
        let (what, instead) = match tensors.any(|t| t.dtype == Dtype::Bf16) {
            true => ("bfloat16", "export the model in float32 or float16"),
            false => ("this graph", "export the model otherwise"),
        };
        refused.message = format!(
            "{} cannot compute {what}; use a provider that can (engine.execution_provider), or {instead}: {}",
            config.execution_provider.execution_provider(),
            refused.message
        );
    }
    refused
}

/// Checks that every trainable tensor can safely be changed in this graph.
fn check_trainable(package: &Package, graph: &Graph, head: Head<'_>) -> Result<(), String> {
    let (Head::LogProbs(output) | Head::Loss(output)) = head;
    let tensors = package.manifest.tensors.iter();
    let tensors = tensors.filter(|(name, _)| package.manifest.is_trainable(name));
    let places = tensors.flat_map(|(name, tensor)| {
        let places = tensor.places.iter();
        places.map(|place| (name.as_str(), place.initializer.as_str()))
    });
    let places: Vec<(&str, &str)> = places.collect();
    let names: Vec<&str> = places.iter().map(|(_, place)| *place).collect();
    let barred = graph.untrainable(&names, output);
    let barred = barred.map_err(|e| e.to_string())?;
    for (name, place) in places {
        let entry = package.manifest.tensors.get(name);
        let empty = entry.is_some_and(|entry| entry.shape.contains(&0));
        if let Some(why) = barred.get(place).or(empty.then_some(&Untrainable::Empty)) {
            return Err(format!(
                "tensors.{name}: {place} {why}, so candidates may not touch it; package it again"
            ));
        }
    }
    Ok(())
}

/// The graph with its weights as inputs, those of candidates first.
fn source(
    graph: Graph,
    mut specs: Vec<WeightSpec>,
    rewrites: &[Rewrite],
    package: &Package,
) -> Result<(Source, Vec<WeightSpec>), String> {
    let names = |specs: &[WeightSpec]| -> Vec<String> {
        specs.iter().map(|spec| spec.input.clone()).collect()
    };
    let frozen = graph.frozen(&names(&specs), &package.dir);
    specs.extend(frozen.map_err(|e| e.to_string())?);
    let all = names(&specs);
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let prepared = graph.prepare(&all, objective::head(package), rewrites, &package.dir);
    let prepared = prepared.and_then(|bytes| Graph::decode(bytes.into()));
    let source = Source {
        graph: prepared.map_err(|e| e.to_string())?,
        folder: package.dir.clone(),
        made: None,
    };
    Ok((source, specs))
}

/// The graph with constant weights, in a folder of its own.
fn bare_source(
    package: &Package,
    graph: Graph,
    specs: &[WeightSpec],
    rewrites: &[Rewrite],
) -> Result<Source, String> {
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let data = dir.path().join("scorer.weights");
    let head = objective::head(package);
    let prepared = graph.with_constants(specs, head, rewrites, &package.dir, &data);
    let prepared = prepared.and_then(|bytes| Graph::decode(bytes.into()));
    copy_external(package, dir.path()).map_err(|e| e.to_string())?;
    Ok(Source {
        graph: prepared.map_err(|e| e.to_string())?,
        folder: dir.path().to_owned(),
        made: Some(dir),
    })
}

/// The number of windows of the default plan.
fn windows(package: &Package) -> Result<usize, EngineError> {
    let plan = Plan::new(&package.shards, None, "", package.cut());
    let plan = plan.map_err(|f| EngineError::new(Detail::WarmFailed, f.message))?;
    Ok(plan.windows.len())
}

/// Copies the package's external data beside a graph in another folder.
fn copy_external(package: &Package, dir: &std::path::Path) -> std::io::Result<()> {
    for external in package.manifest.graph.external.iter().flatten() {
        let (from, to) = (package.dir.join(&external.file), dir.join(&external.file));
        if let Some(parent) = to.parent() {
            std::fs::create_dir_all(parent)?;
        }
        // Copied, because ONNX Runtime rejects symbolic and hard links as an attack.
        std::fs::copy(&from, &to)?;
    }
    Ok(())
}

fn layout(package: &Package) -> (Vec<Slot>, Vec<WeightSpec>) {
    let mut slots = Vec::new();
    let mut specs = Vec::new();
    for (tensor, info) in package.weights.tensors.iter().enumerate() {
        let entry = package.manifest.tensors.get(&info.name);
        for place in entry.iter().flat_map(|entry| &entry.places) {
            slots.push(Slot {
                tensor,
                weight: specs.len(),
                place: place.initializer.clone(),
                transposed: place.transposed,
            });
            let sizes = info.shape.iter().filter_map(|d| i64::try_from(*d).ok());
            let mut shape: Vec<i64> = sizes.collect();
            if place.transposed {
                shape.reverse();
            }
            specs.push(WeightSpec {
                input: place.initializer.clone(),
                shape,
                dtype: info.dtype,
                bytes: graph_bytes(package, tensor, place.transposed),
            });
        }
    }
    (slots, specs)
}

pub(super) fn graph_bytes(package: &Package, tensor: usize, transposed: bool) -> Bytes {
    let info = &package.weights.tensors[tensor];
    let bytes = package.weights.shared_bytes(tensor);
    match (transposed, info.shape.as_slice()) {
        (true, [rows, columns]) => transpose(&bytes, *rows, *columns, info.dtype.size()).into(),
        (_, _) => bytes,
    }
}
