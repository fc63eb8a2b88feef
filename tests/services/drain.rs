//! Draining: the consumer leaves first, nothing is scored twice or lost, and the process says how it went.

use std::collections::HashSet;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use testkit::aggregator::Aggregator;
use testkit::broker::Rabbit;
use testkit::case::honest_job;
use testkit::encoding::Encoding;
use testkit::hazard::{enduring_job, enduring_package, hazard_job, patient};
use testkit::pace::Pace;
use testkit::package::Package;
use testkit::process::Group;
use testkit::program::scorer;
use testkit::redis_server::Redis;
use testkit::stack::Stack;
use testkit::wait::{DRAIN, SOON, START, eventually, eventually_some, secs};
use testkit::worker::Worker;

/// Submits jobs, each on windows of its own, and signals a worker amid them: most are submitted while it is stopped.
fn signal_amid_a_stream(worker: &Worker, aggregator: &Aggregator, signal: Signal) -> Vec<String> {
    let ids: Vec<String> = (0..60).map(|n| format!("job-{n}")).collect();
    let submit = |ids: &[String]| {
        ids.iter()
            .for_each(|id| aggregator.submit(&honest_job(id, id)))
    };
    let (first, rest) = ids.split_at(20);
    submit(first);
    eventually(SOON, "the stream is under way", || {
        aggregator.results().len() >= 4
    });
    worker.signal(Signal::SIGSTOP);
    submit(rest);
    worker.signal(signal);
    worker.signal(Signal::SIGCONT);
    ids
}

fn drains_without_loss(signal: Signal) {
    let stack = Stack::shared();
    let first = stack.worker("w1");
    first.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let ids = signal_amid_a_stream(&first, &aggregator, signal);
    assert_eq!(
        first.exit_code(DRAIN),
        0,
        "jobs handed back in time are a clean exit"
    );
    let record = first.heartbeat();
    assert_eq!(
        stack.rabbit.list_consumers(&stack.jobs_queue()),
        0,
        "its consumer is gone"
    );
    assert_eq!(
        (record["state"].as_str(), record["ready"].as_bool()),
        (Some("stopped"), Some(false)),
        "{record}"
    );
    let workers: Vec<String> =
        redis::Commands::zrange(&mut stack.redis.connection(), stack.key("workers"), 0, -1)
            .expect("the sorted set of workers");
    assert_eq!(
        workers,
        Vec::<String>::new(),
        "a stopped worker leaves the sorted set"
    );
    let before = aggregator.results().len();
    assert!(
        before < ids.len(),
        "all {before} jobs were done before the signal: the test saw no drain"
    );

    let second = stack.worker("w2");
    second.ready();
    aggregator.all_results(&ids, secs(90));
    second.drain();
    aggregator.expect_empty(&stack.jobs_queue());
    let results = aggregator.results();
    let distinct: HashSet<String> = results.iter().map(|m| m.id().to_owned()).collect();
    assert_eq!(
        (results.len(), distinct.len()),
        (ids.len(), ids.len()),
        "one result for each job, and no second"
    );
    assert!(
        results.iter().all(|m| m.json()["status"] == "scored"),
        "a drain is nobody's failure"
    );
    let states = stack.states("w1");
    assert_eq!(
        states[states.len() - 2..],
        ["draining".to_owned(), "stopped".to_owned()],
        "{states:?}"
    );
}

#[test]
fn sigterm_in_the_middle_of_a_stream_loses_and_doubles_nothing() {
    drains_without_loss(Signal::SIGTERM);
}

#[test]
fn sigint_drains_as_sigterm_does() {
    drains_without_loss(Signal::SIGINT);
}

