//! What the model is made of: jobs, workers, what can happen, and what must never.

use std::hash::{Hash, Hasher};

use scorer::protocol::state::State;

/// Deaths until a job is answered `poisoned`.
pub(crate) const POISON_AFTER: u8 = 2;
/// As in `disposition.rs`, where it is 10 of 20 returns: smaller, so that few disturbances reach it.
pub(crate) const RETURNS_BEFORE_REPUBLISH: u8 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Job {
    /// Is scored.
    Ordinary,
    /// Its candidate is never there: it climbs the ladder, then is answered and parked.
    Flaky,
    /// Kills whoever computes it.
    Killer,
}

/// A result, as far as readers can tell two apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Answer {
    /// The one in Redis, or a copy of it.
    Stored,
    /// Computed and not stored: no two are alike.
    Unstored,
    Failed,
    /// `score_timeout`: answered at once and not parked.
    TimedOut,
    Poisoned,
}

/// What a worker publishes for a job it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Message {
    Result {
        answer: Answer,
        then_park: bool,
    },
    Parked,
    /// The job, to the retry ladder.
    Climb,
    /// The job, handed back as a fresh message.
    Fresh,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// Delivered; nothing is known yet.
    Waiting,
    /// It has the worker's one turn on the device, and a crash mark.
    Computing,
    /// Written to a socket; only a confirm says that it arrived.
    Written(Message),
    /// With the broker, whose confirm is on its way.
    Taken(Message),
    /// Confirmed.
    Acking,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Place {
    Queue,
    Rung,
    Held {
        by: usize,
        stage: Stage,
        /// The broker has taken it back and the worker does not know yet.
        stale: bool,
    },
}

/// One message with a job in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Item {
    pub(crate) job: Job,
    pub(crate) attempt: u8,
    /// As the broker counts them.
    pub(crate) returns: u8,
    pub(crate) place: Place,
}

impl Item {
    /// At which stage a worker has it.
    pub(crate) fn stage_at(&self, worker: usize) -> Option<Stage> {
        match self.place {
            Place::Held { by, stage, .. } => (by == worker).then_some(stage),
            Place::Queue | Place::Rung => None,
        }
    }

    pub(crate) fn is_stale(&self) -> bool {
        matches!(self.place, Place::Held { stale: true, .. })
    }
}

/// What is known of a job outside of its messages. The last three no program sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Record {
    /// In Redis.
    pub(crate) stored: bool,
    /// Crash marks of incarnations that are dead.
    pub(crate) marks: u8,
    /// In the results queue: the stored one, how many others.
    pub(crate) published: bool,
    pub(crate) others_published: u8,
    pub(crate) failed: bool,
    pub(crate) timed_out: bool,
    pub(crate) poisoned: bool,
    /// In the dead queue.
    pub(crate) parked: bool,
    pub(crate) climbed: bool,
    /// Workers that died while they computed it.
    pub(crate) deaths: u8,
    /// Times that it began to be computed while another worker computed it.
    pub(crate) overlaps: u8,
}

