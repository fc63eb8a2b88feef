//! Merge jobs: what a worker answers, stores and counts, what it does when a member cannot be fetched, and how it leaves a
//! merge that it cannot end.

use serde_json::{Value, json};
use testkit::case::{Case, cases, honest};
use testkit::hazard::hazard_job;
use testkit::http::{Route, Server};
use testkit::pace::Pace;
use testkit::package::{Package, VERSION, sound};
use testkit::port::free_port;
use testkit::scrape::{get, samples};
use testkit::stack::Stack;
use testkit::wait::{DRAIN, SOON, eventually, now_ms, secs};
use testkit::worker::Worker;

fn case(name: &str) -> &'static Case {
    let mut cases = cases().iter();
    let found = cases.find(|case| case.name == name);
    found.unwrap_or_else(|| panic!("cases.json has {name}"))
}

/// A member with the candidate of a job.
fn member(id: &str, job: &Value) -> Value {
    json!({"id": id, "candidate": job["candidate"]})
}

fn merge(submission_id: &str, members: &[Value]) -> Value {
    json!({
        "v": 1, "kind": "merge", "submission_id": submission_id, "model_version": VERSION, "members": members,
    })
}

fn few() -> Value {
    member("few", &case("difference-few-steps").job(""))
}

fn more() -> Value {
    member("more", &case("difference-more-steps").job(""))
}

/// What a result says of its members: the code, or `scored`.
fn told(result: &Value) -> Vec<(&str, &str)> {
    let members = result["members"].as_array();
    let members = members.unwrap_or_else(|| panic!("{result}"));
    members
        .iter()
        .map(|member| {
            let code = member["error"]["code"].as_str();
            let status = member["status"].as_str().expect("a status");
            (
                member["id"].as_str().expect("an id"),
                code.unwrap_or(status),
            )
        })
        .collect()
}

/// The numbers of a merge, without where and when they were measured.
fn numbers(result: &Value) -> Value {
    let fields = [
        "joint", "members", "gap", "passes", "windows", "tokens", "plan",
    ];
    fields.iter().map(|field| result[*field].clone()).collect()
}

#[test]
fn a_merge_is_answered_stored_and_counted_and_offline_says_the_same() {
    let (stack, port) = (Stack::shared(), free_port());
    let worker = stack.worker_with("w1", |s| {
        s.set("telemetry.metrics_addr", format!("127.0.0.1:{port}"))
    });
    let record = worker.ready();
    let accepts = record["accepts"].as_array().expect("a list");
    assert!(accepts.contains(&json!("merge")), "{record}");
    let aggregator = stack.aggregator();
    aggregator.collect_results();

    let empty = member("empty", &case("malformed-empty").job(""));
    aggregator.submit(&merge("round", &[more(), empty.clone(), few()]));
    let first = aggregator.result("round");
    let said = first.json();
    assert_eq!(said["status"], "scored", "{said}");
    assert_eq!(
        told(&said),
        [
            ("empty", "candidate_empty"),
            ("few", "scored"),
            ("more", "scored")
        ]
    );
    let file = |name: &str| case(name).path().display().to_string();
    let members = [
        format!("--member=few={}", file("difference-few-steps")),
        format!("--member=empty={}", file("malformed-empty")),
        format!("--member=more={}", file("difference-more-steps")),
    ];
    let members: Vec<&str> = members.iter().map(String::as_str).collect();
    let model = sound().display().to_string();
    let how = ["--format", "binary_v2", "--semantics", "param_diff"];
    let offline = [&["merge", "--model", &model][..], &how, &members].concat();
    let offline = stack.command(&offline).expect_code(0).value();
    assert_eq!(numbers(&offline), numbers(&said));

    // In another order it is the same job, answered from what is stored; with another weight it is another one.
    aggregator.submit(&merge("round", &[few(), more(), empty.clone()]));
    let copy = aggregator.nth_result("round", 2);
    assert_eq!((&copy.message_id, copy.json()), (&first.message_id, said));
    worker.heartbeat_when(SOON, "the duplicate is counted", |r| {
        r["jobs"]["duplicates"] == 1
    });
    let mut heavy = more();
    heavy["weight"] = json!(0.5);
    aggregator.submit(&merge("round", &[few(), heavy, empty.clone()]));
    let other = aggregator.nth_result("round", 3);
    assert_ne!(other.message_id, first.message_id);

    let mut strict = merge("strict", &[few(), empty]);
    strict["on_rejected"] = json!("fail");
    aggregator.submit(&strict);
    let refused = aggregator.result("strict").json();
    let expected = json!({"members": [{"id": "empty", "code": "candidate_empty"}]});
    assert_eq!(
        (&refused["status"], &refused["error"]["detail"]),
        (&json!("rejected"), &expected)
    );

    let (_, text) = get(port, "/metrics").expect("metrics");
    let counted = samples(&text);
    let scored = r#"scorer_jobs_total{code="scored",kind="merge",status="scored"}"#;
    assert_eq!(counted[scored], 3.0, "{text}");
    submitted_as_a_person_would(&stack, &model, &members);
    worker.drain();
}

fn submitted_as_a_person_would(stack: &Stack, model: &str, members: &[&str]) {
    let dir = format!("model.dir={model}");
    let asked = ["submit", "--merge", "by-hand", "--set", &dir, "--wait"];
    let how = ["--semantics", "param_diff"];
    let asked: Vec<&str> = [&asked[..], &how, members].concat();
    let answer = stack.command(&asked).expect_code(0);
    let lines: Vec<&str> = answer.stdout.lines().collect();
    let [joint, first, second, third] = lines[..] else {
        panic!("{}", answer.stdout)
    };
    assert!(
        joint.starts_with("by-hand  scored  joint delta "),
        "{joint}"
    );
    assert!(first.starts_with("    more  contributes "), "{first}");
    assert!(second.starts_with("    few  contributes "), "{second}");
    assert!(
        third.starts_with("    empty  left out  candidate_empty: "),
        "{third}"
    );
}

