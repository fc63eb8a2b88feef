//! Measures the cost of scoring against a bare session with constant weights. Both run interleaved in
//! one process, so that noise affects both alike.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use base64::Engine as _;
use flate2::{Decompress, FlushDecompress};
use futures_util::StreamExt;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::Serialize;
use serde_json::{Map, Value};

use super::parts::{Compared, Costs};
use super::sample::{Sample, decode, median, refused, sample};
use crate::candidate::fetch::Fetcher;
use crate::config::{Config, device_name};
use crate::engine::patch::Patches;
use crate::engine::thread::EngineHandle;
use crate::engine::{Engine, EngineError};
use crate::model::package::Package;
use crate::model::plan::Plan;
use crate::protocol::job::{Candidate, Format, Job, Rule, Source, Task, Validation};
use crate::protocol::result::{Body, JobRef, Timings};
use crate::protocol::state::Detail;
use crate::scoring::pipeline::{Judged, Pipeline};
use crate::telemetry::progress::Progress;
use crate::telemetry::traces::Trace;
use crate::util::clock::Lap;

/// Shares of all weights that a candidate touches.
const DENSITIES: [f64; 3] = [0.001, 0.01, 0.05];
/// The density of the stream and of the stages.
const USUAL: usize = 1;
const LIMIT: Duration = Duration::from_secs(600);

/// What was measured. Times in milliseconds, medians.
#[derive(Debug, Clone, Serialize)]
#[expect(
    missing_docs,
    reason = "the fields are the contract's; docs/performance.md explains each"
)]
pub struct Report {
    pub bare_ms: f64,
    pub evaluate_ms: BTreeMap<String, f64>,
    pub ratio: BTreeMap<String, f64>,
    #[serde(flatten)]
    pub costs: Costs,
    pub stages_ms: BTreeMap<&'static str, f64>,
    pub patch_restore_share: f64,
    pub decode_speed: f64,
    pub candidates_per_s: f64,
    pub idle_share: f64,
    pub first_ms: f64,
    pub median_ms: f64,
    pub first_ratio: f64,
    pub peak_rss_bytes: u64,
    pub bare_peak_rss_bytes: u64,
    pub memory_ratio: f64,
    pub weights_bytes: u64,
    pub windows: u64,
    pub repetitions: u64,
    pub provider: String,
    pub device: String,
}

/// Benchmarks the package in `dir`, for about the target time.
///
/// # Errors
/// When it cannot be loaded or does not run.
#[expect(
    clippy::cast_precision_loss,
    reason = "bytes of memory are far below 2^52"
)]
pub async fn run(dir: &Path, config: &Config, aim: Duration) -> Result<Report, EngineError> {
    let mut config = config.clone();
    config.candidates.max_inline_bytes = config.candidates.max_bytes;
    config.amqp.consumer_timeout = Duration::MAX;
    let progress = Arc::new(Progress::default());
    forget_peak();
    let engine = EngineHandle::load(dir, &config, Arc::clone(&progress)).await?;
    engine.turn().await.warm().await?;
    let package = Arc::clone(&engine.package);
    let plan = Plan::new(&package.shards, None, "", package.cut()).map_err(|f| refused(&f))?;
    let plan = Arc::new(plan);
    let mut random = StdRng::seed_from_u64(2);
    let usual = sample(&package, &config, DENSITIES[USUAL], |_| true, &mut random)?;

    let began = Instant::now();
    evaluate(&engine, &usual, &plan).await?;
    let repetitions = repetitions(began.elapsed(), aim);
    let pipeline = pipeline(&engine, &config)?;
    let stages = stages(&pipeline, &package, &usual, &config, repetitions.min(20)).await?;
    let peak_rss_bytes = peak();

    let samples = samples(&package, &config, &mut random)?;
    let mut bare = bare(&package, &config, &plan)?;
    let compared = compare(&engine, &mut bare, &samples, &plan, repetitions).await?;
    let costs = Compared {
        package: &package,
        config: &config,
        bare: &mut bare.engine,
        plan: &plan,
        random: &mut random,
    }
    .costs(repetitions)?;
    let stream = stream(&pipeline, &progress, &usual, repetitions, &config).await?;
    let decode_speed = decode_speed(&package, &config, &usual)?;
    let first = first(dir, &config, &usual, &plan, aim).await?;
    let weights_bytes = weights_bytes(&package);
    let patched = stages["patch"] + stages["restore"];
    Ok(Report {
        bare_ms: median(&compared.bare),
        evaluate_ms: medians(&compared.evaluations),
        ratio: medians(&compared.ratios),
        costs,
        patch_restore_share: patched / stages["forward"],
        stages_ms: stages,
        decode_speed,
        candidates_per_s: stream.per_second,
        idle_share: stream.idle_share,
        first_ms: first.first_ms,
        median_ms: first.median_ms,
        first_ratio: first.ratio,
        peak_rss_bytes,
        bare_peak_rss_bytes: bare.peak,
        memory_ratio: peak_rss_bytes as f64 / (weights_bytes + bare.peak) as f64,
        weights_bytes,
        windows: plan.windows.len() as u64,
        repetitions: repetitions as u64,
        provider: config.engine.execution_provider.execution_provider().into(),
        device: device_name(&config),
    })
}

