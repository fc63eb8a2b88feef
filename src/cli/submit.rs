//! `scorer submit`: publishes jobs as an aggregator does, and waits for their results if asked.

use std::collections::{BTreeMap, HashSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use tokio_util::sync::CancellationToken;

use super::offline::{rule, word};
use super::progress::styled;
use super::topology::link;
use super::{Exit, Fault, Outcome, answer, model_name, plain};
use crate::broker::amqp::{Deliveries, Delivery, Link};
use crate::broker::topology::Topology;
use crate::broker::{Outgoing, Properties, PublishError};
use crate::candidate::fetch::{Claims, Fetched, Fetcher};
use crate::config::units::parse_duration;
use crate::config::{CandidatesConfig, Config, format_duration};
use crate::protocol::encoding::Encoding;
use crate::protocol::failure::{Code, Failure};
use crate::protocol::job::{Compression, Format, Semantics};
use crate::protocol::json as text;

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

/// A job as it is published: of what came as text, every digit is kept.
#[derive(Debug, PartialEq)]
struct Submission {
    id: String,
    body: String,
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

async fn exchange(
    link: &Link,
    topology: &Topology,
    jobs: &[Submission],
    args: &SubmitArgs,
) -> Outcome {
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
    jobs: &[Submission],
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
    job: &Submission,
    reply_to: Option<&str>,
) -> Result<(), Fault> {
    let id = &job.id;
    let outgoing = Outgoing {
        exchange: topology.jobs_exchange(),
        routing_key: topology.model.clone(),
        body: job.body.clone().into_bytes(),
        properties: Properties {
            content_type: Some(Encoding::Json.content_type().into()),
            content_encoding: None,
            message_id: Some(id.clone()),
            correlation_id: Some(id.clone()),
            reply_to: reply_to.map(str::to_owned),
            timestamp: Some(crate::util::clock::unix_ms() / 1000),
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
    fn new(jobs: &[Submission], json: bool) -> Self {
        let mut waiting = BTreeMap::new();
        for job in jobs {
            *waiting.entry(job.id.clone()).or_default() += 1;
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
        jobs: &[Submission],
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
                    self.take(&delivery)?;
                }
                outcome = &mut sending, if sent.is_none() => {
                    let unsent = outcome.as_ref().err().map_or(jobs.len(), |(at, _)| *at);
                    for job in jobs.iter().skip(unsent) {
                        self.settle(&job.id);
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
    fn take(&mut self, delivery: &Delivery) -> Result<(), Fault> {
        let result = delivery.properties.label().decode(&delivery.body);
        let result = serde_json::to_value(result.map_err(Fault::internal)?);
        let result = result.map_err(Fault::internal)?;
        if !self.settle(result["submission_id"].as_str().unwrap_or_default()) {
            return Ok(());
        }
        self.all_scored &= result["status"] == "scored";
        let shown = match self.json {
            // The answer's own text: a context comes back to the digit.
            true => text::compact(&String::from_utf8_lossy(&delivery.body)),
            false => line(&result),
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

fn read_jobs(path: &Path) -> Result<Vec<Submission>, Fault> {
    let mut bytes = Vec::new();
    let read = if path == Path::new("-") {
        std::io::stdin().read_to_end(&mut bytes)
    } else {
        std::fs::File::open(path).and_then(|mut file| file.read_to_end(&mut bytes))
    };
    let named = |why: &dyn std::fmt::Display| data(format!("--jobs {}: {why}", path.display()));
    read.map_err(|e| named(&e))?;
    if matches!(bytes.as_slice(), [0xff, 0xfe, ..] | [0xfe, 0xff, ..]) {
        return Err(named(&"UTF-16 text, it must be UTF-8"));
    }
    let lines = String::from_utf8(bytes).map_err(|_| named(&"not UTF-8 text"))?;
    let lines = lines
        .lines()
        .map(|line| line.trim_start_matches('\u{feff}'));
    let lines = lines
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(at, line)| {
            read_job(line).map_err(|e| data(format!("--jobs {}:{}: {e}", path.display(), at + 1)))
        })
        .collect()
}

/// A line is published as it is, so that refusals can be seen; it only must have a name.
fn read_job(line: &str) -> Result<Submission, String> {
    let job = Encoding::Json.decode(line.as_bytes())?;
    match job["submission_id"].as_str() {
        Some(id) => Ok(Submission {
            id: id.to_owned(),
            body: line.to_owned(),
        }),
        None => Err("submission_id: missing, its result could not be told from others".into()),
    }
}

/// As it was given: it comes back to the digit.
fn read_context(text: &str) -> Result<Box<RawValue>, Fault> {
    let named = |why: &dyn std::fmt::Display| data(format!("--context: {why}"));
    let read = Encoding::Json.decode(text.as_bytes());
    match read.map_err(|e| named(&e))?.is_map() {
        true => serde_json::from_str(text).map_err(|e| named(&e)),
        false => Err(named(&"must be a JSON object")),
    }
}

/// What is made of the command's arguments.
#[derive(Serialize)]
struct Described<'a> {
    #[serde(flatten)]
    job: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    context: Option<&'a RawValue>,
}

async fn describe(config: &Config, args: &SubmitArgs) -> Result<Vec<Submission>, Fault> {
    let semantics = args
        .semantics
        .ok_or_else(|| Fault::new(Exit::Usage, "--semantics: missing, gradient or param_diff"))?;
    rule(semantics, args.learning_rate)?;
    let version = version(config, args)?;
    let context = args.context.as_deref().map(read_context).transpose()?;
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
        let id = unique(&stem, &mut names);
        let mut job = json!({
            "v": 1, "kind": "score", "submission_id": id, "model_version": version,
            "candidate": candidate, "validation": { "nonce": args.nonce },
        });
        if let Some(shards) = &args.shards {
            job["validation"]["shards"] = json!(shards);
        }
        let context = context.as_deref();
        let body = serde_json::to_string(&Described { job, context });
        let body = body.map_err(Fault::internal)?;
        jobs.push(Submission { id, body });
    }
    Ok(jobs)
}

fn version(config: &Config, args: &SubmitArgs) -> Result<u64, Fault> {
    match (args.model_version, &config.model.dir) {
        (Some(version), _) => Ok(version),
        (None, Some(dir)) => {
            let read = crate::model::package::Package::read_manifest(dir);
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
    let fetcher = Fetcher::new(limits, None);
    let fetcher = fetcher.map_err(|e| Failure::new(Code::CandidateUnavailable, e.to_string()))?;
    fetcher.fetch_url(url.as_str(), Claims::default()).await
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

    fn jobs(bytes: &[u8]) -> Result<Vec<Submission>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, bytes).unwrap();
        read_jobs(file.path()).map_err(|fault| fault.message)
    }

    #[test]
    fn a_line_is_published_to_the_digit_whatever_marks_its_beginning() {
        let line = r#"{"submission_id": "a", "v": 1.0, "context": {"a": [1.10, 1e400]}}"#;
        let file = format!(
            "\u{feff}{line}\r\n\n\u{feff}{}\n",
            line.replace("\"a\",", "\"b\",")
        );
        let read = jobs(file.as_bytes()).unwrap();
        assert_eq!(read[0].body, line);
        let names: Vec<_> = read.iter().map(|job| job.id.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
    }

    #[test]
    fn a_file_that_is_no_list_of_jobs_is_named_with_its_line() {
        for (bytes, why) in [
            (&b"\xff\xfe{\0}\0"[..], ": UTF-16 text, it must be UTF-8"),
            (b"\xfe\xff\0{\0}", ": UTF-16 text, it must be UTF-8"),
            (b"{\"submission_id\": \"\xe9\"}", ": not UTF-8 text"),
            (b"\n{\"v\": 1}", ":2: submission_id: missing"),
            (b"[]", ":1: submission_id: missing"),
            (b"{\"submission_id\": null}", ":1: submission_id: missing"),
            (b"{", ":1: not JSON"),
        ] {
            let refused = jobs(bytes).unwrap_err();
            assert!(refused.contains(why), "{refused}");
        }
    }

    #[test]
    fn a_context_goes_into_the_job_as_it_was_given() {
        let given = r#"{"a": [1.10, 1e400, 123456789012345678901234567890]}"#;
        let context = read_context(given).unwrap();
        let job = json!({"v": 1});
        let described = Described {
            job,
            context: Some(&context),
        };
        let body = serde_json::to_string(&described).unwrap();
        assert_eq!(body, format!(r#"{{"v":1,"context":{given}}}"#));
        for unfit in ["[1]", "7", "null", "{", ""] {
            assert_eq!(read_context(unfit).unwrap_err().exit, Exit::Data, "{unfit}");
        }
    }
}
