use serde_json::{Value, json};

use super::*;
use crate::fleet::observer::Queues;
use crate::protocol::heartbeat::Record;
use crate::store::{LiveRecord, StreamEntry};

const NOW: u64 = 1_000_000;

/// A record of a healthy worker with these fields in place of its own.
fn worker(id: &str, fields: Value) -> Worker {
    let mut record = json!({
        "worker_id": id, "incarnation": id, "seq": 900, "at_ms": NOW, "started_at_ms": 100_000,
        "state": "ready", "state_detail": "serving", "ready": true, "last_ready_at_ms": 120_000,
        "last_state_change_at_ms": 940_000, "model": {"name": "m", "version": 7},
        "warm": {"attempt": 1}, "store": {"ok": true}, "jobs": {"p95_ms": 30.0},
        "broker": {"connected": true, "consuming": true, "blocked": false},
    });
    let Value::Object(fields) = fields else {
        panic!("fields")
    };
    record.as_object_mut().unwrap().extend(fields);
    Worker {
        record: Record::read(&record.to_string()).unwrap(),
        live: LiveRecord::default(),
    }
}

fn healthy(id: &str) -> Worker {
    worker(id, json!({}))
}

fn not_ready(id: &str, state: &str, detail: &str) -> Worker {
    let fields = json!({"ready": false, "state": state, "state_detail": detail});
    worker(id, fields)
}

/// A live version, one that was refused, and why an update failed.
fn update(live: u64, refused: Option<u64>, failure: Option<&str>) -> Value {
    let refused =
        refused.map(|version| json!({"version": version, "why": "it was refused", "at_ms": 1}));
    json!({"update": {"live_version": live, "looked_at_ms": null, "bytes_here": 0, "bytes_wanted": 0,
        "refused": refused, "failure": failure}})
}

/// These and one healthy worker.
fn fleet(workers: impl IntoIterator<Item = Worker>) -> View {
    let workers = workers.into_iter().chain([healthy("z")]);
    View {
        at_ms: NOW,
        model: Some("m".into()),
        workers: workers.collect(),
        queues: Some(Ok(Queues {
            consumers: 1,
            ..Queues::default()
        })),
    }
}

fn queued(queues: Queues) -> View {
    View {
        queues: Some(Ok(queues)),
        ..fleet([])
    }
}

fn told(view: &View) -> Vec<String> {
    let found = findings(view, None, &[]);
    let said = |finding: Finding| format!("{}: {}", finding.severity, finding.text);
    found.into_iter().map(said).collect()
}

/// The view has exactly this finding.
fn only(view: &View, said: &str) {
    assert_eq!(told(view), [said]);
}

#[test]
fn of_a_healthy_fleet_there_is_nothing_to_say() {
    assert_eq!(told(&fleet([healthy("a")])), [""; 0]);
}

#[test]
fn a_fleet_that_takes_no_jobs() {
    let mut view = fleet([]);
    view.workers.clear();
    only(&view, "bad: no worker is alive");
    view.workers = vec![not_ready("a", "degraded", "paused")];
    let paused = "warn: 1 worker is degraded: paused. scorer ctl pause was called; it lasts until resume or \
                  a restart";
    assert_eq!(told(&view), ["bad: the only worker takes no jobs", paused]);
    view.workers.push(not_ready("b", "degraded", "paused"));
    assert_eq!(told(&view)[0], "bad: none of 2 workers takes jobs");
}