#[test]
fn the_consumer_leaves_at_once_and_what_it_held_is_answered_or_handed_back() {
    let stack = Stack::shared();
    let package = Package::hazard();
    let worker = stack.worker_on("w1", &package.path());
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let pace = Pace::measure(&aggregator);
    let probes = aggregator.results().len();
    let ids: Vec<String> = (0..8).map(|n| format!("job-{n}")).collect();
    for id in &ids {
        aggregator.submit(&pace.job(id, 1.5));
    }
    let waiting = || {
        let depth = aggregator.depth(&stack.jobs_queue());
        depth.map_or(0, |(waiting, _)| waiting as usize)
    };
    // Amid a job, both slots of `amqp.prefetch` are taken, and nothing can free one before the signal is there.
    stack.stop_amid(&worker, &ids[0]);
    eventually(SOON, "both slots are taken", || waiting() == ids.len() - 2);
    let beyond = waiting();
    worker.terminate();
    worker.signal(Signal::SIGCONT);
    assert_eq!(worker.exit_code(DRAIN), 0);
    eventually(SOON, "answered + waiting = all", || {
        aggregator.results().len() - probes + waiting() == ids.len()
    });
    // Exact: whatever the broker had not yet delivered at the signal is still there.
    assert!(
        waiting() >= beyond,
        "{} of the {beyond} jobs that it did not hold are left: it went on consuming",
        waiting()
    );
}

#[test]
fn a_worker_that_never_got_ready_drains_promptly() {
    let stack = Stack::shared();
    let package = Package::copy();
    package.spoil_a_shard();
    let waiting = stack.worker_on("backing-off", &package.path());
    let young = stack.worker("starting");
    young.heartbeat_when(START, "a first record", |_| true);
    young.terminate();
    assert_eq!(young.exit_code(SOON), 0, "SIGTERM while it starts");
    waiting.heartbeat_when(START, "a failed warm-up", |r| r["state"] == "degraded");
    waiting.terminate();
    assert_eq!(
        waiting.exit_code(SOON),
        0,
        "SIGTERM while it waits to try again"
    );
    assert_eq!(waiting.heartbeat()["state"], "stopped");
    assert_eq!(
        stack
            .aggregator()
            .depth(&stack.jobs_queue())
            .map_or(0, |(_, consumers)| consumers),
        0
    );
}

#[test]
fn a_drain_at_any_moment_of_a_load_is_clean() {
    // One start in nine crashed before the process left without the library's destructors.
    const STARTS: u32 = 40;
    let stack = Stack::shared();
    let loading = |id: &str| {
        let worker = stack.worker(id);
        eventually(START, "it begins to load", || {
            worker.log().contains("loading_model")
        });
        (worker, Instant::now())
    };
    let (whole, began) = loading("whole");
    whole.ready();
    let load = began.elapsed();
    whole.drain();
    for start in 0..STARTS {
        let (worker, _) = loading(&format!("start-{start}"));
        // Another part of it each time.
        std::thread::sleep(load * start / STARTS);
        worker.terminate();
        assert_eq!(worker.exit_code(SOON), 0, "SIGTERM in start {start}");
        assert_eq!(worker.heartbeat()["state"], "stopped", "start {start}");
    }
}

