//! The states of a worker, in one enum, advanced in one place. Everything that depends on the
//! state (the consumer, the heartbeat, the exit) watches it; nothing else decides it.

use crate::protocol::state::{Detail, Phase, State};
use tokio::sync::watch;

use crate::protocol::control::{Command, Outcome};

/// One change, for the event stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// Before.
    pub from: Phase,
    /// After.
    pub to: Phase,
}

/// What the event stream is told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The state changed.
    Changed(Change),
    /// A control message was answered.
    Answered {
        /// What was asked.
        command: Command,
        /// What became of it.
        outcome: Outcome,
        /// What was done, or why not.
        message: String,
        /// The state at that time.
        phase: Phase,
    },
}

/// Where events are sent.
pub type Events = std::sync::mpsc::Sender<Event>;

/// The worker's state; only its owner can advance it.
#[derive(Debug)]
pub struct Lifecycle {
    phase: watch::Sender<Phase>,
    events: Events,
}

impl Lifecycle {
    /// A worker that has just begun, and where its phase and what happens can be read.
    pub fn start() -> (
        Self,
        watch::Receiver<Phase>,
        std::sync::mpsc::Receiver<Event>,
    ) {
        let phase = Phase::starting();
        let (sender, receiver) = watch::channel(phase);
        let (events, log) = std::sync::mpsc::channel();
        // The first entry of the stream: the process began.
        let began = events.send(Event::Changed(Change {
            from: phase,
            to: phase,
        }));
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

    /// Where else events may come from.
    pub fn events(&self) -> Events {
        self.events.clone()
    }

    /// Where the phase can be followed.
    pub fn follow(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// The current phase.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Goes to a state; the only place that does. An illegal step is logged and not taken.
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
        let changed = Event::Changed(Change { from, to });
        if self.events.send(changed).is_err() {
            tracing::debug!("nobody reads state changes any more");
        }
        self.phase.send_replace(to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn illegal_steps_are_not_taken() {
        let (lifecycle, watch, log) = Lifecycle::start();
        lifecycle.advance(State::Ready, Detail::Serving);
        assert_eq!(watch.borrow().state, State::Starting);
        lifecycle.advance(State::Warming, Detail::LoadingModel);
        lifecycle.advance(State::Ready, Detail::Serving);
        assert_eq!(watch.borrow().state, State::Ready);
        assert_eq!(log.try_iter().count(), 3);
    }
}
