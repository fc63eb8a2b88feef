//! What systemd is told, where it asks (`NOTIFY_SOCKET`): once that the worker is ready, its state, and,
//! as long as the device makes progress, that it need not be killed.

use sd_notify::NotifyState;

use crate::protocol::state::{Phase, State};

/// Remembers what was said.
#[derive(Debug, Default)]
pub struct Notifier {
    told: Option<u64>,
    ready: bool,
}

impl Notifier {
    /// Called at every beat.
    pub fn tell(&mut self, phase: Phase, stuck: bool) {
        let status = format!("{} / {}", phase.state.as_str(), phase.detail);
        let mut news = Vec::new();
        if self.told.replace(phase.changes) != Some(phase.changes) {
            news.push(NotifyState::Status(&status));
            match phase.state {
                State::Ready if !std::mem::replace(&mut self.ready, true) => {
                    news.push(NotifyState::Ready);
                }
                // A drain that has nothing to do is over before the next beat.
                State::Draining | State::Stopped => news.push(NotifyState::Stopping),
                State::Starting
                | State::Warming
                | State::Ready
                | State::Degraded
                | State::Updating
                | State::Reloading => {}
            }
        }
        if !stuck {
            news.push(NotifyState::Watchdog);
        }
        if let Err(error) = sd_notify::notify(&news) {
            tracing::debug!(%error, "systemd does not listen");
        }
    }
}
