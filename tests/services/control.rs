//! `scorer ctl` and the control exchange: one worker or all of them, and nothing by accident.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use testkit::aggregator::{Inbox, snapshot};
use testkit::case::honest;
use testkit::encoding::Encoding;
use testkit::message::Message;
use testkit::package::{MODEL, Package};
use testkit::stack::Stack;
use testkit::trainer::Trainer;
use testkit::wait::{SOON, eventually, secs};

#[test]
fn ctl_reaches_one_worker_or_all_of_them() {
    let stack = Stack::shared();
    let (one, two) = (stack.worker("w1"), stack.worker("w2"));
    one.ready();
    two.ready();
    let aggregator = stack.aggregator();
    let consumers = || {
        aggregator
            .depth(&stack.jobs_queue())
            .expect("the jobs queue")
            .1
    };
    assert_eq!(consumers(), 2);

    let answer = stack.command(&["ctl", "pause", "--worker", "w1"]);
    let said = answer.expect_code(0).stdout;
    assert_eq!(said, "w1  done: paused: no jobs are taken\n");
    assert_eq!(consumers(), 1, "it is done when it says so");
    one.state("degraded", "paused");
    eventually(SOON, "one consumer is left", || consumers() == 1);
    assert_eq!(
        two.next_heartbeat()["ready"],
        true,
        "the other was not meant"
    );
    stack.command(&["ctl", "pause"]).expect_code(0);
    two.state("degraded", "paused");
    eventually(SOON, "no consumer is left", || consumers() == 0);

    stack.command(&["ctl", "resume"]).expect_code(0);
    let before = one.ready();
    two.ready();
    eventually(SOON, "both are back", || consumers() == 2);

    let warmings = |id: &str| stack.states(id).iter().filter(|s| *s == "warming").count();
    let so_far = (warmings("w1"), warmings("w2"));
    stack
        .command(&["ctl", "rewarm", "--worker", "w1"])
        .expect_code(0);
    one.heartbeat_when(secs(60), "warm again", |r| {
        r["ready"] == true && r["last_ready_at_ms"].as_u64() > before["last_ready_at_ms"].as_u64()
    });
    assert!(
        warmings("w1") > so_far.0,
        "it did not warm again: {:?}",
        stack.states("w1")
    );
    assert_eq!(warmings("w2"), so_far.1, "the other was not meant");

    stack
        .command(&["ctl", "drain", "--worker", "w2"])
        .expect_code(0);
    assert_eq!(
        two.exit_code(secs(30)),
        0,
        "a drain by control is a clean exit"
    );
    let drained = stack.events("w2");
    assert!(
        drained
            .iter()
            .any(|e| e["to"] == "draining" && e["detail"] == "drain_control"),
        "{drained:?}"
    );
    aggregator.collect_results();
    aggregator.submit(&honest().job("still-served"));
    assert_eq!(aggregator.result("still-served").json()["worker_id"], "w1");
}

#[test]
fn control_messages_are_read_in_both_encodings_and_nonsense_is_ignored() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.control("all", b"{\"v\": 1, \"comm", Encoding::Json);
    aggregator.control(
        "all",
        &Encoding::Json.encode(&json!({"v": 1, "command": "explode"})),
        Encoding::Json,
    );
    let elsewhere = json!({"v": 1, "command": "pause", "worker_id": "another"});
    aggregator.control("all", &Encoding::Json.encode(&elsewhere), Encoding::Json);
    aggregator.control(
        "worker.another",
        &Encoding::Json.encode(&json!({"v": 1, "command": "pause"})),
        Encoding::Json,
    );
    let pause = json!({"v": 1, "command": "pause", "worker_id": "w1"});
    aggregator.collect_results();
    aggregator.submit(&honest().job("meanwhile"));
    assert_eq!(aggregator.result("meanwhile").json()["status"], "scored");
    assert_eq!(
        worker.next_heartbeat()["ready"],
        true,
        "nonsense or another's message stopped it"
    );
    aggregator.control(
        "worker.w1",
        &Encoding::MessagePack.encode(&pause),
        Encoding::MessagePack,
    );
    worker.state("degraded", "paused");
    let resume = json!({"v": 1, "command": "resume"});
    aggregator.control("all", &Encoding::Json.encode(&resume), Encoding::Json);
    worker.ready();
}

#[test]
fn a_worker_that_refuses_control_goes_on() {
    let stack = Stack::shared();
    let worker = stack.worker_with("w1", |s| s.set("amqp.control", false));
    worker.ready();
    // Whether or not the exchange leads anywhere, the worker must not obey.
    stack.command(&["ctl", "pause"]);
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&honest().job("unmoved"));
    assert_eq!(aggregator.result("unmoved").json()["status"], "scored");
    assert_eq!(worker.next_heartbeat()["state_detail"], "serving");
}

/// Waits for so many answers.
fn answers(inbox: &Inbox, count: usize) -> Vec<Value> {
    let answers = || -> Vec<Value> { snapshot(inbox).iter().map(Message::json).collect() };
    eventually(secs(30), &format!("{count} answers"), || {
        answers().len() >= count
    });
    answers()
}

