//! The command line: what can be asked, and the exit codes. Standard output carries only the
//! answer; logs and progress go to standard error.

mod bench;
mod check;
mod ctl;
mod dashboard;
mod dead;
mod offline;
mod progress;
pub mod schemas;
mod signals;
mod status;
mod submit;
mod topology;
mod watch;

use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand};
use strum::{EnumIter, EnumMessage};

use crate::config::{Config, Layers, LogFormat};
use crate::worker::Stop;
use progress::{AboveFoot, busy};

/// How a command ends; the numbers are the contract's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, EnumIter, EnumMessage)]
pub enum Exit {
    /// Done, or drained.
    Done = 0,
    /// The command's own negative answer.
    Negative = 1,
    /// Bad usage or configuration.
    Usage = 64,
    /// Bad input data.
    Data = 65,
    /// A needed service or device is not there.
    Unavailable = 69,
    /// A fault of ours.
    Internal = 70,
    /// The drain's deadline, or a second signal, cut a computation short.
    CutShort = 75,
}

/// An error that ends a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    exit: Exit,
    message: String,
}

impl Fault {
    fn new(exit: Exit, message: impl std::fmt::Display) -> Self {
        Self {
            exit,
            message: message.to_string(),
        }
    }

    fn internal(error: impl std::fmt::Display) -> Self {
        Self::new(Exit::Internal, error)
    }
}

type Outcome = Result<Exit, Fault>;

/// What to type, after the help.
const EXAMPLES: &str = "Examples:
  scorer package --graph model.onnx --weights model.safetensors --shards shards --name mine --version 1 --out package
  scorer check --set model.dir=package --set engine.execution_provider=cpu
  scorer score --model package --candidate update.json --format binary_v2 --semantics param_diff
  scorer run --config scorer.toml
  scorer submit --set model.dir=package --candidate update.json --semantics param_diff --wait
  scorer status --set model.name=mine --watch
  scorer dead list --set model.name=mine --code poisoned

Each command has its own: scorer help submit";

/// Judges model updates from a RabbitMQ queue with ONNX Runtime.
#[derive(Debug, Parser)]
#[command(name = "scorer", version, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    settings: Settings,
    #[command(subcommand)]
    command: Command,
}

