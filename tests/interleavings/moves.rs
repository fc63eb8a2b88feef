//! What can happen next in a world, and what must hold after it.

use crate::world::{
    Broken, Bug, Job, Kind, Link, Message, Model, Move, POISON_AFTER, Phase, Place, Scenario,
    Stage, Then, Worker, World,
};
use scorer::protocol::state::State;

/// A world in the making: the scenario's rules, and what was broken.
pub(crate) struct Next<'a> {
    pub(crate) rules: &'a Scenario,
    pub(crate) world: World,
    pub(crate) broken: Vec<Broken>,
}

/// One way on.
pub(crate) struct Successor {
    pub(crate) what: Move,
    pub(crate) world: World,
    /// The workers' names are exchanged in it.
    pub(crate) exchanged: bool,
    pub(crate) broken: Vec<Broken>,
}

/// Collects the ways on from one world.
pub(crate) struct Moves<'a> {
    rules: &'a Scenario,
    world: &'a World,
    found: Vec<Successor>,
}

impl<'a> Moves<'a> {
    /// All of them.
    pub(crate) fn from(rules: &'a Scenario, world: &'a World) -> Vec<Successor> {
        let found = Vec::new();
        let mut moves = Self {
            rules,
            world,
            found,
        };
        for index in 0..world.items.len() {
            // Equal items have equal moves.
            if index == 0 || world.items[index] != world.items[index - 1] {
                moves.of_item(index);
            }
        }
        for worker in 0..world.workers.len() {
            moves.of_worker(worker);
        }
        moves.found
    }

