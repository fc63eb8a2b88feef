//! `scorer submit`: publishes jobs as an aggregator does, and waits for their results if asked.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::offline::{rule, word};
use super::{Exit, Fault, Outcome, answer, control, model_name};
use crate::broker::amqp::{Deliveries, Link};
use crate::broker::topology::Topology;
use crate::broker::{Outgoing, Properties, PublishError};
use crate::config::Config;
use crate::job::{Encoding, Format, Semantics};

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
        None => describe(config, &args)?,
    };
    if jobs.is_empty() {
        return Err(Fault::new(
            Exit::Usage,
            "nothing to submit: give --candidate or --jobs",
        ));
    }
    let (link, topology) = control::link(config, &model).await?;
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
        Some((_, deliveries)) => collect(deliveries, jobs, args.json).await,
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

async fn collect(mut deliveries: Deliveries, jobs: &[Value], as_json: bool) -> Outcome {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} results, {elapsed}")
        .map_err(Fault::internal)?;
    let bar = ProgressBar::new(jobs.len() as u64).with_style(style);
    bar.enable_steady_tick(Duration::from_millis(200));
    // Several jobs may share a name; every one is answered.
    let mut waiting: HashMap<String, usize> = HashMap::new();
    for job in jobs {
        *waiting
            .entry(job["submission_id"].as_str().unwrap_or_default().to_owned())
            .or_default() += 1;
    }
    let mut all_scored = true;
    let mut lines = Vec::with_capacity(jobs.len());
    while !waiting.is_empty() {
        let Some(delivery) = deliveries.next().await else {
            return Err(Fault::new(
                Exit::Unavailable,
                "the link to the broker was lost while waiting for results",
            ));
        };
        let result: Value = serde_json::from_slice(&delivery.body).map_err(Fault::internal)?;
        let id = result["submission_id"].as_str().unwrap_or_default();
        // A redelivery's second copy is no second answer.
        let Some(count) = waiting.get_mut(id) else {
            continue;
        };
        *count -= 1;
        if *count == 0 {
            waiting.remove(id);
        }
        all_scored &= result["status"] == "scored";
        lines.push(if as_json {
            result.to_string()
        } else {
            line(&result)
        });
        bar.inc(1);
    }
    bar.finish_and_clear();
    answer(&lines.join("\n"))?;
    Ok(if all_scored {
        Exit::Done
    } else {
        Exit::Negative
    })
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

fn describe(config: &Config, args: &SubmitArgs) -> Result<Vec<Value>, Fault> {
    let semantics = args
        .semantics
        .ok_or_else(|| Fault::new(Exit::Usage, "--semantics: missing, gradient or param_diff"))?;
    rule(semantics, args.learning_rate)?;
    let version = match (args.model_version, &config.model.dir) {
        (Some(version), _) => version,
        (None, Some(dir)) => {
            crate::package::Package::read_manifest(dir)
                .map_err(data)?
                .0
                .version
        }
        (None, None) => {
            return Err(Fault::new(
                Exit::Usage,
                "--model-version: missing, and model.dir names no package",
            ));
        }
    };
    let context: Option<Map<String, Value>> = args
        .context
        .as_deref()
        .map(serde_json::from_str)
        .transpose()
        .map_err(|e| data(format!("--context: {e}")))?;
    args.candidate
        .iter()
        .map(|place| {
            let (name, mut candidate) = candidate(config, place, args.inline)?;
            candidate.insert("format".into(), json!(args.format.as_str()));
            candidate.insert("semantics".into(), json!(semantics.as_str()));
            if let Some(rate) = args.learning_rate {
                candidate.insert("learning_rate".into(), json!(rate));
            }
            let mut job = json!({
                "v": 1, "kind": "score", "submission_id": name, "model_version": version,
                "candidate": candidate, "validation": { "nonce": args.nonce },
            });
            if let Some(shards) = &args.shards {
                job["validation"]["shards"] = json!(shards);
            }
            if let Some(context) = &context {
                job["context"] = json!(context);
            }
            Ok(job)
        })
        .collect()
}

/// A name for the job, and where its candidate's bytes are.
fn candidate(
    config: &Config,
    place: &str,
    inline: bool,
) -> Result<(String, Map<String, Value>), Fault> {
    use base64::Engine as _;
    if place.contains("://") {
        return Err(Fault::new(
            Exit::Usage,
            format!(
                "--candidate {place}: a URL needs its sha256 and size; give the whole job with --jobs"
            ),
        ));
    }
    let path = Path::new(place)
        .canonicalize()
        .map_err(|e| data(format!("--candidate {place}: {e}")))?;
    let bytes = std::fs::read(&path).map_err(|e| data(format!("--candidate {place}: {e}")))?;
    let mut fields = Map::new();
    fields.insert("sha256".into(), json!(hex::encode(Sha256::digest(&bytes))));
    fields.insert("size".into(), json!(bytes.len()));
    if inline || bytes.len() as u64 <= config.candidates.max_inline_bytes {
        fields.insert(
            "data".into(),
            json!(base64::engine::general_purpose::STANDARD.encode(&bytes)),
        );
    } else {
        let url = url::Url::from_file_path(&path)
            .map_err(|()| data(format!("--candidate {place}: not a path")))?;
        fields.insert("url".into(), json!(url.as_str()));
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let name: String = stem
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "._:-".contains(c) {
                c
            } else {
                '-'
            }
        })
        .take(120)
        .collect();
    Ok((name, fields))
}
