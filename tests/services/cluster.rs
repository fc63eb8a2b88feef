//! A cluster of brokers that loses a node in the middle of a stream: every job is answered, by the same worker.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use serde_json::Value;
use testkit::aggregator::Aggregator;
use testkit::case::honest_job;
use testkit::cluster::Cluster;
use testkit::package::MODEL;
use testkit::redis_server::Redis;
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually, secs};

/// Some seconds of work.
const JOBS: usize = 120;

fn stack_on(cluster: &Cluster, node: usize) -> Stack {
    Stack::on(Arc::clone(&cluster.nodes()[node]), Redis::shared())
}

fn aggregator_on(cluster: &Cluster, node: usize, stack: &Stack) -> Aggregator {
    Aggregator::connect(&cluster.nodes()[node].url(), &stack.namespace)
}

/// Submits a stream and returns its names once some of it is answered. Results are left in their queue: whoever reads
/// without acknowledging loses what was on the way when a node died, and that would be the test's own loss.
fn stream(stack: &Stack, aggregator: &Aggregator) -> Vec<String> {
    let ids: Vec<String> = (0..JOBS).map(|n| format!("job-{n}")).collect();
    for id in &ids {
        aggregator.submit(&honest_job(id, id));
    }
    eventually(SOON, "the stream is under way", || {
        answered(stack, aggregator) >= 3
    });
    ids
}

fn answered(stack: &Stack, aggregator: &Aggregator) -> usize {
    let queue = stack.object(&format!("results.{MODEL}"));
    aggregator
        .depth(&queue)
        .map_or(0, |(waiting, _)| waiting as usize)
}

/// Each job has a result; there may be copies, and they share their `message_id`.
fn expect_all_scored(aggregator: &Aggregator, ids: &[String]) {
    aggregator.collect_results();
    aggregator.all_results(ids, secs(120));
    let mut names: HashMap<String, HashSet<String>> = HashMap::new();
    for message in aggregator.results() {
        let result = message.json();
        assert_eq!(result["status"], "scored", "{result}");
        let id = result["submission_id"].as_str().expect("a submission_id");
        names
            .entry(id.to_owned())
            .or_default()
            .insert(message.id().to_owned());
    }
    assert_eq!(names.len(), ids.len(), "nothing but what was submitted");
    assert!(names.values().all(|n| n.len() == 1), "{names:?}");
}

#[test]
fn a_stream_outlives_the_node_that_leads_its_queue() {
    let cluster = Cluster::started(3);
    let stack = stack_on(&cluster, 0);
    let queue = stack.jobs_queue();
    // A queue is led by the node that its declarer is connected to.
    aggregator_on(&cluster, 1, &stack).declare_jobs();
    let worker = stack.worker("w1");
    worker.ready();
    let leader = cluster.leader(&queue);
    assert_ne!(leader, 0, "the worker's own node is another test");
    cluster.await_online(&queue, 3);
    let aggregator = aggregator_on(&cluster, 2, &stack);
    let mut ids = stream(&stack, &aggregator);
    cluster.nodes()[leader].kill();
    let done = answered(&stack, &aggregator);
    assert!(done < ids.len(), "all was answered before the node died");
    assert_ne!(cluster.leader(&queue), leader);
    ids.push("afterwards".to_owned());
    aggregator.submit(&honest_job("afterwards", "afterwards"));
    expect_all_scored(&aggregator, &ids);
    worker.ready();
    worker.drain();
    aggregator.expect_empty(&queue);
    assert_eq!(stack.keys("crash:*"), Vec::<String>::new());
}

#[test]
fn a_worker_whose_own_node_dies_goes_on_when_the_node_is_back() {
    let cluster = Cluster::started(3);
    let stack = stack_on(&cluster, 0);
    let queue = stack.jobs_queue();
    let worker = stack.worker("w1");
    let first = worker.ready();
    assert_eq!(cluster.leader(&queue), 0, "its own node leads its queue");
    cluster.await_online(&queue, 3);
    let aggregator = aggregator_on(&cluster, 1, &stack);
    let mut ids = stream(&stack, &aggregator);
    cluster.nodes()[0].kill();
    worker.heartbeat_when(secs(20), "it notices", |r| {
        r["broker"]["connected"] == false && r["ready"] == false
    });
    let done = answered(&stack, &aggregator);
    assert!(done < ids.len(), "all was answered before the node died");
    assert_ne!(cluster.leader(&queue), 0, "two nodes are a majority");
    ids.push("meanwhile".to_owned());
    aggregator.submit(&honest_job("meanwhile", "meanwhile"));
    cluster.nodes()[0].start();
    let again = worker.heartbeat_when(secs(120), "ready again", |r| r["ready"] == true);
    assert!(
        again["broker"]["generation"].as_u64() > first["broker"]["generation"].as_u64(),
        "{}",
        again["broker"]
    );
    cluster.await_running(3);
    expect_all_scored(&aggregator, &ids);
    worker.drain();
    aggregator.expect_empty(&queue);
    assert_eq!(stack.keys("crash:*"), Vec::<String>::new());
}

#[test]
fn a_stream_outlives_its_queue_being_led_by_another_node() {
    let cluster = Cluster::started(3);
    let stack = stack_on(&cluster, 0);
    let queue = stack.jobs_queue();
    let worker = stack.worker("w1");
    let first = worker.ready();
    cluster.await_online(&queue, 3);
    let aggregator = aggregator_on(&cluster, 1, &stack);
    let mut ids = stream(&stack, &aggregator);
    assert_eq!(cluster.leader(&queue), 0, "its own node leads its queue");
    cluster.move_leader(&queue, 1);
    ids.push("afterwards".to_owned());
    aggregator.submit(&honest_job("afterwards", "afterwards"));
    expect_all_scored(&aggregator, &ids);
    let last = worker.ready();
    let generation = |record: &Value| record["broker"]["generation"].clone();
    assert_eq!(generation(&last), generation(&first), "the same link");
    worker.drain();
    aggregator.expect_empty(&queue);
}
