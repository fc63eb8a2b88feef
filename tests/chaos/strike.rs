//! Does what the plan says.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use testkit::broker::Rabbit;
use testkit::encoding::Encoding;
use testkit::hazard::hazard_job;
use testkit::package::MODEL;
use testkit::stack::Stack;
use testkit::wait::secs;

use crate::broker::Broker;
use crate::client::Client;
use crate::fleet::Fleet;
use crate::ledger::{Kind, Ledger};
use crate::plan::{DELAYS, Fault, Lane, Planned, Queue, Service};
use crate::proxy::Mode;

/// A product of matrices of this size fills the memory that no worker may have, long before it ends.
const DEADLY: f32 = 8_000.0;
/// A killer takes two deaths and two waits for news of the dead; a broker that is away takes longer.
const EXECUTION: Duration = secs(40);
/// Some worker is well, and misses its queue.
const REDECLARED: Duration = secs(15);
/// See [`await_settled`].
const SETTLING: Duration = secs(4);
const POLL: Duration = Duration::from_millis(50);
/// Long enough for any of our brokers to take a call.
const PATIENCE: Duration = secs(60);

/// Everything that can be struck.
pub(crate) struct Site<'a> {
    pub(crate) stack: &'a Stack,
    pub(crate) broker: &'a Broker,
    pub(crate) fleet: &'a Fleet,
    pub(crate) ledger: &'a Ledger,
    pub(crate) round: u64,
    /// When the last fault ended.
    quiet_since: Mutex<Instant>,
}

impl<'a> Site<'a> {
    pub(crate) fn new(
        (stack, broker): (&'a Stack, &'a Broker),
        fleet: &'a Fleet,
        ledger: &'a Ledger,
        round: u64,
    ) -> Self {
        Self {
            stack,
            broker,
            fleet,
            ledger,
            round,
            quiet_since: Mutex::new(Instant::now()),
        }
    }

    /// Runs a plan to its end, lanes side by side.
    pub(crate) fn run(&self, plan: &[Planned]) {
        let mut lanes: BTreeMap<Lane, Vec<Planned>> = BTreeMap::new();
        for planned in plan {
            lanes.entry(planned.lane()).or_default().push(*planned);
        }
        let began = Instant::now();
        std::thread::scope(|scope| {
            for lane in lanes.into_values() {
                scope.spawn(move || {
                    for planned in lane {
                        std::thread::sleep(planned.at.saturating_sub(began.elapsed()));
                        let over = self.strike(&planned);
                        let mut quiet = self.quiet();
                        *quiet = over.max(*quiet);
                    }
                });
            }
        });
    }

    pub(crate) fn quiet_since(&self) -> Instant {
        *self.quiet()
    }

    fn quiet(&self) -> std::sync::MutexGuard<'_, Instant> {
        let quiet = self.quiet_since.lock();
        quiet.unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.broker.url(), &self.stack.namespace)
    }

    /// When it was over.
    fn strike(&self, planned: &Planned) -> Instant {
        let wait = || std::thread::sleep(planned.lasts);
        let (redis, fleet) = (&self.stack.redis, self.fleet);
        match planned.fault {
            Fault::Kill(worker) => fleet.kill(worker),
            Fault::Freeze(worker) => {
                fleet.freeze(worker);
                wait();
                fleet.thaw(worker);
            }
            Fault::Terminate(worker) => {
                fleet.terminate(worker);
            }
            Fault::Link(worker, service, mode) => self.disturb(worker, service, mode, wait),
            Fault::BrokerRestart => self.strike_broker(Rabbit::stop, wait, Rabbit::start),
            Fault::BrokerKill => self.strike_broker(Rabbit::kill, wait, Rabbit::start),
            Fault::BrokerFreeze => self.strike_broker(Rabbit::freeze, wait, Rabbit::thaw),
            Fault::BrokerAlarm => {
                let (set, lift) = (
                    |node: &Rabbit| node.memory_alarm(true),
                    |node: &Rabbit| node.memory_alarm(false),
                );
                self.strike_broker(set, wait, lift);
            }
            Fault::Delete(queue) => return self.delete(queue),
            Fault::RedisRestart => {
                redis.kill();
                wait();
                redis.start();
            }
            Fault::RedisFreeze => {
                redis.freeze();
                wait();
                redis.thaw();
            }
            Fault::Killer => return self.submit_killer(planned),
        }
        Instant::now()
    }

    fn strike_broker(&self, strike: impl Fn(&Rabbit), wait: impl Fn(), mend: impl Fn(&Rabbit)) {
        let queue = self.stack.jobs_queue();
        let node = self.broker.leader(&queue);
        strike(&node);
        wait();
        mend(&node);
        self.broker.rejoined(&queue);
    }

    fn disturb(&self, worker: usize, service: Service, mode: Mode, wait: impl FnOnce()) {
        let member = &self.fleet.members[worker];
        let proxy = match service {
            Service::Broker => &member.broker,
            Service::Redis => {
                self.fleet.suspect(&member.id);
                &member.redis
            }
        };
        proxy.set(mode);
        wait();
        proxy.set(Mode::Pass);
    }

    /// Deletes a queue. What was in it is lost by definition, with what was published while it went.
    fn delete(&self, queue: Queue) -> Instant {
        let mut client = self.client();
        let name = match queue {
            Queue::Jobs => self.stack.jobs_queue(),
            Queue::Retry(rung) => format!("{}.retry.{}", self.stack.jobs_queue(), DELAYS[rung]),
            Queue::Results => self.stack.object(&format!("results.{MODEL}")),
        };
        let jobs = self.stack.jobs_queue();
        await_settled(&mut client, &jobs);
        let until = Instant::now() + PATIENCE;
        self.ledger.expose();
        while client.delete(&name).is_err() {
            assert!(Instant::now() < until, "{name} cannot be deleted");
            std::thread::sleep(POLL);
        }
        let deleted = Instant::now();
        self.ledger.expose();
        if !await_settled(&mut client, &jobs) {
            self.fleet.complain(format!("nobody declares {jobs} again"));
        }
        deleted
    }

    /// Waits until it is answered: the deaths are the fault.
    fn submit_killer(&self, planned: &Planned) -> Instant {
        let id = format!("r{}-killer-{}", self.round, planned.at.as_millis());
        let body = Encoding::MessagePack.encode(&hazard_job(&id, DEADLY));
        self.ledger.intend(&id, Kind::Killer, self.round, &body);
        let submitted = Instant::now();
        if self.client().submit(&id, &body, PATIENCE) {
            self.ledger.confirm(&id);
        }
        while submitted.elapsed() < EXECUTION && !self.ledger.is_settled(&id) {
            std::thread::sleep(POLL);
        }
        submitted
    }
}

/// Waits until a queue is there, and a moment longer: a node that dies before it has written down where the log of a
/// new queue lies finds no leader for it, ever again, and it writes that some three seconds late. And where a queue is deleted in the first second
/// of a node, the supervisor of its dead-letter workers gives up: then no queue with at-least-once dead
/// letters has a leader before the node is restarted.
/// False = nobody declares it.
fn await_settled(client: &mut Client, queue: &str) -> bool {
    let began = Instant::now();
    while !matches!(client.depth(queue), Ok(Some(_))) {
        if began.elapsed() > REDECLARED {
            return false;
        }
        std::thread::sleep(POLL);
    }
    std::thread::sleep(SETTLING);
    true
}
