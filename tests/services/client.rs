//! The client for aggregators in Rust: every job is answered once, whatever the services do.

use std::collections::HashMap;
use std::sync::Arc;

use nix::sys::signal::Signal;
use scorer::config::{Config, Layers};
use scorer::fleet::client::{Client, Outcome, SubmitError};
use scorer::protocol::job::{Format, Semantics};
use scorer::protocol::message::{
    Blob, CandidateMessage, JobMessage, ScoreMessage, ScoreValidation, V1,
};
use testkit::aggregator::runtime;
use testkit::broker::Rabbit;
use testkit::case::{Case, honest, honest_job};
use testkit::package::{MODEL, VERSION};
use testkit::redis_server::Redis;
use testkit::stack::Stack;
use testkit::wait::{eventually, secs};

/// What programs are told that look at a test's services.
pub(super) fn config(stack: &Stack) -> Config {
    config_with(stack, &[])
}

/// The same with more settings.
pub(super) fn config_with(stack: &Stack, more: &[(&str, String)]) -> Config {
    let set = [
        ("amqp.url", stack.rabbit.url()),
        ("redis.url", stack.redis.url()),
        ("amqp.namespace", stack.namespace.clone()),
        ("redis.namespace", stack.namespace.clone()),
    ];
    let set = set.iter().chain(more);
    let set: Vec<String> = set.map(|(key, value)| format!("{key}={value}")).collect();
    let layers = Layers {
        set: &set,
        ..Layers::default()
    };
    Config::load(&layers).expect("a sound configuration")
}

fn client(stack: &Stack) -> Client {
    Client::new(config(stack), MODEL)
}

/// A job as programs in Rust write it.
pub(super) fn job(case: &Case, id: &str) -> JobMessage {
    JobMessage::Score(ScoreMessage {
        v: V1,
        submission_id: id.to_owned(),
        model: None,
        model_version: VERSION,
        candidate: CandidateMessage {
            format: Format::BinaryV2,
            compression: None,
            semantics: Semantics::Gradient,
            learning_rate: case.learning_rate,
            url: None,
            data: Some(Blob(case.bytes())),
            sha256: None,
            size: None,
        },
        validation: Some(ScoreValidation {
            nonce: "n".into(),
            ..ScoreValidation::default()
        }),
        deadline_ms: None,
        context: None,
    })
}

/// A job with nothing in its candidate: refused, which is an answer.
pub(super) fn empty(id: &str) -> JobMessage {
    let mut empty = job(honest(), id);
    if let JobMessage::Score(job) = &mut empty {
        job.candidate.data = Some(Blob(b"{}".to_vec()));
    }
    empty
}

/// Whose answer it is.
pub(super) fn name(outcome: Outcome) -> String {
    match outcome {
        Outcome::Answered(result) => result.submission_id,
        other @ (Outcome::Unasked(_)
        | Outcome::Overdue { .. }
        | Outcome::Unsent { .. }
        | Outcome::Unreadable { .. }) => panic!("{other:?}"),
    }
}

/// How often each was answered.
async fn answers(client: &mut Client) -> HashMap<String, usize> {
    let mut counts: HashMap<String, usize> = HashMap::new();
    let collecting = async {
        while let Some(outcome) = client.next().await {
            *counts.entry(name(outcome)).or_default() += 1;
        }
    };
    let ended = tokio::time::timeout(secs(120), collecting).await;
    ended.expect("every job is answered");
    counts
}

#[test]
fn jobs_wait_for_a_worker_and_every_one_is_answered_once() {
    let stack = Stack::shared();
    let mut client = client(&stack);
    let case = honest();
    for n in 0..20 {
        client
            .submit(&job(case, &format!("job-{n}")))
            .expect("a job");
    }
    let again = client.submit(&job(case, "job-3"));
    assert_eq!(again, Err(SubmitError::NameTaken("job-3".into())));
    runtime().block_on(async {
        // Nobody is there: nothing is published, nothing is answered.
        let early = tokio::time::timeout(secs(3), client.next()).await;
        assert!(early.is_err(), "{early:?}");
    });
    let aggregator = stack.aggregator();
    assert_eq!(
        aggregator.depth(&stack.jobs_queue()),
        None,
        "not even a queue is declared"
    );
    let worker = stack.worker("w1");
    worker.ready();
    let counts = runtime().block_on(answers(&mut client));
    assert_eq!(counts.len(), 20);
    assert!(counts.values().all(|count| *count == 1), "{counts:?}");
    runtime().block_on(client.close());
    aggregator.expect_empty(&stack.object(&format!("results.{MODEL}")));
}

#[test]
fn a_broker_and_a_worker_that_die_cost_no_answer_and_double_none() {
    let (rabbit, redis) = (Arc::new(Rabbit::started()), Arc::new(Redis::started()));
    let stack = Stack::on(Arc::clone(&rabbit), redis);
    let worker = stack.worker("w1");
    worker.ready();
    let mut client = client(&stack);
    for n in 0..60 {
        client
            .submit(&job(honest(), &format!("job-{n}")))
            .expect("a job");
    }
    for queue in [
        stack.jobs_queue(),
        stack.object(&format!("results.{MODEL}")),
    ] {
        rabbit.remembers(&queue);
    }
    let breaking = std::thread::spawn(move || {
        rabbit.kill();
        rabbit.start();
    });
    let counts = runtime().block_on(async {
        let first = client.next().await.expect("an answer");
        worker.signal(Signal::SIGKILL);
        let _second = stack.worker("w2");
        let mut counts = answers(&mut client).await;
        *counts.entry(name(first)).or_default() += 1;
        counts
    });
    breaking.join().expect("the broker is back");
    assert_eq!(counts.len(), 60);
    assert!(counts.values().all(|count| *count == 1), "{counts:?}");
}

