//! What will go wrong, when, and for how long: a pure function of the seed and the round's number.

use std::fmt;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};

use crate::proxy::Mode;

/// Workers of the fleet.
pub(crate) const FLEET: usize = 4;
/// The retry ladder.
pub(crate) const DELAYS: [&str; RUNGS] = ["1s", "2s", "4s"];
const RUNGS: usize = 3;

/// Faults of one round.
const HAND: usize = 8;
/// A round's faults begin within this time.
const WINDOW_MS: u64 = 8_000;

/// Every kind of fault as often as it comes in [`ROUNDS_PER_DECK`] rounds.
const DECK: [Kind; 24] = [
    Kind::WorkerKill,
    Kind::WorkerKill,
    Kind::WorkerFreeze,
    Kind::WorkerFreeze,
    Kind::WorkerTerminate,
    Kind::WorkerTerminate,
    Kind::Killer,
    Kind::Killer,
    Kind::BrokerRestart,
    Kind::BrokerKill,
    Kind::BrokerFreeze,
    Kind::BrokerAlarm,
    Kind::JobsQueueDeleted,
    Kind::OtherQueueDeleted,
    Kind::RedisRestart,
    Kind::RedisFreeze,
    Kind::BrokerCut,
    Kind::BrokerDelayed,
    Kind::BrokerThrottled,
    Kind::BrokerHalfOpen,
    Kind::RedisCut,
    Kind::RedisDelayed,
    Kind::RedisThrottled,
    Kind::RedisHalfOpen,
];

/// After so many rounds every kind has come.
pub(crate) const ROUNDS_PER_DECK: u64 = (DECK.len() / HAND) as u64;

/// A kind of fault, as the report counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    WorkerKill,
    WorkerFreeze,
    WorkerTerminate,
    Killer,
    BrokerRestart,
    BrokerKill,
    /// What [`Kind::BrokerKill`] is in a cluster.
    LeaderKill,
    BrokerFreeze,
    BrokerAlarm,
    JobsQueueDeleted,
    OtherQueueDeleted,
    RedisRestart,
    RedisFreeze,
    BrokerCut,
    BrokerDelayed,
    BrokerThrottled,
    BrokerHalfOpen,
    RedisCut,
    RedisDelayed,
    RedisThrottled,
    RedisHalfOpen,
}

impl Kind {
    /// What it is called in a cluster.
    fn clustered(self) -> Self {
        if self == Self::BrokerKill {
            Self::LeaderKill
        } else {
            self
        }
    }
}

/// A queue that somebody deletes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Queue {
    Jobs,
    Retry(usize),
    Results,
}

/// A service behind a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Service {
    Broker,
    Redis,
}

/// A fault and its victim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// `kill -9`.
    Kill(usize),
    /// SIGSTOP, then SIGCONT.
    Freeze(usize),
    /// SIGTERM: a drain.
    Terminate(usize),
    /// A worker's connections to a service suffer.
    Link(usize, Service, Mode),
    /// An orderly stop and a start. In a cluster this and the next three strike the node that leads the
    /// jobs queue.
    BrokerRestart,
    /// `kill -9` and a start on the same data.
    BrokerKill,
    /// SIGSTOP, then SIGCONT.
    BrokerFreeze,
    /// Publishers are blocked.
    BrokerAlarm,
    /// With all that waits in it.
    Delete(Queue),
    /// `kill -9` and a start, empty.
    RedisRestart,
    /// SIGSTOP, then SIGCONT.
    RedisFreeze,
    /// A job that kills whoever computes it.
    Killer,
}

/// Faults of one lane do not overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Lane {
    Broker,
    Redis,
    Jobs,
    Worker(usize),
    Link(usize),
}

/// A line of the schedule.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Planned {
    pub(crate) kind: Kind,
    pub(crate) fault: Fault,
    /// From the beginning of the round; later if the lane is still busy.
    pub(crate) at: Duration,
    /// From the fault to its end, where it has one.
    pub(crate) lasts: Duration,
}

/// Random numbers of one purpose. The lock file pins the generator: another version of `rand` may
/// draw other plans from the same seed.
pub(crate) fn rng(seed: u64, purpose: &str, number: u64) -> StdRng {
    use sha2::Digest as _;
    let text = format!("{seed}/{purpose}/{number}");
    StdRng::from_seed(sha2::Sha256::digest(text).into())
}

