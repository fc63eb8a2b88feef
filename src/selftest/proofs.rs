//! Proves an engine on the machine it will run on: repeats the promises that tests hold on a CPU for any
//! provider, device and model.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;

use crate::candidate::{TensorUpdate, Update};
use crate::config::Config;
use crate::engine::patch::Patches;
use crate::engine::session::Terminator;
use crate::engine::{Engine, EngineError, Evaluation, exhaust};
use crate::model::package::Package;
use crate::model::plan::Plan;
use crate::protocol::failure::{Code, Failure};
use crate::protocol::job::Rule;
use crate::protocol::state::Detail;

/// Random patches that are applied and restored.
const PATCHES: usize = 100;
/// Runs that are terminated midway.
const TERMINATED: usize = 5;

/// A promise, and whether it holds on this machine.
#[derive(Debug, Clone, Serialize)]
pub struct Proof {
    /// The promise.
    pub name: &'static str,
    /// Whether it holds.
    pub holds: bool,
    /// What was measured, or what went wrong.
    pub found: String,
}

/// Loads the package and proves each promise. Blocks until done.
///
/// # Errors
/// When the package or the provider cannot be loaded at all.
pub fn run(dir: &Path, config: &Config) -> Result<Vec<Proof>, EngineError> {
    let package = Package::load(dir, config.model.allow_shards_subset, &[])
        .map_err(|e| EngineError::new(Detail::ModelLoadFailed, e.to_string()))?;
    let package = Arc::new(package);
    let mut engine = Engine::load(Arc::clone(&package), &config.engine, Arc::default())?;
    let refused = |f: Failure| EngineError::new(Detail::WarmFailed, f.to_string());
    let plan = Plan::new(&package.shards, None, "", package.cut()).map_err(refused)?;
    let mut random = StdRng::seed_from_u64(3);
    let placed = Ok(engine.memory().to_owned());
    let warm = engine.warm().map_err(|e| e.to_string()).map(|warm| {
        let (loss, windows) = (warm.baseline_loss, warm.windows);
        let moved = match warm.inert_in_words() {
            None => "every place of every tensor moves it".into(),
            Some(inert) => format!("every place of every other tensor moves it, {inert}"),
        };
        format!("loss {loss} on {windows} windows repeats; {moved}")
    });
    Ok(vec![
        proof("weights", placed),
        proof("warm-up and probe", warm),
        proof(
            "nothing changed, nothing scored",
            nothing(&mut engine, &plan),
        ),
        proof(
            "restored bit for bit",
            restored(&mut engine, &plan, &mut random),
        ),
        proof(
            "ended on demand",
            terminated(&mut engine, &plan, &mut random),
        ),
        proof(
            "out of memory",
            starved(&mut engine, &plan, config, &mut random),
        ),
        proof(
            "audit",
            engine
                .audit()
                .map(|()| "no difference".into())
                .map_err(|e| e.to_string()),
        ),
    ])
}

fn proof(name: &'static str, found: Result<String, String>) -> Proof {
    let holds = found.is_ok();
    let found = found.unwrap_or_else(|wrong| wrong);
    Proof { name, holds, found }
}

fn score(engine: &mut Engine, update: Update, plan: &Plan) -> Result<Evaluation, Failure> {
    let package = Arc::clone(&engine.package);
    let patches = Patches::new(&package, update, Rule::ParamDiff)?;
    engine.score(&patches, plan)
}

/// Some entries of every trainable tensor, moved by up to `scale`.
fn update(package: &Package, scale: f32, random: &mut StdRng) -> Update {
    let mut update = Update::default();
    for (tensor, info) in package.weights.tensors.iter().enumerate() {
        if !package.manifest.is_trainable(&info.name) {
            continue;
        }
        let most = u32::try_from(info.numel).unwrap_or(u32::MAX);
        let step = random.random_range(1..=200_u32);
        let indices: Vec<u32> = (random.random_range(0..step).min(most - 1)..most)
            .step_by(step as usize)
            .collect();
        let value = |_: &u32| {
            if scale > 0.0 {
                random.random_range(-scale..=scale)
            } else {
                0.0
            }
        };
        let values = indices.iter().map(value).collect();
        update.tensors.push(TensorUpdate {
            tensor,
            indices,
            values,
        });
    }
    update
}

fn nothing(engine: &mut Engine, plan: &Plan) -> Result<String, String> {
    let package = Arc::clone(&engine.package);
    let zeros = update(&package, 0.0, &mut StdRng::seed_from_u64(1));
    let delta = score(engine, zeros, plan)
        .map_err(|f| f.to_string())?
        .paired
        .delta;
    if delta.to_bits() == 0 {
        Ok("an update of zeros has delta exactly 0".into())
    } else {
        Err(format!("an update of zeros has delta {delta}"))
    }
}

