//! The workers, each behind two proxies, and what a supervisor does: start again what died, and kill
//! what takes too much memory.

use std::collections::HashMap;
use std::os::unix::process::ExitStatusExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use testkit::package::Package;
use testkit::stack::Stack;
use testkit::wait::secs;
use testkit::worker::{Settings, Worker};

use crate::broker::Broker;
use crate::plan::{DELAYS, FLEET};
use crate::proxy::Proxy;
use crate::records::Records;
use crate::testimony::{Testimony, excused};

/// What `amqp.poison_after` is.
const POISON_AFTER: usize = 2;
/// A worker that takes more is killed, as the kernel does it. At rest it takes a third of this.
const MEMORY: u64 = 300 << 20;
/// A drain has 3 s for jobs; every step after that is bounded too.
pub(crate) const DRAIN: Duration = secs(20);
const POLL: Duration = Duration::from_millis(20);

/// Why a worker was killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Cause {
    Fault,
    Memory,
}

/// A worker that died of SIGKILL.
pub(crate) struct Death {
    pub(crate) at: Instant,
    pub(crate) cause: Cause,
    /// Jobs that carried its mark; none where Redis could not be asked.
    pub(crate) marked: Option<Vec<String>>,
}

/// A place in the fleet: the id stays, incarnations come and go.
pub(crate) struct Member {
    pub(crate) id: String,
    pub(crate) broker: Proxy,
    pub(crate) redis: Proxy,
    seat: Mutex<Seat>,
}

struct Seat {
    worker: Worker,
    /// As its heartbeat has it, once it was seen.
    incarnation: Option<String>,
    killed: Option<Cause>,
    terminated: bool,
    /// How many have sat here.
    starts: u64,
}

