//! Deliveries on bad days: a broker without memory, messages that nobody can read, queues that are
//! full or gone. Nothing is lost, and nothing is computed or counted twice.

use std::process::Command;
use std::sync::Arc;

use lapin::options::{BasicGetOptions, BasicNackOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use testkit::aggregator::{Aggregator, runtime};
use testkit::broker::Rabbit;
use testkit::case::{honest, honest_job};
use testkit::encoding::Encoding;
use testkit::http::{Route, Server};
use testkit::package::MODEL;
use testkit::redis_server::Redis;
use testkit::stack::Stack;
use testkit::wait::{SOON, START, eventually, eventually_some, now_ms, secs, throughout};

use super::topology::arguments;

/// Puts a message with a `message_id` that is no UTF-8 on the jobs exchange: lapin refuses to read
/// such a one, as it refuses to write it.
fn publish_unreadable(stack: &Stack) {
    let script = "
import os, pika
connection = pika.BlockingConnection(pika.URLParameters(os.environ['URL']))
properties = pika.BasicProperties(message_id=b'\\xff\\xfe', delivery_mode=2)
channel = connection.channel()
channel.confirm_delivery()
channel.basic_publish(os.environ['EXCHANGE'], os.environ['MODEL'], b'unreadable', properties)
connection.close()
";
    let ran = Command::new("python3")
        .args(["-c", script])
        .env("URL", stack.rabbit.url())
        .env("EXCHANGE", stack.object("jobs"))
        .env("MODEL", MODEL)
        .output()
        .expect("python3 runs");
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{said}\nrun through ops/test");
}

#[test]
fn a_message_that_no_client_can_read_is_parked_and_its_neighbours_are_scored() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let body = br#"{"v": 1, "command": "pause"}"#;
    aggregator.control("all", body, Encoding::Json);
    worker.state("degraded", "paused");
    let ids: Vec<String> = (0..9).map(|n| format!("beside-{n}")).collect();
    for id in &ids[..2] {
        aggregator.submit(&honest_job(id, id));
    }
    publish_unreadable(&stack);
    for id in &ids[2..] {
        aggregator.submit(&honest_job(id, id));
    }
    let body = br#"{"v": 1, "command": "resume"}"#;
    aggregator.control("all", body, Encoding::Json);
    // Each of its deliveries costs the link; the broker's limit of 20 ends that.
    let parked = stack.object(&format!("dead.{MODEL}"));
    eventually(secs(120), "the unreadable message is parked", || {
        aggregator.depth(&parked).is_some_and(|(n, _)| n == 1)
    });
    aggregator.all_results(&ids, START);
    let record = worker.heartbeat_when(SOON, "ready and cautious no more", |r| {
        r["ready"] == true && r["broker"]["consuming"] == true
    });
    assert_eq!(record["state"], "ready");
    worker.drain();
    aggregator.expect_empty(&stack.jobs_queue());
    assert_eq!(
        aggregator.depth(&parked).map(|(n, _)| n),
        Some(1),
        "no neighbour was parked with it"
    );
    for id in &ids {
        let result = aggregator.result(id).json();
        assert_eq!(
            (&result["status"], &result["attempt"]),
            (&"scored".into(), &1.into()),
            "{result}"
        );
    }
}

