//! `scorer check`: whether this machine has what a worker needs, in the order in which it needs it; and
//! `--prove`: whether the engine keeps its promises on this machine.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar};
use serde_json::{Value, json};

use super::finding::{Finding, Verdict};
use super::offline::fault;
use super::{Exit, Fault, Outcome, answer, answer_json, busy, progress};
use crate::broker::BrokerError;
use crate::broker::amqp::Link;
use crate::broker::nodes::Nodes;
use crate::broker::topology::Topology;
use crate::config::{Config, device_name};
use crate::engine::EngineError;
use crate::engine::session::{Partition, Placement, hardware, library_version, plugin};
use crate::engine::thread::EngineHandle;
use crate::model::package::{MANIFEST, Package};
use crate::protocol::state::Detail;
use crate::store::{FleetStore, StoreError};
use crate::telemetry::progress::Progress;

/// How long a service, or each node of it, may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// When tensors without effect are expected.
const INERT: &str = "expected of adapters multiplied by zero, closed gates, biases before a normalisation and unused \
                     experts; for other tensors check the export: see \"Inert tensors\" in ops/runbook.md";
/// The part that keeps a worker from becoming ready.
struct Broken {
    part: &'static str,
    error: EngineError,
}

impl Broken {
    fn at(part: &'static str) -> impl Fn(EngineError) -> Self {
        move |error| Self { part, error }
    }

    /// This part fails; those that need it were not checked.
    fn findings(&self, config: &Config) -> Vec<Finding> {
        let (part, error) = (self.part, &self.error);
        let advice = wrong_path(config, part)
            .unwrap_or_else(|| format!("ops/runbook.md explains {}", error.detail));
        let failed = Finding::new(part, Verdict::Fail, error.to_string(), Some(advice));
        let needing: &[_] = match part {
            "package" => &["provider", "warm-up"],
            "warm-up" => &[],
            _ => &["warm-up"],
        };
        let missing = || format!("not checked: it needs the {part}");
        let skipped = needing.iter();
        let skipped = skipped.map(|part| Finding::new(part, Verdict::Skip, missing(), None));
        std::iter::once(failed).chain(skipped).collect()
    }
}

/// What to do about a part whose path leads nowhere: a slip needs no runbook.
fn wrong_path(config: &Config, part: &str) -> Option<String> {
    let engine = &config.engine;
    match part {
        "package" => {
            let dir = config.model.dir.as_ref()?;
            let is_package = dir.join(MANIFEST).exists();
            let advice = "model.dir must name a folder that scorer package wrote";
            (!is_package).then(|| advice.to_owned())
        }
        _ => {
            let variable = std::env::var_os("ORT_DYLIB_PATH").map(PathBuf::from);
            let variable = variable.filter(|_| engine.onnxruntime.is_none());
            let named = [
                ("engine.onnxruntime", &engine.onnxruntime),
                ("ORT_DYLIB_PATH", &variable),
                ("engine.webgpu_plugin", &engine.webgpu_plugin),
            ];
            let mut named = named
                .into_iter()
                .filter_map(|(key, path)| Some((key, path.as_ref()?)));
            let (key, _) = named.find(|(_, path)| !path.exists())?;
            Some(format!("correct {key}"))
        }
    }
}

pub(super) async fn check(config: &Config, json: bool) -> Outcome {
    let dir = model_dir(config)?.clone();
    let bar = busy(format!("reading {}", dir.display()));
    let mut findings = Vec::new();
    let examining = async {
        let examined = examine(config, &dir, &bar, &mut findings).await;
        bar.unset_length();
        progress::name(&bar, "asking RabbitMQ and Redis");
        examined
    };
    let (examined, rabbitmq, redis) = tokio::join!(examining, rabbitmq(config), redis(config));
    bar.finish_and_clear();
    let (mut report, broken) = match examined {
        Ok(facts) => (facts, None),
        Err(broken) => (json!({}), Some(broken)),
    };
    findings.extend(broken.iter().flat_map(|broken| broken.findings(config)));
    findings.extend([rabbitmq, redis]);
    if json {
        report["findings"] = json!(findings);
        answer_json(&report)?;
    } else {
        let lines: Vec<String> = findings.iter().map(Finding::line).collect();
        answer(&lines.join("\n"))?;
    }
    // What is wrong is among the findings.
    Ok(broken.map_or(Exit::Done, |broken| fault(&broken.error).exit))
}

