//! `scorer submit`: publishes jobs as an aggregator does, and waits for their results on request.

mod collected;
mod described;
mod fleet;
mod job;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::merge::{MemberArg, check_members, member, named};
use super::offline::{StopArgs, WindowArgs, word};
use super::topology::link;
use super::{Exit, Fault, Outcome, answer, model_name};
use crate::broker::amqp::Link;
use crate::broker::topology::Topology;
use crate::broker::{Properties, PublishError};
use crate::config::units::parse_duration;
use crate::config::{Config, format_duration};
use crate::protocol::encoding::Encoding;
use crate::protocol::job::{Compression, Format, Semantics};
use crate::protocol::merge::OnRejected;
use collected::Collected;
use described::{describe, describe_merge, version};
use fleet::Fleet;
use job::{Submission, read_jobs};

#[derive(Debug, Args)]
pub(super) struct SubmitArgs {
    /// File or URL of a candidate; repeatable.
    #[arg(long, value_name = "FILE|URL")]
    candidate: Vec<String>,
    /// Submit one merge job of this name, of the members.
    #[arg(long, value_name = "ID", requires = "members", value_parser = named)]
    merge: Option<String>,
    /// Name and file or URL of a member of the merge, and its weight [default: 1 / members]; repeatable.
    #[arg(long = "member", value_name = "ID=FILE|URL[:WEIGHT]", requires = "merge", value_parser = member, conflicts_with = "candidate")]
    members: Vec<MemberArg>,
    /// When a member of the merge is refused: `drop` it, with the weights of the others as they are, or `fail`.
    #[arg(long, requires = "merge", value_parser = word::<OnRejected>)]
    on_rejected: Option<OnRejected>,
    /// File with one JSON job per line, or `-` for standard input.
    #[arg(long, value_name = "FILE|-", conflicts_with_all = ["candidate", "merge"])]
    jobs: Option<PathBuf>,
    /// Format of the candidates: `binary_v2`, `safetensors` or `pt_chunks`.
    #[arg(long, default_value = "binary_v2", value_parser = word::<Format>)]
    format: Format,
    /// Compression of the whole file: `zstd`.
    #[arg(long, value_parser = word::<Compression>)]
    compression: Option<Compression>,
    /// Meaning of the values: `gradient` or `param_diff`.
    #[arg(long, value_parser = word::<Semantics>)]
    semantics: Option<Semantics>,
    /// Learning rate; required for gradients.
    #[arg(long)]
    learning_rate: Option<f64>,
    /// Version of the weights that the candidates were made from [default: the version in `model.dir`].
    #[arg(long)]
    model_version: Option<u64>,
    #[command(flatten)]
    windows: WindowArgs,
    #[command(flatten)]
    stop: StopArgs,
    /// JSON object that is returned with the result.
    #[arg(long, value_name = "JSON")]
    context: Option<String>,
    /// Put the candidates' bytes into the jobs, even if they are large or come from a URL. Without it a job carries a file
    /// of at most `candidates.max_inline_bytes`; for what is larger, or comes from a URL, it carries the URL, `file://` for a
    /// file, which the workers must be able to read and `candidates.allow` must cover.
    #[arg(long)]
    inline: bool,
    /// AMQP priority of the jobs, 0 to 255: from RabbitMQ 4.0 on, higher ones are delivered first; 4 is what a job has
    /// without one.
    #[arg(long, value_name = "N")]
    priority: Option<u8>,
    /// Wait for the results and print them; says what it waits for while no worker is ready.
    #[arg(long)]
    wait: bool,
    /// Longest time to wait, such as `5m` [default: no limit].
    #[arg(long, requires = "wait", value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// Print the results as JSON, one per line.
    #[arg(long)]
    json: bool,
}