/// Where the configuration comes from.
#[derive(Debug, Args)]
struct Settings {
    /// A TOML file, over the built-in defaults.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// One key, over everything else: `--set engine.execution_provider=cpu`.
    #[arg(long, global = true, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The worker: warms up, then takes jobs until it is drained.
    #[command(after_help = "Examples:
  scorer run --config scorer.toml
  scorer run --set model.dir=package --set engine.execution_provider=cpu --set telemetry.metrics_addr=127.0.0.1:9464")]
    Run,
    /// Checks what a worker needs: configuration, package, execution provider, one warm-up. Says, too,
    /// whether RabbitMQ and Redis let us in, which changes no exit code.
    #[command(after_help = "Examples:
  scorer check --config scorer.toml
  scorer check --set model.dir=package --set engine.execution_provider=cpu --prove")]
    Check {
        /// The report as JSON.
        #[arg(long)]
        json: bool,
        /// Proves the engine on this machine instead: exactness, time-outs, memory. Takes longer.
        #[arg(long)]
        prove: bool,
    },
    /// Scores one candidate, without broker or Redis; prints the result as JSON.
    #[command(after_help = "Examples:
  scorer score --model package --candidate a.json --format binary_v2 --semantics gradient --learning-rate 0.1
  scorer score --model package --candidate a.safetensors --format safetensors --semantics param_diff --shards 1,2")]
    Score(offline::ScoreArgs),
    /// Measures the model's own loss, without broker or Redis.
    #[command(after_help = "Example:
  scorer validate --model package --nonce round-7")]
    Validate(offline::ValidateArgs),
    /// Publishes jobs as an aggregator does.
    #[command(after_help = "Examples:
  scorer submit --set model.dir=package --candidate a.json --candidate b.json --semantics gradient --learning-rate 0.1 --wait
  scorer submit --set model.name=mine --jobs jobs.ndjson --wait --timeout 5m --json")]
    Submit(submit::SubmitArgs),
    /// The fleet, from Redis.
    #[command(after_help = "Examples:
  scorer status
  scorer status --set model.name=mine --json
  scorer status --set model.name=mine --watch")]
    Status {
        /// As one JSON object.
        #[arg(long)]
        json: bool,
        /// Again every second.
        #[arg(long)]
        watch: bool,
    },
    /// The fleet as a web page, read-only, until Ctrl-C; prints its address.
    #[command(after_help = "Examples:
  scorer dashboard
  scorer dashboard --set model.name=mine --listen 0.0.0.0:8088")]
    Dashboard(dashboard::DashboardArgs),
    /// The exchanges and queues.
    #[command(after_help = "Example:
  scorer topology --set model.name=mine --declare")]
    Topology {
        /// Declare them.
        #[arg(long)]
        declare: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// The parked jobs: lists, shows, tries again or drops them.
    #[command(after_help = "Examples:
  scorer dead list --set model.name=mine
  scorer dead show --set model.name=mine --id miner-7
  scorer dead requeue --set model.name=mine --code candidate_unavailable")]
    Dead(dead::DeadArgs),
    /// Asks workers to pause, resume, drain, look for an update, read their package again or prove
    /// their session again; prints what each answers.
    #[command(after_help = "Examples:
  scorer ctl --set model.name=mine pause
  scorer ctl --set model.name=mine drain --worker node7-cuda0")]
    Ctl(ctl::CtlArgs),
    /// Measures the engine beside a bare session, without broker or Redis.
    #[command(after_help = "Examples:
  scorer bench --model package
  scorer bench --synthetic 100m --seconds 60 --json")]
    Bench {
        #[command(flatten)]
        subject: bench::Subject,
        /// How long to compare, about; the stream takes about half as long.
        #[arg(long, default_value_t = 20)]
        seconds: u64,
        /// The report as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Makes a model package with digests.
    #[command(after_help = "Example:
  scorer package --graph model.onnx --weights model.safetensors --shards shards --name mine --version 1 --out package")]
    Package(offline::PackageArgs),
    /// Prints the effective configuration, secrets hidden.
    Config,
    /// Prints what makes a shell complete the commands: `source <(scorer completions bash)`.
    Completions {
        /// Of which shell.
        shell: clap_complete::Shell,
    },
    /// Prints a JSON Schema.
    Schema {
        /// Such as `score_job.v1`.
        name: String,
    },
    /// Exit 0 or 1 for container probes: does the worker of this host answer, does it take jobs?
    Healthcheck {
        /// The process answers (the default).
        #[arg(long, conflicts_with = "ready")]
        live: bool,
        /// It takes jobs.
        #[arg(long)]
        ready: bool,
    },
}

/// The command line as clap knows it, for the reference and for those who check commands in documents.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Parses, runs, and says how it went.
pub fn main() -> ! {
    let exit = match Cli::try_parse() {
        Ok(cli) => run(cli).unwrap_or_else(|fault| {
            complain(&fault.message);
            fault.exit
        }),
        // Help and versions are answers; everything else is bad usage.
        Err(error) if error.print().is_err() => Exit::Internal,
        Err(error) if error.use_stderr() => Exit::Usage,
        Err(_) => Exit::Done,
    };
    leave(exit)
}

/// Ends the process of a drain that takes too long.
fn leave_overdue(stop: Stop) {
    leave(exit_of(stop));
}

fn exit_of(stop: Stop) -> Exit {
    match stop {
        Stop::Drained => Exit::Done,
        Stop::CutShort => Exit::CutShort,
        Stop::Stuck | Stop::PartLost(_) => Exit::Internal,
    }
}

/// Ends the process without the destructors that returning from `main` would run: those of ONNX
/// Runtime's library free what the engine's thread, which nothing can stop in the middle of a
/// load, still uses. A drain during a load was a segmentation fault before this.
fn leave(exit: Exit) -> ! {
    // Answers have been flushed and checked; help texts have not.
    drop(std::io::Write::flush(&mut std::io::stdout()));
    #[expect(unsafe_code, reason = "there is no safe way to end a process at once")]
    // SAFETY: it takes any number, never returns, and touches no memory of ours.
    unsafe {
        libc::_exit(exit as i32)
    }
}

/// The one place where a command's error, or its note, reaches a person, if one is there to read it.
fn complain(message: &str) {
    use std::io::Write;
    drop(writeln!(std::io::stderr(), "scorer: {message}"));
}

/// Writes an answer; a reader that has gone (`| head`) is no error.
fn answer(text: &str) -> Outcome {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    match out
        .write_all(text.as_bytes())
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush())
    {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Fault::internal(error)),
        Ok(()) | Err(_) => Ok(Exit::Done),
    }
}

