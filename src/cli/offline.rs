//! Commands that need neither broker nor Redis: score, validate, package.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::shortage::shortage;
use super::{Exit, Fault, Outcome, answer, answer_json, busy, complain, format, signals};
use crate::candidate::fetch::Fetcher;
use crate::config::Config;
use crate::engine::EngineError;
use crate::engine::thread::EngineHandle;
use crate::engine::trial::{Trial, trial};
use crate::model::build::{Recipe, Unfinished, build};
use crate::model::manifest::{Objective, PackageError};
use crate::model::package::Package;
use crate::model::plan::Plan;
use crate::protocol::failure::Status;
use crate::protocol::job::{
    Candidate, Compression, Format, Job, Rule, Semantics, Source, Task, Validation,
};
use crate::protocol::result::{JobRef, ResultMessage};
use crate::protocol::state::Detail;
use crate::protocol::stop::Stop;
use crate::scoring::pipeline::{Judged, Pipeline};
use crate::telemetry::status::WorkerStatus;
use crate::telemetry::traces::Trace;

/// Which windows.
#[derive(Debug, Args)]
pub(super) struct WindowArgs {
    /// Seed for the choice of windows.
    #[arg(long, default_value = "")]
    pub(super) nonce: String,
    /// Comma-separated shard ids [default: all].
    #[arg(long, value_delimiter = ',')]
    pub(super) shards: Option<Vec<u64>>,
}

impl From<WindowArgs> for Validation {
    fn from(args: WindowArgs) -> Self {
        Self {
            shards: args.shards,
            nonce: args.nonce,
        }
    }
}

/// Whether an evaluation may end early.
#[derive(Debug, Args)]
pub(super) struct StopArgs {
    /// End the evaluation once it is decided that the candidate does not help.
    ///
    /// ALPHA is how often a candidate that does help may be stopped at most (0.01 is a good choice). With a MARGIN, in
    /// nats per target, an evaluation also ends where the candidate helps less than that. A candidate is never accepted
    /// early.
    ///
    /// Stopping assumes that no window still to be measured gains more than K times the root mean square of the
    /// differences measured so far. Where one candidate may help a few rare windows very much and hurt the rest, ask
    /// for `proven`, or do not stop. K is 8 for a plan of 64 windows, 10 for 256, 14 for 1,024; a plan of fewer than 32
    /// windows is always measured whole.
    #[arg(long, value_name = "ALPHA[,MARGIN[,proven]]", value_parser = stop)]
    pub(super) stop: Option<Stop>,
}

fn stop(text: &str) -> Result<Stop, String> {
    let number = |name: &str, text: &str| {
        let number = text.trim().parse::<f64>();
        number.map_err(|_| format!("{name}: {text:?} is not a number"))
    };
    let mut parts = text.split(',');
    let alpha = number("alpha", parts.next().unwrap_or_default())?;
    let margin = parts.next().map(|part| number("margin", part));
    let proven = match (parts.next().map(str::trim), parts.next()) {
        (None, _) => false,
        (Some("proven"), None) => true,
        (Some(_), _) => return Err("after the margin comes `proven`, or nothing".into()),
    };
    let stop = Stop {
        alpha,
        margin: margin.transpose()?.unwrap_or_default(),
        proven,
    };
    stop.checked().map_err(str::to_owned)
}

/// What a file of a candidate holds.
#[derive(Debug, Args)]
pub(super) struct ContentArgs {
    /// Format of the candidate: `binary_v2`, `safetensors` or `pt_chunks`.
    #[arg(long, value_parser = word::<Format>)]
    pub(super) format: Format,
    /// Compression of the whole file: `zstd`.
    #[arg(long, value_parser = word::<Compression>)]
    pub(super) compression: Option<Compression>,
    /// Meaning of the values: `gradient` or `param_diff`.
    #[arg(long, value_parser = word::<Semantics>)]
    semantics: Semantics,
    /// Learning rate; required for gradients.
    #[arg(long)]
    learning_rate: Option<f64>,
}

impl ContentArgs {
    pub(super) fn rule(&self) -> Result<Rule, Fault> {
        rule(self.semantics, self.learning_rate)
    }
}

#[derive(Debug, Args)]
pub(super) struct ScoreArgs {
    /// Directory of the model package.
    #[arg(long)]
    model: PathBuf,
    /// File of the candidate.
    #[arg(long)]
    candidate: PathBuf,
    #[command(flatten)]
    content: ContentArgs,
    #[command(flatten)]
    windows: WindowArgs,
    #[command(flatten)]
    stop: StopArgs,
}