#[test]
fn headers_that_fill_a_frame_stop_neither_the_ladder_nor_the_parking() {
    let stack = Stack::shared();
    let worker = stack.worker_with("w1", |s| s.set("amqp.retry_delays", r#"["1s"]"#));
    let generation = worker.ready()["broker"]["generation"].clone();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let mut newer = honest_job("newer", "newer");
    newer["model_version"] = 99.into();
    let large = "x".repeat(120_000);
    aggregator.submit_as(&newer, Encoding::MessagePack, |properties| {
        let mut headers = FieldTable::default();
        for (name, value) in [
            ("small", "kept"),
            ("large", &large),
            ("traceparent", "00-1"),
        ] {
            headers.insert(name.into(), AMQPValue::LongString(value.into()));
        }
        properties.with_headers(headers)
    });
    let result = aggregator.result("newer");
    assert_eq!(result.json()["status"], "failed");
    assert_eq!(result.json()["attempt"], 2);
    let parked = aggregator.take_parked();
    assert_eq!(
        parked.headers.get("small").map(String::as_str),
        Some("kept")
    );
    assert_eq!(
        parked.headers.get("large"),
        None,
        "it would not fit beside ours"
    );
    assert_eq!(
        worker.next_heartbeat()["broker"]["generation"],
        generation,
        "and the link was never lost"
    );
    worker.drain();
}

#[test]
fn a_deleted_jobs_queue_is_made_again_and_consumed() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    let generation = worker.ready()["broker"]["generation"].clone();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    for round in 0..3 {
        aggregator.delete(&stack.jobs_queue());
        worker.heartbeat_when(SOON, "it notices", |r| {
            r["ready"] == false && r["state_detail"] == "consumer_lost"
        });
        let record = worker.ready();
        assert_eq!(record["broker"]["generation"], generation, "{record}");
        assert_eq!(stack.rabbit.list_consumers(&stack.jobs_queue()), 1);
        let id = format!("round-{round}");
        aggregator.submit(&honest_job(&id, &id));
        assert_eq!(aggregator.result(&id).json()["status"], "scored");
    }
    worker.drain();
}

/// Returns what waits in the jobs queue so often that a worker hands it back as a fresh message.
fn return_often(aggregator: &Aggregator, queue: &str, messages: usize) {
    runtime().block_on(async {
        let channel = aggregator.connection.create_channel().await;
        let channel = channel.expect("a channel");
        for _ in 0..10 {
            let mut got = Vec::new();
            while got.len() < messages {
                let options = BasicGetOptions::default();
                let next = channel.basic_get(queue.into(), options).await;
                got.extend(next.expect("the queue answers"));
            }
            for message in got {
                let requeue = BasicNackOptions {
                    requeue: true,
                    ..Default::default()
                };
                message.acker.nack(requeue).await.expect("it goes back");
            }
        }
        channel.close(200, "done".into()).await.ok();
    });
}

#[test]
fn a_drain_is_not_held_by_a_full_jobs_queue() {
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    // As an operator may have declared it: with room for little.
    runtime().block_on(async {
        let channel = aggregator.connection.create_channel().await;
        let mut arguments = FieldTable::default();
        let text = |text: &str| AMQPValue::LongString(text.into());
        arguments.insert("x-queue-type".into(), text("quorum"));
        arguments.insert("x-overflow".into(), text("reject-publish"));
        arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(4));
        let options = QueueDeclareOptions {
            durable: true,
            ..Default::default()
        };
        let queue = stack.jobs_queue();
        let channel = channel.expect("a channel");
        let declared = channel.queue_declare(queue.as_str().into(), options, arguments);
        declared.await.expect("the queue is declared");
    });
    let worker = stack.worker("early");
    worker.ready();
    worker.drain();
    let ids: Vec<String> = (0..4).map(|n| format!("held-{n}")).collect();
    for id in &ids {
        aggregator.submit(&honest_job(id, id));
    }
    return_often(&aggregator, &stack.jobs_queue(), ids.len());
    // The foreign mark of somebody who may live keeps the jobs from being computed.
    for id in &ids {
        let key = stack.key(&format!("crash:{id}:{}", testkit::package::VERSION));
        let mark = redis::Commands::hset(&mut stack.redis.connection(), key, "other/1", "1");
        let _: () = mark.expect("a mark");
    }
    let worker = stack.worker_with("w1", |s| {
        s.set("worker.drain_timeout", "5s")
            .set("heartbeat.ttl", "30s")
            .set("amqp.prefetch", 4)
    });
    worker.ready();
    worker.heartbeat_when(SOON, "it holds all four", |r| {
        let held = r["jobs"]["in_flight"]
            .as_u64()
            .zip(r["jobs"]["buffered"].as_u64());
        held.is_some_and(|(computing, waiting)| computing + waiting == 4)
    });
    worker.terminate();
    assert_eq!(worker.exit_code(SOON), 0);
    eventually(SOON, "all four wait again", || {
        aggregator.depth(&stack.jobs_queue()) == Some((4, 0))
    });
}

