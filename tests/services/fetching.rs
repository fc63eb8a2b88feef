//! Candidates by reference: only what is allowed, only what was promised, only as long as it may take.

use redis::Commands as _;
use serde_json::{Value, json};
use testkit::aggregator::Aggregator;
use testkit::case::honest;
use testkit::digest::digest;
use testkit::folder::Folder;
use testkit::http::{Route, Server};
use testkit::package::VERSION;
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually, now_ms, secs};
use testkit::worker::{Settings, Worker};

const LADDER: &str = r#"["100ms", "200ms", "300ms"]"#;

/// Submits the honest candidate by URL; the result's body and its code.
fn submit(aggregator: &Aggregator, id: &str, url: &str) {
    aggregator.submit(&honest().job_by_url(id, url));
}

fn code(aggregator: &Aggregator, id: &str) -> String {
    let result = aggregator.result(id).json();
    match result["status"].as_str() {
        Some("scored") => "scored".to_owned(),
        _ => result["error"]["code"]
            .as_str()
            .unwrap_or("no code")
            .to_owned(),
    }
}

#[test]
fn only_what_an_allowed_prefix_covers_is_fetched() {
    let (stack, server, folder) = (Stack::shared(), Server::start(), Folder::new("files"));
    let bytes = honest().bytes();
    for dir in ["in", "out", "in-side"] {
        std::fs::create_dir(folder.join(dir)).expect("a writable folder");
        std::fs::write(folder.join(dir).join("c"), &bytes).expect("a writable folder");
    }
    for path in ["/ok/c", "/secret/c", "/okay/c"] {
        server.put(path, Route::Bytes(bytes.clone()));
    }
    let inside = format!("file://{}/", folder.join("in").display());
    let allow = json!([inside, server.url("/ok/")]).to_string();
    let worker = stack.worker_with("w1", |s| {
        s.set("candidates.allow", &allow)
            .set("candidates.allow_private", true)
    });
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let port = server.port();
    let file = |path: &str| format!("file://{}", folder.join(path).display());
    let table = [
        ("file", file("in/c"), "scored"),
        ("http", server.url("/ok/c"), "scored"),
        ("file-outside", file("out/c"), "candidate_url_forbidden"),
        ("file-beside", file("in-side/c"), "candidate_url_forbidden"),
        ("file-up", file("in/../out/c"), "candidate_url_forbidden"),
        (
            "file-up-encoded",
            file("in/%2e%2e/out/c"),
            "candidate_url_forbidden",
        ),
        (
            "http-outside",
            server.url("/secret/c"),
            "candidate_url_forbidden",
        ),
        (
            "http-beside",
            server.url("/okay/c"),
            "candidate_url_forbidden",
        ),
        (
            "http-up",
            server.url("/ok/../secret/c"),
            "candidate_url_forbidden",
        ),
        (
            "http-up-encoded",
            server.url("/ok/%2e%2e/secret/c"),
            "candidate_url_forbidden",
        ),
        (
            "http-other-host",
            format!("http://127.0.0.2:{port}/ok/c"),
            "candidate_url_forbidden",
        ),
        (
            "http-user",
            format!("http://127.0.0.1:{port}@localhost:{port}/ok/c"),
            "candidate_url_forbidden",
        ),
        (
            "scheme",
            format!("ftp://127.0.0.1:{port}/ok/c"),
            "candidate_url_forbidden",
        ),
    ];
    for (id, url, _) in &table {
        submit(&aggregator, id, url);
    }
    for (id, url, expected) in &table {
        assert_eq!(code(&aggregator, id), *expected, "{id}: {url}");
    }
    assert_eq!(server.asked("/ok/c"), 1, "a forbidden URL was fetched");
    assert_eq!(
        server.asked("/secret/c") + server.asked("/okay/c"),
        0,
        "a forbidden URL was fetched"
    );
}

