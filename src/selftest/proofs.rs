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
    let warm = engine.warm().map(|warm| {
        let (loss, windows) = (warm.baseline_loss, warm.windows);
        let moved = match warm.inert_in_words() {
            None => "every place of every tensor moves it".into(),
            Some(inert) => format!("every place of every other tensor moves it, {inert}"),
        };
        format!("loss {loss} on {windows} windows repeats; {moved}")
    });
    let (e, r) = (&mut engine, &mut random);
    let nothing = nothing(e, &plan);
    let restored = restored(e, &plan, r);
    let terminated = terminated(e, &plan, r);
    let starved = starved(e, &plan, config, r);
    let audit = engine.audit().map(|()| "no difference".to_owned());
    Ok(vec![
        proof("weights", placed),
        proof("warm-up and probe", warm.map_err(Into::into)),
        proof("nothing changed, nothing scored", nothing),
        proof("restored bit for bit", restored),
        proof("ended on demand", terminated),
        proof("out of memory", starved),
        proof("audit", audit.map_err(Into::into)),
    ])
}

fn proof(name: &'static str, found: anyhow::Result<String>) -> Proof {
    let holds = found.is_ok();
    let found = found.unwrap_or_else(|wrong| wrong.to_string());
    Proof { name, holds, found }
}

fn score(engine: &mut Engine, update: Update, plan: &Plan) -> Result<Evaluation, Failure> {
    let package = Arc::clone(&engine.package);
    let patches = Patches::new(&package, update, Rule::ParamDiff)?;
    engine.score(&patches, plan, None)
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
        let first = random.random_range(0..step).min(most - 1);
        let indices: Vec<u32> = (first..most).step_by(step as usize).collect();
        let value = |_: &u32| match scale > 0.0 {
            true => random.random_range(-scale..=scale),
            false => 0.0,
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

fn nothing(engine: &mut Engine, plan: &Plan) -> anyhow::Result<String> {
    let package = Arc::clone(&engine.package);
    let zeros = update(&package, 0.0, &mut StdRng::seed_from_u64(1));
    let delta = score(engine, zeros, plan)?.paired.delta;
    anyhow::ensure!(delta.to_bits() == 0, "an update of zeros has delta {delta}");
    Ok("an update of zeros has delta exactly 0".into())
}

fn restored(engine: &mut Engine, plan: &Plan, random: &mut StdRng) -> anyhow::Result<String> {
    let package = Arc::clone(&engine.package);
    let first = update(&package, 1e-3, random);
    let before = score(engine, first.clone(), plan)?;
    let short = Plan::excerpt([1; 32], &plan.windows[..1]);
    for patch in 0..PATCHES {
        let scale = 10_f32.powi(random.random_range(-6..=1));
        let candidate = update(&package, scale, random);
        match score(engine, candidate, &short) {
            Ok(_) => {}
            // Large steps may make a loss infinite; the weights must be restored all the same.
            Err(f) if matches!(f.code, Code::NonFiniteLoss | Code::CandidateNonFinite) => {}
            Err(f) => anyhow::bail!("patch {patch}: {f}"),
        }
        if patch % 10 == 9 {
            engine.compare_weights()?;
        }
    }
    let after = score(engine, first, plan)?;
    same(&before, &after)?;
    Ok(format!(
        "{PATCHES} random patches left no trace; the same candidate scores the same bits"
    ))
}

fn same(before: &Evaluation, after: &Evaluation) -> anyhow::Result<()> {
    let (before, after) = (before.paired.loss_after, after.paired.loss_after);
    let same = before.to_bits() == after.to_bits();
    anyhow::ensure!(same, "the same candidate gave {before}, then {after}");
    Ok(())
}

/// Terminates passes at different moments and measures how soon they return.
fn terminated(engine: &mut Engine, plan: &Plan, random: &mut StdRng) -> anyhow::Result<String> {
    let package = Arc::clone(&engine.package);
    let candidate = update(&package, 1e-3, random);
    let began = Instant::now();
    let before = score(engine, candidate.clone(), plan)?;
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
        let signal = alarm.join();
        let signal = signal.map_err(|_| anyhow::anyhow!("the alarm's thread ended"))?;
        match outcome {
            Err(f) if f.code == Code::ScoreTimeout => {
                ended += 1;
                slowest = slowest.max(returned.saturating_duration_since(signal));
            }
            // The pass finished before the signal.
            Ok(_) => {}
            Err(f) => return Err(f.into()),
        }
        engine.compare_weights()?;
    }
    engine.obey(Terminator::default());
    same(&before, &score(engine, candidate, plan)?)?;
    anyhow::ensure!(ended > 0, "no run was ended; a pass is too short to tell");
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
) -> anyhow::Result<String> {
    let package = Arc::clone(&engine.package);
    let candidate = update(&package, 1e-3, random);
    let before = score(engine, candidate.clone(), plan)?;
    tracing::info!("allocating four petabytes; the error that follows is expected");
    let failure = exhaust(&config.engine)?;
    let code = failure.code;
    let starved = code == Code::OutOfMemory;
    anyhow::ensure!(
        starved,
        "allocating 4 PB fails as {}: {failure}",
        code.as_str()
    );
    same(&before, &score(engine, candidate, plan)?)?;
    Ok("a request for 4 PB is out_of_memory; the engine goes on".into())
}
