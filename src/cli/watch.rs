//! `scorer status --watch` on a terminal: the fleet as it changes, until `q`.

mod keys;
mod pace;
mod rows;
mod screen;

use std::time::Duration;

use super::{Fault, Outcome};
use crate::fleet::observer::Observer;
use keys::{Key, keys};
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
            key = keys.recv() => match key {
                Some(Key::Sort) => screen.order = screen.order.next(),
                Some(Key::Filter) => screen.shown = screen.shown.next(),
                Some(Key::Redraw) => {}
                Some(Key::Quit) | None => break Ok(screen.exit()),
            },
        }
        if let Err(error) = terminal.draw(|frame| screen.draw(frame)) {
            break Err(Fault::internal(error));
        }
    };
    ratatui::restore();
    outcome
}