fn pipeline(engine: &EngineHandle, config: &Config) -> Result<Pipeline, EngineError> {
    let fetcher = Fetcher::new(config.candidates.clone(), None)
        .map_err(|e| EngineError::new(Detail::ModelLoadFailed, e.to_string()))?;
    let engine = engine.clone();
    Ok(Pipeline::new(engine, config, fetcher, "bench", None))
}

/// A candidate of each density.
fn samples(
    package: &Package,
    config: &Config,
    random: &mut StdRng,
) -> Result<Vec<Sample>, EngineError> {
    let densities = DENSITIES.iter();
    densities
        .map(|density| sample(package, config, *density, |_| true, random))
        .collect()
}

fn weights_bytes(package: &Package) -> u64 {
    let tensors = package.weights.tensors.iter();
    tensors.map(|t| (t.numel * t.dtype.size()) as u64).sum()
}

/// By density.
fn medians(all: &[Vec<f64>]) -> BTreeMap<String, f64> {
    let labels = DENSITIES.iter().map(ToString::to_string);
    labels.zip(all.iter().map(|one| median(one))).collect()
}

/// As many repetitions as fit into the target time, but enough for a median.
fn repetitions(one: Duration, aim: Duration) -> usize {
    let passes = aim.as_secs_f64() / one.as_secs_f64().max(1e-6);
    let per_repetition = (2 * DENSITIES.len()) as f64;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to a small count"
    )]
    let fitting = (passes / per_repetition).clamp(5.0, 200.0) as usize;
    fitting
}

/// Patch, forward and restore: the work after decoding.
async fn evaluate(
    engine: &EngineHandle,
    sample: &Sample,
    plan: &Arc<Plan>,
) -> Result<f64, EngineError> {
    let turn = engine.turn().await;
    let evaluation = turn.score(Arc::clone(&sample.patches), Arc::clone(plan), None, LIMIT);
    let laps = evaluation.await.map_err(|f| refused(&f))?.laps;
    Ok(laps.apply.millis() + laps.running() + laps.restore.millis())
}

/// One entry per repetition and density.
struct Paired {
    bare: Vec<f64>,
    evaluations: [Vec<f64>; DENSITIES.len()],
    ratios: [Vec<f64>; DENSITIES.len()],
}

/// A session with constant weights, and the most memory that loading it and a pass took.
struct Bare {
    engine: Engine,
    peak: u64,
}

fn bare(package: &Arc<Package>, config: &Config, plan: &Plan) -> Result<Bare, EngineError> {
    let before = resident();
    forget_peak();
    let mut engine = Engine::load_bare(Arc::clone(package), &config.engine)?;
    // Discarded on both sides, because the first pass plans its memory.
    engine.pass(plan).map_err(|f| refused(&f))?;
    Ok(Bare {
        engine,
        peak: peak().saturating_sub(before),
    })
}