#[derive(Debug, Args)]
pub(super) struct ValidateArgs {
    /// Directory of the model package.
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    windows: WindowArgs,
}

#[derive(Debug, Args)]
pub(super) struct PackageArgs {
    /// List the tensors of an existing package: names, shape, places in the graph, and whether each moves the
    /// loss.
    #[arg(long, value_name = "DIR", conflicts_with = "BuildArgs")]
    pub(super) list: Option<PathBuf>,
    /// Print the list as JSON.
    #[arg(long, requires = "list")]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) build: Option<BuildArgs>,
}

#[derive(Debug, Args)]
pub(super) struct BuildArgs {
    /// The exported ONNX graph.
    #[arg(long, value_name = "G.onnx")]
    graph: PathBuf,
    /// The training checkpoint: a safetensors file, the index of a sharded checkpoint, or its directory.
    #[arg(long, value_name = "W.safetensors")]
    weights: Option<PathBuf>,
    /// Checkpoint tensors to leave out, such as buffers that the model does not use; `*` matches any
    /// characters; repeatable.
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// Directory of the held-out shards, *.safetensors.
    #[arg(long, value_name = "DIR")]
    shards: PathBuf,
    /// The model's name.
    #[arg(long)]
    name: String,
    /// Version of the weights.
    #[arg(long = "version", id = "model_version")]
    version: u64,
    /// Directory to write the package to.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How the loss is computed: `causal_lm`, or `graph_loss` if the graph itself outputs it.
    #[arg(long, default_value = "causal_lm", value_parser = ["causal_lm", "graph_loss"])]
    objective: String,
    /// Input tokens per window.
    #[arg(long, default_value_t = 128)]
    window: usize,
    /// Windows taken from each row.
    #[arg(long, default_value_t = 1)]
    windows_per_row: usize,
    /// Which token is predicted: 1 = the next, 2 = the one after it.
    #[arg(long, default_value_t = 1)]
    label_shift: usize,
}

impl BuildArgs {
    fn objective(&self) -> Objective {
        if self.objective == "graph_loss" {
            return Objective::GraphLoss {};
        }
        Objective::CausalLm {
            window: self.window,
            windows_per_row: self.windows_per_row,
            label_shift: self.label_shift,
            ignore_index: -100,
        }
    }
}

/// Reads a word of the wire as an argument.
pub(super) fn word<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(json!(text)).map_err(|e| e.to_string())
}

/// The update rule of the arguments, checked as in a job.
pub(super) fn rule(semantics: Semantics, learning_rate: Option<f64>) -> Result<Rule, Fault> {
    Rule::new(semantics, learning_rate)
        .map_err(|why| Fault::usage(format!("--learning-rate: {why}")))
}

pub(super) fn fault(error: &EngineError) -> Fault {
    let exit = if error.detail == Detail::EpUnavailable {
        Exit::Unavailable
    } else {
        Exit::Data
    };
    Fault::new(exit, error)
}

/// What judges without a broker.
pub(super) async fn pipeline(mut config: Config, model: &Path) -> Result<Pipeline, Fault> {
    // No broker waits for the answer.
    config.amqp.consumer_timeout = Duration::MAX;
    // A local file has the limit of a fetched one.
    config.candidates.max_inline_bytes = config.candidates.max_bytes;
    let status = WorkerStatus::default();
    let engine = EngineHandle::load(model, &config, status.progress)
        .await
        .map_err(|e| fault(&e))?;
    let fetcher = Fetcher::new(config.candidates.clone(), config.candidates_dir());
    let fetcher = fetcher.map_err(Fault::internal)?;
    Ok(Pipeline::new(engine, &config, fetcher, "offline", None))
}

async fn judge(
    config: Config,
    model: PathBuf,
    windows: WindowArgs,
    task: impl FnOnce(u64) -> Task,
    name: String,
) -> Outcome {
    let bar = busy(format!("loading {}", model.display()));
    let pipeline = pipeline(config, &model).await?;
    bar.set_message(format!("computing {name}"));
    let job = Job {
        submission_id: name,
        model: None,
        task: task(pipeline.origin().model_version),
        validation: windows.into(),
        deadline_ms: None,
        context: None,
    };
    let job_ref = JobRef::new(&job, 1);
    let judged = pipeline.judge(&job, &job_ref, &Trace::silent()).await;
    bar.finish_and_clear();
    let Judged::Fresh { verdict, .. } = judged else {
        return Err(Fault::internal("a stored result without a store"));
    };
    let message = ResultMessage::new(pipeline.origin(), job_ref, verdict);
    answer_json(&message)?;
    Ok(Exit::of_answer(message.status == Status::Scored))
}