#[test]
fn a_broker_short_of_memory_delays_results_and_nothing_else() {
    let rabbit = Arc::new(Rabbit::started());
    let stack = Stack::on(Arc::clone(&rabbit), Redis::shared());
    let worker = stack.worker("w1");
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let ids: Vec<String> = (0..6).map(|n| format!("job-{n}")).collect();
    for id in &ids {
        aggregator.submit(&honest_job(id, id));
    }
    aggregator.all_results(&ids, START);

    worker.signal(Signal::SIGSTOP);
    for id in &ids {
        aggregator.submit(&honest_job(&format!("{id}-late"), id));
    }
    rabbit.memory_alarm(true);
    worker.signal(Signal::SIGCONT);
    worker.heartbeat_when(START, "it says that it is held back", |r| {
        r["broker"]["blocked"] == true
    });
    let blocked = worker.next_heartbeat();
    assert_eq!(blocked["ready"], true, "{blocked}");
    // Longer than a publish and a confirm may take otherwise.
    throughout(secs(35), "it keeps its link and its jobs", || {
        let record = worker.heartbeat();
        record["broker"]["connected"] == true
            && record["broker"]["generation"] == blocked["broker"]["generation"]
    });
    rabbit.memory_alarm(false);
    let late: Vec<String> = ids.iter().map(|id| format!("{id}-late")).collect();
    aggregator.all_results(&late, START);
    let record = worker.heartbeat_when(SOON, "held back no more", |r| {
        r["broker"]["blocked"] == false
    });
    assert_eq!(
        record["broker"]["generation"],
        blocked["broker"]["generation"]
    );
    assert_eq!(record["jobs"]["redelivered"], 0, "{record}");
    worker.drain();
    for id in &late {
        assert_eq!(aggregator.copies(id).len(), 1, "{id}");
    }
}

#[test]
fn a_result_that_could_not_be_settled_is_answered_from_memory() {
    let rabbit = Arc::new(Rabbit::started());
    let stack = Stack::on(Arc::clone(&rabbit), Arc::new(Redis::started()));
    let worker = stack.worker("w1");
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    // A connection that has never published is not held back.
    aggregator.submit(&honest_job("first", "same"));
    aggregator.result("first");
    worker.signal(Signal::SIGSTOP);
    aggregator.submit(&honest_job("late", "same"));
    rabbit.memory_alarm(true);
    worker.signal(Signal::SIGCONT);
    let computed = worker.heartbeat_when(START, "computed, and held back", |r| {
        r["broker"]["blocked"] == true
            && r["jobs"]["in_flight"] == 1
            && r["progress"]["busy_ms"] == 0
            && stack.keys("result:*").len() == 2
    });
    rabbit.remembers(&stack.object("results.tinylm"));
    // Redis forgets: what was computed is known to the worker alone.
    stack.redis.kill();
    rabbit.kill();
    stack.redis.start();
    rabbit.start();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let result = aggregator.result("late").json();
    assert_eq!(result["status"], "scored", "{result}");
    let record = worker.heartbeat_when(SOON, "it answered", |r| r["jobs"]["scored"] == 2);
    assert_eq!(record["jobs"]["duplicates"], 1, "{record}");
    assert_eq!(
        record["progress"]["counter"],
        computed["progress"]["counter"]
    );
    worker.drain();
}

