//! Draining: the consumer leaves first, nothing is scored twice or lost, and the process says how it went.

use std::collections::HashSet;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use testkit::aggregator::Aggregator;
use testkit::broker::Rabbit;
use testkit::case::honest_job;
use testkit::encoding::Encoding;
use testkit::hazard::hazard_job;
use testkit::pace::Pace;
use testkit::package::Package;
use testkit::process::Group;
use testkit::program::scorer;
use testkit::redis_server::Redis;
use testkit::stack::Stack;
use testkit::wait::{SOON, START, eventually, secs};
use testkit::worker::Worker;

/// How long a stream is meant to keep one worker busy.
const BUSY: Duration = secs(4);

/// Submits jobs, each on windows of its own, and returns their names once the worker is amid them.
fn stream(aggregator: &Aggregator) -> Vec<String> {
    let submit = |n: u32| {
        let id = format!("job-{n}");
        aggregator.submit(&honest_job(&id, &id));
        id
    };
    let started = Instant::now();
    for n in 0..3 {
        aggregator.result(&submit(n));
    }
    // One at a time is slower than a stream, so this errs towards too few: hence the factor.
    let jobs = (2 * 3 * BUSY.as_millis() / started.elapsed().as_millis().max(1)).clamp(60, 800);
    let last = 3 + u32::try_from(jobs).expect("at most 800");
    let mut ids: Vec<String> = (0..3).map(|n| format!("job-{n}")).collect();
    ids.extend((3..last).map(submit));
    eventually(SOON, "the stream is under way", || {
        aggregator.results().len() >= 8
    });
    ids
}