#[test]
fn every_command_is_answered_to_who_asked_and_in_the_event_stream() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    let record = worker.ready();
    let aggregator = stack.aggregator();
    let (queue, inbox) = aggregator.reply_queue();
    let ask = |command: &str, n: usize| {
        let message = json!({"v": 1, "command": command});
        aggregator.ask("worker.w1", &message, &queue);
        let answer = answers(&inbox, n).pop().expect("an answer");
        assert_eq!(answer["command"], command);
        assert_eq!(answer["worker_id"], "w1");
        assert_eq!(answer["incarnation"], record["incarnation"]);
        assert_eq!(answer["model"], MODEL);
        let [outcome, message] =
            ["outcome", "message"].map(|f| answer[f].as_str().map(str::to_owned));
        (outcome.expect("an outcome"), message.expect("a message"))
    };
    let (outcome, message) = ask("rewarm", 1);
    assert_eq!(outcome, "done");
    assert!(message.starts_with("warm: version 7, loss "), "{message}");
    let (outcome, message) = ask("update", 2);
    assert_eq!(outcome, "refused");
    assert!(message.contains("model.update_url is not set"), "{message}");
    assert_eq!(ask("reload", 3).0, "done");
    assert_eq!(ask("pause", 4).0, "done");
    assert_eq!(ask("resume", 5), ("done".into(), "no longer paused".into()));
    assert_eq!(ask("drain", 6).0, "done");
    assert_eq!(worker.exit_code(secs(30)), 0);
    let replies = snapshot(&inbox);
    assert!(
        replies
            .iter()
            .all(|r| r.correlation_id.as_deref() == Some("asked"))
    );
    let events = stack.events("w1");
    let told: Vec<(&str, &str)> = events
        .iter()
        .filter_map(|e| Some((e.get("command")?.as_str(), e.get("outcome")?.as_str())))
        .collect();
    let expected = [
        ("rewarm", "done"),
        ("update", "refused"),
        ("reload", "done"),
        ("pause", "done"),
        ("resume", "done"),
        ("drain", "done"),
    ];
    assert_eq!(told, expected);
}

#[test]
fn a_package_is_read_again_while_the_worker_serves_and_only_a_sound_one_is_taken() {
    let stack = Stack::shared();
    let package = Package::copy();
    let worker = stack.worker_on("w1", &package.path());
    let before = worker.ready();
    let shard = package.spoil_a_shard();
    let answer = stack.command(&["ctl", "reload"]).expect_code(1);
    assert!(
        answer.stdout.starts_with("w1  refused: "),
        "{}",
        answer.stdout
    );
    assert!(answer.stdout.contains(&shard), "{}", answer.stdout);
    package.edit(|manifest| manifest["name"] = json!("another"));
    package.repair();
    let answer = stack.command(&["ctl", "reload"]).expect_code(1);
    assert!(answer.stdout.contains("\"another\""), "{}", answer.stdout);
    let after = worker.next_heartbeat();
    assert_eq!(
        after["last_state_change_at_ms"],
        before["last_state_change_at_ms"]
    );

    let mut trainer = Trainer::new(31);
    let version = trainer.advance();
    package.edit(|manifest| manifest["name"] = json!(MODEL));
    package.replace_weights(version, &trainer.full(version));
    let answer = stack.command(&["ctl", "reload"]).expect_code(0);
    assert!(
        answer.stdout.starts_with("w1  done: warm: version 8"),
        "{}",
        answer.stdout
    );
    let record = worker.ready();
    assert_eq!(record["model"]["version"], version);
    assert_eq!(record["model"]["weights_id"], trainer.weights_id(version));
    let events = stack.events("w1");
    let reloads = events
        .iter()
        .filter(|e| e["to"] == "reloading" && e.get("command").is_none());
    let details: Vec<&str> = reloads.map(|e| e["detail"].as_str()).collect();
    assert_eq!(
        details,
        ["reload_request"],
        "the two refused ones cost nothing"
    );
}

#[test]
fn ctl_names_who_does_not_answer_and_who_is_not_there() {
    let stack = Stack::shared();
    let (one, two) = (stack.worker("w1"), stack.worker("w2"));
    one.ready();
    two.ready();
    let nobody = stack
        .command(&["ctl", "pause", "--worker", "w3"])
        .expect_code(1);
    assert!(
        nobody.stderr.contains("no worker received it"),
        "{}",
        nobody.stderr
    );
    two.signal(Signal::SIGSTOP);
    let answer = stack
        .command(&["ctl", "pause", "--timeout", "5s"])
        .expect_code(1);
    two.signal(Signal::SIGCONT);
    let lines: Vec<&str> = answer.stdout.lines().collect();
    assert_eq!(
        lines,
        [
            "w1  done: paused: no jobs are taken",
            "w2  no answer within 5s"
        ]
    );
}