async fn compare(
    engine: &EngineHandle,
    bare: &mut Bare,
    samples: &[Sample],
    plan: &Arc<Plan>,
    repetitions: usize,
) -> Result<Paired, EngineError> {
    let mut compared = Paired {
        bare: Vec::new(),
        evaluations: [const { Vec::new() }; DENSITIES.len()],
        ratios: [const { Vec::new() }; DENSITIES.len()],
    };
    for _ in 0..repetitions {
        for (at, sample) in samples.iter().enumerate() {
            // Each is paired with its own bare pass, so that a machine that slows down slows both.
            let began = Instant::now();
            bare.engine.pass(plan).map_err(|f| refused(&f))?;
            let bare_ms = Lap::since(began).millis();
            let evaluated = evaluate(engine, sample, plan).await?;
            compared.bare.push(bare_ms);
            compared.evaluations[at].push(evaluated);
            compared.ratios[at].push(evaluated / bare_ms);
        }
    }
    Ok(compared)
}

/// The first evaluation after a warm-up, and those that follow.
struct First {
    first_ms: f64,
    median_ms: f64,
    ratio: f64,
}

/// Each sample needs a fresh engine, so the model is loaded and warmed several times.
async fn first(
    dir: &Path,
    config: &Config,
    sample: &Sample,
    plan: &Arc<Plan>,
    aim: Duration,
) -> Result<First, EngineError> {
    const LOADS: usize = 9;
    const LATER: usize = 5;
    let (mut firsts, mut medians, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let began = Instant::now();
    for load in 0..LOADS {
        // The probe of a large model takes its time.
        if load > 0 && began.elapsed() > aim {
            break;
        }
        let engine = EngineHandle::load(dir, config, Arc::default()).await?;
        engine.turn().await.warm().await?;
        let first = evaluate(&engine, sample, plan).await?;
        let mut later = Vec::with_capacity(LATER);
        for _ in 0..LATER {
            later.push(evaluate(&engine, sample, plan).await?);
        }
        firsts.push(first);
        medians.push(median(&later));
        ratios.push(first / median(&later));
    }
    Ok(First {
        first_ms: median(&firsts),
        median_ms: median(&medians),
        ratio: median(&ratios),
    })
}

/// The stages of a job that runs alone.
async fn stages(
    pipeline: &Pipeline,
    package: &Package,
    sample: &Sample,
    config: &Config,
    repetitions: usize,
) -> Result<BTreeMap<&'static str, f64>, EngineError> {
    let mut all = Vec::with_capacity(repetitions);
    for _ in 0..repetitions {
        all.push(judge(pipeline, sample).await?);
    }
    // The pipeline measures decoding and checking together.
    let check = check(package, sample, config, repetitions)?;
    let stage = |of: fn(&Timings) -> f64| median(&all.iter().map(of).collect::<Vec<_>>());
    Ok(BTreeMap::from([
        ("fetch", stage(|t| t.fetch)),
        ("decode", stage(|t| t.decode) - check),
        ("check", check),
        ("patch", stage(|t| t.apply)),
        ("forward", stage(|t| t.forward)),
        ("restore", stage(|t| t.restore)),
    ]))
}

/// The time to compute the new values and check that they are finite.
fn check(
    package: &Package,
    sample: &Sample,
    config: &Config,
    repetitions: usize,
) -> Result<f64, EngineError> {
    let mut times = Vec::with_capacity(repetitions);
    for _ in 0..repetitions {
        let update = decode(&sample.bytes, package, config)?;
        let began = Instant::now();
        Patches::new(package, update, Rule::ParamDiff).map_err(|f| refused(&f))?;
        times.push(Lap::since(began).millis());
    }
    Ok(median(&times))
}

struct Stream {
    per_second: f64,
    idle_share: f64,
}