pub(super) async fn submit(config: &Config, args: SubmitArgs) -> Outcome {
    match (&args.stop.stop, &args.jobs, &args.merge) {
        (Some(_), Some(_), _) => {
            return Err(Fault::usage(
                "--stop: not with --jobs, where each job says so itself, in validation.stop",
            ));
        }
        (Some(_), None, Some(_)) => {
            return Err(Fault::usage("--stop: a merge is always measured whole"));
        }
        (Some(_), None, None) | (None, _, _) => {}
    }
    if args.merge.is_some() {
        check_members(&args.members, config.candidates.max_members)?;
    }
    let model = model_name(config)?;
    let jobs = match (&args.jobs, &args.merge) {
        (Some(path), _) => read_jobs(path)?,
        (None, Some(id)) => vec![describe_merge(config, &args, id).await?],
        (None, None) => describe(config, &args).await?,
    };
    if jobs.is_empty() {
        return Err(Fault::usage(
            "nothing to submit: give --candidate, --merge or --jobs",
        ));
    }
    let (link, topology) = link(config, &model).await?;
    let fleet = Fleet::new(config, &model);
    let version = args.jobs.is_none().then(|| version(config, &args));
    fleet.describe(version.transpose()?).await;
    let outcome = exchange(&link, &topology, &jobs, &args, fleet).await;
    link.close().await;
    outcome
}

async fn exchange(
    link: &Link,
    topology: &Topology,
    jobs: &[Submission],
    args: &SubmitArgs,
    mut fleet: Fleet<'_>,
) -> Outcome {
    if !args.wait {
        let sent = publish_all(link, topology, jobs, (args.priority, None)).await;
        sent.map_err(|(_, fault)| fault)?;
        let queue = topology.jobs_queue();
        return answer(&format!("{} jobs submitted to {queue}", jobs.len()));
    }
    let subscribed = link.subscribe(&topology.results_exchange(), &[]).await;
    let (queue, deliveries) = subscribed.map_err(Fault::unavailable)?;
    let sending = publish_all(link, topology, jobs, (args.priority, Some(&queue)));
    let mut collected = Collected::new(jobs, args.json);
    let limit = args.timeout.unwrap_or(Duration::MAX);
    let bar = collected.bar.clone();
    let collecting = collected.fill(jobs, sending, deliveries, &link.lost);
    let ended = tokio::select! {
        ended = tokio::time::timeout(limit, collecting) => ended,
        never = fleet.tell(&bar) => match never {},
    };
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
            let waited_for = fleet.said.map(|why| format!("; {why}"));
            let text = format!(
                "--timeout {} has passed{}{}",
                format_duration(limit),
                without(),
                waited_for.unwrap_or_default()
            );
            Err(Fault::unavailable(text))
        }
        Ok(Err(fault)) => Err(Fault::new(fault.exit, fault.message + &without())),
        Ok(Ok(())) => Ok(Exit::of_answer(collected.all_scored)),
    }
}

/// Publishes one job after the other. The error says how many were published before it.
async fn publish_all(
    link: &Link,
    topology: &Topology,
    jobs: &[Submission],
    with: (Option<u8>, Option<&str>),
) -> Result<(), (usize, Fault)> {
    for (at, job) in jobs.iter().enumerate() {
        if let Err(error) = publish(link, topology, job, with).await {
            let (id, all) = (&job.id, jobs.len());
            let text = format!("job {id}: {error}; {at} of {all} jobs were submitted");
            return Err((at, Fault::unavailable(text)));
        }
    }
    Ok(())
}

async fn publish(
    link: &Link,
    topology: &Topology,
    job: &Submission,
    (priority, reply_to): (Option<u8>, Option<&str>),
) -> Result<(), PublishError> {
    let properties = Properties {
        content_type: Some(Encoding::Json.content_type().into()),
        message_id: Some(job.id.clone()),
        correlation_id: Some(job.id.clone()),
        reply_to: reply_to.map(str::to_owned),
        timestamp: Some(crate::util::clock::unix_ms() / 1000),
        priority,
        attempt: 1,
        ..Properties::default()
    };
    let outgoing = topology.job(job.body.clone().into_bytes(), properties);
    link.jobs.publish(outgoing).await
}