    fn add(&mut self, kind: Kind, worker: Option<usize>, change: impl Fn(&mut Next<'_>)) {
        self.push(
            Move {
                kind,
                worker,
                job: None,
            },
            change,
        );
    }

    fn push(&mut self, what: Move, change: impl Fn(&mut Next<'_>)) {
        let Some(left) = self.world.left.checked_sub(u8::from(what.kind.disturbs())) else {
            return;
        };
        let world = World {
            left,
            ..self.world.clone()
        };
        let mut next = Next {
            rules: self.rules,
            world,
            broken: Vec::new(),
        };
        change(&mut next);
        next.look_around();
        next.check();
        let (world, exchanged) = next.world.canonical();
        let broken = next.broken;
        self.found.push(Successor {
            what,
            world,
            exchanged,
            broken,
        });
    }

    fn of_item(&mut self, index: usize) {
        let job = Some(self.world.items[index].job);
        match self.world.items[index].place {
            // The broker's time to live and its dead-lettering.
            Place::Rung => {
                let what = Move {
                    kind: Kind::RungExpires,
                    worker: None,
                    job,
                };
                self.push(what, |n| n.world.items[index].place = Place::Queue);
            }
            Place::Queue => {
                for by in 0..self.world.workers.len() {
                    if self.may_be_delivered_to(by) {
                        let what = Move {
                            kind: Kind::Deliver,
                            worker: Some(by),
                            job,
                        };
                        self.push(what, |n| n.deliver(index, by));
                    }
                }
            }
            Place::Held { by, stage, .. } => self.of_held(index, by, stage),
        }
    }

    fn of_held(&mut self, index: usize, by: usize, stage: Stage) {
        let item = self.world.items[index];
        let what = |kind| Move {
            kind,
            worker: Some(by),
            job: Some(item.job),
        };
        match stage {
            Stage::Waiting if self.is_decided(item.job) || !self.computes(by) => {
                self.push(what(Kind::Begin), |n| n.begin(index));
            }
            Stage::Waiting => {}
            Stage::Computing if item.job == Job::Killer => {
                self.push(what(Kind::Kill), |n| n.crash(by));
            }
            Stage::Computing => self.push(what(Kind::Score), |n| n.score(index)),
            Stage::Written(message) => {
                self.push(what(Kind::BrokerTakes), |n| n.broker_takes(index, message));
                if self.acks_early(message) {
                    self.push(what(Kind::Ack), |n| n.ack(index, false));
                }
            }
            Stage::Taken(message) => self.push(what(Kind::Confirm), |n| n.confirm(index, message)),
            Stage::Acking => {
                let kind = if item.is_stale() {
                    Kind::AckLost
                } else {
                    Kind::Ack
                };
                self.push(what(kind), |n| n.ack(index, true));
            }
        }
        match (self.world.workers[by].phase, stage) {
            (Phase::Serving, Stage::Waiting) => {
                self.push(what(Kind::SendBack), |n| n.hand_back(index));
                return;
            }
            (Phase::Serving, Stage::Computing) => {
                self.push(what(Kind::Stall), |n| n.stall(index, by));
                return;
            }
            (Phase::Serving | Phase::Idle, _) => return,
            (Phase::Leaving(_), _) => {}
        }
        // The drain's deadline may come at any moment.
        match stage {
            Stage::Waiting | Stage::Computing => {
                self.push(what(Kind::HandBack), |n| n.hand_back(index));
            }
            Stage::Written(_) | Stage::Taken(_) | Stage::Acking if item.is_stale() => {}
            // `Consumer::abandon` when even that takes too long: the end of the channel returns it.
            Stage::Written(_) | Stage::Taken(_) | Stage::Acking => {
                self.push(what(Kind::CutOff), |n| n.broker_returns(index));
            }
        }
    }

    /// The broker knows consumers, not states.
    fn may_be_delivered_to(&self, by: usize) -> bool {
        let Worker {
            consuming, link, ..
        } = self.world.workers[by];
        let held = self.world.items.iter().filter(|i| i.stage_at(by).is_some());
        consuming && link == Link::Up && held.count() < self.rules.prefetch
    }

    fn computes(&self, by: usize) -> bool {
        let computing = Some(Stage::Computing);
        self.world
            .items
            .iter()
            .any(|item| item.stage_at(by) == computing)
    }

    /// Whether look-up, marks or fetch end a job before it needs the device.
    fn is_decided(&self, job: Job) -> bool {
        let record = &self.world.records[job as usize];
        record.stored || self.rules.poisons(record) || job == Job::Flaky
    }

    fn acks_early(&self, message: Message) -> bool {
        match message {
            Message::Result { .. } | Message::Parked => self.rules.has(Bug::AckBeforeConfirm),
            Message::Climb | Message::Fresh => {
                self.rules.has(Bug::RepublishWithoutConfirmBeforeAck)
            }
        }
    }

    fn of_worker(&mut self, w: usize) {
        let Worker {
            phase,
            state,
            link,
            consuming,
            paused,
            model,
            ..
        } = self.world.workers[w];
        let held = self
            .world
            .items
            .iter()
            .any(|item| item.stage_at(w).is_some());
        let by = Some(w);
        match phase {
            Phase::Idle if model != Model::Warm => {
                self.add(Kind::WarmUp, by, |n| n.warm_up(w));
                self.add(Kind::WarmUpFails, by, |n| n.warm_up_fails(w));
            }
            Phase::Idle if !paused && link == Link::Up => {
                self.add(Kind::Register, by, |n| n.register(w));
            }
            Phase::Idle => {}
            Phase::Serving => {
                if consuming && link == Link::Up {
                    self.add(Kind::LoseConsumer, by, |n| n.lose_consumer(w));
                }
                self.add(Kind::Distrust, by, |n| {
                    n.asked(w, State::Degraded, Then::Reload)
                });
            }
            Phase::Leaving(then) if !held => self.add(Kind::Finish, by, |n| n.finish(w, then)),
            Phase::Leaving(_) => {}
        }
        self.add(Kind::Crash, by, |n| n.crash(w));
        match link {
            Link::Up => self.add(Kind::LoseLink, by, |n| n.lose_link(w)),
            Link::Dying => self.add(Kind::NoticeLoss, by, |n| n.notice_loss(w)),
            // `Keeper::keep`.
            Link::Down => self.add(Kind::Relink, by, |n| n.world.workers[w].link = Link::Up),
        }
        // A drain hears nothing any more.
        if state == State::Draining {
            return;
        }
        if paused {
            self.add(Kind::Resume, by, |n| n.world.workers[w].paused = false);
        } else {
            self.add(Kind::Pause, by, |n| n.pause(w));
        }
        self.add(Kind::Rewarm, by, |n| {
            n.asked(w, State::Warming, Then::Rewarm)
        });
        self.add(Kind::Drain, by, |n| n.asked(w, State::Draining, Then::Stop));
    }
}

impl Next<'_> {
    pub(crate) fn break_if(&mut self, broken: bool, what: Broken) {
        if broken {
            self.broken.push(what);
        }
    }

    /// What must hold in every world.
    fn check(&mut self) {
        for worker in self.world.workers {
            let ready = worker.state == State::Ready;
            self.break_if(ready && !worker.consuming, Broken::ReadyUnregistered);
            self.break_if(ready && worker.owed != Then::Again, Broken::ReadyUnproven);
        }
        for index in 0..self.world.items.len() {
            let item = self.world.items[index];
            let climbed = u8::from(self.record(index).climbed);
            self.break_if(item.attempt > 1 + climbed, Broken::AttemptBurned);
        }
        for job in self.rules.jobs {
            let record = self.world.records[*job as usize];
            // Whoever lost its link computes on for a moment, beside the one who has the job now.
            let deserved = POISON_AFTER + record.overlaps;
            self.break_if(record.deaths > deserved, Broken::KilledTooMany);
            // All but one of its marks are of workers that computed it.
            let innocent = record.deaths + 1 < POISON_AFTER;
            self.break_if(record.poisoned && innocent, Broken::InnocentPoisoned);
            let published = u8::from(record.published) + record.others_published;
            self.break_if(published > 1, Broken::CopiesDiffer);
            if self.world.items.iter().all(|item| item.job != *job) {
                let failed = record.failed || record.poisoned;
                let answered = failed || record.timed_out || published > 0;
                self.break_if(!answered && !record.parked, Broken::JobLost);
                self.break_if(!answered, Broken::Unanswered);
                // A score that came after all needs no parked copy.
                self.break_if(
                    failed && !record.parked && published == 0,
                    Broken::NotParked,
                );
            }
        }
    }
}