/// `worker::transition::Next`: what comes when the jobs that are held have ended. A later one covers the
/// ones before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Then {
    Again,
    Rewarm,
    Reload,
    Stop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Without a consumer: to warm up, or to wait for what stands in the way.
    Idle,
    Serving,
    /// In `Worker::finish`: no consumer any more, jobs end.
    Leaving(Then),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Link {
    Up,
    /// The broker has given it up and the worker does not know yet.
    Dying,
    Down,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Model {
    Absent,
    Unproven,
    Warm,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Worker {
    pub(crate) phase: Phase,
    pub(crate) state: State,
    pub(crate) link: Link,
    /// As the worker knows it, and says in its heartbeat.
    pub(crate) consuming: bool,
    pub(crate) paused: bool,
    pub(crate) model: Model,
    /// What must happen to the model before it may serve again; no program sees it.
    pub(crate) owed: Then,
}

/// A process that has just begun.
pub(crate) const NEW: Worker = Worker {
    phase: Phase::Idle,
    state: State::Starting,
    link: Link::Up,
    consuming: false,
    paused: false,
    model: Model::Absent,
    owed: Then::Reload,
};

impl Worker {
    /// For hashing and ordering, which `State` has not.
    pub(crate) fn key(&self) -> impl Ord + Hash + use<> {
        let Self {
            phase, link, model, ..
        } = *self;
        (
            phase,
            self.state as u8,
            link,
            self.consuming,
            self.paused,
            model,
            self.owed,
        )
    }
}

impl Hash for Worker {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.key().hash(hasher);
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct World {
    /// Sorted: their order means nothing.
    pub(crate) items: Vec<Item>,
    pub(crate) records: [Record; 3],
    pub(crate) workers: [Worker; 2],
    /// Disturbances that may still come.
    pub(crate) left: u8,
}

impl World {
    /// The same world with the workers' names exchanged.
    fn mirrored(&self) -> Self {
        let mut mirrored = self.clone();
        mirrored.workers.reverse();
        for item in &mut mirrored.items {
            if let Place::Held { by, .. } = &mut item.place {
                *by = 1 - *by;
            }
        }
        mirrored.items.sort_unstable();
        mirrored
    }

    /// One form for all worlds that differ in nothing that matters; true = names are exchanged.
    pub(crate) fn canonical(mut self) -> (Self, bool) {
        self.items.sort_unstable();
        let mirrored = self.mirrored();
        let key = |world: &Self| world.workers.map(|worker| worker.key());
        let exchange = (key(&mirrored), &mirrored.items) < (key(&self), &self.items);
        (if exchange { mirrored } else { self }, exchange)
    }

    /// Everything settled and everybody ready: where every run must still be able to go.
    pub(crate) fn is_done(&self) -> bool {
        let serves = |w: &Worker| w.phase == Phase::Serving && w.link == Link::Up && w.consuming;
        self.items.is_empty() && self.workers.iter().all(serves)
    }
}

/// What can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Deliver,
    Begin,
    Score,
    Kill,
    BrokerTakes,
    Confirm,
    Ack,
    /// On a dead channel: the broker delivers again.
    AckLost,
    HandBack,
    RungExpires,
    Finish,
    WarmUp,
    Register,
    NoticeLoss,
    Relink,
    Resume,
    /// The first that disturbs.
    WarmUpFails,
    Crash,
    LoseLink,
    LoseConsumer,
    /// Jobs that do not settle in time after the drain's deadline are left to the broker.
    CutOff,
    /// An audit finds the engine changed, or the engine is lost.
    Distrust,
    /// A run makes no progress: it is ended, and its job answered.
    Stall,
    /// A job has waited long, and another worker has nothing to do.
    SendBack,
    Pause,
    Rewarm,
    /// The last: tests count.
    Drain,
}

impl Kind {
    /// What a fleet suffers or is asked, and never needs to get on.
    pub(crate) fn disturbs(self) -> bool {
        self >= Self::WarmUpFails
    }
}

/// What happens, to which worker and which job.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Move {
    pub(crate) kind: Kind,
    pub(crate) worker: Option<usize>,
    pub(crate) job: Option<Job>,
}

/// The invariants, broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Broken {
    /// No result, no parked copy, not in a queue, held by nobody.
    JobLost,
    /// Nothing of it is left to do and there is no result.
    Unanswered,
    /// A failure that was tried to the end left no parked copy.
    NotParked,
    /// Acknowledged without a confirmed result or another confirmed copy.
    AckedUnconfirmed,
    /// Two copies of the result of one job are not equal.
    CopiesDiffer,
    /// A job went to a worker that is not ready.
    DeliveredUnready,
    /// `ready` without a consumer.
    ReadyUnregistered,
    /// `ready` without the warm-up or the reload that was due.
    ReadyUnproven,
    /// A hand-back counts against the job.
    AttemptBurned,
    /// The broker's own limit took a job out.
    LimitReached,
    /// A killer got more workers than `poison_after`.
    KilledTooMany,
    /// `poisoned` was said of a job that no worker, or too few, died of.
    InnocentPoisoned,
    /// `Lifecycle::advance` would refuse the step.
    IllegalStep,
    /// However lucky everything goes from here, some job is never settled or some worker never
    /// ready.
    Stuck,
}

/// Mistakes that the search must find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bug {
    AckBeforeConfirm,
    RepublishWithoutConfirmBeforeAck,
    ResultNotStoredFirst,
    NackOnPoison,
    MarksIgnored,
    ReadyWhileCancelled,
    ConsumerOutlivesReady,
    /// A pause while jobs end, and the re-warm that was asked before is not done.
    ForgottenRewarm,
    /// The same with a reload that was due.
    ForgottenReload,
    EndlessNack,
    HandBackCountsAsAttempt,
    /// Jobs that only waited beside a killer are marked every time.
    BystandersMarked,
}

/// Who takes part, and how much goes wrong.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scenario {
    pub(crate) jobs: &'static [Job],
    pub(crate) prefetch: usize,
    pub(crate) disturbances: u8,
    /// Before RabbitMQ 4.3 the broker counts a nack as it counts a crash.
    pub(crate) nacks_count: bool,
    pub(crate) bug: Option<Bug>,
}

impl Scenario {
    pub(crate) fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    /// The broker's: hand-backs, the deaths of a killer and every disturbance fit in.
    pub(crate) fn delivery_limit(&self) -> u8 {
        RETURNS_BEFORE_REPUBLISH + POISON_AFTER + self.disturbances
    }

    /// Whether too many workers died of a job for it to be computed again.
    pub(crate) fn poisons(&self, record: &Record) -> bool {
        record.marks >= POISON_AFTER && !self.has(Bug::MarksIgnored)
    }

    pub(crate) fn start(&self) -> World {
        let item = |job: &Job| Item {
            job: *job,
            attempt: 1,
            returns: 0,
            place: Place::Queue,
        };
        World {
            items: self.jobs.iter().map(item).collect(),
            records: [Record::default(); 3],
            workers: [NEW; 2],
            left: self.disturbances,
        }
    }
}
