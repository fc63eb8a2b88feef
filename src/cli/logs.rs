//! Logs on standard error, and colours.

use super::exit::Fault;
use super::output::colourless;
use super::progress::AboveFoot;
use crate::config::{Config, LogFormat};

/// Sets up logging and colours.
pub(super) fn init(config: &Config, worker: bool) -> Result<(), Fault> {
    use std::io::IsTerminal;
    use tracing_subscriber::EnvFilter;
    use tracing_subscriber::fmt::writer::BoxMakeWriter;
    // One-shot commands print their answer; only problems are logged.
    let filter = if worker {
        config.telemetry.log.as_str()
    } else {
        "warn"
    };
    // lapin logs a connection that is closed on purpose, as in every drain, as an error. Real errors it
    // also returns or sends as events, which `broker::amqp` reports. redis warns of each node of a cluster that is
    // away, at each look for the others.
    let filter = EnvFilter::try_new(format!("{filter},ort=error,lapin=off,redis=error"))
        .map_err(|e| Fault::usage(format!("telemetry.log: {e}")))?;
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
        // If the log cannot be written (its terminal was closed, its reader has died), reporting that on
        // standard error would panic.
        .log_internal_errors(false)
        .with_writer(writer);
    let set = if pretty {
        builder.with_target(false).try_init()
    } else {
        builder.json().flatten_event(true).try_init()
    };
    set.map_err(Fault::internal)
}
