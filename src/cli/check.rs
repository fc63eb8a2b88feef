//! `scorer check`: a doctor's report of what a worker needs here, in the order in which it needs it;
//! and `--prove`, the promises of the engine held to this machine.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use console::style;
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::{Value, json};

use super::offline::fault;
use super::{Exit, Fault, Outcome, answer, answer_json, busy, plain, progress};
use crate::broker::BrokerError;
use crate::broker::amqp::Link;
use crate::broker::topology::Topology;
use crate::config::Config;
use crate::engine::session::library_version;
use crate::engine::thread::EngineHandle;
use crate::engine::{EngineError, Progress};
use crate::lifecycle::Detail;
use crate::package::Package;
use crate::pipeline::device_name;
use crate::store::{self, StoreError};

/// What a service may take to answer before the report goes on without it.
const PATIENCE: Duration = Duration::from_secs(5);
/// Columns before what was found: the verdict and the part.
const INDENT: usize = 21;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As a worker needs it.
    Ok,
    /// A worker starts, and waits for it.
    Warn,
    /// No worker becomes ready.
    Fail,
    /// Not looked at, for something before it is missing.
    Skip,
}

/// What was found of one part.
#[derive(Debug, Serialize)]
struct Finding {
    part: &'static str,
    verdict: Verdict,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl Finding {
    fn ok(part: &'static str, found: String) -> Self {
        Self::new(part, Verdict::Ok, found, None)
    }

    fn new(part: &'static str, verdict: Verdict, found: String, advice: Option<String>) -> Self {
        Self {
            part,
            verdict,
            found: plain(&found),
            advice,
        }
    }

    fn line(&self) -> String {
        let word = match self.verdict {
            Verdict::Ok => style("ok  ").green(),
            Verdict::Warn => style("warn").yellow(),
            Verdict::Fail => style("FAIL").red(),
            Verdict::Skip => style("-   ").dim(),
        };
        let advice = self.advice.as_ref();
        let advice = advice.map(|advice| format!("\n{:INDENT$}-> {advice}", ""));
        let (part, found) = (self.part, &self.found);
        format!("{word}  {part:<15}{found}{}", advice.unwrap_or_default())
    }
}

/// What is known of the parts that no service has a say in.
struct Examined {
    findings: Vec<Finding>,
    /// For programs, of a model that is warm.
    facts: Value,
    /// Why no worker becomes ready.
    fault: Option<EngineError>,
}

impl Examined {
    /// This part fails, and what comes after it was not looked at.
    fn failed(mut findings: Vec<Finding>, part: &'static str, error: EngineError) -> Self {
        let advice = format!("ops/runbook.md says what to do about {}", error.detail);
        let failed = Finding::new(part, Verdict::Fail, error.to_string(), Some(advice));
        findings.push(failed);
        let needing: &[_] = match part {
            "package" => &["provider", "warm-up"],
            "warm-up" => &[],
            _ => &["warm-up"],
        };
        let missing = || format!("not looked at: it needs the {part}");
        let skipped = needing.iter();
        findings.extend(skipped.map(|part| Finding::new(part, Verdict::Skip, missing(), None)));
        Self {
            findings,
            facts: json!({}),
            fault: Some(error),
        }
    }
}

pub(super) async fn check(config: &Config, json: bool) -> Outcome {
    let dir = model_dir(config)?.clone();
    let bar = busy(format!("reading {}", dir.display()));
    let examining = async {
        let examined = examine(config, dir, &bar).await;
        bar.unset_length();
        progress::name(&bar, "asking RabbitMQ and Redis");
        examined
    };
    let (mut examined, rabbitmq, redis) = tokio::join!(examining, rabbitmq(config), redis(config));
    bar.finish_and_clear();
    examined.findings.extend([rabbitmq, redis]);
    if json {
        let mut report = examined.facts;
        report["findings"] = json!(examined.findings);
        answer_json(&report)?;
    } else {
        let lines: Vec<String> = examined.findings.iter().map(Finding::line).collect();
        answer(&lines.join("\n"))?;
    }
    match examined.fault {
        None => Ok(Exit::Done),
        Some(error) => Err(fault(&error)),
    }
}

async fn examine(config: &Config, dir: PathBuf, bar: &ProgressBar) -> Examined {
    let named = format!("sound, worker.id = {}", config.worker_id());
    let mut findings = vec![Finding::ok("configuration", named)];
    let (read, subset) = (dir.clone(), config.model.allow_shards_subset);
    let reading = tokio::task::spawn_blocking(move || Package::load(&read, subset, &[]));
    let unfit = |text: String| EngineError::new(Detail::ModelLoadFailed, text);
    let package = match reading.await {
        Ok(Ok(package)) => Arc::new(package),
        Ok(Err(error)) => return Examined::failed(findings, "package", unfit(error.to_string())),
        Err(error) => return Examined::failed(findings, "package", unfit(error.to_string())),
    };
    let manifest = &package.manifest;
    if let Some(name) = config.model.name.as_ref().filter(|n| **n != manifest.name) {
        let (dir, found) = (dir.display(), &manifest.name);
        let text = format!("{dir}: is of the model {found:?}, and model.name says {name:?}");
        return Examined::failed(findings, "package", unfit(text));
    }
    let (tensors, shards) = (package.weights.tensors.len(), package.shards.len());
    findings.push(Finding::ok(
        "package",
        format!(
            "{} version {} in {}: {tensors} tensors, {shards} shards, digests match",
            manifest.name,
            manifest.version,
            dir.display()
        ),
    ));
    let began = Instant::now();
    bar.set_message("making a session");
    let given = Arc::clone(&package);
    let progress = Arc::<Progress>::default();
    let starting = EngineHandle::start(move || Ok(given), config, Arc::clone(&progress));
    let engine = match starting.await {
        Ok(engine) => engine,
        Err(error) if error.detail == Detail::EpUnavailable => {
            return Examined::failed(findings, "provider", error);
        }
        Err(error) => return Examined::failed(findings, "session", error),
    };
    let provider = config.engine.execution_provider.execution_provider();
    let (device, onnxruntime) = (device_name(config), library_version(&config.engine));
    let version = onnxruntime.as_deref().unwrap_or("of unknown version");
    findings.push(Finding::ok(
        "provider",
        format!("{provider} on {device}, ONNX Runtime {version}"),
    ));
    bar.set_message("warming up: every tensor is moved and put back");
    let warming = async { engine.turn().await.warm().await };
    let warm = match progress::until(bar, &progress, warming).await {
        Ok(warm) => warm,
        Err(error) => return Examined::failed(findings, "warm-up", error),
    };
    let (took, windows, loss) = (
        began.elapsed().as_millis(),
        warm.windows,
        warm.baseline_loss,
    );
    findings.push(Finding::ok(
        "warm-up",
        format!(
            "{took} ms: {windows} windows, baseline loss {loss}; it repeats bit for bit, every tensor moves it"
        ),
    ));
    Examined {
        findings,
        facts: json!({
            "model": manifest.name, "version": manifest.version, "dir": dir,
            "package_id": package.package_id, "weights_id": package.weights.weights_id,
            "execution_provider": provider, "device": device, "onnxruntime": onnxruntime,
            "tensors": tensors, "shards": shards,
            "windows": windows, "baseline_loss": loss, "warm_ms": took,
        }),
        fault: None,
    }
}

async fn rabbitmq(config: &Config) -> Finding {
    let advice = "without it a worker is ready for nothing: start it, or mend amqp.url";
    let looking = async {
        let link = Link::connect(&config.amqp, "scorer/check").await?;
        let model = super::model_name(config).ok();
        let queue = model.map(|model| Topology::new(&config.amqp, &model).jobs_queue());
        let depth = match &queue {
            Some(queue) => link.depth(queue).await,
            None => Ok(None),
        };
        link.close().await;
        Ok::<_, BrokerError>(match (depth?, queue) {
            (Some((jobs, consumers)), Some(queue)) => {
                format!("{jobs} jobs wait in {queue}, with {consumers} consumers")
            }
            (None, Some(queue)) => format!("{queue} is not there yet, the first worker makes it"),
            (_, None) => "it lets us in".into(),
        })
    };
    service("RabbitMQ", &config.amqp.url, advice, looking).await
}

async fn redis(config: &Config) -> Finding {
    let advice = "without it nobody sees the worker, and results are not found again: start it, or mend redis.url";
    let looking = async {
        store::ping(&config.redis).await?;
        Ok::<_, StoreError>("it lets us in".into())
    };
    service("Redis", &config.redis.url, advice, looking).await
}

/// One that a worker waits for when it is away.
async fn service<E: ToString>(
    part: &'static str,
    url: &str,
    advice: &str,
    looking: impl Future<Output = Result<String, E>>,
) -> Finding {
    let why = match tokio::time::timeout(PATIENCE, looking).await {
        Ok(Ok(found)) => return Finding::ok(part, found),
        Ok(Err(error)) => {
            let why = error.to_string();
            let bare = why.strip_prefix(part).and_then(|w| w.strip_prefix(": "));
            bare.unwrap_or(&why).to_owned()
        }
        Err(_) => format!(
            "{} does not answer within {} s",
            crate::config::redact(url),
            PATIENCE.as_secs()
        ),
    };
    Finding::new(part, Verdict::Warn, why, Some(advice.into()))
}

pub(super) async fn prove(config: &Config, json: bool) -> Outcome {
    let (dir, own) = (model_dir(config)?.clone(), config.clone());
    let proofs = tokio::task::spawn_blocking(move || crate::prove::run(&dir, &own));
    let bar = busy("proving the engine on this machine".into());
    let proofs = proofs.await;
    bar.finish_and_clear();
    let proofs = proofs.map_err(Fault::internal)?.map_err(|e| fault(&e))?;
    let exit = if proofs.iter().all(|proof| proof.holds) {
        Exit::Done
    } else {
        Exit::Negative
    };
    if json {
        answer_json(&json!({
            "execution_provider": config.engine.execution_provider.execution_provider(),
            "device": device_name(config),
            "onnxruntime": library_version(&config.engine),
            "proofs": proofs,
        }))?;
        return Ok(exit);
    }
    let line = |proof: &crate::prove::Proof| {
        let verdict = if proof.holds { "holds" } else { "FAILS" };
        format!("{verdict}  {:<32} {}", proof.name, proof.found)
    };
    let lines: Vec<String> = proofs.iter().map(line).collect();
    answer(&lines.join("\n"))?;
    Ok(exit)
}

fn model_dir(config: &Config) -> Result<&PathBuf, Fault> {
    let unset = || {
        Fault::new(
            Exit::Usage,
            "model.dir: not set; it names the model package",
        )
    };
    config.model.dir.as_ref().ok_or_else(unset)
}
