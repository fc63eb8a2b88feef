//! What becomes of workers: `worker.rs`, its link and its end.

use scorer::protocol::state::State;

use crate::moves::Next;
use crate::world::{Broken, Bug, Item, Link, Model, NEW, Phase, Place, Stage, Then, Worker};

impl Next<'_> {
    fn worker(&mut self, w: usize) -> &mut Worker {
        &mut self.world.workers[w]
    }

    /// `Lifecycle::advance`, which refuses what is illegal; a worker must never ask for it.
    fn advance(&mut self, w: usize, state: State) {
        let from = self.world.workers[w].state;
        if from == state || from.may_become(state) {
            self.worker(w).state = state;
        } else {
            self.broken.push(Broken::IllegalStep);
        }
    }

    /// `Worker::may_serve`: an obstacle is a state.
    pub(crate) fn look_around(&mut self) {
        for w in 0..self.world.workers.len() {
            let worker = self.world.workers[w];
            let obstacle = worker.paused || worker.link != Link::Up;
            if worker.phase == Phase::Idle && worker.model == Model::Warm && obstacle {
                self.advance(w, State::Degraded);
            }
        }
    }

    /// `Worker::warm_up`. To prove the same session again does not stand in for loading it anew.
    pub(crate) fn warm_up(&mut self, w: usize) {
        self.advance(w, State::Warming);
        let worker = self.worker(w);
        if worker.model == Model::Absent || worker.owed < Then::Reload {
            worker.owed = Then::Again;
        }
        worker.model = Model::Warm;
    }

    /// The same with `report_failure`: the next attempt loads anew.
    pub(crate) fn warm_up_fails(&mut self, w: usize) {
        self.advance(w, State::Warming);
        self.advance(w, State::Degraded);
        self.worker(w).model = Model::Absent;
    }

    /// `Worker::serve` and `Consumer::register`: nothing is taken between confirm and state.
    pub(crate) fn register(&mut self, w: usize) {
        self.worker(w).consuming = true;
        self.advance(w, State::Ready);
        self.worker(w).phase = Phase::Serving;
    }

    /// `Worker::serve`, its end: the consumer goes, then the state. One step here, because the
    /// heartbeat says ready only while both are there.
    fn leave(&mut self, w: usize, state: State, then: Then) {
        if !self.rules.has(Bug::ConsumerOutlivesReady) {
            self.worker(w).consuming = false;
        }
        self.advance(w, state);
        self.worker(w).phase = Phase::Leaving(then);
    }

    /// `heed`, wherever a request is heard: `asked_to_leave`, `finish`, `wait`, `unless_drained`;
    /// and `distrust`.
    pub(crate) fn asked(&mut self, w: usize, state: State, then: Then) {
        let worker = self.world.workers[w];
        self.worker(w).owed = worker.owed.max(then.min(Then::Reload));
        match worker.phase {
            Phase::Serving => self.leave(w, state, then),
            Phase::Leaving(before) => {
                self.advance(w, state);
                self.worker(w).phase = Phase::Leaving(self.both(before, then));
            }
            Phase::Idle if then == Then::Stop => {
                self.advance(w, state);
                self.finish(w, then);
            }
            Phase::Idle if then == Then::Rewarm && worker.model == Model::Warm => {
                self.worker(w).model = Model::Unproven;
            }
            Phase::Idle => {}
        }
    }

    /// `Worker::finish`: what is asked while jobs end does not make forgotten what was due.
    fn both(&self, before: Then, asked: Then) -> Then {
        let forgets = match before {
            Then::Rewarm => self.rules.has(Bug::ForgottenRewarm),
            Then::Reload => self.rules.has(Bug::ForgottenReload),
            Then::Again | Then::Stop => false,
        };
        if forgets { asked } else { before.max(asked) }
    }

    pub(crate) fn pause(&mut self, w: usize) {
        self.worker(w).paused = true;
        self.asked(w, State::Degraded, Then::Again);
    }

    /// Jobs have ended: the next step of `Worker::live`, or the end of the process.
    pub(crate) fn finish(&mut self, w: usize, then: Then) {
        let worker = self.worker(w);
        worker.phase = Phase::Idle;
        if worker.link == Link::Dying {
            worker.link = Link::Down;
        }
        match then {
            Then::Again => {}
            Then::Rewarm => worker.model = Model::Unproven,
            Then::Reload => worker.model = Model::Absent,
            Then::Stop => {
                self.advance(w, State::Stopped);
                self.world.workers[w] = NEW;
            }
        }
    }

    /// `ServeEnd::ConsumerLost`: the broker cancels the consumer, the channel lives on.
    pub(crate) fn lose_consumer(&mut self, w: usize) {
        if self.rules.has(Bug::ReadyWhileCancelled) {
            self.worker(w).consuming = false;
        } else {
            self.leave(w, State::Degraded, Then::Again);
        }
    }

    /// The broker gives up a connection. The worker goes on until it notices and may even publish:
    /// that is another connection.
    pub(crate) fn lose_link(&mut self, w: usize) {
        let held = |item: &&Item| item.stage_at(w).is_some();
        let held: Vec<Item> = self.world.items.iter().filter(held).copied().collect();
        self.take_from(w);
        for mut item in held {
            if let Place::Held { stale, .. } = &mut item.place {
                *stale = true;
            }
            self.world.items.push(item);
        }
        let worker = self.worker(w);
        worker.link = match worker.phase {
            Phase::Serving | Phase::Leaving(_) => Link::Dying,
            Phase::Idle => Link::Down,
        };
    }

    /// `ServeEnd::BrokerLost`: jobs are abandoned; the broker has them back already.
    pub(crate) fn notice_loss(&mut self, w: usize) {
        self.take_from(w);
        self.worker(w).link = Link::Down;
        if self.world.workers[w].phase == Phase::Serving {
            self.leave(w, State::Degraded, Then::Again);
        }
    }

    /// The process dies, and a new one begins. The first mark of a job is written when it is looked
    /// up, and may be of one that only waited; who finds marks marks when it has the device.
    pub(crate) fn crash(&mut self, w: usize) {
        for job in self.rules.jobs {
            let at = |stage| {
                let mut items = self.world.items.iter();
                items.any(|item| item.job == *job && item.stage_at(w) == Some(stage))
            };
            let (computed, waited) = (at(Stage::Computing), at(Stage::Waiting));
            let early = self.rules.has(Bug::BystandersMarked);
            let record = &mut self.world.records[*job as usize];
            let marked = computed || waited && (record.marks == 0 || early);
            record.deaths += u8::from(computed);
            record.marks += u8::from(marked);
        }
        self.take_from(w);
        self.world.workers[w] = NEW;
    }
}