#[test]
fn a_drain_waits_neither_for_the_job_that_a_pause_waits_for_nor_behind_a_burst_of_pauses() {
    let (stack, package) = (Stack::shared(), enduring_package());
    let worker = stack.worker_with("w1", |s| {
        patient(s, &package).set("worker.drain_timeout", "10m")
    });
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.submit(&enduring_job("held"));
    worker.computes();
    let commands = |commands: &[&str]| {
        for command in commands {
            let body = format!(r#"{{"v": 1, "command": "{command}"}}"#);
            aggregator.control("all", body.as_bytes(), Encoding::Json);
        }
    };
    commands(&["pause"]);
    worker.state("degraded", "paused");
    // All of them are there before the signal is heard.
    worker.signal(Signal::SIGSTOP);
    commands(&["pause", "resume"].repeat(100));
    worker.terminate();
    worker.signal(Signal::SIGCONT);
    worker.state("draining", "drain_signal");
    assert!(stack.is_begun("held"), "its job is still computed");
    let answered = stack
        .events("w1")
        .iter()
        .filter(|e| e.contains_key("command"))
        .count();
    assert!(answered < 100, "{answered} of 200 commands came first");
    worker.end_now();
    assert_eq!(worker.exit_code(DRAIN), 75, "{}", worker.log());
}

#[test]
fn what_will_be_done_in_time_ends_here_and_the_rest_is_handed_back_at_once() {
    const SHORT: usize = 200;
    // Windows one by one, so that no step of a job takes the ten seconds after which a worker counts as stuck, be the
    // machine ten times slower.
    let (stack, package) = (Stack::shared(), Package::hazard_of(24));
    let worker = stack.worker_with("w1", |s| {
        s.set("model.dir", package.path().display())
            .set("engine.micro_batch", 1)
            .set("amqp.prefetch", SHORT + 2)
            .set("worker.drain_timeout", "60s")
    });
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let pace = Pace::measure(&aggregator);
    let probes = aggregator.results().len();
    // What a window took here is what those behind are expected to take. So of the 57 s and a half of this drain there is
    // room for some of them and not for half of them, be these two seconds one or twenty; and for what computes, be it
    // five times slower than the probes. Jobs that come together are computed in the order in which they are decoded, so
    // each of the first two is alone.
    aggregator.submit(&pace.job("tells", 2.0));
    aggregator.result("tells");
    aggregator.submit(&pace.job("computed", 10.0));
    // Not only begun: it has the device before the others come.
    worker.computes();
    stack.stop_amid(&worker, "computed");
    for n in 0..SHORT {
        aggregator.submit(&hazard_job(&format!("short-{n}"), 2.0));
    }
    eventually(SOON, "they are on their way", || {
        aggregator.depth(&stack.jobs_queue()) == Some((0, 1))
    });
    worker.signal(Signal::SIGCONT);
    // Not all of them: on a machine that is busy otherwise, the first are computed before the last are looked at.
    worker.heartbeat_when(SOON, "it holds many", |r| {
        r["jobs"]["buffered"].as_u64() >= Some(SHORT as u64 / 2)
    });
    worker.terminate();
    let waiting = || {
        let depth = aggregator.depth(&stack.jobs_queue());
        depth.map_or(0, |(n, _)| n as usize)
    };
    eventually(SOON, "what will not be done is handed back", || {
        waiting() > 0
    });
    assert!(stack.is_begun("computed"), "before anything else is done");
    assert_eq!(worker.exit_code(DRAIN), 0, "{}", worker.log());
    eventually(SOON, "answered + waiting = all", || {
        aggregator.results().len() - probes + waiting() == SHORT + 2
    });
    assert_eq!(aggregator.result("computed").json()["status"], "scored");
    assert!(
        waiting() < SHORT,
        "some fitted into the time: {}",
        worker.log()
    );
}

/// A worker that has four seconds to drain. That it drained in them is told by its exit code: at their end it is ended with
/// another one, and long before the minute of the default.
fn drains_in_four_seconds(worker: &Worker, expected: i32) {
    worker.terminate();
    assert_eq!(
        worker.exit_code(secs(4) + SOON),
        expected,
        "{}",
        worker.log()
    );
}

#[test]
fn a_computation_that_is_cut_short_is_told_by_the_exit_code_and_its_job_handed_back() {
    let stack = Stack::shared();
    let package = Package::hazard();
    let worker = stack.worker_with("w1", |s| {
        s.set("model.dir", package.path().display())
            .set("worker.drain_timeout", "4s")
    });
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    // Seconds of zeros, then minutes of a product that cannot be ended.
    aggregator.submit(&hazard_job("endless", 16_000.0));
    worker.computes();
    drains_in_four_seconds(&worker, 75);
    assert!(worker.log().contains("\"cut_short\":1"), "{}", worker.log());
    assert_eq!(worker.heartbeat()["state"], "stopped");
    eventually(SOON, "its job waits again", || {
        aggregator.depth(&stack.jobs_queue()) == Some((1, 0))
    });
}

#[test]
fn a_drain_keeps_its_time_whatever_the_services_do() {
    let rabbit = Arc::new(Rabbit::started());
    let stack = Stack::on(Arc::clone(&rabbit), Arc::new(Redis::started()));
    let start = |id: &str| {
        let worker = stack.worker_with(id, |s| s.set("worker.drain_timeout", "4s"));
        worker.ready();
        worker
    };
    let worker = start("redis-frozen");
    stack.redis.freeze();
    drains_in_four_seconds(&worker, 0);
    stack.redis.thaw();
    let worker = start("broker-frozen");
    rabbit.freeze();
    drains_in_four_seconds(&worker, 0);
    rabbit.thaw();
    let worker = start("both-frozen");
    rabbit.freeze();
    stack.redis.freeze();
    drains_in_four_seconds(&worker, 0);
    rabbit.thaw();
    stack.redis.thaw();

    let worker = start("memory");
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&honest_job("first", "first"));
    aggregator.result("first");
    worker.signal(Signal::SIGSTOP);
    aggregator.submit(&honest_job("held", "held"));
    rabbit.memory_alarm(true);
    worker.signal(Signal::SIGCONT);
    worker.heartbeat_when(START, "its result is held back", |r| {
        r["broker"]["blocked"] == true && r["jobs"]["in_flight"] == 1
    });
    drains_in_four_seconds(&worker, 0);
    rabbit.memory_alarm(false);
    let heir = start("heir");
    assert_eq!(aggregator.result("held").json()["status"], "scored");
    heir.drain();
}