/// Like a worker: some jobs are fetched and checked while one computes.
async fn stream(
    pipeline: &Pipeline,
    progress: &Progress,
    sample: &Sample,
    repetitions: usize,
    config: &Config,
) -> Result<Stream, EngineError> {
    let jobs = repetitions.max(10);
    let mut judging = futures_util::stream::iter(0..jobs)
        .map(|_| judge(pipeline, sample))
        .buffer_unordered(config.amqp.prefetch.into());
    // Measured from the first verdict to the last, to exclude the start of the stream.
    judging.next().await.transpose()?;
    let (began, worked) = (Instant::now(), progress.worked_us.load(Ordering::Relaxed));
    let mut done = 0_u32;
    while let Some(judged) = judging.next().await {
        judged?;
        done += 1;
    }
    let elapsed = began.elapsed().as_secs_f64();
    let worked = progress.worked_us.load(Ordering::Relaxed) - worked;
    #[expect(
        clippy::cast_precision_loss,
        reason = "microseconds of a benchmark are far below 2^52"
    )]
    let busy = worked as f64 / 1e6;
    Ok(Stream {
        per_second: f64::from(done) / elapsed,
        idle_share: (1.0 - busy / elapsed).max(0.0),
    })
}

async fn judge(pipeline: &Pipeline, sample: &Sample) -> Result<Timings, EngineError> {
    let task = Task::Score {
        stop: None,
        model_version: pipeline.origin().model_version,
        candidate: Box::new(Candidate {
            format: Format::BinaryV2,
            compression: None,
            rule: Rule::ParamDiff,
            source: Source::Inline(sample.bytes.clone()),
            sha256: None,
            size: None,
        }),
    };
    let job_ref = JobRef {
        submission_id: "bench".into(),
        kind: task.kind(),
        model_version: task.model_version(),
        context: None,
        attempt: 1,
    };
    let job = Job {
        submission_id: "bench".into(),
        model: None,
        task,
        validation: Validation::default(),
        deadline_ms: None,
        context: None,
    };
    let lost = |m: &str| EngineError::new(Detail::WarmFailed, m);
    match pipeline.judge(&job, &job_ref, &Trace::silent()).await {
        Judged::Fresh { verdict, .. } => match verdict.map_err(|f| refused(&f))? {
            Body::Score(body) => Ok(body.timings_ms),
            Body::Loss(_) | Body::Merge(_) | Body::Error { .. } => {
                Err(lost("a candidate came back unscored"))
            }
        },
        Judged::Stored { .. } | Judged::Requeue => {
            Err(lost("answered from a store that is not there"))
        }
    }
}

/// The speed of decoding and checking relative to only inflating the same streams.
fn decode_speed(package: &Package, config: &Config, sample: &Sample) -> Result<f64, EngineError> {
    let streams = streams(&sample.bytes);
    let (mut zlib, mut inflated) = (Decompress::new(true), Vec::new());
    let mut ratios = Vec::new();
    for _ in 0..9 {
        let began = Instant::now();
        for (stream, length) in &streams {
            inflated.clear();
            inflated.reserve_exact(*length);
            zlib.reset(true);
            zlib.decompress_vec(stream, &mut inflated, FlushDecompress::Finish)
                .map_err(|e| EngineError::new(Detail::WarmFailed, e.to_string()))?;
        }
        let alone = Lap::since(began).millis();
        let began = Instant::now();
        decode(&sample.bytes, package, config)?;
        ratios.push(alone / Lap::since(began).millis());
    }
    Ok(median(&ratios))
}

/// The zlib streams of a candidate and their inflated sizes.
fn streams(bytes: &[u8]) -> Vec<(Vec<u8>, usize)> {
    let document: Map<String, Value> = serde_json::from_slice(bytes).unwrap_or_default();
    let base64 = base64::engine::general_purpose::STANDARD;
    let stream = |entry: &Value| {
        let packed = base64.decode(entry["data"].as_str()?).ok()?;
        Some((packed, usize::try_from(8 * entry["k"].as_u64()?).ok()?))
    };
    document.values().filter_map(stream).collect()
}

/// Resets the peak memory that Linux reports.
fn forget_peak() {
    if let Err(error) = std::fs::write("/proc/self/clear_refs", "5") {
        tracing::debug!(%error, "the peak of memory counts from the start of the process");
    }
}

fn peak() -> u64 {
    status("VmHWM:")
}

fn resident() -> u64 {
    status("VmRSS:")
}

/// A line of `/proc/self/status`, in bytes; 0 where there is none.
fn status(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kibibytes = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}
