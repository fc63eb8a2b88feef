//! The broker counts how often a job comes back, and gives up at 20: a job that is only handed back must not get there.

use lapin::Channel;
use lapin::message::BasicGetMessage;
use lapin::options::{BasicGetOptions, BasicRejectOptions};
use redis::Commands as _;
use testkit::aggregator::{Aggregator, runtime};
use testkit::case::honest_job;
use testkit::encoding::Encoding;
use testkit::message::Message;
use testkit::package::VERSION;
use testkit::stack::Stack;
use testkit::wait::{SOON, START, eventually, eventually_some};

/// Of the job, whoever sends it back.
const PRIORITY: u8 = 9;

/// Takes a job without settling it, which is possible as long as the channel is open.
fn take(aggregator: &Aggregator, queue: &str) -> (Channel, BasicGetMessage) {
    let channel = runtime().block_on(aggregator.connection.create_channel());
    let channel = channel.expect("a channel");
    // What was returned is there again a moment later.
    let taken = eventually_some(SOON, "the job is in its queue", || {
        let got = channel.basic_get(queue.into(), BasicGetOptions::default());
        runtime().block_on(got).expect("the broker answers")
    });
    (channel, taken)
}

/// Takes a job and lets it fall, as a worker does that dies: every version of RabbitMQ counts that.
fn fall(aggregator: &Aggregator, queue: &str) {
    let (channel, taken) = take(aggregator, queue);
    runtime().block_on(async {
        let reject = taken.acker.reject(BasicRejectOptions { requeue: true });
        assert_eq!(reject.await, Ok(true));
        let closed = channel.close(200, "done".into()).await;
        closed.expect("the channel closes after the reject");
    });
}

/// What became of a job that had come back so often before a worker handed it back.
fn handed_back(returns: usize) -> (Message, bool) {
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    aggregator.declare_jobs();
    let queue = stack.jobs_queue();
    // A mark of somebody who may live: the job is held and not begun.
    let key = stack.key(&format!("crash:held:{VERSION}"));
    let marked: redis::RedisResult<()> =
        stack
            .redis
            .connection()
            .hset(key, "ghost/gone", "1700000000000");
    marked.expect("a mark");
    let job = honest_job("held", "held");
    aggregator.submit_as(&job, Encoding::MessagePack, |p| p.with_priority(PRIORITY));
    for _ in 0..returns {
        fall(&aggregator, &queue);
    }
    let worker = stack.worker_with("w1", |s| s.set("heartbeat.ttl", "30s"));
    worker.heartbeat_when(START, "it holds the job", |r| r["jobs"]["in_flight"] == 1);
    worker.drain();
    let (_channel, back) = take(&aggregator, &queue);
    // 3.10 counts late, and some versions count as a consumer whoever has taken a message.
    eventually(SOON, "there is one of it", || {
        aggregator
            .depth(&queue)
            .is_some_and(|(waiting, _)| waiting == 0)
    });
    (Message::new(&back.delivery), back.delivery.redelivered)
}

#[test]
fn a_job_that_came_back_often_is_handed_back_as_a_fresh_message() {
    let (again, redelivered) = handed_back(1);
    assert!(redelivered, "the message itself is returned");
    // Before 4.3 the broker counts the hand-back as well.
    let count = again.headers["x-delivery-count"].as_str();
    assert!(["1", "2"].contains(&count), "{count}");

    let (fresh, redelivered) = handed_back(10);
    assert!(!redelivered, "it begins anew");
    let count = fresh.headers.get("x-delivery-count").map(String::as_str);
    assert!(matches!(count, None | Some("0")), "{count:?}");
    assert_eq!(fresh.body, again.body);
    assert_eq!(fresh.content_type, again.content_type);
    assert_eq!([again.priority, fresh.priority], [Some(PRIORITY); 2]);
}