fn restored(engine: &mut Engine, plan: &Plan, random: &mut StdRng) -> Result<String, String> {
    let package = Arc::clone(&engine.package);
    let first = update(&package, 1e-3, random);
    let before = score(engine, first.clone(), plan).map_err(|f| f.to_string())?;
    let short = Plan {
        hash: [1; 32],
        windows: plan.windows[..1].to_vec(),
        targets: 0,
    };
    for patch in 0..PATCHES {
        let scale = 10_f32.powi(random.random_range(-6..=1));
        let candidate = update(&package, scale, random);
        match score(engine, candidate, &short) {
            Ok(_) => {}
            // Large steps may make a loss infinite; the weights must be restored all the same.
            Err(f) if matches!(f.code, Code::NonFiniteLoss | Code::CandidateNonFinite) => {}
            Err(f) => return Err(format!("patch {patch}: {f}")),
        }
        if patch % 10 == 9 {
            engine.compare_weights().map_err(|e| e.to_string())?;
        }
    }
    let after = score(engine, first, plan).map_err(|f| f.to_string())?;
    same(&before, &after)?;
    Ok(format!(
        "{PATCHES} random patches left no trace; the same candidate scores the same bits"
    ))
}

fn same(before: &Evaluation, after: &Evaluation) -> Result<(), String> {
    let (before, after) = (before.paired.loss_after, after.paired.loss_after);
    if before.to_bits() == after.to_bits() {
        Ok(())
    } else {
        Err(format!("the same candidate gave {before}, then {after}"))
    }
}

/// Terminates passes at different moments and measures how soon they return.
fn terminated(engine: &mut Engine, plan: &Plan, random: &mut StdRng) -> Result<String, String> {
    let package = Arc::clone(&engine.package);
    let candidate = update(&package, 1e-3, random);
    let began = Instant::now();
    let before = score(engine, candidate.clone(), plan).map_err(|f| f.to_string())?;
    let pass = began.elapsed();
    let (mut ended, mut slowest) = (0, Duration::ZERO);
    for part in 1..=TERMINATED {
        let terminator = Terminator::default();
        engine.obey(terminator.clone());
        #[expect(clippy::cast_possible_truncation, reason = "a small constant")]
        let delay = pass * part as u32 / (2 * TERMINATED as u32);
        let alarm = std::thread::spawn(move || {
            std::thread::sleep(delay);
            let signal = Instant::now();
            terminator.terminate();
            signal
        });
        let outcome = score(engine, candidate.clone(), plan);
        let returned = Instant::now();
        let signal = alarm
            .join()
            .map_err(|_| "the alarm's thread ended".to_owned())?;
        match outcome {
            Err(f) if f.code == Code::ScoreTimeout => {
                ended += 1;
                slowest = slowest.max(returned.saturating_duration_since(signal));
            }
            // The pass finished before the signal.
            Ok(_) => {}
            Err(f) => return Err(f.to_string()),
        }
        engine.compare_weights().map_err(|e| e.to_string())?;
    }
    engine.obey(Terminator::default());
    same(
        &before,
        &score(engine, candidate, plan).map_err(|f| f.to_string())?,
    )?;
    if ended == 0 {
        return Err("no run was ended; a pass is too short to tell".into());
    }
    Ok(format!(
        "{ended} of {TERMINATED} runs ended within {:.1} ms of the signal, a pass takes {:.1} ms",
        slowest.as_secs_f64() * 1e3,
        pass.as_secs_f64() * 1e3
    ))
}

/// Allocates more memory than exists and checks that this fails as `out_of_memory` without side effects.
fn starved(
    engine: &mut Engine,
    plan: &Plan,
    config: &Config,
    random: &mut StdRng,
) -> Result<String, String> {
    let package = Arc::clone(&engine.package);
    let candidate = update(&package, 1e-3, random);
    let before = score(engine, candidate.clone(), plan).map_err(|f| f.to_string())?;
    tracing::info!("allocating four petabytes; the error that follows is expected");
    let failure = exhaust(&config.engine).map_err(|e| e.to_string())?;
    if failure.code != Code::OutOfMemory {
        return Err(format!(
            "allocating 4 PB fails as {}: {failure}",
            failure.code.as_str()
        ));
    }
    same(
        &before,
        &score(engine, candidate, plan).map_err(|f| f.to_string())?,
    )?;
    Ok("a request for 4 PB is out_of_memory; the engine goes on".into())
}