/// Checks everything but the services. Returns the facts for the JSON report.
async fn examine(
    config: &Config,
    dir: &Path,
    bar: &ProgressBar,
    findings: &mut Vec<Finding>,
) -> Result<Value, Broken> {
    let named = format!("valid, worker.id = {}", config.worker_id());
    findings.push(Finding::ok("configuration", named));
    let package = read(config, dir).await?;
    let (manifest, weights) = (&package.manifest, &package.weights);
    let (tensors, shards) = (weights.tensors.len(), package.shards.len());
    let (name, version, place) = (&manifest.name, manifest.version, dir.display());
    let found = format!(
        "{name} version {version} in {place}: {tensors} tensors, {shards} shards, digests match"
    );
    findings.push(Finding::ok("package", found));

    bar.set_message("creating the session");
    let (began, progress) = (Instant::now(), Arc::<Progress>::default());
    let engine = start(config, &package, &progress).await?;
    let onnxruntime = library_version(&config.engine);
    findings.push(provider(config, onnxruntime.as_deref(), &engine));
    findings.push(Finding::ok("graph", divided(&engine.partition)));

    bar.set_message("warming up: changing and restoring every tensor");
    let warming = async { engine.turn().await.warm().await };
    let warm = progress::until(bar, &progress, warming).await;
    let warm = warm.map_err(Broken::at("warm-up"))?;
    let (took, windows, loss) = (
        began.elapsed().as_millis(),
        warm.windows,
        warm.baseline_loss,
    );
    let measured =
        format!("{took} ms: {windows} windows, baseline loss {loss}, repeatable bit for bit, ");
    findings.push(match warm.inert_in_words() {
        None => Finding::ok("warm-up", measured + "every tensor changes it"),
        Some(inert) => {
            let found = measured + &inert;
            Finding::new("warm-up", Verdict::Warn, found, Some(INERT.into()))
        }
    });
    Ok(json!({
        "model": name, "version": version, "dir": dir,
        "package_id": package.package_id, "weights_id": weights.weights_id,
        "execution_provider": config.engine.execution_provider.execution_provider(),
        "device": device_name(config), "onnxruntime": onnxruntime,
        "software_device": engine.facts.software_device, "plugin": plugin(&config.engine),
        "placement": engine.facts.placement, "host_nodes": host_nodes(&engine.placement),
        "parts": engine.facts.parts, "cuts": engine.partition.cuts, "activation_bytes": engine.partition.size.bytes,
        "micro_batch": engine.facts.micro_batch, "class": engine.facts.class,
        "tensors": tensors, "shards": shards,
        "windows": windows, "baseline_loss": loss, "warm_ms": took,
        "inert": warm.named_inert(), "inert_count": warm.inert.len(),
    }))
}

/// What computes, where the graph's nodes are, and where the provider comes from.
fn provider(config: &Config, onnxruntime: Option<&str>, engine: &EngineHandle) -> Finding {
    let (name, device) = (
        config.engine.execution_provider.execution_provider(),
        device_name(config),
    );
    let library = onnxruntime.unwrap_or("of unknown version");
    let plugin = plugin(&config.engine).map(|plugin| {
        let (path, sha256) = (plugin.path.display(), plugin.sha256);
        format!(", plugin {path} (SHA-256 {sha256})")
    });
    let (placement, plugin) = (placed(&engine.placement), plugin.unwrap_or_default());
    let found = format!("{name} on {device}, ONNX Runtime {library}{plugin}; {placement}");
    match engine.facts.software_device {
        false => Finding::ok("provider", found),
        true => {
            let found = format!("{found}; the device is software");
            let advice = "for tests only: a GPU in software is far slower than the provider cpu";
            Finding::new("provider", Verdict::Warn, found, Some(advice.into()))
        }
    }
}

fn placed(placement: &Placement) -> String {
    let (device, host) = (placement.device, placement.host_nodes.len());
    match host {
        0 => format!("all {device} nodes on the device"),
        _ => format!(
            "{device} nodes on the device, {host} on the host, which compute shapes and indices only: {}",
            placement.host_in_words()
        ),
    }
}

fn divided(partition: &Partition) -> String {
    let (cuts, size) = (&partition.cuts, partition.size);
    let bytes = HumanBytes(size.bytes);
    let least = if size.unknown > 0 { "at least " } else { "" };
    match cuts.len() {
        0 => "one part: every candidate is computed from the first layer on".into(),
        cut => format!(
            "{} parts, cut before {}; a micro-batch keeps {least}{bytes} between them",
            cut + 1,
            cuts.join(", ")
        ),
    }
}