#[test]
fn workers_that_are_not_ready_are_grouped_by_why() {
    for (state, detail, said) in [
        (
            "degraded",
            "ep_unavailable",
            "bad: 2 workers are degraded: ep_unavailable. The execution provider that was asked for is not \
             available",
        ),
        (
            "degraded",
            "invented_later",
            "bad: 2 workers are degraded: invented_later",
        ),
        ("degraded", "", "bad: 2 workers are degraded"),
        (
            "ready",
            "serving",
            "warn: 2 workers are ready, but RabbitMQ has not confirmed a consumer, or a computation hangs",
        ),
        (
            "starting",
            "initializing",
            "note: 2 workers are starting: initializing",
        ),
        ("warming", "rewarm", "note: 2 workers are warming: rewarm"),
        (
            "updating",
            "update_to_v9",
            "note: 2 workers are updating: update_to_v9",
        ),
        (
            "reloading",
            "reload_request",
            "note: 2 workers are reloading: reload_request",
        ),
        (
            "draining",
            "drain_signal",
            "note: 2 workers are draining: drain_signal",
        ),
        ("stopped", "drained", "note: 2 workers are stopped: drained"),
        ("juggling", "balls", "warn: 2 workers are juggling: balls"),
        ("", "", "warn: 2 workers are in no known state"),
    ] {
        let view = fleet([not_ready("a", state, detail), not_ready("b", state, detail)]);
        only(&view, said);
        let found = findings(&view, None, &[]);
        let word = if detail.is_empty() { state } else { detail };
        let word = (!word.is_empty()).then(|| word.to_owned());
        let found = found.into_iter().map(|f| (f.count, f.workers, f.filter));
        let names = vec!["a".to_owned(), "b".to_owned()];
        assert_eq!(found.collect::<Vec<_>>(), [(2, names, word)]);
    }
}

#[test]
fn a_state_that_should_pass_and_does_not_is_a_warning() {
    let warming = |mut fields: Value| {
        let state = json!({"ready": false, "state": "warming", "state_detail": "rewarm"});
        let fields_of = fields.as_object_mut().unwrap();
        fields_of.extend(state.as_object().unwrap().clone());
        fleet([worker("a", fields)])
    };
    only(
        &warming(json!({"last_state_change_at_ms": NOW - 720_000})),
        "warn: 1 worker is warming: rewarm, for up to 12 min",
    );
    let failing = json!({"warm": {"attempt": 4}, "last_ready_at_ms": null});
    let said = "warn: 1 worker is warming: rewarm. The session is being proven again";
    only(&warming(failing), said);
    let failing =
        json!({"warm": {"attempt": 9}, "last_error": {"code": "warm_failed", "at_ms": 130_000}});
    only(&warming(failing), said);
    // Many updates are no failures.
    only(
        &warming(json!({"warm": {"attempt": 9}})),
        "note: 1 worker is warming: rewarm",
    );
}

#[test]
fn one_worker_has_a_problem_beside_its_state() {
    for (fields, said) in [
        (
            json!({"broker": {"connected": true, "consuming": true, "blocked": true}}),
            "bad: RabbitMQ lets 1 worker publish nothing (memory or disk alarm): results do not get out",
        ),
        (
            json!({"store": {"ok": false, "last_error": "results are not stored: OOM"}}),
            "warn: 1 worker has trouble with Redis, so that results or crash marks are missing: results are \
             not stored: OOM",
        ),
        (
            json!({"engine": {"software_device": true}}),
            "warn: 1 worker computes on a device in software, which is meant for tests",
        ),
        (
            update(9, None, Some("canary differs")),
            "warn: 1 worker does not serve the live version 9: canary differs",
        ),
        (
            update(9, Some(9), None),
            "warn: 1 worker does not serve the live version 9: it was refused",
        ),
        (
            update(7, None, Some("manifest: status 404")),
            "warn: 1 worker cannot follow the model's versions: manifest: status 404",
        ),
        (
            json!({"model": {"name": "m", "version": 8}}),
            "note: several versions are served: 8 by 1 worker, 7 by 1",
        ),
        (
            json!({"warm": {"inert": ["a.lora_A", "b"], "inert_count": 2}}),
            "note: 1 worker saw no effect of some tensors on the loss, such as a.lora_A",
        ),
    ] {
        only(&fleet([worker("a", fields)]), said);
    }
    // An earlier version that was refused, and an update that runs.
    let view = fleet([worker("a", update(9, Some(8), None))]);
    assert_eq!(told(&view), [""; 0]);
}