#[test]
fn a_private_address_is_refused_unless_it_is_allowed() {
    let (stack, server) = (Stack::shared(), Server::start());
    let url = server.put("/ok/c", Route::Bytes(honest().bytes()));
    let named = format!("http://localhost:{}/ok/c", server.port());
    let allow = json!([
        server.url("/ok/"),
        format!("http://localhost:{}/ok/", server.port())
    ])
    .to_string();
    let worker = stack.worker_with("w1", |s| s.set("candidates.allow", &allow));
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    submit(&aggregator, "by-number", &url);
    submit(&aggregator, "by-name", &named);
    assert_eq!(code(&aggregator, "by-number"), "candidate_url_forbidden");
    assert_eq!(code(&aggregator, "by-name"), "candidate_url_forbidden");
    assert_eq!(server.asked("/ok/c"), 0, "a private address was fetched");
}

#[test]
fn what_was_promised_is_checked_and_what_is_not_there_climbs_the_ladder() {
    let (stack, server) = (Stack::shared(), Server::start());
    let bytes = honest().bytes();
    let limit = bytes.len() + 1000;
    let allow = json!([server.url("/")]).to_string();
    let worker = stack.worker_with("w1", |s| {
        s.set("candidates.allow", &allow)
            .set("candidates.allow_private", true)
            .set("candidates.max_bytes", limit)
            .set("candidates.fetch_timeout", "1s")
            .set("amqp.retry_delays", LADDER)
    });
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();

    let mut changed = bytes.clone();
    *changed.last_mut().expect("a candidate has bytes") ^= 1;
    let mut longer = bytes.clone();
    longer.push(b' ');
    submit(
        &aggregator,
        "changed",
        &server.put("/changed", Route::Bytes(changed)),
    );
    submit(
        &aggregator,
        "longer",
        &server.put("/longer", Route::Bytes(longer)),
    );
    submit(
        &aggregator,
        "endless",
        &server.put("/endless", Route::Unannounced(vec![b'x'; limit * 3])),
    );
    submit(
        &aggregator,
        "shorter",
        &server.put(
            "/shorter",
            Route::Unannounced(bytes[..bytes.len() / 2].to_vec()),
        ),
    );
    let big = vec![b'x'; limit + 1];
    let mut declared = honest().job_by_url(
        "declared-big",
        &server.put("/big", Route::Bytes(big.clone())),
    );
    declared["candidate"]["size"] = json!(big.len());
    declared["candidate"]["sha256"] = json!(digest(&big));
    aggregator.submit(&declared);
    submit(
        &aggregator,
        "good",
        &server.put("/good", Route::Bytes(bytes.clone())),
    );
    assert_eq!(code(&aggregator, "changed"), "candidate_digest_mismatch");
    assert_eq!(code(&aggregator, "longer"), "candidate_digest_mismatch");
    assert_eq!(code(&aggregator, "shorter"), "candidate_digest_mismatch");
    assert_eq!(code(&aggregator, "declared-big"), "candidate_too_large");
    let endless = code(&aggregator, "endless");
    assert!(
        ["candidate_digest_mismatch", "candidate_too_large"].contains(&endless.as_str()),
        "endless: {endless}"
    );
    assert_eq!(code(&aggregator, "good"), "scored");
    assert_eq!(
        server.asked("/big"),
        0,
        "what declares itself too large is not fetched"
    );

    let target = server.put("/target", Route::Bytes(bytes.clone()));
    submit(&aggregator, "missing", &server.url("/missing"));
    submit(
        &aggregator,
        "broken",
        &server.put("/broken", Route::Status(503)),
    );
    submit(
        &aggregator,
        "stalled",
        &server.put("/stalled", Route::Stall(secs(30))),
    );
    submit(
        &aggregator,
        "coded",
        &server.put("/coded", Route::Coded(bytes)),
    );
    submit(
        &aggregator,
        "moved",
        &server.put("/moved", Route::Redirect(target)),
    );
    for id in ["missing", "broken", "stalled", "coded"] {
        assert_eq!(code(&aggregator, id), "candidate_unavailable", "{id}");
        let result = aggregator.result(id).json();
        assert_eq!(
            (&result["status"], &result["attempt"]),
            (&json!("failed"), &json!(4)),
            "{id}: {result}"
        );
        assert_eq!(result["error"]["retryable"], true, "{id}");
    }
    let moved = code(&aggregator, "moved");
    assert!(
        ["candidate_unavailable", "candidate_url_forbidden"].contains(&moved.as_str()),
        "moved: {moved}"
    );
    assert_eq!(server.asked("/target"), 0, "a redirect was followed");
    assert!(
        server.asked("/missing") >= 4,
        "every rung tries again: {}",
        server.asked("/missing")
    );
    parked_are(
        &aggregator,
        if moved == "candidate_unavailable" {
            5
        } else {
            4
        },
    );
    worker.drain();
    aggregator.expect_empty(&stack.jobs_queue());
    assert!(
        aggregator.copies("missing").len() == 1,
        "one result after the last rung"
    );
}

