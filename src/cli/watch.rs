//! `scorer status --watch` on a terminal: the fleet as it changes, until `q`.

mod head;
mod keys;
mod rows;
mod screen;
mod sparkline;
mod table;

use std::time::Duration;

use super::{Fault, Outcome};
use crate::fleet::observer::Observer;
use keys::keys;
use screen::Screen;

/// Interval between two looks.
pub(super) const EVERY: Duration = Duration::from_secs(1);

/// Shows the fleet until a key ends it.
pub(super) async fn watch(observer: &mut Observer<'_>) -> Outcome {
    let mut keys = keys();
    let mut terminal = ratatui::try_init().map_err(Fault::internal)?;
    let mut screen = Screen::new();
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let outcome = loop {
        tokio::select! {
            _ = ticks.tick() => screen.look(observer).await,
            key = keys.recv() => {
                let went_on = key.map(|key| screen.press(key));
                if !went_on.is_some_and(|went_on| went_on.is_continue()) {
                    break Ok(screen.exit());
                }
            }
        }
        if let Err(error) = terminal.draw(|frame| screen.draw(frame)) {
            break Err(Fault::internal(error));
        }
    };
    ratatui::restore();
    outcome
}
