//! A cluster of brokers that loses a node in the middle of a stream: every job is answered, by the same worker.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use scorer::fleet::client::Client;
use serde_json::Value;
use testkit::aggregator::{Aggregator, runtime};
use testkit::case::{honest, honest_job};
use testkit::cluster::Cluster;
use testkit::package::MODEL;
use testkit::redis_server::Redis;
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually, secs};
use testkit::worker::Worker;

use crate::client::{config_with, job, name};

/// Some seconds of work.
const JOBS: usize = 120;
/// How long it may take until a worker is ready on another node.
const READY: Duration = secs(10);

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

/// What a node suffers. A frozen one keeps its connections and its port, and says nothing.
#[derive(Debug, Clone, Copy)]
enum Fault {
    Frozen,
    Killed,
    Removed,
}

impl Fault {
    fn strike(self, cluster: &Cluster, node: usize) {
        match self {
            Self::Frozen => cluster.nodes()[node].freeze(),
            Self::Killed => cluster.nodes()[node].kill(),
            Self::Removed => cluster.remove(node),
        }
    }

    fn mend(self, cluster: &Cluster, node: usize) {
        match self {
            // With Khepri a node that thaws joins the others by itself; with Mnesia it may have to be restarted.
            Self::Frozen if cluster.nodes()[(node + 1) % 3].version() >= (4, 2) => {
                cluster.nodes()[node].thaw();
            }
            Self::Frozen => {
                cluster.nodes()[node].kill();
                cluster.nodes()[node].start();
            }
            Self::Killed => cluster.nodes()[node].start(),
            Self::Removed => return,
        }
        cluster.await_running(3);
    }
}

/// Workers and an aggregator that know every node of a cluster.
struct Fleet<'a> {
    cluster: &'a Cluster,
    stack: Stack,
    workers: Vec<Worker>,
    client: Client,
    /// Every result, copies included, whatever the client acknowledges.
    copies: String,
    submitted: Vec<String>,
}

impl<'a> Fleet<'a> {
    fn on(cluster: &'a Cluster) -> Self {
        let stack = stack_on(cluster, 0);
        let copies = stack.object("copies");
        let more = [("amqp.url", cluster.urls())];
        let client = Client::new(config_with(&stack, &more), MODEL);
        let mut fleet = Self {
            cluster,
            stack,
            workers: Vec::new(),
            client,
            copies,
            submitted: Vec::new(),
        };
        fleet.add_worker();
        let aggregator = aggregator_on(cluster, 0, &fleet.stack);
        aggregator.keep_results(&fleet.copies);
        cluster.await_online(&fleet.stack.jobs_queue(), 3);
        cluster.await_online(&fleet.copies, 3);
        fleet
    }

    fn add_worker(&mut self) {
        let id = format!("w{}", self.workers.len() + 1);
        let urls = self.cluster.urls();
        let worker = self.stack.worker_with(&id, |s| s.set("amqp.url", urls));
        worker.ready();
        self.workers.push(worker);
    }

    fn node_of(&self, worker: &Worker) -> Option<usize> {
        let node = worker.heartbeat()["broker"]["node"].as_str()?.to_owned();
        Some(self.cluster.at(&node))
    }

    /// Submits a stream and waits for its first answer.
    fn begin(&mut self, fault: Fault) {
        for n in 0..JOBS {
            let id = format!("{fault:?}-{n}");
            let job = job(honest(), &id);
            self.client.submit(&job).expect("a job");
            self.submitted.push(id);
        }
        self.next().expect("an answer");
    }

    /// The next answer.
    fn next(&mut self) -> Option<String> {
        runtime().block_on(async {
            let next = tokio::time::timeout(secs(120), self.client.next()).await;
            next.expect("an answer in time").map(name)
        })
    }

    /// The node that the client uses and a worker, too.
    fn victim(&mut self) -> usize {
        let node = self.client.node().expect("the client is connected");
        let node = self.cluster.at(node);
        // Each worker has an order of its own, so sooner or later one begins here.
        while !self.workers.iter().any(|w| self.node_of(w) == Some(node)) {
            self.add_worker();
        }
        node
    }

    /// Returns the node that suffered.
    #[expect(clippy::print_stderr, reason = "how long it took, with --nocapture")]
    fn survives(&mut self, fault: Fault) -> usize {
        self.begin(fault);
        let victim = self.victim();
        let place = self.cluster.nodes()[victim].place();
        let struck = Instant::now();
        fault.strike(self.cluster, victim);
        for worker in &self.workers {
            worker.heartbeat_when(READY, "ready on another node", |r| {
                let node = r["broker"]["node"].as_str();
                r["ready"] == true && node.is_some_and(|node| node != place)
            });
        }
        let ready = struck.elapsed();
        let mut answers = 1;
        while self.client.node() == Some(&place) {
            self.next().expect("an answer by another node");
            answers += 1;
        }
        let answered = struck.elapsed();
        eprintln!(
            "{fault:?}: workers are ready after {ready:?}, the client has an answer after {answered:?}"
        );
        let cluster = self.cluster;
        std::thread::scope(|scope| {
            scope.spawn(move || fault.mend(cluster, victim));
            while self.next().is_some() {
                answers += 1;
            }
        });
        assert_eq!(answers, JOBS, "each job is answered once");
        match fault {
            // With the next fault a queue that is not whole again would have no majority.
            Fault::Killed | Fault::Frozen => cluster.await_all_online(&self.stack.object(""), 3),
            Fault::Removed => {}
        }
        victim
    }

    /// Copies of a result are the same result.
    fn expect_no_contradiction(&self, aggregator: &Aggregator) {
        let mut found: HashMap<String, Value> = HashMap::new();
        while let Some(message) = aggregator.take(&self.copies) {
            let mut result = message.json();
            assert_eq!(result["status"], "scored", "{result}");
            let id = result["submission_id"].as_str().expect("an id").to_owned();
            let numbers = ["delta", "stderr", "loss_before", "loss_after", "plan"];
            let numbers = Value::from_iter(numbers.map(|n| (n, result[n].take())));
            let first = found.entry(id).or_insert_with(|| numbers.clone());
            assert_eq!(*first, numbers);
        }
        let expected: HashSet<&String> = self.submitted.iter().collect();
        assert_eq!(found.keys().collect::<HashSet<_>>(), expected);
    }
}

#[test]
fn who_knows_every_node_goes_on_at_another_one() {
    let cluster = Cluster::started(3);
    let mut fleet = Fleet::on(&cluster);
    fleet.survives(Fault::Killed);
    fleet.survives(Fault::Frozen);
    let gone = fleet.survives(Fault::Removed);
    let aggregator = aggregator_on(&cluster, (gone + 1) % 3, &fleet.stack);
    fleet.workers.iter().for_each(Worker::drain);
    fleet.expect_no_contradiction(&aggregator);
    aggregator.expect_empty(&fleet.stack.jobs_queue());
    assert_eq!(fleet.stack.keys("crash:*"), Vec::<String>::new());
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