/// Text of strangers for a terminal, which would obey what stands between control characters.
fn plain(text: &str) -> String {
    let shown = |c: char| match c.is_control() {
        true => c.escape_default().to_string(),
        false => c.to_string(),
    };
    text.chars().map(shown).collect()
}

fn answer_json(value: &impl serde::Serialize) -> Outcome {
    answer(&serde_json::to_string_pretty(value).map_err(Fault::internal)?)
}

fn load(settings: &Settings) -> Result<Config, Fault> {
    let layers = Layers {
        file: settings.config.as_deref(),
        environment: std::env::vars_os().collect(),
        set: &settings.set,
    };
    Config::load(&layers).map_err(|e| Fault::new(Exit::Usage, e))
}

fn run(cli: Cli) -> Outcome {
    // What needs no configuration must work with a broken one.
    if let Command::Schema { name } = &cli.command {
        return print_schema(name);
    }
    if let Command::Completions { shell } = cli.command {
        return completions(shell);
    }
    let config = load(&cli.settings)?;
    init_logs(&config, matches!(cli.command, Command::Run))?;
    if !config.passed_over.is_empty() {
        let names = config.passed_over.join(", ");
        tracing::warn!(%names, "passed over, for Kubernetes and docker set them for a service (enableServiceLinks: false ends it)");
    }
    let threads = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let runtime = threads.map_err(Fault::internal)?;
    let outcome = runtime.block_on(dispatch(cli.command, config));
    // A fetch or a decode that is still going on must not hold the exit.
    runtime.shutdown_background();
    outcome
}

async fn dispatch(command: Command, config: Config) -> Outcome {
    match command {
        Command::Run => worker(config).await,
        Command::Check { json, prove: true } => check::prove(&config, json).await,
        Command::Check { json, prove: false } => check::check(&config, json).await,
        Command::Score(args) => offline::score(config, args).await,
        Command::Validate(args) => offline::validate(config, args).await,
        Command::Submit(args) => submit::submit(&config, args).await,
        Command::Status { json, watch } => status::status(&config, json, watch).await,
        Command::Dashboard(args) => dashboard::dashboard(config, args).await,
        Command::Topology { declare, json } => topology::topology(&config, declare, json).await,
        Command::Dead(args) => dead::dead(&config, args).await,
        Command::Ctl(args) => ctl::ctl(&config, args).await,
        Command::Bench {
            subject,
            seconds,
            json,
        } => bench::bench(&config, subject, seconds, json).await,
        Command::Config => answer(config.redacted().trim_end()),
        Command::Healthcheck { ready, .. } => {
            let health = crate::worker::health::ask(&config.redis.namespace, &config.worker_id());
            let good = if ready { health.ready } else { health.live };
            Ok(if good { Exit::Done } else { Exit::Negative })
        }
        Command::Completions { shell } => completions(shell),
        Command::Schema { name } => print_schema(&name),
        Command::Package(args) => offline::package(config, args).await,
    }
}