fn drains_without_loss(signal: Signal) {
    let stack = Stack::shared();
    let first = stack.worker("w1");
    first.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let ids = stream(&aggregator);
    first.signal(signal);
    assert_eq!(
        first.exit_code(secs(30)),
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
    computes(&worker);
    let waiting = || {
        let depth = aggregator.depth(&stack.jobs_queue());
        depth.map_or(0, |(waiting, _)| waiting as usize)
    };
    // Amid a job, both slots of `amqp.prefetch` are taken, and nothing can free one before the signal is there.
    worker.signal(Signal::SIGSTOP);
    let beyond = waiting();
    assert!(beyond > 0, "more jobs than it holds");
    worker.terminate();
    worker.signal(Signal::SIGCONT);
    assert_eq!(worker.exit_code(secs(30)), 0);
    eventually(secs(5), "answered + waiting = all", || {
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
    assert_eq!(young.exit_code(secs(10)), 0, "SIGTERM while it starts");
    waiting.heartbeat_when(START, "a failed warm-up", |r| r["state"] == "degraded");
    waiting.terminate();
    assert_eq!(
        waiting.exit_code(secs(10)),
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
    for start in 0..STARTS {
        let worker = stack.worker(&format!("start-{start}"));
        eventually(START, "it begins to load", || {
            worker.log().contains("loading_model")
        });
        // A load takes some 60 ms: the signal falls into another part of it each time.
        std::thread::sleep(Duration::from_millis(60) * start / STARTS);
        worker.terminate();
        assert_eq!(worker.exit_code(secs(10)), 0, "SIGTERM in start {start}");
        assert_eq!(worker.heartbeat()["state"], "stopped", "start {start}");
    }
}

#[test]
fn a_drain_does_not_wait_behind_a_burst_of_pauses() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    stream(&aggregator);
    for _ in 0..100 {
        for command in ["pause", "resume"] {
            let body = format!(r#"{{"v": 1, "command": "{command}"}}"#);
            aggregator.control("all", body.as_bytes(), Encoding::Json);
        }
    }
    worker.terminate();
    assert_eq!(worker.exit_code(secs(10)), 0);
}

#[test]
fn what_will_be_done_in_time_ends_here_and_the_rest_is_handed_back_at_once() {
    let stack = Stack::shared();
    let package = Package::hazard();
    let worker = stack.worker_with("w1", |s| {
        s.set("model.dir", package.path().display())
            .set("amqp.prefetch", 10)
            .set("worker.drain_timeout", "8s")
    });
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let pace = Pace::measure(&aggregator);
    let ids: Vec<String> = (0..10).map(|n| format!("job-{n}")).collect();
    for id in &ids {
        aggregator.submit(&pace.job(id, 1.5));
    }
    // Nine are left for the five seconds and a half of a drain: by the measured pace a good third of them fits, and
    // there are some of both kinds even where the pace was measured at half or twice the speed.
    // The first has told what the others will take.
    aggregator.result(&ids[0]);
    let asked = Instant::now();
    worker.terminate();
    let waiting = || {
        aggregator
            .depth(&stack.jobs_queue())
            .map_or(0, |(n, _)| n as usize)
    };
    eventually(secs(2), "what will not be done is handed back", || {
        waiting() > 0
    });
    assert_eq!(worker.exit_code(secs(8)), 0, "{}", worker.log());
    assert!(asked.elapsed() < secs(8));
    eventually(secs(5), "answered + waiting = all", || {
        aggregator.results().len() - 2 + waiting() == ids.len()
    });
    assert!(waiting() < 9, "some fitted into the time: {}", worker.log());
}

/// A worker that is amid a long computation, and has four seconds to drain.
fn drains_in_four_seconds(worker: &Worker, expected: i32) {
    let asked = Instant::now();
    worker.terminate();
    assert_eq!(worker.exit_code(secs(6)), expected, "{}", worker.log());
    let took = asked.elapsed();
    // A little for the kernel to end a process of a busy machine.
    assert!(took < Duration::from_millis(4500), "it took {took:?}");
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
    worker.heartbeat_when(SOON, "it computes", |r| {
        r["progress"]["busy_ms"].as_u64() > Some(500)
    });
    drains_in_four_seconds(&worker, 75);
    assert!(worker.log().contains("\"cut_short\":1"), "{}", worker.log());
    assert_eq!(worker.heartbeat()["state"], "stopped");
    eventually(secs(5), "its job waits again", || {
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
    worker.heartbeat_when(secs(30), "its result is held back", |r| {
        r["broker"]["blocked"] == true && r["jobs"]["in_flight"] == 1
    });
    drains_in_four_seconds(&worker, 0);
    rabbit.memory_alarm(false);
    let heir = start("heir");
    assert_eq!(aggregator.result("held").json()["status"], "scored");
    heir.drain();
}

/// A worker of the hazardous model, whose jobs may take four seconds.
fn hazardous(stack: &Stack, package: &Package) -> Worker {
    let worker = stack.worker_with("w1", |s| {
        s.set("model.dir", package.path().display())
            .set("worker.score_timeout", "4s")
    });
    worker.ready();
    worker
}

/// Waits until the worker is amid a computation.
#[track_caller]
fn computes(worker: &Worker) {
    worker.heartbeat_when(SOON, "it computes", |r| {
        r["progress"]["busy_ms"].as_u64() > Some(200)
    });
}

/// Submits a job and waits until the worker computes for it.
fn begin(worker: &Worker, aggregator: &Aggregator, job: &Value) {
    aggregator.submit(job);
    computes(worker);
}

#[test]
fn no_signal_of_ordinary_life_costs_the_job_that_is_being_scored() {
    let stack = Stack::shared();
    let package = Package::hazard();
    let worker = hazardous(&stack, &package);
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let pace = Pace::measure(&aggregator);
    begin(&worker, &aggregator, &pace.job("held", 1.5));
    // Stopped for longer than a job may take: it took none of that time.
    worker.signal(Signal::SIGSTOP);
    std::thread::sleep(Duration::from_millis(4500));
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
    assert_eq!(worker.exit_code(secs(30)), 0, "{}", worker.log());
    assert_eq!(aggregator.result("held").json()["status"], "scored");
    assert_eq!(stack.keys("crash:*"), Vec::<String>::new());
    for line in ["SIGUSR1: ignored", "SIGXFSZ: ignored", "SIGHUP: draining"] {
        assert!(worker.log().contains(line), "{line}: {}", worker.log());
    }
}

#[test]
fn a_second_signal_ends_the_drain_and_the_job_waits_again() {
    let stack = Stack::shared();
    let package = Package::hazard();
    let worker = hazardous(&stack, &package);
    let aggregator = stack.aggregator();
    begin(&worker, &aggregator, &hazard_job("endless", 16_000.0));
    worker.terminate();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(worker.ended(), None, "it has a minute to drain");
    worker.signal(Signal::SIGQUIT);
    assert_eq!(worker.exit_code(secs(4)), 75, "{}", worker.log());
    assert_eq!(worker.heartbeat()["state"], "stopped");
    assert_eq!(stack.keys("crash:*"), Vec::<String>::new());
    eventually(secs(5), "its job waits again", || {
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
    let ready = || stack.record("nohup").is_some_and(|r| r["ready"] == true);
    eventually(START, "ready", ready);
    process.signal(Signal::SIGHUP);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(process.ended(), None);
    assert!(ready());
    process.signal(Signal::SIGTERM);
    let status = process.wait(SOON).and_then(|status| status.code());
    assert_eq!(status, Some(0));
}
