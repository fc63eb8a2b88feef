//! Rounds of faults under load; after each the fleet recovers, the jobs settle, and all is judged.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use testkit::http::Server;
use testkit::message::Message;
use testkit::package::MODEL;
use testkit::redis_server::Redis;
use testkit::stack::Stack;
use testkit::wait::{START, eventually};

use crate::broker::Broker;
use crate::fleet::Fleet;
use crate::inbox::Inbox;
use crate::judge::Judge;
use crate::ledger::Ledger;
use crate::load::Load;
use crate::plan::{Planned, plan};
use crate::recovery::Watch;
use crate::report::Report;
use crate::settle::settle;
use crate::strike::Site;

/// Which rounds are run.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Length {
    /// From 0 on.
    Rounds(u64),
    /// As many as fit.
    Time(Duration),
    /// One alone: each is the same whatever came before.
    Only(u64),
}

/// A run under way.
struct Run {
    seed: u64,
    broker: Broker,
    stack: Arc<Stack>,
    fleet: Arc<Fleet>,
    supervisor: JoinHandle<()>,
    ledger: Arc<Ledger>,
    server: Server,
    report: Report,
    /// Deliveries that were complained of already.
    told: HashSet<String>,
}

/// Runs to the end, whatever is found.
pub(crate) fn run(seed: u64, length: Length, clustered: bool) -> Report {
    let began = Instant::now();
    let mut run = Run::start(seed, clustered);
    let inboxes = run.inboxes();
    let rounds = match length {
        Length::Rounds(count) => 0..count,
        Length::Time(_) => 0..u64::MAX,
        Length::Only(round) => round..round + 1,
    };
    let is_over = || matches!(length, Length::Time(limit) if began.elapsed() > limit);
    for round in rounds.take_while(|_| !is_over()) {
        run.round(round);
    }
    run.report.took = began.elapsed();
    let report = run.finish();
    drop(inboxes);
    report
}

impl Run {
    fn start(seed: u64, clustered: bool) -> Self {
        let broker = Broker::start(clustered);
        let stack = Arc::new(Stack::on(broker.node(), Arc::new(Redis::started())));
        let server = Server::start();
        let fleet = Arc::new(Fleet::start(&stack, &broker, server.url("/")));
        eventually(START, "the fleet is ready", || fleet.unready().is_empty());
        let supervised = Arc::clone(&fleet);
        Self {
            seed,
            supervisor: std::thread::spawn(move || supervised.supervise()),
            broker,
            stack,
            fleet,
            ledger: Arc::default(),
            server,
            report: Report::new(seed, clustered),
            told: HashSet::new(),
        }
    }

    /// Results from wherever they may be, and parked jobs.
    fn inboxes(&self) -> Vec<Inbox> {
        let open = |queue: &str, take: fn(&Ledger, &Message, bool)| {
            let ledger = Arc::clone(&self.ledger);
            let take =
                Arc::new(move |message: &Message, again: bool| take(&ledger, message, again));
            Inbox::open(self.broker.url(), self.stack.object(queue), take)
        };
        vec![
            open(&format!("results.{MODEL}"), Ledger::answer),
            open("results.unrouted", Ledger::answer),
            open(&format!("dead.{MODEL}"), Ledger::park),
        ]
    }

    fn round(&mut self, round: u64) {
        let began = Instant::now();
        let plan = plan(self.seed, round, self.report.clustered);
        println!("--- seed {} round {round}", self.seed);
        plan.iter().for_each(|planned| println!("{planned}"));
        self.fleet.forgive();
        let mut violations = self.strike(round, &plan);
        violations.extend(self.judge(round));
        for planned in &plan {
            *self.report.faults.entry(planned.kind).or_default() += 1;
        }
        self.report.rounds += 1;
        let entries = self.ledger.entries();
        let jobs = entries
            .values()
            .filter(|entry| entry.round == round)
            .count();
        drop(entries);
        let ready = self.report.recoveries.last().copied().unwrap_or_default();
        println!(
            "    {jobs} jobs, ready after {ready:.1?}, settled after {:.0?}",
            began.elapsed()
        );
        self.complain(
            &format!("seed {} round {round}", self.seed),
            &plan,
            &violations,
        );
    }

    /// The faults, under load; the recovery, still under load; then without load what is left.
    fn strike(&mut self, round: u64, plan: &[Planned]) -> Vec<String> {
        let site = Site::new(
            (&self.stack, &self.broker),
            &self.fleet,
            &self.ledger,
            round,
        );
        let mut load = Load::new(&self.ledger, &self.server, site.client(), self.seed, round);
        let watch = Watch::new();
        let (load_ends, watch_ends) = (AtomicBool::new(false), AtomicBool::new(false));
        let mut violations = Vec::new();
        let settled = std::thread::scope(|scope| {
            // However this ends, nobody runs on.
            let _guards = [Raised(&load_ends), Raised(&watch_ends)];
            scope.spawn(|| watch.run(&site, &watch_ends));
            let loading = scope.spawn(|| load.run(&load_ends));
            site.run(plan);
            self.report.note(watch.recovered(&site), &mut violations);
            load_ends.store(true, Ordering::Relaxed);
            let refused = loading.join().expect("the load ends without a panic");
            if !refused.is_empty() {
                violations.push(format!("the broker did not take {refused:?}"));
            }
            let settled = settle(&site);
            // What was submitted again may have killed again.
            self.report.note(watch.recovered(&site), &mut violations);
            settled
        });
        self.report.lost += settled.lost;
        self.report.resubmitted += settled.resubmitted;
        violations.extend(settled.violations);
        violations
    }

    fn judge(&mut self, round: u64) -> Vec<String> {
        let judge = Judge {
            server: &self.server,
            suspects: &self.fleet.suspects(),
        };
        let mut violations = self.fleet.complaints();
        violations.extend(self.ledger.contradictions());
        let entries = self.ledger.entries();
        let of_round = entries.iter().filter(|(_, entry)| entry.round == round);
        violations.extend(of_round.flat_map(|(id, entry)| judge.judge(id, entry)));
        let (_, unready) = self.fleet.testimony();
        let news = unready.into_iter();
        violations.extend(news.filter(|what| self.told.insert(what.clone())));
        violations
    }

    fn complain(&mut self, when: &str, plan: &[Planned], violations: &[String]) {
        self.report.violations += violations.len();
        if violations.is_empty() {
            return;
        }
        println!("=== violations, {when}:");
        plan.iter().for_each(|planned| println!("{planned}"));
        violations.iter().for_each(|what| println!("=== {what}"));
        println!(
            "=== after {} rounds; the schedules before are above",
            self.report.rounds
        );
    }

    /// The last drain, and what came late.
    fn finish(mut self) -> Report {
        self.fleet.retire();
        self.supervisor
            .join()
            .expect("the supervisor ends without a panic");
        let mut violations = self.fleet.close();
        violations.extend(self.fleet.complaints());
        violations.extend(self.ledger.contradictions());
        let (testified, _) = self.fleet.testimony();
        self.report.testified = testified;
        self.report.count_deaths(&self.fleet.deaths());
        for entry in self.ledger.entries().values() {
            self.report.count_job(entry);
        }
        self.report.violations += violations.len();
        violations
            .iter()
            .for_each(|what| println!("=== at the end: {what}"));
        self.report
    }
}

/// A flag that is raised when this goes.
struct Raised<'a>(&'a AtomicBool);

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