async fn worker(config: Config) -> Outcome {
    // Before anything loads: a signal during a long load must find its handler.
    let wishes = signals::listen().map_err(Fault::internal)?;
    let show = |status, phase| drop(tokio::spawn(progress::show(status, phase)));
    let stop = crate::worker::run(config, wishes, leave_overdue, show)
        .await
        .map_err(|e| Fault::new(Exit::Usage, format!("{e:#}")))?;
    match stop {
        Stop::Drained | Stop::CutShort => Ok(exit_of(stop)),
        Stop::Stuck => Err(Fault::internal(
            "the device did not come back from a terminated run, so the process ends; start the worker again",
        )),
        Stop::PartLost(part) => Err(Fault::internal(format!(
            "a part of the worker has ended: {}; what it held was handed back; the log says why; start the worker again",
            part.as_str()
        ))),
    }
}

fn completions(shell: clap_complete::Shell) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "scorer", &mut script);
    answer(String::from_utf8_lossy(&script).trim_end())
}

fn print_schema(name: &str) -> Outcome {
    match crate::cli::schemas::schema(name) {
        Some(schema) => answer_json(&schema),
        None => Err(Fault::new(
            Exit::Usage,
            format!(
                "there is no schema {name:?}; there are {}",
                crate::cli::schemas::NAMES.join(", ")
            ),
        )),
    }
}

/// The model a command is about: `model.name`, else the package's.
fn model_name(config: &Config) -> Result<String, Fault> {
    if let Some(name) = &config.model.name {
        return Ok(name.clone());
    }
    let Some(dir) = &config.model.dir else {
        return Err(Fault::new(
            Exit::Usage,
            "model.name: not set, and model.dir names no package to take it from",
        ));
    };
    let read = crate::model::package::Package::read_manifest(dir);
    read.map(|(manifest, _)| manifest.name)
        .map_err(|e| Fault::new(Exit::Usage, format!("model.dir: {e}")))
}

/// Whether whoever looks does not want colours: <https://no-color.org>.
fn colourless() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

/// Sets the log up, and colours.
fn init_logs(config: &Config, worker: bool) -> Result<(), Fault> {
    use std::io::IsTerminal;
    use tracing_subscriber::EnvFilter;
    use tracing_subscriber::fmt::writer::BoxMakeWriter;
    // One-shot commands speak for themselves; only what goes wrong is logged.
    let filter = if worker {
        config.telemetry.log.as_str()
    } else {
        "warn"
    };
    // lapin logs a connection that we close ourselves, as in every drain, as an error. What does go
    // wrong it also returns or sends as an event, and `broker::amqp` reports that.
    let filter = EnvFilter::try_new(format!("{filter},ort=error,lapin=off"))
        .map_err(|e| Fault::new(Exit::Usage, format!("telemetry.log: {e}")))?;
    let terminal = std::io::stderr().is_terminal();
    let pretty = match config.telemetry.log_format {
        LogFormat::Auto => terminal,
        LogFormat::Pretty => true,
        LogFormat::Json => false,
    };
    let writer = match terminal {
        true => BoxMakeWriter::new(AboveFoot),
        false => BoxMakeWriter::new(std::io::stderr),
    };
    console::set_colors_enabled(std::io::stdout().is_terminal() && !colourless());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(terminal && !colourless())
        // Where the log cannot be written (its terminal was closed, its reader has died), saying so
        // on standard error is a panic.
        .log_internal_errors(false)
        .with_writer(writer);
    let set = if pretty {
        builder.with_target(false).try_init()
    } else {
        builder.json().flatten_event(true).try_init()
    };
    set.map_err(Fault::internal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_obeys_no_stranger() {
        let shown = plain("a\u{1b}]52;c;x\u{7}\nü");
        assert_eq!(shown, "a\\u{1b}]52;c;x\\u{7}\\nü");
    }

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
