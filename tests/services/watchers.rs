//! Those who look at a fleet again and again: one connection to Redis each, and it comes back by itself.

use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::Commands as _;
use scorer::fleet::client::Client;
use scorer::fleet::observer::{Observer, View};
use scorer::store::StoreError;
use serde_json::json;
use testkit::aggregator::runtime;
use testkit::broker::Rabbit;
use testkit::package::MODEL;
use testkit::redis_server::Redis;
use testkit::stack::Stack;
use testkit::wait::{SOON, now_ms};

use super::client::{config, empty};
use crate::outages::set_password;

/// Connections that Redis has taken so far, and how often it was asked for the time, as each look does.
fn counts(redis: &mut redis::Connection) -> (u64, u64) {
    let info: String = redis::cmd("INFO")
        .arg("everything")
        .query(redis)
        .expect("redis tells of itself");
    let behind = |what: &str| {
        let rest = info.lines().find_map(|line| line.strip_prefix(what));
        let digits = rest.unwrap_or("0").split(',').next();
        digits.expect("a first part").parse().expect("a number")
    };
    (
        behind("total_connections_received:"),
        behind("cmdstat_time:calls="),
    )
}

#[test]
fn many_looks_use_one_connection() {
    let stack = Stack::on(Rabbit::shared(), Arc::new(Redis::started()));
    let mut redis = stack.redis.connection();
    let config = config(&stack);
    let (before, _) = counts(&mut redis);
    // What `status`, its view and the dashboard do.
    let mut observer = Observer::new(&config, Some(MODEL.to_owned()));
    runtime().block_on(async {
        for _ in 0..10 {
            observer.look().await.expect("a look at the fleet");
            observer.events(None).await.expect("its events");
        }
        observer.close().await;
    });
    let (after, looks) = counts(&mut redis);
    assert_eq!((after - before, looks), (1, 10), "connections, looks");

    // There is a queue of results, and nobody is ready: it looks once a second.
    stack.command(&["topology", "--declare"]).expect_code(0);
    let mut client = Client::new(config, MODEL);
    client.submit(&empty("waits")).expect("a job");
    runtime().block_on(async {
        let again = async {
            while counts(&mut redis).1 < 12 {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let again = tokio::time::timeout(SOON, again);
        tokio::select! {
            answer = client.next() => panic!("nobody is there: {answer:?}"),
            looked = again => looked.expect("it looks again and again"),
        }
    });
    let (last, _) = counts(&mut redis);
    assert_eq!(last - after, 1, "connections of a client");
    runtime().block_on(client.close());
}

/// A look, in time; or why there is none.
async fn look(observer: &mut Observer<'_>, place: &str) -> Result<View, StoreError> {
    let began = Instant::now();
    let looked = observer.look().await;
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    looked.inspect_err(|why| assert!(why.0.starts_with(place), "{why}"))
}

/// Looks until one is answered, as views do every second; how many were not.
async fn blind(observer: &mut Observer<'_>, place: &str) -> usize {
    for blind in 0..5 {
        if look(observer, place).await.is_ok() {
            return blind;
        }
    }
    panic!("it never comes back")
}

/// With the connection that it has, and when it makes one.
async fn sees_nothing(observer: &mut Observer<'_>, place: &str) {
    for _ in 0..2 {
        look(observer, place).await.expect_err("nothing is known");
    }
}

#[test]
fn a_view_comes_back_when_redis_does() {
    let stack = Stack::on(Rabbit::shared(), Arc::new(Redis::started()));
    let (config, redis) = (config(&stack), &stack.redis);
    let mut observer = Observer::new(&config, Some(MODEL.to_owned()));
    let place = redis.url();
    runtime().block_on(async {
        assert_eq!(blind(&mut observer, &place).await, 0);
        redis.kill();
        sees_nothing(&mut observer, &place).await;
        redis.start();
        assert!(blind(&mut observer, &place).await <= 1);
        redis.freeze();
        sees_nothing(&mut observer, &place).await;
        redis.thaw();
        assert!(blind(&mut observer, &place).await <= 1);
        observer.close().await;
    });
}

#[test]
fn a_view_comes_back_when_its_password_is_the_right_one_again() {
    let stack = Stack::on(Rabbit::shared(), Arc::new(Redis::started()));
    let mut redis = stack.redis.connection();
    let mut set_password = |password: &str| set_password(&mut redis, password);
    let mut config = config(&stack);
    let url = |password: &str| stack.redis.url().replace("//", &format!("//:{password}@"));
    config.redis.urls = vec![url("old")];
    let place = url("hidden");
    let mut observer = Observer::new(&config, Some(MODEL.to_owned()));
    set_password("old");
    runtime().block_on(async {
        assert_eq!(blind(&mut observer, &place).await, 0);
        set_password("new");
        sees_nothing(&mut observer, &place).await;
        set_password("old");
        assert!(blind(&mut observer, &place).await <= 1);
        observer.close().await;
    });
}

#[test]
fn a_workers_age_does_not_depend_on_its_clock() {
    let stack = Stack::shared();
    let mut redis = stack.redis.connection();
    let (seconds, _): (u64, u64) = redis::cmd("TIME").query(&mut redis).expect("a time");
    for (id, off) in [("ahead", 3_600_000), ("behind", -3_600_000)] {
        let at_ms = now_ms().saturating_add_signed(off);
        let record = json!({"worker_id": id, "at_ms": at_ms, "model": {"name": MODEL}});
        let key = stack.key(&format!("worker:{id}"));
        let _: () = redis.set(key, record.to_string()).expect("a record");
        let _: () = redis
            .zadd(stack.key("workers"), id, seconds * 1000)
            .expect("its beat");
    }
    let status = stack.command(&["status", "--json"]).expect_code(1).value();
    let workers = status["workers"].as_array().expect("a list");
    let ages = workers
        .iter()
        .filter_map(|worker| worker["age_ms"].as_u64());
    let ages: Vec<u64> = ages.collect();
    // Their clocks are an hour off.
    let plausible = |age: &u64| *age < 600_000;
    assert!(ages.len() == 2 && ages.iter().all(plausible), "{status}");
}