pub(crate) struct Fleet {
    stack: Arc<Stack>,
    package: Package,
    /// Where candidates may be fetched.
    allowed: String,
    pub(crate) members: Vec<Member>,
    pub(crate) records: Records,
    deaths: Mutex<Vec<Death>>,
    dead: Mutex<Vec<String>>,
    /// Whose death may have been counted since the round began, and how often: who died, was frozen, or
    /// could not beat.
    suspects: Mutex<HashMap<String, usize>>,
    testimony: Mutex<Testimony>,
    complaints: Mutex<Vec<String>>,
    retired: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fleet {
    pub(crate) fn start(stack: &Arc<Stack>, services: &Broker, allowed: String) -> Self {
        let package = Package::hazard();
        let members = (0..FLEET).map(|n| {
            let (broker, redis) = (services.proxy(n), Proxy::before(&[stack.redis.url()]));
            let id = format!("w{n}");
            let settings = settings(stack, &package, &id, &broker, &redis)
                .set("candidates.allow", format!("[{allowed:?}]"));
            let seat = Mutex::new(Seat::taken(Worker::spawn(&id, &settings, stack), 1));
            Member {
                id,
                broker,
                redis,
                seat,
            }
        });
        let members = members.collect();
        Self {
            records: Records::new(stack),
            stack: Arc::clone(stack),
            package,
            allowed,
            members,
            deaths: Mutex::default(),
            dead: Mutex::default(),
            suspects: Mutex::default(),
            testimony: Mutex::default(),
            complaints: Mutex::default(),
            retired: AtomicBool::new(false),
        }
    }

    /// The supervisor: runs until it is retired.
    pub(crate) fn supervise(&self) {
        let mut looked = Instant::now();
        while !self.retired.load(Ordering::Relaxed) {
            for member in &self.members {
                self.look_after(member);
            }
            if looked.elapsed() > Duration::from_millis(250) {
                self.note_incarnations();
                looked = Instant::now();
            }
            std::thread::sleep(POLL);
        }
    }

    fn look_after(&self, member: &Member) {
        let mut seat = lock(&member.seat);
        if resident(seat.worker.pid()) > MEMORY && seat.killed.is_none() {
            seat.killed = Some(Cause::Memory);
            seat.worker.signal(Signal::SIGKILL);
        }
        if seat.worker.ended().is_none() {
            return;
        }
        let settings = self.settings(member);
        let next = Worker::spawn(&member.id, &settings, &self.stack);
        let starts = seat.starts + 1;
        let left = std::mem::replace(&mut *seat, Seat::taken(next, starts));
        drop(seat);
        self.bury(member, &left);
    }

    /// Looks how it ended, what it leaves behind, and what it has to say.
    fn bury(&self, member: &Member, left: &Seat) {
        let log = left.worker.log();
        lock(&self.testimony).hear(&member.id, &log);
        let status = left.worker.ended().expect("it has ended");
        match (status.code(), status.signal(), left.killed) {
            (Some(0 | 75), _, _) if left.terminated => {}
            // Before it could install its handlers.
            (_, Some(15), _) if left.terminated => {}
            (_, Some(9), Some(cause)) => self.count_death(member, left, cause, &log),
            _ => {
                let tail: Vec<&str> = log.lines().rev().take(5).collect();
                self.complain(format!("{} ended by itself: {status}; {tail:?}", member.id));
            }
        }
    }

    fn count_death(&self, member: &Member, left: &Seat, cause: Cause, log: &str) {
        self.suspect(&member.id);
        let own = left.incarnation.as_ref();
        let own = own.map(|incarnation| format!("{}/{incarnation}", member.id));
        let marks = own.as_ref().and_then(|_| self.records.marks());
        lock(&self.dead).extend(own.clone());
        let mut marked = Vec::new();
        for (job, marks) in marks.iter().flatten() {
            let mark = marks.iter().find(|(field, _)| Some(field) == own.as_ref());
            let Some(started) = mark.and_then(|(_, value)| value.parse().ok()) else {
                continue;
            };
            let dead = lock(&self.dead);
            let died_of_it = marks
                .iter()
                .filter(|(field, _)| dead.contains(field))
                .count();
            drop(dead);
            if died_of_it > POISON_AFTER && !excused(log, started) {
                self.complain(format!(
                    "{died_of_it} workers died of {job}; marks: {marks:?}"
                ));
            }
            marked.push(job.clone());
        }
        lock(&self.deaths).push(Death {
            at: Instant::now(),
            cause,
            marked: marks.is_some().then_some(marked),
        });
    }

    fn note_incarnations(&self) {
        let Some(beats) = self.records.beats(&self.ids()) else {
            return;
        };
        for (member, beat) in self.members.iter().zip(beats) {
            let mut seat = lock(&member.seat);
            if let Some(beat) = beat.filter(|beat| beat["pid"] == seat.worker.pid()) {
                seat.incarnation = beat["incarnation"].as_str().map(str::to_owned);
            }
        }
    }

    fn ids(&self) -> Vec<String> {
        self.members.iter().map(|m| m.id.clone()).collect()
    }

    fn settings(&self, member: &Member) -> Settings {
        let Member {
            id, broker, redis, ..
        } = member;
        settings(&self.stack, &self.package, id, broker, redis)
            .set("candidates.allow", format!("[{:?}]", self.allowed))
    }

    /// What each worker that is not ready says instead; empty = the fleet is ready.
    pub(crate) fn unready(&self) -> Vec<String> {
        let Some(beats) = self.records.beats(&self.ids()) else {
            return vec!["Redis does not answer".into()];
        };
        let tell = |(member, beat): (&Member, Option<serde_json::Value>)| {
            let pid = lock(&member.seat).worker.pid();
            match beat.filter(|beat| beat["pid"] == pid) {
                Some(beat) if beat["ready"] == true => None,
                Some(beat) => Some(format!(
                    "{}: {}/{}, {}",
                    member.id, beat["state"], beat["state_detail"], beat["last_error"]["message"]
                )),
                None => Some(format!("{}: no record of this process", member.id)),
            }
        };
        self.members.iter().zip(beats).filter_map(tell).collect()
    }

    /// Jobs that workers hold, by their own account; none if one has no record.
    pub(crate) fn held(&self) -> Option<u64> {
        let beats = self.records.beats(&self.ids())?;
        let held = beats.into_iter().map(|beat| {
            let jobs = beat?["jobs"].clone();
            Some(jobs["in_flight"].as_u64()? + jobs["buffered"].as_u64()?)
        });
        held.sum()
    }

    pub(crate) fn kill(&self, member: usize) {
        let mut seat = lock(&self.members[member].seat);
        seat.killed.get_or_insert(Cause::Fault);
        seat.worker.signal(Signal::SIGKILL);
    }

    pub(crate) fn freeze(&self, member: usize) {
        self.suspect(&self.members[member].id);
        lock(&self.members[member].seat)
            .worker
            .signal(Signal::SIGSTOP);
    }

    pub(crate) fn thaw(&self, member: usize) {
        lock(&self.members[member].seat)
            .worker
            .signal(Signal::SIGCONT);
    }

    /// Asks for a drain and waits until the process is gone; false = it does not go.
    pub(crate) fn terminate(&self, member: usize) -> bool {
        let member = &self.members[member];
        let mut seat = lock(&member.seat);
        seat.terminated = true;
        seat.worker.signal(Signal::SIGTERM);
        let starts = seat.starts;
        drop(seat);
        let until = Instant::now() + DRAIN;
        while Instant::now() < until {
            if lock(&member.seat).starts > starts {
                return true;
            }
            std::thread::sleep(POLL);
        }
        let log = lock(&member.seat).worker.log();
        let tail: Vec<&str> = log.lines().rev().take(8).collect();
        self.complain(format!("{} does not drain: {tail:?}", member.id));
        self.kill_seat(member);
        false
    }

    fn kill_seat(&self, member: &Member) {
        let mut seat = lock(&member.seat);
        seat.killed.get_or_insert(Cause::Fault);
        seat.worker.signal(Signal::SIGKILL);
    }

    /// Others may have to take this worker for dead.
    pub(crate) fn suspect(&self, id: &str) {
        *lock(&self.suspects).entry(id.to_owned()).or_default() += 1;
    }

    /// How often others may have taken each worker for dead, since the last call of [`Fleet::forgive`].
    pub(crate) fn suspects(&self) -> HashMap<String, usize> {
        lock(&self.suspects).clone()
    }

    pub(crate) fn forgive(&self) {
        lock(&self.suspects).clear();
    }

    pub(crate) fn last_death(&self) -> Option<Instant> {
        lock(&self.deaths).last().map(|death| death.at)
    }

    pub(crate) fn deaths(&self) -> MutexGuard<'_, Vec<Death>> {
        lock(&self.deaths)
    }

