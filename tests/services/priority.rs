//! The priority of a job: which jobs the broker delivers first, and that every copy of a job keeps it.

use serde_json::json;
use testkit::case::{honest, honest_job};
use testkit::encoding::Encoding;
use testkit::http::{Route, Server};
use testkit::package::MODEL;
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually, eventually_some};

const PRIORITY: u8 = 7;

#[test]
fn a_job_keeps_its_priority_up_the_ladder_into_the_parked_jobs_and_back() {
    let (stack, server) = (Stack::shared(), Server::start());
    let worker = stack.worker_with("w1", |s| {
        s.set("amqp.retry_delays", json!(["100ms", "200ms"]))
            .set("candidates.allow", json!([server.url("/")]))
            .set("candidates.allow_private", true)
    });
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let job = honest().job_by_url("gone", &server.put("/c", Route::Status(404)));
    aggregator.submit_as(&job, Encoding::Json, |p| p.with_priority(PRIORITY));
    let result = aggregator.result("gone");
    assert_eq!(result.json()["attempt"], 3, "it went up the whole ladder");
    assert_eq!(result.priority, None, "results have none");
    worker.drain();
    let requeued = stack.command(&["dead", "requeue", "--id", "gone"]);
    requeued.expect_code(0);
    let again = eventually_some(SOON, "the job is back", || {
        aggregator.take(&stack.jobs_queue())
    });
    assert_eq!(again.priority, Some(PRIORITY));
}

#[test]
fn what_scorer_submits_has_the_priority_that_it_is_told() {
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    aggregator.declare_jobs();
    let job = honest_job("first", "first").to_string();
    let submit = ["submit", "--jobs", "-", "--priority"];
    let sent = |priority| {
        let arguments = [&submit[..], &[priority]].concat();
        stack.command_with(stack.settings(), &arguments, &job)
    };
    sent("255").expect_code(0);
    let taken = eventually_some(SOON, "the job", || aggregator.take(&stack.jobs_queue()));
    assert_eq!(taken.priority, Some(255));
    sent("256").expect_code(64);
}

#[test]
fn a_job_of_high_priority_overtakes_those_that_wait_where_the_broker_knows_priorities() {
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    aggregator.declare_jobs();
    let submit = |id: &str, priority: Option<u8>| {
        aggregator.submit_as(
            &honest_job(id, id),
            Encoding::MessagePack,
            |p| match priority {
                Some(priority) => p.with_priority(priority),
                None => p,
            },
        );
    };
    submit("plain", None);
    submit("low", Some(0));
    submit("normal", Some(4));
    submit("high", Some(5));
    submit("highest", Some(255));
    let worker = stack.worker_with("w1", |s| s.set("amqp.prefetch", 1));
    worker.ready();
    let queue = stack.object(&format!("results.{MODEL}"));
    eventually(SOON, "all are answered", || {
        aggregator
            .depth(&queue)
            .is_some_and(|(waiting, _)| waiting == 5)
    });
    let results = std::iter::from_fn(|| aggregator.take(&queue));
    let order: Vec<String> = results
        .map(|result| {
            result.json()["submission_id"]
                .as_str()
                .expect("an id")
                .to_owned()
        })
        .collect();
    let expected = match stack.rabbit.version() {
        // Strictly by 32 levels; a job without a priority has 4.
        version if version >= (4, 3) => ["highest", "high", "plain", "normal", "low"],
        // Two of the high ones, then one of the others, of which those come first that were there first.
        version if version >= (4, 0) => ["high", "highest", "plain", "low", "normal"],
        _ => ["plain", "low", "normal", "high", "highest"],
    };
    assert_eq!(order, expected);
}