pub(super) async fn score(config: Config, args: ScoreArgs) -> Outcome {
    let rule = args.content.rule()?;
    let named = format!("--candidate {}", args.candidate.display());
    let bytes = std::fs::read(&args.candidate);
    let bytes = bytes.map_err(|e| Fault::data(format!("{named}: {e}")))?;
    format::check(
        &named,
        &bytes,
        (args.content.format, args.content.compression),
    )?;
    let name = args
        .candidate
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let candidate = Candidate {
        format: args.content.format,
        compression: args.content.compression,
        rule,
        source: Source::Inline(bytes.into()),
        sha256: None,
        size: None,
    };
    let task = |model_version| Task::Score {
        model_version,
        candidate: Box::new(candidate),
        stop: args.stop.stop,
    };
    judge(config, args.model, args.windows, task, name).await
}

pub(super) async fn validate(config: Config, args: ValidateArgs) -> Outcome {
    let task = |version| Task::Validate {
        model_version: Some(version),
    };
    judge(config, args.model, args.windows, task, "validate".into()).await
}

/// A signal ends it as it ends any process, but unfinished output is removed first.
pub(super) async fn package(config: Config, args: Option<BuildArgs>) -> Outcome {
    let args = args.ok_or_else(|| Fault::usage("--graph: missing"))?;
    let unfinished = Unfinished::default();
    let end = signals::end().map_err(Fault::internal)?;
    let left = unfinished.clone();
    tokio::spawn(async move {
        let signal = end.await;
        let _removed = left.remove();
        signals::die(signal)
    });
    tokio::task::spawn_blocking(move || make(&config, &args, &unfinished))
        .await
        .map_err(Fault::internal)?
}

fn make(config: &Config, args: &BuildArgs, unfinished: &Unfinished) -> Outcome {
    let recipe = Recipe {
        graph: args.graph.clone(),
        weights: args.weights.clone(),
        exclude: args.exclude.clone(),
        shards: args.shards.clone(),
        name: args.name.clone(),
        version: args.version,
        out: args.out.clone(),
        objective: args.objective(),
    };
    recipe.check().map_err(Fault::usage)?;
    let bar = busy(format!("building {}", args.out.display()));
    let (mut windows, mut few) = (0, None);
    let tried = |package: Package| {
        bar.set_message("trying the package on the CPU");
        let refused = |e: &dyn std::fmt::Display| PackageError(format!("{e}"));
        let plan = Plan::new(&package.shards, None, "", package.cut());
        let plan =
            plan.map_err(|e| refused(&format!("{}: {}", args.shards.display(), e.message)))?;
        windows = plan.windows.len();
        few = shortage(&package.shards, package.cut(), windows);
        match trial(Arc::new(package), &config.engine).map_err(|e| refused(&e))? {
            Trial::Ran(loss) => Ok(vec![format!("tried on the CPU: loss {loss}")]),
            Trial::NotTried(why) => Ok(vec![format!("the package was not tried: {why}")]),
        }
    };
    let built = build(&recipe, unfinished, tried);
    bar.finish_and_clear();
    let built = built.map_err(Fault::data)?;
    for note in &built.notes {
        complain(&format!("note: {note}"));
    }
    if let Some(few) = few {
        complain(&few);
    }
    answer(&format!(
        "{}: {} version {}, {} tensors ({} renamed or transposed by the exporter), {} shards, {windows} windows",
        args.out.display(),
        built.manifest.name,
        built.manifest.version,
        built.manifest.tensors.len(),
        built.moved,
        built.manifest.shards.len(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_is_alpha_then_margin_then_the_word() {
        let of = |alpha, margin, proven| {
            Ok(Stop {
                alpha,
                margin,
                proven,
            })
        };
        assert_eq!(stop("0.01"), of(0.01, 0.0, false));
        assert_eq!(stop("0.05, 1e-4"), of(0.05, 1e-4, false));
        assert_eq!(stop("0.05,0,proven"), of(0.05, 0.0, true));
        for (wrong, named) in [
            ("", "alpha: "),
            ("often", "alpha: "),
            ("0.5", "alpha: "),
            ("nan", "alpha: "),
            ("0.01,", "margin: "),
            ("0.01,-1", "margin: "),
            ("0.01,inf", "margin: "),
            ("0.01,proven", "margin: "),
            ("0.01,0,proof", "after the margin"),
            ("0.01,0,proven,1", "after the margin"),
        ] {
            let why = stop(wrong).unwrap_err();
            assert!(why.starts_with(named), "{wrong:?}: {why}");
        }
    }
}