#[test]
fn what_is_never_answered_or_never_taken_is_said_and_holds_up_nothing() {
    // A broker with a limit, which ends the link of who sends more.
    let rabbit = Rabbit::stopped();
    rabbit.configure("max_message_size = 100000\n");
    rabbit.start();
    let stack = Stack::on(Arc::new(rabbit), Redis::shared());
    let worker = stack.worker_with("w1", |s| s.set("heartbeat.ttl", "60s"));
    worker.ready();
    let mut client = self::client(&stack);
    let mut large = job(honest(), "large");
    if let JobMessage::Score(job) = &mut large {
        job.candidate.data = Some(Blob(vec![0; 200_000]));
    }
    client.submit(&large).expect("a job");
    client.submit(&empty("small")).expect("a job");
    let (first, second) = runtime().block_on(async {
        let next = async { (client.next().await, client.next().await) };
        let ended = tokio::time::timeout(secs(60), next).await;
        ended.expect("both have their outcome")
    });
    let outcomes = [first.expect("an outcome"), second.expect("an outcome")];
    let unsent = |o: &Outcome| matches!(o, Outcome::Unsent { submission_id, .. } if submission_id == "large");
    let answered = |o: &Outcome| matches!(o, Outcome::Answered(r) if r.submission_id == "small");
    assert!(outcomes.iter().any(unsent), "{outcomes:?}");
    assert!(outcomes.iter().any(answered), "{outcomes:?}");

    // Its record says that it is ready: the job is at the broker, and nobody takes it.
    worker.signal(Signal::SIGSTOP);
    let mut client = self::client(&stack).answer_within(secs(2));
    client.submit(&empty("late")).expect("a job");
    let late = runtime().block_on(async { tokio::time::timeout(secs(60), client.next()).await });
    let late = late.expect("it is said").expect("an outcome");
    let id = "late".to_owned();
    assert_eq!(late, Outcome::Overdue { submission_id: id });
    worker.signal(Signal::SIGCONT);
}

#[test]
fn answers_of_an_earlier_run_are_handed_over_and_taken_for_nobodys() {
    let stack = Stack::shared();
    let worker = stack.worker_with("w1", |s| s.set("amqp.retry_delays", "[]"));
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.submit(&honest_job("stranger", "n"));
    let mut newer = honest_job("same", "n");
    newer["model_version"] = 99.into();
    aggregator.submit(&newer);
    let results = stack.object(&format!("results.{MODEL}"));
    eventually(secs(60), "both are answered", || {
        aggregator.depth(&results).is_some_and(|(n, _)| n == 2)
    });

    let mut client = client(&stack);
    client.submit(&job(honest(), "same")).expect("a job");
    let outcomes = runtime().block_on(async {
        let mut outcomes = Vec::new();
        let collecting = async {
            while let Some(outcome) = client.next().await {
                outcomes.push(outcome);
            }
        };
        let ended = tokio::time::timeout(secs(60), collecting).await;
        ended.expect("the job is answered");
        client.close().await;
        outcomes
    });
    let said: Vec<_> = outcomes
        .iter()
        .filter_map(|outcome| match outcome {
            Outcome::Answered(r) => Some((true, r.submission_id.as_str(), r.model_version)),
            Outcome::Unasked(r) => Some((false, r.submission_id.as_str(), r.model_version)),
            Outcome::Overdue { .. } | Outcome::Unsent { .. } | Outcome::Unreadable { .. } => None,
        })
        .collect();
    let mut sorted = said.clone();
    sorted.sort_unstable();
    let expected = [
        (false, "same", 99),
        (false, "stranger", VERSION),
        (true, "same", VERSION),
    ];
    assert_eq!(sorted, expected, "{outcomes:?}");
    aggregator.expect_empty(&results);
}

#[test]
fn jobs_for_a_version_that_nobody_serves_yet_wait_and_hold_up_no_others() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    worker.ready();
    let mut client = client(&stack);
    let mut newer = job(honest(), "newer");
    if let JobMessage::Score(job) = &mut newer {
        job.model_version = VERSION + 1;
    }
    client.submit(&newer).expect("a job");
    client.submit(&job(honest(), "now")).expect("a job");
    let mut older = job(honest(), "older");
    if let JobMessage::Score(job) = &mut older {
        job.model_version = VERSION - 1;
    }
    client.submit(&older).expect("a job");
    let (first, second, third) = runtime().block_on(async {
        let first = tokio::time::timeout(secs(60), client.next()).await;
        let second = tokio::time::timeout(secs(60), client.next()).await;
        let third = tokio::time::timeout(secs(3), client.next()).await;
        (first, second, third)
    });
    let mut answered = [first, second].map(|next| name(next.expect("an answer").expect("one")));
    answered.sort();
    assert_eq!(answered, ["now", "older"]);
    assert!(third.is_err(), "{third:?}");
    let (aggregator, jobs) = (stack.aggregator(), stack.jobs_queue());
    let rungs = ["5s", "30s", "300s"].map(|rung| format!("{jobs}.retry.{rung}"));
    for queue in rungs.into_iter().chain([jobs]) {
        assert!(
            aggregator.depth(&queue).is_none_or(|(jobs, _)| jobs == 0),
            "{queue}"
        );
    }
}