fn host_nodes(placement: &Placement) -> Vec<Value> {
    let nodes = placement.host_nodes.iter();
    let nodes = nodes.map(|node| json!({ "name": node.name, "op": node.operator }));
    nodes.collect()
}

async fn read(config: &Config, dir: &Path) -> Result<Arc<Package>, Broken> {
    let unfit =
        |text: String| Broken::at("package")(EngineError::new(Detail::ModelLoadFailed, text));
    let (from, subset) = (dir.to_owned(), config.model.allow_shards_subset);
    let reading = tokio::task::spawn_blocking(move || Package::load(&from, subset, &[]));
    let package = match reading.await {
        Ok(read) => read.map_err(|e| unfit(e.to_string()))?,
        Err(error) => return Err(unfit(error.to_string())),
    };
    let (found, dir) = (&package.manifest.name, dir.display());
    match config.model.name.as_ref().filter(|name| *name != found) {
        None => Ok(Arc::new(package)),
        Some(name) => Err(unfit(format!(
            "{dir}: holds the model {found:?}, but model.name is {name:?}"
        ))),
    }
}

async fn start(
    config: &Config,
    package: &Arc<Package>,
    progress: &Arc<Progress>,
) -> Result<EngineHandle, Broken> {
    let given = Arc::clone(package);
    let started = EngineHandle::start(move || Ok(given), config, Arc::clone(progress)).await;
    let part = |error: &EngineError| match error.detail == Detail::EpUnavailable {
        true => "provider",
        false => "session",
    };
    started.map_err(|error| Broken::at(part(&error))(error))
}

async fn rabbitmq(config: &Config) -> Finding {
    let mut nodes = Nodes::new(&config.amqp).within(PATIENCE);
    let limit = nodes.longest();
    let looking = async {
        let link = Link::connect(&mut nodes, "scorer/check").await;
        let link = link.map_err(no_rabbitmq)?;
        let model = super::model_name(config).ok();
        let queue = model.map(|model| Topology::new(&config.amqp, &model).jobs_queue());
        let depth = match &queue {
            Some(queue) => link.depth(queue).await,
            None => Ok(None),
        };
        link.close().await;
        let depth = depth.map_err(no_rabbitmq)?;
        Ok(match (depth, queue) {
            (Some((jobs, consumers)), Some(queue)) => {
                format!("{jobs} jobs in {queue}, {consumers} consumers")
            }
            (None, Some(queue)) => {
                format!("connected; {queue} does not exist yet, the first worker declares it")
            }
            (_, None) => "connected".into(),
        })
    };
    let place = crate::config::redact_all(&config.amqp.urls);
    service("RabbitMQ", &place, limit, START_RABBITMQ, looking).await
}

const START_RABBITMQ: &str =
    "the worker cannot become ready without RabbitMQ: start it, or correct amqp.url";

/// What to do where RabbitMQ does not do what was asked.
fn no_rabbitmq(error: BrokerError) -> (&'static str, String) {
    (error.advice().unwrap_or(START_RABBITMQ), error.text())
}

async fn redis(config: &Config) -> Finding {
    let looking = async {
        let server = FleetStore::new(&config.redis).greet().await;
        let server = server.map_err(|e| (no_redis(&e), e.to_string()))?;
        Ok(format!("connected, {server}"))
    };
    let place = crate::config::redact_all(&config.redis.urls);
    service("Redis", &place, PATIENCE, START_REDIS, looking).await
}

const START_REDIS: &str = "without Redis the worker is invisible to status, and redelivered jobs are scored again: start it, update it, or correct redis.url";

/// What to do where Redis does not do what was asked. Its driver has no kinds for all of it, but words.
fn no_redis(error: &StoreError) -> &'static str {
    let refused = ["AuthenticationFailed", "NOAUTH", "WRONGPASS", "NOPERM"];
    match refused.iter().any(|word| error.0.contains(word)) {
        true => {
            "Redis answers, and refuses the login: correct the user or the password in redis.url; without Redis the worker \
             is invisible to status, and redelivered jobs are scored again"
        }
        false => START_REDIS,
    }
}

