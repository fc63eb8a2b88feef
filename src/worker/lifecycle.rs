//! The worker's current state, changed in one place and watched by everything that depends on it, and
//! the events that the stream in Redis gets.

use tokio::sync::watch;

use crate::protocol::control::{Command, Outcome};
use crate::protocol::state::{Detail, Phase, State};

/// An entry of the event stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The state changed.
    Changed {
        /// Before.
        from: Phase,
        /// After.
        to: Phase,
    },
    /// A control message was answered.
    Answered {
        /// The command.
        command: Command,
        /// Its outcome.
        outcome: Outcome,
        /// What was done, or why not, for a person.
        message: String,
        /// The state at that time.
        phase: Phase,
    },
}

/// Where events are sent.
pub type Events = std::sync::mpsc::Sender<Event>;

/// The worker's state; only its owner can change it.
#[derive(Debug)]
pub struct Lifecycle {
    phase: watch::Sender<Phase>,
    events: Events,
}

impl Lifecycle {
    /// The state of a process that has just started, a receiver of its phases, and one of its events.
    pub fn start() -> (
        Self,
        watch::Receiver<Phase>,
        std::sync::mpsc::Receiver<Event>,
    ) {
        let phase = Phase::starting();
        let (sender, receiver) = watch::channel(phase);
        let (events, log) = std::sync::mpsc::channel();
        // The first entry of the stream: the process has started.
        let began = events.send(Event::Changed {
            from: phase,
            to: phase,
        });
        debug_assert!(began.is_ok());
        (
            Self {
                phase: sender,
                events,
            },
            receiver,
            log,
        )
    }

    /// For other sources of events.
    pub fn events(&self) -> Events {
        self.events.clone()
    }

    /// A receiver of its phases.
    pub fn follow(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// The current phase.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Changes the state; nothing else does. An illegal change is logged and refused.
    pub fn advance(&self, state: State, detail: Detail) {
        let from = self.phase();
        if (from.state, from.detail) == (state, detail) {
            return;
        }
        if from.state != state && !from.state.may_become(state) {
            tracing::error!(
                from = from.state.as_str(),
                to = state.as_str(),
                "refused an illegal state change"
            );
            return;
        }
        let to = from.followed_by(state, detail);
        tracing::info!(
            from = from.state.as_str(),
            to = state.as_str(),
            %detail,
            "state changed"
        );
        if self.events.send(Event::Changed { from, to }).is_err() {
            tracing::debug!("no one reads state changes any more");
        }
        self.phase.send_replace(to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn illegal_changes_are_refused() {
        let (lifecycle, watch, log) = Lifecycle::start();
        lifecycle.advance(State::Ready, Detail::Serving);
        assert_eq!(watch.borrow().state, State::Starting);
        lifecycle.advance(State::Warming, Detail::LoadingModel);
        lifecycle.advance(State::Ready, Detail::Serving);
        assert_eq!(watch.borrow().state, State::Ready);
        assert_eq!(log.try_iter().count(), 3);
    }
}
