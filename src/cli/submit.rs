//! `scorer submit`: publishes jobs as an aggregator does, and waits for their results if asked.

use std::collections::{BTreeMap, HashSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use indicatif::ProgressBar;
use serde_json::{Map, Value, json};
use tokio_util::sync::CancellationToken;

use super::offline::{rule, word};
use super::progress::styled;
use super::topology::link;
use super::{Exit, Fault, Outcome, answer, model_name, plain};
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
    if !args.wait {
        let sent = publish_all(link, topology, jobs, None).await;
        sent.map_err(|(sent, fault)| {
            let text = format!(
                "{}; {sent} of {} jobs were submitted",
                fault.message,
                jobs.len()
            );
            Fault::new(fault.exit, text)
        })?;
        let queue = topology.jobs_queue();
        return answer(&format!("{} jobs submitted to {queue}", jobs.len()));
    }
    let subscribed = link.subscribe(&topology.results_exchange(), &[]).await;
    let (queue, deliveries) = subscribed.map_err(|e| Fault::new(Exit::Unavailable, e))?;
    let sending = publish_all(link, topology, jobs, Some(&queue));
    let mut collected = Collected::new(jobs, args.json);
    let limit = args.timeout.unwrap_or(Duration::MAX);
    let collecting = collected.fill(jobs, sending, deliveries, &link.lost);
    let ended = tokio::time::timeout(limit, collecting).await;
    collected.bar.finish_and_clear();
    let without = || {
        let missing: Vec<&str> = collected.waiting.keys().map(String::as_str).collect();
        match missing.is_empty() {
            true => String::new(),
            false => format!("; without a result: {}", missing.join(", ")),
        }
    };
    match ended {
        Err(_) => {
            let text = format!(
                "--timeout {} has passed{}",
                format_duration(limit),
                without()
            );
            Err(Fault::new(Exit::Unavailable, text))
        }
        Ok(Err(fault)) => Err(Fault::new(fault.exit, fault.message + &without())),
        Ok(Ok(())) if collected.all_scored => Ok(Exit::Done),
        Ok(Ok(())) => Ok(Exit::Negative),
    }
}

/// One after the other; if one fails, how many were taken before it.
async fn publish_all(
    link: &Link,
    topology: &Topology,
    jobs: &[Value],
    reply_to: Option<&str>,
) -> Result<(), (usize, Fault)> {
    for (at, job) in jobs.iter().enumerate() {
        let sent = publish(link, topology, job, reply_to).await;
        sent.map_err(|fault| (at, fault))?;
    }
    Ok(())
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
        Err(
            error
            @ (PublishError::Refused(_) | PublishError::Unroutable(_) | PublishError::Lost(_)),
        ) => Err(Fault::new(Exit::Unavailable, format!("job {id}: {error}"))),
    }
}

/// Results are printed as they come; here are the jobs that still wait for theirs.
struct Collected {
    /// Several jobs may share a name; every one is answered.
    waiting: BTreeMap<String, usize>,
    all_scored: bool,
    json: bool,
    bar: ProgressBar,
}

impl Collected {
    fn new(jobs: &[Value], json: bool) -> Self {
        let mut waiting = BTreeMap::new();
        for job in jobs {
            *waiting.entry(name_of(job)).or_default() += 1;
        }
        let bar = ProgressBar::new(jobs.len() as u64);
        let bar = styled(bar, "{bar:40} {pos}/{len} results, {elapsed}");
        Self {
            waiting,
            all_scored: true,
            json,
            bar,
        }
    }

    /// Whatever happens to the sending, results of what was sent are waited for.
    async fn fill(
        &mut self,
        jobs: &[Value],
        sending: impl Future<Output = Result<(), (usize, Fault)>>,
        mut deliveries: Deliveries,
        lost: &CancellationToken,
    ) -> Result<(), Fault> {
        let gone = || {
            Fault::new(
                Exit::Unavailable,
                "the link to the broker was lost while waiting for results",
            )
        };
        let mut sent = None;
        tokio::pin!(sending);
        while sent.is_none() || !self.waiting.is_empty() {
            tokio::select! {
                biased;
                delivery = deliveries.next() => {
                    let delivery = delivery.ok_or_else(gone)?;
                    let result = serde_json::from_slice(&delivery.body).map_err(Fault::internal)?;
                    self.take(&result)?;
                }
                outcome = &mut sending, if sent.is_none() => {
                    let unsent = outcome.as_ref().err().map_or(jobs.len(), |(at, _)| *at);
                    for job in jobs.iter().skip(unsent) {
                        self.settle(&name_of(job));
                    }
                    sent = Some(outcome.map_err(|(at, fault)| {
                        let text = format!("{}; {at} of {} jobs were submitted", fault.message, jobs.len());
                        Fault::new(fault.exit, text)
                    }));
                }
                () = lost.cancelled() => return Err(gone()),
            }
        }
        sent.unwrap_or(Ok(()))
    }

    /// Prints a result; not a redelivery's second copy, which is no second answer.
    fn take(&mut self, result: &Value) -> Result<(), Fault> {
        if !self.settle(&name_of(result)) {
            return Ok(());
        }
        self.all_scored &= result["status"] == "scored";
        let shown = match self.json {
            true => result.to_string(),
            false => line(result),
        };
        self.bar.inc(1);
        self.bar.suspend(|| answer(&shown)).map(drop)
    }

    /// One job of this name waits no longer; false = none did.
    fn settle(&mut self, name: &str) -> bool {
        let Some(count) = self.waiting.get_mut(name) else {
            return false;
        };
        *count -= 1;
        if *count == 0 {
            self.waiting.remove(name);
        }
        true
    }
}

fn name_of(message: &Value) -> String {
    message["submission_id"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
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
            plain(result["error"]["message"].as_str().unwrap_or_default())
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
    let mut names = HashSet::new();
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
            "v": 1, "kind": "score", "submission_id": unique(&stem, &mut names), "model_version": version,
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

/// The second candidate of a name gets `-2`, or what is free: results are told apart by the name.
fn unique(stem: &str, names: &mut HashSet<String>) -> String {
    let numbered = (2..).map(|n| format!("{stem}-{n}"));
    let mut all = std::iter::once(stem.to_owned()).chain(numbered);
    let free = all.find(|name| !names.contains(name)).unwrap_or_default();
    names.insert(free.clone());
    free
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
    let fetched = fetched.map_err(|e| {
        let whose = match e.code == Code::CandidateTooLarge {
            true => " (of this command; the workers have limits of their own)",
            false => "",
        };
        data(format!("--candidate {place}: {}{whose}", e.message))
    })?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_jobs_get_one_name() {
        let mut names = HashSet::new();
        let given = ["a", "a", "a-2", "a", "b"].map(|stem| unique(stem, &mut names));
        assert_eq!(given, ["a", "a-2", "a-2-2", "a-3", "b"]);
    }
}
