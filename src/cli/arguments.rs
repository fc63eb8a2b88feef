//! The command line: every command with its arguments and help.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use super::{bench, ctl, dashboard, dead, manifest, merge, offline, submit};

/// Shown below the help.
const EXAMPLES: &str = "Examples:
  scorer init demo
  scorer package --graph model.onnx --weights model.safetensors --shards shards --name mine --version 1 --out package
  scorer check --set model.dir=package --set engine.execution_provider=cpu
  scorer score --model package --candidate update.json --format binary_v2 --semantics param_diff
  scorer merge --model package --member a=a.json --member b=b.json --format binary_v2 --semantics param_diff
  scorer run --config scorer.toml
  scorer submit --set model.dir=package --candidate update.json --semantics param_diff --wait
  scorer status --set model.name=mine --watch
  scorer dead list --set model.name=mine --code poisoned
  scorer manifest check --config scorer.toml

Examples of a command: scorer help COMMAND";

/// Scores model updates from a RabbitMQ queue with ONNX Runtime.
#[derive(Debug, Parser)]
#[command(name = "scorer", version, after_help = EXAMPLES)]
pub(super) struct Cli {
    #[command(flatten)]
    pub(super) settings: Settings,
    #[command(subcommand)]
    pub(super) command: Command,
}