#[test]
fn different_reasons_for_one_problem_are_one_finding() {
    let failing = |id: &str, why: &str| worker(id, update(9, None, Some(why)));
    let view = fleet([failing("a", "x"), failing("b", "y"), failing("c", "y")]);
    let said = "warn: 3 workers do not serve the live version 9: y (others give other reasons)";
    only(&view, said);
}

#[test]
fn a_late_heartbeat_is_late_by_the_worker_s_own_interval() {
    let late = |age_ms: u64, seq: u64| {
        let mut worker = worker("a", json!({"seq": seq}));
        worker.live.age_ms = age_ms;
        fleet([worker])
    };
    // A beat a second.
    only(
        &late(4000, 900),
        "warn: 1 worker has been silent for up to 4 s",
    );
    assert_eq!(told(&late(2400, 900)), [""; 0]);
    // One every ten.
    assert_eq!(told(&late(9000, 90)), [""; 0]);
    only(
        &late(26_000, 90),
        "warn: 1 worker has been silent for up to 26 s",
    );
}

#[test]
fn queues_that_are_not_as_they_should_be() {
    let queues = Queues {
        consumers: 1,
        ..Queues::default()
    };
    only(
        &queued(Queues { dead: 1, ..queues }),
        "warn: 1 job is dead-lettered: see scorer dead list",
    );
    only(
        &queued(Queues { retry: 2, ..queues }),
        "note: 2 jobs wait to be retried",
    );
    assert_eq!(told(&queued(Queues { jobs: 5, ..queues })), [""; 0]);
    let alone = Queues {
        jobs: 5,
        consumers: 0,
        ..queues
    };
    only(
        &queued(alone),
        "bad: 5 jobs wait and the queue has no consumer",
    );
    let mut unknown = fleet([]);
    unknown.queues = Some(Err("RabbitMQ: it is away".into()));
    let said = "warn: how many jobs wait is unknown: RabbitMQ: it is away";
    only(&unknown, said);
    unknown.queues = None;
    assert!(told(&unknown)[0].contains("set model.name"));
}

#[test]
fn the_oldest_job_is_late_after_a_minute_and_bad_after_ten() {
    let said = |jobs: u32, oldest: Oldest, p95_ms: f64| {
        let mut view = queued(Queues {
            jobs,
            consumers: 1,
            ..Queues::default()
        });
        view.workers = vec![worker("a", json!({"jobs": {"p95_ms": p95_ms}}))];
        let found = findings(&view, Some(oldest), &[]);
        let said = |f: Finding| format!("{}: {}", f.severity, f.text);
        found.into_iter().map(said).collect::<Vec<_>>()
    };
    assert_eq!(said(3, Oldest::About(59_000), 30.0), [""; 0]);
    assert_eq!(
        said(3, Oldest::About(190_000), 30.0),
        ["warn: the oldest of 3 waiting jobs has waited for about 3 min"]
    );
    assert_eq!(
        said(1, Oldest::AtLeast(7_300_000), 30.0),
        ["bad: 1 job has waited for at least 2 h"]
    );
    // Each job takes five minutes.
    assert_eq!(said(3, Oldest::About(190_000), 300_000.0), [""; 0]);
    // However long jobs take.
    assert_eq!(said(3, Oldest::About(700_000), 1e300).len(), 1);

    let mut nobody = queued(Queues {
        jobs: 3,
        ..Queues::default()
    });
    nobody.workers.clear();
    let found = findings(&nobody, Some(Oldest::About(61_000)), &[]);
    let severities: Vec<_> = found.iter().map(|finding| finding.severity).collect();
    assert_eq!(severities, [Severity::Bad; 3], "{found:?}");
}

