//! `scorer submit`: publishes jobs as an aggregator does, and waits for their results if asked.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

use super::offline::{rule, word};
use super::topology::link;
use super::{Exit, Fault, Outcome, answer, model_name};
use crate::broker::amqp::{Deliveries, Link};
use crate::broker::topology::Topology;
use crate::broker::{Outgoing, Properties, PublishError};
use crate::candidate::fetch::{Fetched, Fetcher};
use crate::config::units::parse_duration;
use crate::config::{CandidatesConfig, Config, format_duration};
use crate::failure::{Code, Failure};
use crate::job::{Candidate, Compression, Encoding, Format, Rule, Semantics, Source};

#[derive(Debug, Args)]
pub(super) struct SubmitArgs {
    /// A candidate's file or URL; repeatable.
    #[arg(long, value_name = "FILE|URL")]
    candidate: Vec<String>,
    /// One job object per line, or `-` for standard input.
    #[arg(long, value_name = "FILE|-", conflicts_with = "candidate")]
    jobs: Option<PathBuf>,
    /// The candidates' container.
    #[arg(long, default_value = "binary_v2", value_parser = word::<Format>)]
    format: Format,
    /// Of the whole files: `zstd`.
    #[arg(long, value_parser = word::<Compression>)]
    compression: Option<Compression>,
    /// What their values mean.
    #[arg(long, value_parser = word::<Semantics>)]
    semantics: Option<Semantics>,
    /// Required for gradients.
    #[arg(long)]
    learning_rate: Option<f64>,
    /// The version they were made from; default the package's in `model.dir`.
    #[arg(long)]
    model_version: Option<u64>,
    /// Chooses the windows.
    #[arg(long, default_value = "")]
    nonce: String,
    /// Shard ids, comma-separated; default all.
    #[arg(long, value_delimiter = ',')]
    shards: Option<Vec<u64>>,
    /// An object that comes back with the result.
    #[arg(long, value_name = "JSON")]
    context: Option<String>,
    /// Send files' bytes in the job instead of a file:// URL.
    #[arg(long)]
    inline: bool,
    /// Wait for the results and print them.
    #[arg(long)]
    wait: bool,
    /// Wait no longer than this, such as `5m`; default for as long as it takes.
    #[arg(long, requires = "wait", value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// Print results as JSON, one line each.
    #[arg(long)]
    json: bool,
}

fn data(message: impl std::fmt::Display) -> Fault {
    Fault::new(Exit::Data, message)
}

pub(super) async fn submit(config: &Config, args: SubmitArgs) -> Outcome {
    let model = model_name(config)?;
    let jobs = match &args.jobs {
        Some(path) => read_jobs(path)?,
        None => describe(config, &args).await?,
    };
    if jobs.is_empty() {
        return Err(Fault::new(
            Exit::Usage,
            "nothing to submit: give --candidate or --jobs",
        ));
    }
    let (link, topology) = link(config, &model).await?;
    let outcome = exchange(&link, &topology, &jobs, &args).await;
    link.close().await;
    outcome
}

async fn exchange(link: &Link, topology: &Topology, jobs: &[Value], args: &SubmitArgs) -> Outcome {
    let unavailable = |e: &dyn std::fmt::Display| Fault::new(Exit::Unavailable, e);
    let replies = match args.wait {
        true => Some(
            link.subscribe(&topology.results_exchange(), &[])
                .await
                .map_err(|e| unavailable(&e))?,
        ),
        false => None,
    };
    let reply_to = replies.as_ref().map(|(queue, _)| queue.as_str());
    for job in jobs {
        publish(link, topology, job, reply_to).await?;
    }
    match replies {
        None => answer(&format!(
            "{} jobs submitted to {}",
            jobs.len(),
            topology.jobs_queue()
        )),
        Some((_, deliveries)) => collect(deliveries, jobs, args).await,
    }
}

async fn publish(
    link: &Link,
    topology: &Topology,
    job: &Value,
    reply_to: Option<&str>,
) -> Result<(), Fault> {
    let id = job["submission_id"].as_str().unwrap_or_default();
    let outgoing = Outgoing {
        exchange: topology.jobs_exchange(),
        routing_key: topology.model.clone(),
        body: Encoding::Json.encode(job).map_err(Fault::internal)?,
        properties: Properties {
            content_type: Some(Encoding::Json.content_type().into()),
            message_id: Some(id.to_owned()),
            correlation_id: Some(id.to_owned()),
            reply_to: reply_to.map(str::to_owned),
            timestamp: Some(crate::clock::unix_ms() / 1000),
            headers: Vec::new(),
            attempt: 1,
        },
        mandatory: true,
    };
    match link.jobs.publish(outgoing).await {
        Ok(()) => Ok(()),
        Err(error @ (PublishError::Refused(_) | PublishError::Lost(_))) => {
            Err(Fault::new(Exit::Unavailable, format!("job {id}: {error}")))
        }
    }
}