#[test]
fn a_job_that_is_held_for_too_long_for_the_broker_is_delivered_again_and_answered() {
    let rabbit = Rabbit::stopped();
    rabbit.configure("consumer_timeout = 3000\n");
    rabbit.look_often_for_slow_consumers();
    rabbit.start();
    let (stack, server) = (
        Stack::on(Arc::new(rabbit), Redis::shared()),
        Server::start(),
    );
    let worker = stack.worker_with("w1", |s| {
        // From 4.3 on the consumer itself says how long it may take.
        s.set("amqp.consumer_timeout", "3s")
            .set("candidates.allow", json!([server.url("/")]))
            .set("candidates.allow_private", true)
            .set("candidates.min_rate", 0)
    });
    let first = worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    // Whoever fetches this first gets nothing for a minute.
    let stalls = Box::new(Route::Stall(secs(60)));
    let serves = Box::new(Route::Mirror(honest().bytes()));
    let url = server.put("/c", Route::Then(stalls, serves));
    aggregator.submit(&honest().job_by_url("held", &url));
    let result = aggregator.result("held").json();
    assert_eq!(result["status"], "scored", "{result}");
    assert_eq!(result["attempt"], 1, "{result}");
    let again = worker.heartbeat_when(SOON, "it was delivered again", |r| {
        r["jobs"]["redelivered"].as_u64() > Some(0) && r["ready"] == true
    });
    // The link outlives this, the consumer does not.
    let generation = |record: &Value| record["broker"]["generation"].clone();
    assert_eq!(generation(&again), generation(&first), "the same link");
    worker.drain();
    aggregator.expect_empty(&stack.jobs_queue());
    assert_eq!(aggregator.copies("held").len(), 1);
}

/// The channels that consume the jobs queue.
fn channels(stack: &Stack) -> Vec<String> {
    let queue = stack.jobs_queue();
    let consumers = stack
        .rabbit
        .list("list_consumers", &["queue_name", "channel_pid"]);
    let ours = consumers.iter().filter(|row| row["queue_name"] == *queue);
    ours.map(|row| row["channel_pid"].to_string()).collect()
}

#[test]
fn an_idle_worker_registers_anew_once_for_a_consumer_that_is_missing() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    worker.ready();
    let first = channels(&stack);
    assert_eq!(first.len(), 1);
    // Another worker says that it has a consumer, and the broker has none: who of them lost it, nobody
    // can tell.
    let record = json!({"broker": {"consuming": true}}).to_string();
    let beat = redis::pipe()
        .zadd(stack.key("workers"), "mute", now_ms() + 60_000)
        .set_ex(stack.key("worker:mute"), record, 60)
        .exec(&mut stack.redis.connection());
    beat.expect("redis takes a beat");
    let second = eventually_some(SOON, "a consumer on another channel", || {
        let now = channels(&stack);
        (now.len() == 1 && now != first).then_some(now)
    });
    throughout(secs(8), "it was not ours", || channels(&stack) == second);
}

#[test]
fn an_idle_worker_keeps_its_consumer_while_another_is_paused_and_while_redis_is_away() {
    let stack = Stack::on(Rabbit::shared(), Arc::new(Redis::started()));
    let worker = stack.worker("w1");
    worker.ready();
    let other = stack.worker("w2");
    other.ready();
    let aggregator = stack.aggregator();
    let pause = json!({"v": 1, "command": "pause"}).to_string();
    aggregator.control("worker.w2", pause.as_bytes(), Encoding::Json);
    other.state("degraded", "paused");
    let first = channels(&stack);
    assert_eq!(first.len(), 1);
    throughout(secs(10), "one is paused", || channels(&stack) == first);
    stack.redis.freeze();
    throughout(secs(10), "Redis is away", || channels(&stack) == first);
    stack.redis.thaw();
    worker.ready();
}

#[test]
fn a_consumer_says_how_long_it_may_hold_a_job_to_brokers_that_listen() {
    let stack = Stack::shared();
    let worker = stack.worker_with("w1", |s| s.set("amqp.consumer_timeout", "7m"));
    worker.ready();
    let consumers = stack
        .rabbit
        .list("list_consumers", &["queue_name", "arguments"]);
    let queue = stack.jobs_queue();
    let ours = consumers.iter().find(|row| row["queue_name"] == *queue);
    let expected = match stack.rabbit.version() >= (4, 3) {
        true => json!({"x-consumer-timeout": 420_000}),
        false => json!({}),
    };
    assert_eq!(arguments(ours.expect("a consumer")), expected);
}
