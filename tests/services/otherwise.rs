//! What an operator declared otherwise costs no result, and no link again and again; what a worker may not do, it says.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use lapin::ExchangeKind::{Direct, Fanout, Topic};
use scorer::broker::amqp::Link;
use scorer::broker::nodes::Nodes;
use scorer::broker::topology::Topology;
use scorer::broker::{Outgoing, Properties};
use serde_json::{Value, json};
use testkit::aggregator::{Aggregator, runtime};
use testkit::case::{honest, honest_job};
use testkit::message::Message;
use testkit::package::MODEL;
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually, eventually_some, secs, throughout};
use testkit::worker::Worker;

use super::client::config;

/// What the worker says, once, when it puts results among the unrouted ones itself.
const SAID: &str = "set a policy with alternate-exchange";

fn unrouted(aggregator: &Aggregator) -> String {
    format!("{}.results.unrouted", aggregator.namespace)
}

fn generation(record: &Value) -> u64 {
    record["broker"]["generation"].as_u64().expect("a number")
}

/// Waits until all jobs are answered and settled; the results of a queue.
#[track_caller]
fn settled(aggregator: &Aggregator, worker: &Worker, queue: &str, results: u32) -> Vec<Value> {
    eventually(SOON, &format!("{results} results in {queue}"), || {
        aggregator.depth(queue) == Some((results, 0))
    });
    worker.drain();
    let jobs = format!("{}.jobs.{MODEL}", aggregator.namespace);
    aggregator.expect_empty(&jobs);
    let taken = std::iter::from_fn(|| aggregator.take(queue));
    taken.map(|message| message.json()).collect()
}

/// Many at once, and every other one comes back: whose confirm a return comes with is no sign of which it is.
#[test]
fn results_that_come_back_are_kept_as_unrouted_and_only_they() {
    const MANY: u32 = 500;
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    aggregator.declare_exchange("results", Topic, false, None);
    let routed = aggregator.declare_results_of("scored");
    let mut config = config(&stack);
    config.amqp.results_queue = false;
    let topology = Topology::new(&config.amqp, MODEL);
    let (scored, rejected): (Vec<_>, Vec<_>) = (0..MANY).partition(|n| n % 2 == 0);
    let result = |n: u32| Outgoing {
        exchange: topology.results_exchange(),
        routing_key: format!("{MODEL}.{}", ["scored", "rejected"][n as usize % 2]),
        body: n.to_string().into_bytes(),
        properties: Properties::default(),
        mandatory: true,
    };
    runtime().block_on(async {
        let link = Link::connect(&mut Nodes::new(&config.amqp), "test")
            .await
            .expect("a link");
        link.declare(&topology).await.expect("the topology");
        let publishing = (0..MANY).map(|n| link.results.publish(result(n)));
        for (n, outcome) in join_all(publishing).await.into_iter().enumerate() {
            assert_eq!(outcome, Ok(()), "{n}");
        }
        assert!(!link.lost.is_cancelled(), "the link is given up");
    });
    let bodies = |queue: &str| {
        let messages = std::iter::from_fn(|| aggregator.take(queue));
        let text = |m: Message| String::from_utf8(m.body).expect("a number");
        let mut numbers: Vec<u32> = messages.flat_map(|m| text(m).parse()).collect();
        numbers.sort_unstable();
        numbers
    };
    assert_eq!(bodies(&unrouted(&aggregator)), rejected);
    assert_eq!(bodies(&routed), scored);
}