/// Results as they come, and the jobs that still wait for theirs.
struct Collected {
    /// Several jobs may share a name; every one is answered.
    waiting: BTreeMap<String, usize>,
    results: Vec<Value>,
}

impl Collected {
    fn new(jobs: &[Value]) -> Self {
        let mut waiting = BTreeMap::new();
        for job in jobs {
            let id = job["submission_id"].as_str().unwrap_or_default();
            *waiting.entry(id.to_owned()).or_default() += 1;
        }
        Self {
            waiting,
            results: Vec::with_capacity(jobs.len()),
        }
    }

    /// False for a redelivery's second copy, which is no second answer.
    fn take(&mut self, result: Value) -> bool {
        let id = result["submission_id"].as_str().unwrap_or_default();
        let Some(count) = self.waiting.get_mut(id) else {
            return false;
        };
        *count -= 1;
        if *count == 0 {
            self.waiting.remove(id);
        }
        self.results.push(result);
        true
    }

    async fn fill(&mut self, mut deliveries: Deliveries, bar: &ProgressBar) -> Result<(), Fault> {
        while !self.waiting.is_empty() {
            let Some(delivery) = deliveries.next().await else {
                let lost = "the link to the broker was lost while waiting for results";
                return Err(Fault::new(Exit::Unavailable, lost));
            };
            let result = serde_json::from_slice(&delivery.body).map_err(Fault::internal)?;
            if self.take(result) {
                bar.inc(1);
            }
        }
        Ok(())
    }
}

/// Whatever ends the wait, the results that came are printed.
async fn collect(deliveries: Deliveries, jobs: &[Value], args: &SubmitArgs) -> Outcome {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} results, {elapsed}")
        .map_err(Fault::internal)?;
    let bar = ProgressBar::new(jobs.len() as u64).with_style(style);
    bar.enable_steady_tick(Duration::from_millis(200));
    let mut collected = Collected::new(jobs);
    let limit = args.timeout.unwrap_or(Duration::MAX);
    let ended = tokio::time::timeout(limit, collected.fill(deliveries, &bar)).await;
    bar.finish_and_clear();
    let shown = |result: &Value| match args.json {
        true => result.to_string(),
        false => line(result),
    };
    let lines: Vec<String> = collected.results.iter().map(shown).collect();
    if !lines.is_empty() {
        answer(&lines.join("\n"))?;
    }
    let missing: Vec<&str> = collected.waiting.keys().map(String::as_str).collect();
    let without = format!("without a result: {}", missing.join(", "));
    match ended {
        Err(_) => Err(Fault::new(
            Exit::Unavailable,
            format!("--timeout {} has passed; {without}", format_duration(limit)),
        )),
        Ok(Err(fault)) => Err(Fault::new(
            fault.exit,
            format!("{}; {without}", fault.message),
        )),
        Ok(Ok(())) if collected.results.iter().all(|r| r["status"] == "scored") => Ok(Exit::Done),
        Ok(Ok(())) => Ok(Exit::Negative),
    }
}

fn line(result: &Value) -> String {
    let id = result["submission_id"].as_str().unwrap_or_default();
    match (
        &result["status"],
        result["delta"].as_f64(),
        result["stderr"].as_f64(),
    ) {
        (_, Some(delta), Some(stderr)) => format!("{id}  scored  delta {delta:+.6} +- {stderr:.6}"),
        (_, Some(delta), None) => format!("{id}  scored  delta {delta:+.6}"),
        (_, None, _) if result["loss"].is_number() => format!("{id}  loss {}", result["loss"]),
        (status, None, _) => format!(
            "{id}  {}  {}: {}",
            status.as_str().unwrap_or_default(),
            result["error"]["code"].as_str().unwrap_or_default(),
            result["error"]["message"].as_str().unwrap_or_default()
        ),
    }
}

fn read_jobs(path: &Path) -> Result<Vec<Value>, Fault> {
    let mut text = String::new();
    let read = if path == Path::new("-") {
        std::io::stdin().read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|mut file| file.read_to_string(&mut text))
    };
    read.map_err(|e| data(format!("--jobs {}: {e}", path.display())))?;
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(at, line)| {
            read_job(line).map_err(|e| data(format!("--jobs {}:{}: {e}", path.display(), at + 1)))
        })
        .collect()
}

/// A line is published as it is, so that refusals can be seen; it only must have a name.
fn read_job(line: &str) -> Result<Value, String> {
    let job: Value = serde_json::from_str(line).map_err(|e| e.to_string())?;
    match job["submission_id"].as_str() {
        Some(_) => Ok(job),
        None => Err("submission_id: missing, its result could not be told from others".into()),
    }
}

