//! What becomes of jobs: the broker's part, `scoring/{pipeline,consumer,settle}.rs`.

use std::time::Duration;

use scorer::protocol::failure::{Code, Failure};
use scorer::protocol::result::{Body, LossBody, Verdict};
use scorer::protocol::state::State;
use scorer::scoring::disposition::{Disposition, Try, dispose};

use crate::moves::Next;
use crate::world::{
    Answer, Broken, Bug, Item, Job, Message, Place, RETURNS_BEFORE_REPUBLISH, Record, Stage, Then,
};

const LADDER: [Duration; 1] = [Duration::from_secs(5)];

impl Next<'_> {
    pub(crate) fn record(&mut self, index: usize) -> &mut Record {
        &mut self.world.records[self.world.items[index].job as usize]
    }

    fn set(&mut self, index: usize, next: Stage) {
        if let Place::Held { stage, .. } = &mut self.world.items[index].place {
            *stage = next;
        }
    }

    /// The broker, then `Consumer::take`.
    pub(crate) fn deliver(&mut self, index: usize, by: usize) {
        let ready = self.world.workers[by].state == State::Ready;
        self.break_if(!ready, Broken::DeliveredUnready);
        let (stage, stale) = (Stage::Waiting, false);
        self.world.items[index].place = Place::Held { by, stage, stale };
    }

    /// `Pipeline::judge` until the job has the device: admission and the fetch. Marks of live workers only
    /// make it wait until they are known to be alive.
    pub(crate) fn begin(&mut self, index: usize) {
        let item = self.world.items[index];
        let record = self.world.records[item.job as usize];
        if record.stored {
            // `Judged::Stored`.
            let (answer, then_park) = (Answer::Stored, false);
            return self.set(index, Stage::Written(Message::Result { answer, then_park }));
        }
        if self.rules.poisons(&record) {
            let poisoned = Failure::new(Code::Poisoned, "workers died of it");
            return self.settle(index, &Err(poisoned));
        }
        if item.job == Job::Flaky {
            let unavailable = Failure::new(Code::CandidateUnavailable, "not there");
            return self.settle(index, &Err(unavailable));
        }
        let computing = |other: &Item| {
            let at = |worker| other.stage_at(worker) == Some(Stage::Computing);
            other.job == item.job && (at(0) || at(1))
        };
        let overlaps = self.world.items.iter().any(computing);
        self.record(index).overlaps += u8::from(overlaps);
        self.set(index, Stage::Computing);
    }

    /// `Pipeline::score` comes to an end.
    pub(crate) fn score(&mut self, index: usize) {
        let (loss, windows, tokens, plan) = (1.0, 1, 1, String::new());
        let body = Body::Loss(LossBody {
            loss,
            windows,
            tokens,
            plan,
        });
        self.settle(index, &Ok(body));
    }

    /// `Turn::within` in `engine/thread.rs` ends a run without progress; then `ServeEnd::Stalled`.
    pub(crate) fn stall(&mut self, index: usize, by: usize) {
        let ended = Failure::new(Code::ScoreTimeout, "no progress");
        self.settle(index, &Err(ended));
        self.asked(by, State::Degraded, Then::Reload);
    }

    /// `Settler::settle`, until the first message is written.
    fn settle(&mut self, index: usize, verdict: &Verdict) {
        let attempt = self.world.items[index].attempt;
        let code = verdict.as_ref().err().map(|failure| failure.code);
        if code == Some(Code::Poisoned) && self.rules.has(Bug::NackOnPoison) {
            return self.nack(index);
        }
        let tried = Try {
            attempt: attempt.into(),
            deadline_ms: None,
            now_ms: 0,
        };
        let disposition = dispose(code, tried, &LADDER);
        let message = match disposition {
            Disposition::Climb { .. } => Message::Climb,
            Disposition::Answer | Disposition::AnswerTooLate | Disposition::AnswerAndDeadLetter => {
                Message::Result {
                    answer: self.store_first(index, code),
                    then_park: disposition == Disposition::AnswerAndDeadLetter,
                }
            }
        };
        self.set(index, Stage::Written(message));
    }

    /// `Settler::store_first`, of what `ResultMessage::may_be_stored` allows.
    fn store_first(&mut self, index: usize, code: Option<Code>) -> Answer {
        match code.filter(|code| !code.proven_by_candidate()) {
            Some(Code::Poisoned) => Answer::Poisoned,
            Some(Code::ScoreTimeout) => Answer::TimedOut,
            Some(_) => Answer::Failed,
            None if self.rules.has(Bug::ResultNotStoredFirst) => Answer::Unstored,
            None => {
                self.record(index).stored = true;
                Answer::Stored
            }
        }
    }

    /// The broker has what `Settler::publish` wrote. A refusal changes nothing: it is written again.
    pub(crate) fn broker_takes(&mut self, index: usize, message: Message) {
        let item = self.world.items[index];
        let burned = u8::from(self.rules.has(Bug::HandBackCountsAsAttempt));
        let copy = |attempt, place| Item {
            attempt,
            returns: 0,
            place,
            ..item
        };
        self.set(index, Stage::Taken(message));
        let record = self.record(index);
        match message {
            Message::Result { answer, .. } => match answer {
                Answer::Stored => record.published = true,
                Answer::Unstored => record.others_published += 1,
                Answer::Failed => record.failed = true,
                Answer::TimedOut => record.timed_out = true,
                Answer::Poisoned => record.poisoned = true,
            },
            Message::Parked => record.parked = true,
            Message::Climb => {
                record.climbed = true;
                self.world.items.push(copy(item.attempt + 1, Place::Rung));
            }
            Message::Fresh => self
                .world
                .items
                .push(copy(item.attempt + burned, Place::Queue)),
        }
    }

    /// `Settler::answer`, `climb` and `hand_back`: what comes after the confirm.
    pub(crate) fn confirm(&mut self, index: usize, message: Message) {
        let next = match message {
            Message::Result {
                then_park: true, ..
            } => Stage::Written(Message::Parked),
            Message::Result {
                then_park: false, ..
            }
            | Message::Parked
            | Message::Climb
            | Message::Fresh => Stage::Acking,
        };
        self.set(index, next);
    }

    /// `Settler::acknowledge`. What was only written by then is taken to be lost.
    pub(crate) fn ack(&mut self, index: usize, confirmed: bool) {
        let item = self.world.items.remove(index);
        self.break_if(!confirmed && !item.is_stale(), Broken::AckedUnconfirmed);
    }

    /// `Serving::judge` when `abandon` is cancelled, and `Settler::hand_back`.
    pub(crate) fn hand_back(&mut self, index: usize) {
        let item = self.world.items[index];
        if item.is_stale() {
            self.world.items.remove(index);
        } else if item.returns < RETURNS_BEFORE_REPUBLISH || self.rules.has(Bug::EndlessNack) {
            let burned = self.rules.nacks_count && item.returns >= RETURNS_BEFORE_REPUBLISH;
            self.break_if(burned, Broken::AttemptBurned);
            self.nack(index);
        } else {
            self.set(index, Stage::Written(Message::Fresh));
        }
    }

    fn nack(&mut self, index: usize) {
        if self.rules.nacks_count {
            self.broker_returns(index);
        } else {
            self.world.items[index].place = Place::Queue;
        }
    }

    /// The broker puts a job back and counts it.
    pub(crate) fn broker_returns(&mut self, index: usize) {
        let item = &mut self.world.items[index];
        item.returns += 1;
        item.place = Place::Queue;
        if item.returns > self.rules.delivery_limit() {
            self.record(index).parked = true;
            self.world.items.remove(index);
            self.broken.push(Broken::LimitReached);
        }
    }

    /// A worker has nothing any more: what the broker counts as held goes back to the queue.
    pub(crate) fn take_from(&mut self, w: usize) {
        self.world
            .items
            .retain(|item| item.stage_at(w).is_none() || !item.is_stale());
        for index in (0..self.world.items.len()).rev() {
            if self.world.items[index].stage_at(w).is_some() {
                self.broker_returns(index);
            }
        }
    }
}