#[test]
fn the_worst_come_first_then_those_that_concern_most() {
    let view = fleet([
        not_ready("a", "warming", "rewarm"),
        not_ready("b", "warming", "rewarm"),
        not_ready("c", "degraded", "paused"),
        not_ready("d", "degraded", "stuck"),
        not_ready("e", "degraded", "consumer_lost"),
        not_ready("f", "degraded", "consumer_lost"),
    ]);
    let found = findings(&view, None, &[]);
    let words: Vec<_> = found.iter().map(|f| f.filter.as_deref().unwrap()).collect();
    assert_eq!(words, ["consumer_lost", "stuck", "paused", "rewarm"]);
}

#[test]
fn what_does_not_fit_is_counted() {
    let sick = |n: usize| not_ready(&n.to_string(), "degraded", &format!("detail_{n}"));
    let view = fleet((0..12).map(sick));
    assert_eq!(findings(&view, None, &[]).len(), MOST);
    let mut view = fleet((0..12).map(sick));
    view.workers.push(not_ready("w", "warming", "rewarm"));
    let found = findings(&view, None, &[]);
    let last = found.last().unwrap();
    assert_eq!(found.len(), MOST);
    assert_eq!(last.text, "2 more findings: 1 bad, 1 note");
    assert_eq!((last.severity, last.count), (Severity::Bad, 2));
}

#[test]
fn whatever_a_record_says_a_finding_is_one_short_line() {
    let evil = "\u{1b}[31m\n<script>".to_owned() + &"x".repeat(100_000);
    let mut fields = update(9, None, Some(&evil));
    fields["store"] = json!({"ok": false, "last_error": evil});
    fields["warm"] = json!({"inert": [evil], "inert_count": 1});
    let view = fleet([
        worker(&evil, fields),
        not_ready("b", &evil, &evil),
        not_ready("c", "degraded", &evil),
    ]);
    let found = findings(&view, None, &[]);
    assert_eq!(found.len(), 5, "{found:?}");
    for finding in found {
        assert!(finding.text.chars().count() < 2 * LONGEST, "{finding:?}");
        assert!(!finding.text.chars().any(char::is_control));
        assert_eq!(finding.filter, None);
    }
}

#[test]
fn a_finding_names_three_workers_and_is_read_by_a_page() {
    let paused = |id| not_ready(id, "degraded", "paused");
    let view = fleet(["a", "b", "c", "d"].map(paused));
    let found = serde_json::to_value(findings(&view, None, &[])).unwrap();
    let expected = json!({"severity": "warn", "count": 4, "workers": ["a", "b", "c"], "filter": "paused",
        "text": found[0]["text"]});
    assert_eq!(found, json!([expected]));
}

#[test]
fn who_vanishes_without_a_goodbye_is_lost_until_it_is_back() {
    let mut losses = Losses::default();
    let see = |losses: &mut Losses, at_ms: u64, workers: Vec<Worker>| {
        let view = View {
            at_ms,
            workers,
            ..fleet([])
        };
        losses.see(&view);
    };
    let leaving = |state| not_ready("b", state, "drain_signal");
    see(
        &mut losses,
        1000,
        vec![healthy("a"), leaving("draining"), healthy("c")],
    );
    assert_eq!(losses.list(), []);
    see(&mut losses, 2000, vec![healthy("c")]);
    let lost = Lost {
        id: "a".into(),
        at_ms: 2000,
        state: "ready".into(),
    };
    assert_eq!(losses.list(), [lost]);
    let found = findings(&fleet([]), None, losses.list());
    assert_eq!(
        found[0].text,
        "1 worker vanished: killed, frozen, or cut off from Redis"
    );
    assert_eq!(
        (found[0].severity, &*found[0].workers),
        (Severity::Bad, &["a".to_owned()][..])
    );

    see(&mut losses, 3000, vec![healthy("c"), healthy("a")]);
    assert_eq!(losses.list(), []);
    see(&mut losses, 4000, vec![healthy("c")]);
    see(&mut losses, 603_999, vec![healthy("c")]);
    assert_eq!(losses.list().len(), 1);
    see(&mut losses, 604_000, vec![healthy("c")]);
    assert_eq!(losses.list(), []);
}

