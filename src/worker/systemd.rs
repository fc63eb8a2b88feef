//! Notifies systemd, if it asks for that (`NOTIFY_SOCKET`): readiness once, every state, and the watchdog's
//! keep-alive as long as the device makes progress.

use sd_notify::NotifyState;

use crate::protocol::state::{Phase, State};

/// Remembers what systemd was told.
#[derive(Debug, Default)]
pub struct Notifier {
    told: Option<u64>,
    ready: bool,
}

impl Notifier {
    /// Called at every beat.
    pub fn tell(&mut self, phase: Phase, stuck: bool) {
        let status = format!("{} / {}", phase.state.as_str(), phase.detail);
        let mut updates = Vec::new();
        if self.told.replace(phase.changes) != Some(phase.changes) {
            updates.push(NotifyState::Status(&status));
            match phase.state {
                State::Ready if !std::mem::replace(&mut self.ready, true) => {
                    updates.push(NotifyState::Ready);
                }
                // A drain with nothing to do ends before the next beat.
                State::Draining | State::Stopped => updates.push(NotifyState::Stopping),
                State::Starting
                | State::Warming
                | State::Ready
                | State::Degraded
                | State::Updating
                | State::Reloading => {}
            }
        }
        if !stuck {
            updates.push(NotifyState::Watchdog);
        }
        if let Err(error) = sd_notify::notify(&updates) {
            tracing::debug!(%error, "systemd cannot be notified");
        }
    }
}