/// The faults of a round, in the order in which they begin.
pub(crate) fn plan(seed: u64, round: u64, clustered: bool) -> Vec<Planned> {
    let mut deck = DECK;
    deck.shuffle(&mut rng(seed, "deck", round / ROUNDS_PER_DECK));
    let first = usize::try_from(round % ROUNDS_PER_DECK).expect("a small number") * HAND;
    let mut rng = rng(seed, "faults", round);
    let hand = deck[first..first + HAND]
        .iter()
        .map(|kind| if clustered { kind.clustered() } else { *kind });
    let mut planned: Vec<Planned> = hand.map(|kind| draw(kind, &mut rng)).collect();
    planned.sort_by_key(|planned| planned.at);
    planned
}

fn draw(kind: Kind, rng: &mut StdRng) -> Planned {
    let at = Duration::from_millis(rng.random_range(0..WINDOW_MS));
    let lasts = Duration::from_millis(rng.random_range(1_000..5_000));
    let worker = rng.random_range(0..FLEET);
    let delay = Mode::Delay(Duration::from_millis(rng.random_range(60..600)));
    let throttle = Mode::Throttle(rng.random_range(1_000..20_000));
    let other = match rng.random_range(0..=RUNGS) {
        rung @ 0..RUNGS => Queue::Retry(rung),
        _ => Queue::Results,
    };
    let fault = match kind {
        Kind::WorkerKill => Fault::Kill(worker),
        Kind::WorkerFreeze => Fault::Freeze(worker),
        Kind::WorkerTerminate => Fault::Terminate(worker),
        Kind::Killer => Fault::Killer,
        Kind::BrokerRestart => Fault::BrokerRestart,
        Kind::BrokerKill | Kind::LeaderKill => Fault::BrokerKill,
        Kind::BrokerFreeze => Fault::BrokerFreeze,
        Kind::BrokerAlarm => Fault::BrokerAlarm,
        Kind::JobsQueueDeleted => Fault::Delete(Queue::Jobs),
        Kind::OtherQueueDeleted => Fault::Delete(other),
        Kind::RedisRestart => Fault::RedisRestart,
        Kind::RedisFreeze => Fault::RedisFreeze,
        Kind::BrokerCut => Fault::Link(worker, Service::Broker, Mode::Cut),
        Kind::BrokerDelayed => Fault::Link(worker, Service::Broker, delay),
        Kind::BrokerThrottled => Fault::Link(worker, Service::Broker, throttle),
        Kind::BrokerHalfOpen => Fault::Link(worker, Service::Broker, Mode::HalfOpen),
        Kind::RedisCut => Fault::Link(worker, Service::Redis, Mode::Cut),
        Kind::RedisDelayed => Fault::Link(worker, Service::Redis, delay),
        Kind::RedisThrottled => Fault::Link(worker, Service::Redis, throttle),
        Kind::RedisHalfOpen => Fault::Link(worker, Service::Redis, Mode::HalfOpen),
    };
    Planned {
        kind,
        fault,
        at,
        lasts,
    }
}

impl Planned {
    pub(crate) fn lane(&self) -> Lane {
        match self.fault {
            Fault::Kill(worker) | Fault::Freeze(worker) | Fault::Terminate(worker) => {
                Lane::Worker(worker)
            }
            Fault::Link(worker, _, _) => Lane::Link(worker),
            // A queue that is deleted just before its broker is killed may find no leader for a
            // minute, in RabbitMQ 3.10; so they share a lane.
            Fault::BrokerRestart
            | Fault::BrokerKill
            | Fault::BrokerFreeze
            | Fault::BrokerAlarm
            | Fault::Delete(_) => Lane::Broker,
            Fault::RedisRestart | Fault::RedisFreeze => Lane::Redis,
            Fault::Killer => Lane::Jobs,
        }
    }
}

impl fmt::Display for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (at, lasts) = (self.at.as_secs_f64(), self.lasts.as_secs_f64());
        write!(f, "+{at:6.3} s  {lasts:5.3} s  {:?}", self.fault)
    }
}

#[test]
fn a_seed_repeats_itself_and_every_kind_comes_in_a_deck() {
    let lines = |seed, round| {
        let planned = plan(seed, round, false);
        let lines: Vec<String> = planned.iter().map(ToString::to_string).collect();
        lines
    };
    assert_eq!(lines(7, 5), lines(7, 5));
    assert_ne!(lines(7, 5), lines(8, 5));
    let rounds = (0..ROUNDS_PER_DECK).flat_map(|round| plan(7, round, true));
    let mut kinds: Vec<Kind> = rounds.map(|planned| planned.kind).collect();
    kinds.sort();
    let mut deck = DECK.map(Kind::clustered);
    deck.sort();
    assert_eq!(kinds, deck);
}