/// Checks a service that a worker waits for while it is away.
async fn service(
    part: &'static str,
    place: &str,
    limit: Duration,
    unanswered: &str,
    looking: impl Future<Output = Result<String, (&str, String)>>,
) -> Finding {
    let (advice, why) = match tokio::time::timeout(limit, looking).await {
        Ok(Ok(found)) => return Finding::ok(part, found),
        Ok(Err((advice, why))) => {
            let bare = why.strip_prefix(part).and_then(|w| w.strip_prefix(": "));
            (advice, bare.unwrap_or(&why).to_owned())
        }
        Err(_) => {
            let seconds = limit.as_secs();
            let why = format!("{place} does not answer within {seconds} s");
            (unanswered, why)
        }
    };
    Finding::new(part, Verdict::Warn, why, Some(advice.into()))
}

pub(super) async fn prove(config: &Config, json: bool) -> Outcome {
    let (dir, own) = (model_dir(config)?.clone(), config.clone());
    let proofs = tokio::task::spawn_blocking(move || crate::selftest::proofs::run(&dir, &own));
    let bar = busy("testing the engine on this machine".into());
    let proofs = proofs.await;
    bar.finish_and_clear();
    let proofs = proofs.map_err(Fault::internal)?.map_err(|e| fault(&e))?;
    let exit = Exit::of_answer(proofs.iter().all(|proof| proof.holds));
    if json {
        answer_json(&json!({
            "execution_provider": config.engine.execution_provider.execution_provider(),
            "device": device_name(config),
            "software_device": hardware(&config.engine).is_software,
            "onnxruntime": library_version(&config.engine),
            "plugin": plugin(&config.engine),
            "proofs": proofs,
        }))?;
        return Ok(exit);
    }
    let line = |proof: &crate::selftest::proofs::Proof| {
        let verdict = if proof.holds { "holds" } else { "FAILS" };
        format!("{verdict}  {:<32} {}", proof.name, proof.found)
    };
    let lines: Vec<String> = proofs.iter().map(line).collect();
    answer(&lines.join("\n"))?;
    Ok(exit)
}

fn model_dir(config: &Config) -> Result<&PathBuf, Fault> {
    let unset = || Fault::usage("model.dir: not set; it must name the model package");
    config.model.dir.as_ref().ok_or_else(unset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Layers;

    fn config(set: &str) -> Config {
        let set = [set.to_owned()];
        let layers = Layers {
            set: &set,
            ..Layers::default()
        };
        Config::load(&layers).unwrap()
    }

    fn advice(config: &Config, part: &'static str, detail: Detail) -> String {
        let error = EngineError::new(detail, "why");
        let found = Broken { part, error }.findings(config);
        found[0].advice.clone().unwrap_or_default()
    }

    #[test]
    fn a_path_that_leads_nowhere_needs_no_runbook() {
        let empty = tempfile::tempdir().unwrap();
        let dir = empty.path().display();
        for dir in [format!("{dir}"), format!("{dir}/nope")] {
            let config = config(&format!("model.dir={dir}"));
            let said = advice(&config, "package", Detail::ModelLoadFailed);
            assert!(said.starts_with("model.dir must name"), "{said}");
        }
        let lost = config(&format!("engine.onnxruntime={dir}/nope"));
        let said = advice(&lost, "provider", Detail::EpUnavailable);
        assert_eq!(said, "correct engine.onnxruntime");
        // What is there and cannot be used is in the runbook.
        std::fs::write(empty.path().join(MANIFEST), "{").unwrap();
        let broken = config(&format!("model.dir={dir}"));
        let said = advice(&broken, "package", Detail::ModelLoadFailed);
        assert_eq!(said, "ops/runbook.md explains model_load_failed");
    }

    #[test]
    fn a_service_that_refuses_the_login_is_not_to_be_started() {
        let why = || "why".to_owned();
        for (error, starts) in [
            (BrokerError::Denied(why()), false),
            (BrokerError::Forbidden(why()), false),
            (BrokerError::Failed(why()), true),
        ] {
            let (advice, _) = no_rabbitmq(error);
            assert_eq!(advice.contains("start it"), starts, "{advice}");
        }
        for (why, starts) in [
            (
                "Password authentication failed - AuthenticationFailed",
                false,
            ),
            ("\"NOAUTH\": Authentication required.", false),
            ("Connection refused (os error 111)", true),
        ] {
            let advice = no_redis(&StoreError(why.into()));
            assert_eq!(advice.contains("start it"), starts, "{why}");
        }
    }
}
