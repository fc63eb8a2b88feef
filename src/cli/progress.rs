//! Progress on a terminal, below the log: what is awaited, for how long, and how much of it is done where
//! that is known. Without a terminal nothing is shown.

use std::io;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::sync::watch;
use tracing_subscriber::fmt::MakeWriter;

use crate::protocol::state::{Phase, State};
use crate::telemetry::progress::Progress;
use crate::telemetry::status::WorkerStatus;

/// Interval between redraws.
const FRAME: Duration = Duration::from_millis(200);
const DOING: &str = "{spinner} {msg}, {elapsed}";
const WARMING: &str = "{spinner} {msg} {bar:30} {percent} %, {elapsed}";
const FETCHING: &str =
    "{spinner} {msg} {bar:30} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left";

/// Shows on a terminal what is awaited, and for how long.
pub(super) fn busy(with: String) -> ProgressBar {
    let bar = styled(ProgressBar::new_spinner(), DOING);
    bar.set_message(with);
    bar
}

/// Shows what is awaited next.
pub(super) fn name(bar: &ProgressBar, with: &'static str) {
    restyle(bar, DOING);
    bar.set_message(with);
}

/// Awaits a warm-up and shows its progress.
pub(super) async fn until<T>(
    bar: &ProgressBar,
    progress: &Progress,
    warmed: impl Future<Output = T>,
) -> T {
    let mut frame = tokio::time::interval(FRAME);
    tokio::pin!(warmed);
    loop {
        tokio::select! {
            warm = &mut warmed => return warm,
            _ = frame.tick() => measure(bar, progress),
        }
    }
}

/// Shows a bar where the amount of work is known, else a spinner.
fn measure(bar: &ProgressBar, progress: &Progress) {
    let (template, length) = match progress.warming() {
        Some((done, all)) => {
            bar.set_position(done);
            (WARMING, Some(all))
        }
        None => (DOING, None),
    };
    if bar.length() != length {
        match length {
            Some(length) => bar.set_length(length),
            None => bar.unset_length(),
        }
        restyle(bar, template);
    }
}

/// Adds a bar at the foot of the terminal.
pub(super) fn styled(bar: ProgressBar, template: &str) -> ProgressBar {
    let bar = FOOT.add(bar);
    bar.enable_steady_tick(FRAME);
    restyle(&bar, template);
    bar
}

fn restyle(bar: &ProgressBar, template: &str) {
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
}

/// The bars at the foot of standard error.
static FOOT: LazyLock<MultiProgress> =
    LazyLock::new(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));

/// Shows what a worker does until it ends.
pub(super) async fn show(status: Arc<WorkerStatus>, mut phase: watch::Receiver<Phase>) {
    if FOOT.is_hidden() {
        return;
    }
    let (mut doing, mut fetching) = (None::<ProgressBar>, None::<ProgressBar>);
    let (mut frame, mut shown) = (tokio::time::interval(FRAME), None);
    loop {
        let now = *phase.borrow_and_update();
        if shown.replace(now.changes) != Some(now.changes) {
            clear(&mut doing);
        }
        if let Some(text) = what(now) {
            let bar = doing.get_or_insert_with(|| styled(ProgressBar::new_spinner(), DOING));
            bar.set_message(text);
            measure(bar, &status.progress);
        }
        let update = status.facts().update.clone();
        let update = update.map(|update| (update.bytes_here, update.bytes_wanted));
        if let Some((here, wanted)) = update.filter(|(here, wanted)| here < wanted) {
            let bar = fetching.get_or_insert_with(|| styled(ProgressBar::new(wanted), FETCHING));
            bar.set_message("downloading the next version");
            bar.set_length(wanted);
            bar.set_position(here);
        } else {
            clear(&mut fetching);
        }
        tokio::select! {
            _ = frame.tick() => {}
            changed = phase.changed() => if changed.is_err() { break },
        }
    }
    clear(&mut doing);
    clear(&mut fetching);
}

fn clear(bar: &mut Option<ProgressBar>) {
    if let Some(bar) = bar.take() {
        bar.finish_and_clear();
    }
}

/// What is awaited, in words; none = nothing.
fn what(phase: Phase) -> Option<String> {
    match phase.state {
        State::Starting
        | State::Warming
        | State::Updating
        | State::Reloading
        | State::Draining
        | State::Degraded => Some(format!("{}: {}", phase.state.as_str(), phase.detail)),
        State::Ready | State::Stopped => None,
    }
}

/// Writes log lines above the bars, which are redrawn below them.
#[derive(Debug, Clone, Copy)]
pub(super) struct AboveFoot;

impl<'a> MakeWriter<'a> for AboveFoot {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        *self
    }
}

impl io::Write for AboveFoot {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        FOOT.suspend(|| io::stderr().write_all(line))?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