async fn describe(config: &Config, args: &SubmitArgs) -> Result<Vec<Value>, Fault> {
    let semantics = args
        .semantics
        .ok_or_else(|| Fault::new(Exit::Usage, "--semantics: missing, gradient or param_diff"))?;
    rule(semantics, args.learning_rate)?;
    let version = version(config, args)?;
    let context: Option<Map<String, Value>> = args
        .context
        .as_deref()
        .map(serde_json::from_str)
        .transpose()
        .map_err(|e| data(format!("--context: {e}")))?;
    let mut names: HashMap<String, usize> = HashMap::new();
    let mut jobs = Vec::with_capacity(args.candidate.len());
    for place in &args.candidate {
        let (stem, mut candidate) = candidate(config, place, args.inline).await?;
        candidate.insert("format".into(), json!(args.format.as_str()));
        if let Some(compression) = args.compression {
            candidate.insert("compression".into(), json!(compression));
        }
        candidate.insert("semantics".into(), json!(semantics.as_str()));
        if let Some(rate) = args.learning_rate {
            candidate.insert("learning_rate".into(), json!(rate));
        }
        let mut job = json!({
            "v": 1, "kind": "score", "submission_id": unique(stem, &mut names), "model_version": version,
            "candidate": candidate, "validation": { "nonce": args.nonce },
        });
        if let Some(shards) = &args.shards {
            job["validation"]["shards"] = json!(shards);
        }
        if let Some(context) = &context {
            job["context"] = json!(context);
        }
        jobs.push(job);
    }
    Ok(jobs)
}

fn version(config: &Config, args: &SubmitArgs) -> Result<u64, Fault> {
    match (args.model_version, &config.model.dir) {
        (Some(version), _) => Ok(version),
        (None, Some(dir)) => {
            let read = crate::package::Package::read_manifest(dir);
            read.map(|(manifest, _)| manifest.version).map_err(data)
        }
        (None, None) => Err(Fault::new(
            Exit::Usage,
            "--model-version: missing, and model.dir names no package",
        )),
    }
}

/// The second candidate of a name gets `-2`: results are told apart by the name.
fn unique(stem: String, names: &mut HashMap<String, usize>) -> String {
    let count = names.entry(stem.clone()).or_default();
    *count += 1;
    match *count {
        1 => stem,
        n => format!("{stem}-{n}"),
    }
}

/// A name for the job, and where its candidate's bytes are.
async fn candidate(
    config: &Config,
    place: &str,
    inline: bool,
) -> Result<(String, Map<String, Value>), Fault> {
    use base64::Engine as _;
    let url = match place.contains("://") {
        true => url::Url::parse(place).map_err(|e| data(format!("--candidate {place}: {e}")))?,
        false => {
            let path = Path::new(place)
                .canonicalize()
                .map_err(|e| data(format!("--candidate {place}: {e}")))?;
            url::Url::from_file_path(&path)
                .map_err(|()| data(format!("--candidate {place}: not a path")))?
        }
    };
    let fetched = fetch(config, &url).await;
    let fetched = fetched.map_err(|e| data(format!("--candidate {place}: {}", e.message)))?;
    let mut fields = Map::new();
    fields.insert("sha256".into(), json!(hex::encode(fetched.sha256)));
    fields.insert("size".into(), json!(fetched.bytes.len()));
    let small = fetched.bytes.len() as u64 <= config.candidates.max_inline_bytes;
    if inline || (small && !place.contains("://")) {
        let base64 = base64::engine::general_purpose::STANDARD;
        fields.insert("data".into(), json!(base64.encode(&fetched.bytes)));
    } else {
        fields.insert("url".into(), json!(url.as_str()));
    }
    Ok((name(&url), fields))
}

/// Size and digest have to be known, so the bytes are fetched once here, from wherever the user
/// of the command says.
async fn fetch(config: &Config, url: &url::Url) -> Result<Fetched, Failure> {
    let limits = CandidatesConfig {
        allow: vec![url.as_str().to_owned()],
        allow_private: true,
        ..config.candidates.clone()
    };
    let wanted = Candidate {
        format: Format::BinaryV2,
        compression: None,
        rule: Rule::ParamDiff,
        source: Source::Url(url.as_str().to_owned()),
        sha256: None,
        size: None,
    };
    let fetcher = Fetcher::new(limits, None);
    let fetcher = fetcher.map_err(|e| Failure::new(Code::CandidateUnavailable, e.to_string()))?;
    fetcher.fetch(&wanted, None).await
}

/// The last part of the path, without its ending, in the characters of a `submission_id`.
fn name(url: &url::Url) -> String {
    let last = url.path_segments().and_then(|mut parts| parts.next_back());
    let stem = Path::new(last.unwrap_or_default())
        .file_stem()
        .unwrap_or_default();
    let legal = |c: char| {
        if c.is_ascii_alphanumeric() || "._:-".contains(c) {
            c
        } else {
            '-'
        }
    };
    let name: String = stem
        .to_string_lossy()
        .chars()
        .map(legal)
        .take(120)
        .collect();
    if name.is_empty() {
        "candidate".into()
    } else {
        name
    }
}