/// Where the configuration comes from.
#[derive(Debug, Args)]
pub(super) struct Settings {
    /// TOML file; overrides the built-in defaults.
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Sets one key, such as `engine.execution_provider=cpu`; overrides every other source; repeatable.
    #[arg(long, global = true, value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Makes a folder to begin with: a configuration, services for docker compose, a sample model and candidates.
    #[command(after_help = "Example:
  scorer init demo")]
    Init {
        /// The folder; it must be empty or not exist yet.
        dir: PathBuf,
    },
    /// Runs the worker: warms up, then scores jobs until it is told to drain.
    #[command(after_help = "Examples:
  scorer run --config scorer.toml
  scorer run --set model.dir=package --set engine.execution_provider=cpu --set telemetry.metrics_addr=127.0.0.1:9464")]
    Run,
    /// Checks what a worker needs: the configuration, the package, the execution provider and one warm-up.
    /// Also reports whether RabbitMQ and Redis can be reached, which does not affect the exit code.
    #[command(after_help = "Examples:
  scorer check --config scorer.toml
  scorer check --set model.dir=package --set engine.execution_provider=cpu --prove")]
    Check {
        /// Print the report as JSON.
        #[arg(long)]
        json: bool,
        /// Test the engine on this machine instead: exactness, time-outs, memory. Takes longer.
        #[arg(long)]
        prove: bool,
    },
    /// Lists what each execution provider sees on this machine, and the settings that name it.
    #[command(after_help = "Examples:
  scorer devices
  scorer devices --json")]
    Devices {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Scores one candidate without RabbitMQ or Redis and prints the result as JSON.
    #[command(after_help = "Examples:
  scorer score --model package --candidate a.json --format binary_v2 --semantics gradient --learning-rate 0.1
  scorer score --model package --candidate a.safetensors --format safetensors --semantics param_diff --shards 1,2")]
    Score(offline::ScoreArgs),
    /// Measures what candidates are worth together, and each in the company of the others, without RabbitMQ or Redis,
    /// and prints the result as JSON.
    ///
    /// The weights become `w + sum of weight * d`. Of each member it is measured what it changes alone and what it
    /// changes as the last to join; its contribution is the mean of both, which is its Shapley value where the loss is
    /// quadratic in the weights. A copy contributes less than it would get alone, a complement more. That takes at most
    /// two passes a member, and one.
    ///
    /// `gap` is what the contributions do not sum to. Where it is `large`, beyond 3 % of the largest contribution and
    /// beyond two standard errors, the loss is far from quadratic between the coalitions, as with weights that are far
    /// too large, or with steps so small that rounding decides: the contributions are then a guide, not a measure. A
    /// gap near 0 proves nothing: errors may cancel.
    #[command(after_help = "Examples:
  scorer merge --model package --member a=a.json --member b=b.json --format binary_v2 --semantics param_diff
  scorer merge --model package --member a=a.json:0.5 --member b=b.json:0.25 --format binary_v2 --semantics gradient --learning-rate 0.1")]
    Merge(merge::MergeArgs),
    /// Measures the model's own loss without RabbitMQ or Redis and prints it as JSON.
    #[command(after_help = "Example:
  scorer validate --model package --nonce round-7")]
    Validate(offline::ValidateArgs),
    /// Publishes jobs, as an aggregator does.
    #[command(after_help = "Examples:
  scorer submit --set model.dir=package --candidate a.json --candidate b.json --semantics gradient --learning-rate 0.1 --wait
  scorer submit --set model.name=mine --jobs jobs.ndjson --wait --timeout 5m --json")]
    Submit(submit::SubmitArgs),
    /// Shows the workers and the queue.
    #[command(after_help = "Examples:
  scorer status
  scorer status --set model.name=mine --json
  scorer status --set model.name=mine --watch")]
    Status {
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
        /// Refresh every second.
        #[arg(long)]
        watch: bool,
    },
    /// Serves a read-only web page of the fleet until Ctrl-C; prints its address.
    #[command(after_help = "Examples:
  scorer dashboard
  scorer dashboard --set model.name=mine --listen 0.0.0.0:8088 --contributors miner_id
  scorer dashboard --demo 100")]
    Dashboard(dashboard::DashboardArgs),
    /// Shows the exchanges, queues and bindings.
    #[command(after_help = "Example:
  scorer topology --set model.name=mine --declare")]
    Topology {
        /// Declare them in RabbitMQ first.
        #[arg(long)]
        declare: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Lists, shows, requeues or drops dead-lettered jobs.
    #[command(after_help = "Examples:
  scorer dead list --set model.name=mine
  scorer dead show --set model.name=mine --id miner-7
  scorer dead requeue --set model.name=mine --code candidate_unavailable")]
    Dead(dead::DeadArgs),
    /// Asks workers to pause, resume, drain, look for an update, reload their package or warm up again, and
    /// prints their replies.
    #[command(after_help = "Examples:
  scorer ctl --set model.name=mine pause
  scorer ctl --set model.name=mine drain --worker node7-cuda0")]
    Ctl(ctl::CtlArgs),
    /// Measures the engine against a bare ONNX Runtime session, without RabbitMQ or Redis.
    #[command(after_help = "Examples:
  scorer bench --model package
  scorer bench --synthetic 100m --seconds 60 --json")]
    Bench {
        #[command(flatten)]
        subject: bench::Subject,
        /// Approximate time of the comparison; the throughput test that follows takes half as long.
        #[arg(long, default_value_t = 20)]
        seconds: u64,
        /// Print the report as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Builds a model package, or lists the tensors of one.
    #[command(after_help = "Examples:
  scorer package --graph model.onnx --weights model.safetensors --shards shards --name mine --version 1 --out package
  scorer package --list package")]
    Package(offline::PackageArgs),
    /// Writes and checks the manifest by which workers follow a model's versions: `model.update_url`.
    #[command(after_help = "Examples:
  scorer manifest add models/manifest.json --model package --weights models/full-9.safetensors --version 9 --live
  scorer manifest add models/manifest.json --model package --delta models/9-10.json --format binary_v2 --from 9 --to 10 --key private.pem
  scorer manifest live models/manifest.json 9
  scorer manifest check models/manifest.json --model package")]
    Manifest(manifest::ManifestArgs),
    /// Prints the effective configuration with secrets hidden.
    Config,
    /// Prints a shell completion script: `source <(scorer completions bash)`.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Prints the JSON Schema of a message.
    Schema {
        /// The name of the message, such as `score_job.v1`.
        name: String,
    },
    /// For container probes: exits 0 if the worker on this host is alive, or ready, else 1.
    Healthcheck {
        /// The process answers (default).
        #[arg(long, conflicts_with = "ready")]
        live: bool,
        /// The worker takes jobs.
        #[arg(long)]
        ready: bool,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_example_of_the_help_is_a_command_line() {
        let cli = Cli::command();
        let commands = std::iter::once(&cli).chain(cli.get_subcommands());
        let help = commands.filter_map(|command| command.get_after_help());
        let help: Vec<_> = help.map(ToString::to_string).collect();
        let lines = help.iter().flat_map(|text| text.lines());
        let examples: Vec<_> = lines.filter(|line| line.starts_with("  scorer ")).collect();
        assert!(examples.len() > 20, "{examples:?}");
        for example in examples {
            let parsed = Cli::try_parse_from(example.split_whitespace());
            assert!(parsed.is_ok(), "{example}: {}", parsed.unwrap_err());
        }
    }
}