#[test]
fn whatever_is_wrong_on_the_way_of_a_result_it_is_kept() {
    let stacks: Vec<_> = [
        "no alternate",
        "an alternate that is not there",
        "another type of exchange",
        "an alternate that routes by key",
        "an alternate for the broker alone",
        "an alternate by a policy",
    ]
    .into_iter()
    .map(|what| (what, Stack::shared()))
    .collect();
    let cases: Vec<_> = stacks
        .iter()
        .map(|(what, stack)| {
            let aggregator = stack.aggregator();
            match *what {
                "no alternate" => aggregator.declare_exchange("results", Topic, false, None),
                "an alternate that is not there" => {
                    aggregator.declare_exchange("results", Topic, false, Some("nowhere"));
                }
                "another type of exchange" => {
                    aggregator.declare_exchange("results", Direct, false, None);
                }
                "an alternate that routes by key" => {
                    aggregator.declare_exchange("results.unrouted", Direct, false, None);
                }
                "an alternate for the broker alone" => {
                    aggregator.declare_exchange("results.unrouted", Fanout, true, None);
                    aggregator.declare_exchange("results", Topic, false, None);
                }
                _ => {
                    aggregator.declare_exchange("results", Topic, false, None);
                    let pattern = format!("^{}$", stack.object("results").replace('.', "[.]"));
                    let definition =
                        json!({"alternate-exchange": stack.object("results.unrouted")}).to_string();
                    let policy = [
                        "set_policy",
                        "--apply-to",
                        "exchanges",
                        &stack.namespace,
                        &pattern,
                    ];
                    let arguments = [&policy[..], &[definition.as_str()]].concat();
                    eventually_some(SOON, "a policy", || stack.rabbit.control(&arguments));
                }
            }
            let worker = stack.worker_with("w1", |s| {
                let own_queue = *what == "another type of exchange";
                s.set("amqp.results_queue", own_queue)
            });
            (*what, aggregator, worker)
        })
        .collect();
    for (what, aggregator, worker) in &cases {
        let first = worker.ready();
        aggregator.submit(&honest().job("x"));
        aggregator.submit(&honest_job("y", "y"));
        let last = worker.heartbeat_when(SOON, what, |r| r["jobs"]["scored"] == 2);
        assert_eq!(generation(&last), generation(&first), "{what}: {last}");
        let kept = settled(aggregator, worker, &unrouted(aggregator), 2);
        let kept: BTreeSet<_> = kept.iter().map(|r| r["submission_id"].as_str()).collect();
        assert_eq!(kept, BTreeSet::from(["x", "y"].map(Some)), "{what}");
        let said = worker.log().matches(SAID).count();
        let by_hand = usize::from(*what != "an alternate by a policy");
        assert_eq!(said, by_hand, "{what}:\n{}", worker.log());
    }
}

#[test]
fn an_exchange_that_loses_its_alternate_later_costs_one_link() {
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    let worker = stack.worker_with("w1", |s| s.set("amqp.results_queue", false));
    let first = worker.ready();
    aggregator.delete_exchange("results");
    aggregator.declare_exchange("results", Topic, false, None);
    for n in 1..=3 {
        let name = format!("job-{n}");
        aggregator.submit(&honest_job(&name, &name));
        let record = worker.heartbeat_when(SOON, "it is answered", |r| r["jobs"]["scored"] == n);
        assert_eq!(generation(&record), generation(&first) + 1, "{record}");
    }
    let kept = settled(&aggregator, &worker, &unrouted(&aggregator), 3);
    let kept: Vec<_> = kept.iter().map(|r| r["submission_id"].as_str()).collect();
    assert_eq!(kept, ["job-1", "job-2", "job-3"].map(Some));
}

#[test]
fn a_worker_that_may_not_publish_says_so_and_goes_on_when_it_may() {
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    let user = format!("user-{}", stack.namespace);
    let may_write = |pattern: &str| {
        let permissions = ["set_permissions", &user, ".*", pattern, ".*"];
        eventually_some(SOON, "rights", || stack.rabbit.control(&permissions));
    };
    eventually_some(SOON, "a user", || {
        stack.rabbit.control(&["add_user", &user, "secret"])
    });
    may_write(&format!("^(?!{}$)", stack.object("results")));
    let url = stack
        .rabbit
        .url()
        .replace("guest:guest", &format!("{user}:secret"));
    let worker = stack.worker_with("w1", |s| s.env("SCORER_AMQP__URL", &url));
    worker.ready();
    aggregator.submit(&honest().job("x"));
    let told = |r: &Value| {
        let error = &r["last_error"];
        let why = error["message"].as_str().unwrap_or_default();
        error["code"] == "publish_forbidden" && why.contains("ACCESS_REFUSED")
    };
    let forbidden = |r: &Value| r["state_detail"] == "publish_forbidden" && told(r);
    worker.heartbeat_when(SOON, "the reason is its state", forbidden);
    // It takes the job again after a second, then after two, four and eight.
    throughout(secs(6), "it does not try all the time", || {
        generation(&worker.heartbeat()) <= 5
    });
    may_write(".*");
    aggregator.collect_results();
    aggregator.result("x");
    worker.ready();
    worker.drain();
    aggregator.expect_empty(&stack.jobs_queue());
    assert_eq!(aggregator.copies("x").len(), 1);
}