/// Every failed job left one copy, with the reason.
fn parked_are(aggregator: &Aggregator, n: usize) {
    let mut ids: Vec<String> = Vec::new();
    for _ in 0..n {
        let parked = aggregator.take_parked();
        assert_eq!(
            parked.headers.get("x-error-code").map(String::as_str),
            Some("candidate_unavailable")
        );
        let body: Value =
            rmpv::ext::from_value(parked.message_pack()["submission_id"].clone()).expect("text");
        ids.push(body.as_str().expect("text").to_owned());
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), n, "each job is parked once: {ids:?}");
}

#[test]
fn a_server_that_drips_is_left_and_one_that_breaks_off_is_asked_for_the_rest() {
    let (stack, server) = (Stack::shared(), Server::start());
    let bytes = honest().bytes();
    let allow = json!([server.url("/")]).to_string();
    let worker = stack.worker_with("w1", |s| {
        s.set("candidates.allow", &allow)
            .set("candidates.allow_private", true)
            .set("amqp.retry_delays", r#"["100ms"]"#)
    });
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let third = bytes.len() / 3;
    let broken = server.put("/broken", Route::Breaking(bytes.clone(), third));
    submit(&aggregator, "broken", &broken);
    assert_eq!(code(&aggregator, "broken"), "scored");
    let from = |n: usize| Some((n * third) as u64);
    let ranges = server.ranges("/broken");
    assert_eq!(ranges[..3], [None, from(1), from(2)], "{ranges:?}");

    // Half of one file and half of another are no file.
    let mut before = bytes.clone();
    before[0] ^= 1;
    let revised = Route::Then(
        Box::new(Route::Breaking(before, third)),
        Box::new(Route::Mirror(bytes.clone())),
    );
    submit(&aggregator, "revised", &server.put("/revised", revised));
    assert_eq!(code(&aggregator, "revised"), "scored");
    assert_eq!(server.ranges("/revised"), [None, from(1), None]);

    // The second time the server is itself again.
    let ill = Route::Then(
        Box::new(Route::Status(500)),
        Box::new(Route::Bytes(bytes.clone())),
    );
    submit(&aggregator, "ill", &server.put("/ill", ill));
    assert_eq!(code(&aggregator, "ill"), "scored");
    assert_eq!(aggregator.result("ill").json()["attempt"], 2);

    // Whole, it would take an hour.
    let drip = Route::Drip(bytes, secs(1) / 10);
    submit(&aggregator, "drip", &server.put("/drip", drip));
    let silent = server.put("/silent", Route::Silence(secs(120)));
    submit(&aggregator, "silent", &silent);
    assert_eq!(code(&aggregator, "drip"), "candidate_unavailable");
    let result = aggregator.result("drip").json();
    let message = result["error"]["message"].as_str().expect("text");
    assert!(message.contains("candidates.min_rate"), "{message}");
    assert_eq!(code(&aggregator, "silent"), "candidate_unavailable");
    let result = aggregator.result("silent").json();
    let message = result["error"]["message"].as_str().expect("text");
    assert!(message.contains("no answer within 10s"), "{message}");
}

#[test]
fn a_candidate_is_fetched_once_while_it_is_kept() {
    let (stack, server) = (Stack::shared(), Server::start());
    let bytes = honest().bytes();
    let allow = json!([server.url("/ok/")]).to_string();
    let keeping = |s: Settings, budget: usize| {
        s.set("candidates.allow", &allow)
            .set("candidates.allow_private", true)
            .set("candidates.cache_bytes", budget)
    };
    let worker = stack.worker_with("w1", |s| keeping(s, bytes.len()));
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let url = server.put("/ok/c", Route::Bytes(bytes.clone()));
    let ask = |id: &str, url: &str| {
        submit(&aggregator, id, url);
        code(&aggregator, id)
    };
    assert_eq!(ask("first", &url), "scored");
    assert_eq!(ask("again", &url), "scored");
    assert_eq!(server.asked("/ok/c"), 1);
    // Nobody gets at it by way of a place that is not allowed.
    let elsewhere = server.put("/secret/c", Route::Bytes(bytes.clone()));
    assert_eq!(ask("elsewhere", &elsewhere), "candidate_url_forbidden");
    // It outlives the process, but not a change of what is kept.
    drop(worker);
    let worker = stack.worker_with("w1", |s| keeping(s, bytes.len()));
    worker.ready();
    assert_eq!(ask("another-process", &url), "scored");
    assert_eq!(server.asked("/ok/c"), 1);
    let kept = stack.state_dir().join("w1/candidates").join(digest(&bytes));
    std::fs::write(kept, b"something else").expect("a writable folder");
    assert_eq!(ask("changed", &url), "scored");
    assert_eq!(server.asked("/ok/c"), 2);
}

/// A worker, a quick server and one that takes hours over the same candidate, and what is marked in Redis.
struct Slow {
    stack: Stack,
    worker: Worker,
    quick: String,
    slow: String,
}

impl Slow {
    fn new() -> Self {
        let (stack, server) = (Stack::shared(), Server::start());
        let bytes = honest().bytes();
        let worker = stack.worker_with("w1", |s| {
            s.set("candidates.allow", json!([server.url("/")]))
                .set("candidates.allow_private", true)
                .set("candidates.min_rate", 1)
                .set("candidates.fetch_timeout", "1h")
                .set("heartbeat.ttl", "30s")
        });
        worker.ready();
        Self {
            quick: server.put("/quick", Route::Bytes(bytes.clone())),
            slow: server.put("/slow", Route::Drip(bytes, secs(1) / 5)),
            worker,
            stack,
        }
    }

    fn mark(&self, id: &str, marks: &[(&str, &str)]) {
        let key = self.stack.key(&format!("crash:{id}:{VERSION}"));
        let mut redis = self.stack.redis.connection();
        let marked: redis::RedisResult<()> = redis.hset_multiple(key, marks);
        marked.expect("marks");
    }
}

#[test]
fn what_is_decided_without_the_candidate_does_not_wait_for_it() {
    let strangers = Slow::new();
    let (stack, slow) = (&strangers.stack, &strangers.slow);
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let answers = |id: &str, expected: &str| assert_eq!(code(&aggregator, id), expected, "{id}");

    strangers.mark("poisoned", &[("x/1", "dead:1"), ("y/2", "dead:2")]);
    submit(&aggregator, "poisoned", slow);
    answers("poisoned", "poisoned");

    submit(&aggregator, "stored", &strangers.quick);
    answers("stored", "scored");
    submit(&aggregator, "stored", slow);
    eventually(SOON, "answered from the store", || {
        aggregator.copies("stored").len() == 2
    });

    let mut late = honest().job_by_url("late", slow);
    late["deadline_ms"] = json!(now_ms() + 1500);
    aggregator.submit(&late);
    answers("late", "deadline_exceeded");
    strangers.worker.drain();
}

#[test]
fn a_drain_hands_back_what_is_on_its_way_and_what_waits_for_news_at_once() {
    let strangers = Slow::new();
    let (stack, slow) = (&strangers.stack, &strangers.slow);
    let aggregator = stack.aggregator();
    submit(&aggregator, "on-its-way", slow);
    strangers.mark("held", &[("ghost/gone", "1")]);
    submit(&aggregator, "held", slow);
    let worker = &strangers.worker;
    worker.heartbeat_when(SOON, "it holds both", |r| r["jobs"]["buffered"] == 1);
    worker.terminate();
    assert_eq!(worker.exit_code(SOON), 0, "{}", worker.log());
    eventually(SOON, "both wait again", || {
        aggregator.depth(&stack.jobs_queue()) == Some((2, 0))
    });
    assert_eq!(stack.keys("crash:on-its-way*"), Vec::<String>::new());
}