#[test]
fn no_signal_of_ordinary_life_costs_the_job_that_is_being_scored() {
    const SCORE_TIMEOUT: Duration = secs(4);
    let (stack, package) = (Stack::shared(), Package::hazard());
    let worker = stack.worker_with("w1", |s| {
        s.set("model.dir", package.path().display())
            .set("worker.score_timeout", "4s")
            .set("heartbeat.interval", "50ms")
    });
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let pace = Pace::measure(&aggregator);
    aggregator.submit(&pace.job("held", 0.7));
    worker.computes();
    stack.stop_amid(&worker, "held");
    // Stopped for longer than a job may take: it took none of that time.
    std::thread::sleep(SCORE_TIMEOUT + Duration::from_millis(500));
    worker.signal(Signal::SIGCONT);
    for signal in [
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGVTALRM,
        Signal::SIGPROF,
        Signal::SIGIO,
        Signal::SIGSTKFLT,
        Signal::SIGXFSZ,
        Signal::SIGPIPE,
        Signal::SIGWINCH,
    ] {
        worker.signal(signal);
    }
    worker.signal(Signal::SIGHUP);
    assert_eq!(worker.exit_code(DRAIN), 0, "{}", worker.log());
    assert_eq!(aggregator.result("held").json()["status"], "scored");
    assert_eq!(stack.keys("crash:*"), Vec::<String>::new());
    for line in ["SIGUSR1: ignored", "SIGXFSZ: ignored", "SIGHUP: draining"] {
        assert!(worker.log().contains(line), "{line}: {}", worker.log());
    }
}

#[test]
fn a_second_signal_ends_the_drain_and_the_job_waits_again() {
    let (stack, package) = (Stack::shared(), enduring_package());
    let worker = stack.worker_with("w1", |s| {
        patient(s, &package).set("worker.drain_timeout", "10m")
    });
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.submit(&enduring_job("held"));
    worker.computes();
    worker.terminate();
    worker.state("draining", "drain_signal");
    worker.next_heartbeat();
    worker.end_now();
    assert_eq!(worker.exit_code(SOON), 75, "{}", worker.log());
    assert_eq!(worker.heartbeat()["state"], "stopped");
    assert_eq!(stack.keys("crash:*"), Vec::<String>::new());
    eventually(SOON, "its job waits again", || {
        aggregator.depth(&stack.jobs_queue()) == Some((1, 0))
    });
}

/// `nohup`, whose terminal is gone: nobody reads the log either.
#[test]
fn a_hangup_that_is_ignored_stays_ignored_and_a_log_that_nobody_reads_ends_nothing() {
    let stack = Stack::shared();
    let mut command = Command::new("sh");
    command
        .args(["-c", "trap '' HUP; exec \"$0\" \"$@\""])
        .arg(scorer())
        .arg("run")
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let settings = stack.settings().set("worker.id", "nohup");
    let mut process = Group::spawn(settings.apply(&mut command));
    drop(process.child().stderr.take());
    let ready = || stack.record("nohup").filter(|r| r["ready"] == true);
    let record = eventually_some(START, "ready", ready);
    process.signal(Signal::SIGHUP);
    let seen = record["seq"].as_u64().expect("a number");
    eventually(SOON, "it goes on beating", || {
        ready().is_some_and(|r| r["seq"].as_u64() > Some(seen + 2))
    });
    assert_eq!(process.ended(), None);
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.child().id()));
    let status = status.expect("a process tells of itself");
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = u64::from_str_radix(ignored.expect("what it ignores").trim(), 16);
    let hangup = 1 << (Signal::SIGHUP as u32 - 1);
    assert!(ignored.expect("a mask") & hangup != 0, "{status}");
    process.signal(Signal::SIGTERM);
    let status = process.wait(DRAIN).and_then(|status| status.code());
    assert_eq!(status, Some(0));
}