    /// What went wrong since the last call.
    pub(crate) fn complaints(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.complaints))
    }

    /// Tells what went wrong.
    pub(crate) fn complain(&self, what: String) {
        lock(&self.complaints).push(what);
    }

    /// Jobs that workers say to have answered, and those of them that came while they were not ready.
    pub(crate) fn testimony(&self) -> (usize, Vec<String>) {
        let mut all = lock(&self.testimony).clone();
        for member in &self.members {
            all.hear(&member.id, &lock(&member.seat).worker.log());
        }
        (all.answered, all.unready)
    }

    /// Ends the supervisor.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
    }

    /// Drains them all, for good, without a supervisor; what did not end with 0 is told.
    pub(crate) fn close(&self) -> Vec<String> {
        let seats = || self.members.iter().map(|member| lock(&member.seat));
        seats().for_each(|seat| seat.worker.terminate());
        let codes = self.members.iter().map(|member| {
            let code = lock(&member.seat).worker.exit_code(DRAIN);
            (code != 0).then(|| format!("{} ended its last drain with {code}", member.id))
        });
        codes.flatten().collect()
    }
}

impl Seat {
    fn taken(worker: Worker, starts: u64) -> Self {
        Self {
            worker,
            incarnation: None,
            killed: None,
            terminated: false,
            starts,
        }
    }
}

/// Short lives and short waits, so that deaths are known within seconds.
fn settings(stack: &Stack, package: &Package, id: &str, broker: &Proxy, redis: &Proxy) -> Settings {
    stack
        .settings()
        .set("worker.id", id)
        .set("worker.drain_timeout", "3s")
        .set("model.dir", package.path().display())
        .set("amqp.url", broker.url())
        .set("amqp.heartbeat", "2s")
        .set("amqp.retry_delays", format!("{DELAYS:?}"))
        .set("amqp.poison_after", POISON_AFTER)
        .set("redis.url", redis.url())
        .set("heartbeat.interval", "250ms")
        .set("heartbeat.ttl", "1500ms")
        .set("candidates.allow_private", true)
        // It says when Redis did not answer a job in time.
        .set("telemetry.log", "info,scorer::store=debug")
}

/// Resident bytes of a process; 0 when it is gone.
fn resident(pid: u32) -> u64 {
    const PAGE: u64 = 4096;
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages = text
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or_default() * PAGE
}