#[test]
fn a_member_that_cannot_be_fetched_climbs_the_ladder_and_is_left_out_at_its_end() {
    let (stack, server) = (Stack::shared(), Server::start());
    let worker = stack.worker_with("w1", |s| {
        s.set("candidates.allow", json!([server.url("/")]))
            .set("candidates.allow_private", true)
            .set("amqp.retry_delays", r#"["100ms", "200ms"]"#)
    });
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let (away, slow) = (case("difference-more-steps"), honest());
    let gone = server.put("/gone", Route::Status(404));
    let gone = member("gone", &away.job_by_url("", &gone));

    // While a member is on its way, other jobs are computed.
    let dripping = server.put("/slow", Route::Stall(secs(600)));
    let waits = member("waits", &slow.job_by_url("", &dripping));
    let mut merging = merge("waits", &[waits, few()]);
    merging["deadline_ms"] = json!(now_ms() + 600_000);
    aggregator.submit(&merging);
    eventually(SOON, "its member is asked for", || {
        server.asked("/slow") == 1
    });
    aggregator.submit(&honest().job("meanwhile"));
    assert_eq!(aggregator.result("meanwhile").json()["status"], "scored");
    assert_eq!(aggregator.copies("waits").len(), 0);

    aggregator.submit(&merge("dropped", &[gone.clone(), few()]));
    let dropped = aggregator.result("dropped").json();
    assert_eq!(
        (&dropped["status"], &dropped["attempt"]),
        (&json!("scored"), &json!(3))
    );
    assert_eq!(
        told(&dropped),
        [("few", "scored"), ("gone", "candidate_unavailable")]
    );
    assert_eq!(server.asked("/gone"), 3);
    // It may be there the next time, so this is not kept.
    server.put("/gone", Route::Bytes(away.bytes()));
    aggregator.submit(&merge("dropped", &[gone.clone(), few()]));
    let whole = aggregator.nth_result("dropped", 2).json();
    assert_eq!(told(&whole), [("few", "scored"), ("gone", "scored")]);

    server.put("/gone", Route::Status(500));
    let mut strict = merge("strict", &[gone.clone(), few()]);
    strict["on_rejected"] = json!("fail");
    let also = member("also", &away.job_by_url("", &server.url("/nowhere")));
    for (job, detail) in [
        (
            strict,
            json!([{"id": "gone", "code": "candidate_unavailable"}]),
        ),
        (
            merge("nobody", &[gone, also]),
            json!([
                {"id": "also", "code": "candidate_unavailable"},
                {"id": "gone", "code": "candidate_unavailable"},
            ]),
        ),
    ] {
        aggregator.submit(&job);
        let id = job["submission_id"].as_str().expect("a name");
        let failed = aggregator.result(id).json();
        let error = &failed["error"];
        assert_eq!(error["code"], "candidate_unavailable", "{failed}");
        assert_eq!(
            (&failed["attempt"], &error["detail"]["members"]),
            (&json!(3), &detail)
        );
        let parked = aggregator.take_parked();
        assert_eq!(parked.headers["x-error-code"], "candidate_unavailable");
    }
    worker.drain();
}

/// Seven members that compute for about so long alone, and more than fifty times as long in all. No two are equal, so that
/// every pass is needed.
fn long_merge(submission_id: &str, pace: &Pace, seconds: f64) -> Value {
    let members = [1.0, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06].map(|times| {
        let mut member = member(&format!("{times}"), &pace.job("", seconds * times));
        member["weight"] = json!(1.0);
        member
    });
    merge(submission_id, &members)
}

fn worker_of(stack: &Stack, package: &Package, id: &str, drain: &str) -> Worker {
    stack.worker_with(id, |s| {
        s.set("model.dir", package.path().display())
            .set("engine.micro_batch", 1)
            .set("worker.drain_timeout", drain)
    })
}

#[test]
fn a_merge_is_left_between_two_passes_at_its_deadline_and_at_a_drains() {
    let (stack, package) = (Stack::shared(), Package::hazard_of(4));
    let worker = worker_of(&stack, &package, "w1", "30s");
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let pace = Pace::measure(&aggregator);

    // Two minutes, where the drain may take half a minute.
    let mut late = long_merge("late", &pace, 2.0);
    aggregator.submit(&hazard_job("before", 2.0));
    aggregator.result("before");
    late["deadline_ms"] = json!(now_ms() + 2_000);
    aggregator.submit(&late);
    let answered = aggregator.result("late").json();
    assert_eq!(answered["error"]["code"], "deadline_exceeded", "{answered}");

    // Before its first pass has ended nothing is known; then it is seen that it will not be done.
    aggregator.submit(&long_merge("left", &pace, 2.0));
    worker.computes();
    stack.stop_amid(&worker, "left");
    worker.signal(nix::sys::signal::Signal::SIGCONT);
    worker.terminate();
    assert_eq!(worker.exit_code(DRAIN), 0, "{}", worker.log());
    eventually(SOON, "it waits again", || {
        aggregator.depth(&stack.jobs_queue()) == Some((1, 0))
    });
    assert_eq!(stack.keys("crash:*"), Vec::<String>::new());
    assert_eq!(aggregator.copies("left").len(), 0);
}
