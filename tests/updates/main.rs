//! A fleet of three workers follows fifty updates under constant load, some of them broken: every
//! job gets one verdict, on the very weights of the version it named, and the queue is never without
//! a consumer. `TEST_UPDATES=200` makes it longer.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]
#![expect(
    clippy::print_stderr,
    reason = "the report, and the logs of a failed test"
)]

mod gaps;
mod load;
mod plan;

use std::time::{Duration, Instant};

use gaps::Gaps;
use load::Load;
use plan::{Fault, Publisher};
use testkit::package::VERSION;
use testkit::stack::Stack;
use testkit::wait::{START, eventually_some, secs};
use testkit::worker::{Settings, Worker};

const IDS: [&str; 3] = ["w1", "w2", "w3"];

fn updates() -> usize {
    let said = std::env::var("TEST_UPDATES").ok();
    said.and_then(|n| n.parse().ok()).unwrap_or(50)
}

fn settings(publisher: &Publisher, settings: Settings) -> Settings {
    publisher
        .site
        .followed(settings)
        .set("model.update_key", testkit::manifest::public_key())
        .set(
            "amqp.retry_delays",
            "[\"200ms\",\"500ms\",\"1s\",\"2s\",\"4s\",\"8s\",\"16s\",\"32s\"]",
        )
}

/// Waits until every worker takes jobs for the version, with its very weights.
#[track_caller]
fn all_serve(workers: &[Worker], publisher: &Publisher, version: u64) {
    for worker in workers {
        let record = worker.heartbeat_when(secs(90), &format!("version {version}"), |r| {
            r["ready"] == true && r["model"]["version"] == version
        });
        let expected = publisher.site.trainer.weights_id(version);
        assert_eq!(record["model"]["weights_id"], expected);
    }
}

/// Waits until every worker has refused the version and serves the one before.
#[track_caller]
fn all_refuse(workers: &[Worker], version: u64, before: u64) {
    for worker in workers {
        worker.heartbeat_when(secs(90), &format!("no version {version}"), |r| {
            r["ready"] == true
                && r["model"]["version"] == before
                && r["update"]["refused"]["version"] == version
        });
    }
}

/// Kills the first worker that swaps its weights, at the beginning of that, and starts it again.
#[track_caller]
fn kill_in_the_middle(stack: &Stack, workers: &mut [Worker], publisher: &Publisher) {
    let swap = format!("update_to_v{}", publisher.live);
    // By the event, which stays: the state itself may be over before it is looked at.
    let at = eventually_some(START, "a worker swaps its weights", || {
        let swaps = |id: &&str| stack.events(id).iter().any(|e| e["detail"] == swap);
        IDS.iter().position(swaps)
    });
    workers[at].kill();
    workers[at] = stack.worker_with(IDS[at], |s| settings(publisher, s));
}

#[test]
fn a_fleet_follows_fifty_updates_and_no_job_is_lost_or_judged_on_other_weights() {
    let stack = Stack::shared();
    let mut publisher = Publisher::new(50);
    publisher.begin();
    let start = |id: &&str| stack.worker_with(id, |s| settings(&publisher, s));
    let mut workers: Vec<Worker> = IDS.iter().map(start).collect();
    all_serve(&workers, &publisher, VERSION);
    let warm_ups = workers
        .iter()
        .map(|w| w.heartbeat()["warm"]["last_ms"].clone());
    let warm_ups: Vec<_> = warm_ups.collect();
    let gaps = Gaps::watch(&stack);
    let load = Load::start(&stack);
    let mut took = Vec::new();
    for n in 1..=updates() {
        let before = publisher.live;
        let fault = Fault::of(n);
        let began = Instant::now();
        publisher.publish(fault);
        match fault {
            Fault::Canary => all_refuse(&workers, publisher.live + 1, before),
            Fault::Unsigned => {
                for worker in &workers {
                    worker.heartbeat_when(secs(90), "it refuses an unsigned manifest", |r| {
                        r["update"]["failure"]
                            .as_str()
                            .is_some_and(|f| f.contains("signature"))
                    });
                }
                publisher.sign();
                all_serve(&workers, &publisher, publisher.live);
            }
            Fault::Kill => {
                kill_in_the_middle(&stack, &mut workers, &publisher);
                all_serve(&workers, &publisher, publisher.live);
            }
            Fault::None | Fault::Full | Fault::DyingMirror | Fault::BrokenDelta => {
                all_serve(&workers, &publisher, publisher.live);
            }
        }
        took.push((fault, began.elapsed()));
        load.now_live(publisher.live);
    }
    let jobs = load.stop();
    let report = gaps.stop(&stack, &IDS);
    jobs.check(&stack, &publisher);
    publisher.check_disks(&stack, &IDS);
    report.print();
    eprintln!("the first warm-ups, which load the model, took {warm_ups:?} ms");
    print_updates(&took);
    assert_eq!(
        report.without_consumer, 0,
        "the queue was without a consumer"
    );
    for worker in workers {
        worker.drain();
    }
}

fn print_updates(took: &[(Fault, Duration)]) {
    let mut plain: Vec<Duration> = took
        .iter()
        .filter(|(f, _)| *f == Fault::None)
        .map(|(_, t)| *t)
        .collect();
    plain.sort();
    let middle = plain.get(plain.len() / 2).copied().unwrap_or_default();
    eprintln!(
        "{} updates; a plain one reaches the whole fleet in {:.1} s (median)",
        took.len(),
        middle.as_secs_f64()
    );
}