#[test]
fn who_drains_between_two_looks_is_not_lost() {
    let mut losses = Losses::default();
    let entry = |id: &str, to: &str| StreamEntry {
        id: "1-1".into(),
        fields: [("worker_id", id), ("to", to)]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
    };
    losses.see(&fleet([healthy("a"), healthy("b")]));
    losses.see(&fleet([healthy("b")]));
    losses.hear(&[entry("a", "stopped")]);
    assert_eq!(losses.list(), []);
    // What it said before it went.
    losses.hear(&[entry("b", "ready"), entry("b", "draining")]);
    losses.see(&fleet([]));
    assert_eq!(losses.list(), []);
}

#[test]
fn jobs_that_wait_for_news_of_a_worker_name_it() {
    let waits = worker("a", json!({"jobs": {"waiting": 2, "waits_for": ["w1"]}}));
    only(
        &fleet([waits]),
        "note: 2 jobs wait for the end of w1, or a sign of life; others are computed",
    );
}

#[test]
fn who_was_lost_before_the_first_look_is_heard_of() {
    let lost = |id: &str, at: u64| StreamEntry {
        id: "1-1".into(),
        fields: [("worker_id", id), ("to", "lost"), ("at", &at.to_string())]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
    };
    let mut losses = Losses::default();
    let at = |at_ms: u64, ids: &[&str]| View {
        at_ms,
        workers: ids.iter().map(|id| healthy(id)).collect(),
        ..fleet([])
    };
    losses.see(&at(1_000_000, &["b"]));
    // One that is back, one of an hour ago, and one that was told twice.
    losses.hear(&[
        lost("b", 990_000),
        lost("old", 1),
        lost("a", 995_000),
        lost("a", 995_000),
    ]);
    let ids =
        |losses: &Losses| -> Vec<String> { losses.list().iter().map(|l| l.id.clone()).collect() };
    assert_eq!(ids(&losses), ["a"]);
    losses.see(&at(1_001_000, &["a", "b"]));
    assert_eq!(losses.list(), []);
}

#[test]
fn of_many_that_vanish_the_last_are_kept() {
    let mut losses = Losses::default();
    let all = (0..50).map(|n| healthy(&format!("{n:02}")));
    losses.see(&fleet(all));
    losses.see(&fleet([]));
    assert_eq!(losses.list().len(), 20);
    assert_eq!(losses.list()[19].id, "49");
}

#[test]
fn of_many_versions_the_first_are_named() {
    let at = |version: u64| worker("a", json!({"model": {"version": version}}));
    let view = View {
        workers: [1, 2, 2, 3, 4, 5, 5].map(at).into(),
        ..fleet([])
    };
    let said = Versions::of(&view).to_string();
    assert_eq!(said, "5 by 2 workers, 2 by 2, 4 by 1, others by 2");
    // Those of other models are no others.
    let of = |model: &str, version: u64| {
        worker("a", json!({"model": {"name": model, "version": version}}))
    };
    let several = |workers: Vec<Worker>| {
        Versions::of(&View {
            workers,
            ..fleet([])
        })
        .to_string()
    };
    assert_eq!(several(vec![of("a", 1), of("b", 2)]), "");
    assert_eq!(
        several(vec![of("a", 1), of("b", 2), of("a", 2)]),
        "a 2 by 1 worker, a 1 by 1"
    );
    let evil = several(vec![of("a\u{1b}[2J", 1), of("b", 2), of("a\u{1b}[2J", 2)]);
    assert!(!evil.contains('\u{1b}'), "{evil:?}");
}

#[test]
fn times_are_said_as_people_say_them() {
    let said = [0, 89_999, 90_000, 5_400_000, 172_800_000].map(span);
    assert_eq!(said, ["0 s", "89 s", "1 min", "1 h", "2 days"]);
}
