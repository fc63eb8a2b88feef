//! The command line. Standard output carries only the answer; logs and progress go to standard error.

mod arguments;
mod bench;
mod check;
mod ctl;
mod dashboard;
mod dead;
mod devices;
mod exit;
mod finding;
mod format;
mod init;
mod logs;
mod manifest;
mod merge;
mod offline;
mod output;
mod progress;
pub mod schemas;
mod shortage;
mod signals;
mod status;
mod submit;
mod tensors;
mod topology;
mod watch;

use clap::{CommandFactory, Parser};

pub use exit::Exit;

use crate::config::{Config, Layers};
use crate::worker::Stop;
use arguments::{Cli, Command, Settings};
use exit::{Fault, Outcome, exit_of, leave, leave_overdue};
use output::{answer, answer_json, complain, plain};
use progress::busy;

/// The command line as clap knows it, for the reference and for those who check commands in documents.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Parses the command line, runs the command, and exits.
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

fn load(settings: &Settings) -> Result<Config, Fault> {
    let layers = Layers {
        file: settings.config.as_deref(),
        environment: std::env::vars_os().collect(),
        set: &settings.set,
    };
    Config::load(&layers).map_err(Fault::usage)
}

fn run(cli: Cli) -> Outcome {
    // What needs no configuration must work with a broken one.
    if let Command::Schema { name } = &cli.command {
        return print_schema(name);
    }
    if let Command::Completions { shell } = cli.command {
        return completions(shell);
    }
    if let Command::Init { dir } = &cli.command {
        return init::init(dir);
    }
    let config = load(&cli.settings)?;
    logs::init(&config, matches!(cli.command, Command::Run))?;
    if !config.passed_over.is_empty() {
        let names = config.passed_over.join(", ");
        tracing::warn!(%names, "ignored: Kubernetes or docker sets these for a service; enableServiceLinks: false stops that");
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
        Command::Devices { json } => devices::show(config, json).await,
        Command::Score(args) => offline::score(config, args).await,
        Command::Validate(args) => offline::validate(config, args).await,
        Command::Merge(args) => merge::merge(config, args).await,
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
        Command::Manifest(args) => manifest::manifest(config, args).await,
        Command::Config => answer(config.redacted().trim_end()),
        Command::Healthcheck { ready, .. } => {
            let health = crate::worker::health::ask(&config.redis.namespace, &config.worker_id());
            let good = if ready { health.ready } else { health.live };
            Ok(Exit::of_answer(good))
        }
        Command::Completions { shell } => completions(shell),
        Command::Schema { name } => print_schema(&name),
        Command::Init { dir } => init::init(&dir),
        Command::Package(args) => match args.list {
            Some(dir) => tensors::list(&config, &dir, args.json).await,
            None => offline::package(config, args.build).await,
        },
    }
}

async fn worker(config: Config) -> Outcome {
    // Before anything loads: a signal during a long load must find its handler.
    let wishes = signals::listen().map_err(Fault::internal)?;
    let show = |status, phase| drop(tokio::spawn(progress::show(status, phase)));
    let stop = crate::worker::run(config, wishes, leave_overdue, show)
        .await
        .map_err(|e| Fault::usage(format!("{e:#}")))?;
    match stop {
        Stop::Drained | Stop::CutShort => Ok(exit_of(stop)),
        Stop::Stuck => Err(Fault::internal(
            "the device did not return from a run that was terminated, so the process exits; restart the worker",
        )),
        Stop::PartLost(part) => Err(Fault::internal(format!(
            "a part of the worker has ended: {}; its jobs were returned to the queue; see the log for the reason; restart the worker",
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
        None => Err(Fault::usage(format!(
            "there is no schema {name:?}; the schemas are {}",
            crate::cli::schemas::NAMES.join(", ")
        ))),
    }
}

/// The model a command is about: `model.name`, else the package's.
fn model_name(config: &Config) -> Result<String, Fault> {
    if let Some(name) = &config.model.name {
        return Ok(name.clone());
    }
    let Some(dir) = &config.model.dir else {
        return Err(Fault::usage(
            "model.name: not set, and neither is model.dir, from whose package it could be taken",
        ));
    };
    let read = crate::model::package::Package::read_manifest(dir);
    read.map(|(manifest, _)| manifest.name)
        .map_err(|e| Fault::usage(format!("model.dir: {e}")))
}
