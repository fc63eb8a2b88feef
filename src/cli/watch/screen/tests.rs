use super::*;
use crate::fleet::observer::{Queues, Worker};
use crate::protocol::heartbeat::Record;
use crate::store::LiveRecord;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use serde_json::json;

fn worker(id: &str, ready: bool, scored: u64) -> Worker {
    let record = json!({
        "worker_id": id, "incarnation": id, "ready": ready, "seq": 100,
        // By a clock of its own.
        "at_ms": 9_100_000, "started_at_ms": 9_000_000,
        "state": if ready { "ready" } else { "degraded" },
        "state_detail": if ready { "serving" } else { "ep_unavailable" },
        "last_state_change_at_ms": 9_040_000, "model": {"name": "m", "version": 7},
        "jobs": {"scored": scored, "p50_ms": 12.25, "p95_ms": if ready { 30.0 } else { 99.0 }},
    });
    Worker {
        record: Record::read(&record.to_string()).unwrap(),
        live: LiveRecord::default(),
    }
}

fn seen(at_ms: u64, scored: u64) -> View {
    let queues = Queues {
        jobs: 5,
        retry: 2,
        dead: 1,
        consumers: 1,
    };
    View {
        at_ms,
        model: Some("m".into()),
        workers: vec![worker("a-node", true, scored), worker("b-node", false, 0)],
        queues: Some(Ok(queues)),
    }
}

fn buffer(screen: &Screen, width: u16, height: u16) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| screen.draw(frame)).unwrap();
    terminal.backend().buffer().clone()
}

fn drawn_on(screen: &Screen, width: u16, height: u16) -> Vec<String> {
    let buffer = buffer(screen, width, height);
    let line = |y| {
        (0..width)
            .map(|x| buffer[(x, y)].symbol())
            .collect::<String>()
    };
    (0..height).map(|y| line(y).trim_end().to_owned()).collect()
}

fn drawn(screen: &Screen) -> Vec<String> {
    drawn_on(screen, 80, 16)
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

fn press(screen: &mut Screen, keys: &str) {
    for key in keys.chars() {
        assert!(screen.press(Key::Char(key)).is_continue(), "{key}");
    }
}

/// The first column of the table.
fn names(screen: &Screen) -> Vec<String> {
    let lines = drawn_on(screen, 120, 40);
    let table = lines.iter().skip_while(|line| !line.starts_with("WORKER"));
    let rows = table.skip(1).take_while(|line| !line.starts_with("events"));
    let first = rows.filter_map(|row| row.split(' ').next());
    first
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

#[test]
fn eighty_columns_hold_the_fleet() {
    let mut screen = Screen::new();
    let mut first = seen(100_000, 10);
    if let Some(Ok(queues)) = &mut first.queues {
        queues.jobs = 0;
    }
    screen.see(Ok(first));
    let mut second = seen(102_000, 16);
    second.workers[0].record.progress.busy_ms = 7;
    screen.see(Ok(second));
    screen.see(Ok(seen(104_000, 22)));
    let fields = [
        ("worker_id", "b-node"),
        ("from", "warming"),
        ("to", "degraded"),
        ("detail", "ep_unavailable"),
        ("at", "3723000"),
    ];
    let fields = fields.map(|(name, value)| (name.to_owned(), value.to_owned()));
    screen.hear(vec![StreamEntry {
        id: "1-1".into(),
        fields: fields.into(),
    }]);
    let lines = drawn(&screen);
    let expected = [
        "1 of 2 workers ready, 3.0 jobs/s, busy 33%, oldest job about 0 s",
        "queue: 5 waiting, 2 to be retried, 1 dead-lettered, 1 consumers",
        "bad: 1 worker is degraded: ep_unavailable. The execution provider that was ask..",
        "warn: 1 job is dead-lettered: see scorer dead list",
        "note: 2 jobs wait to be retried",
    ];
    assert_eq!(lines[..5], expected);
    let (sick, well) = (words(&lines[6]), words(&lines[7]));
    assert_eq!(
        sick[..8],
        [
            "b-node",
            "degraded",
            "1m",
            "ep_unavailable",
            "7",
            "0.0",
            "12.2",
            "99.0"
        ]
    );
    assert_eq!(
        well,
        [
            "a-node", "ready", "1m", "serving", "7", "3.0", "12.2", "30.0", "██"
        ]
    );
    assert_eq!(
        lines[9],
        "01:02:03Z b-node: warming -> degraded (ep_unavailable)"
    );
    assert!(lines[15].starts_with(HELP), "{lines:?}");
}

#[test]
fn a_fleet_without_a_fault_has_no_line_about_one() {
    let mut view = seen(100_000, 0);
    view.workers.pop();
    view.queues = Some(Ok(Queues {
        consumers: 1,
        ..Queues::default()
    }));
    let mut screen = Screen::new();
    screen.see(Ok(view));
    let lines = drawn(&screen);
    assert_eq!(lines[0], "1 of 1 workers ready, 0.0 jobs/s, busy 0%");
    assert!(lines[2].starts_with("WORKER"), "{lines:?}");
}

#[test]
fn an_update_that_failed_is_told_above_the_table() {
    let mut view = seen(100_000, 0);
    view.workers.pop();
    view.queues = None;
    let update = json!({"live_version": 9, "looked_at_ms": 1, "bytes_here": 0, "bytes_wanted": 0,
        "refused": null, "failure": "canary differs"});
    view.workers[0].record.update = serde_json::from_value(update).unwrap();
    let mut screen = Screen::new();
    screen.see(Ok(view));
    let told = "warn: 1 worker does not serve the live version 9: canary differs (a-node)";
    let lines = drawn(&screen);
    assert!(lines.iter().any(|line| line == told), "{lines:?}");
}

#[test]
fn what_is_wrong_has_the_colour_of_how_bad_it_is() {
    let mut screen = Screen::new();
    screen.see(Ok(seen(100_000, 10)));
    let buffer = buffer(&screen, 80, 16);
    let colours = [2, 3, 4, 6, 7].map(|y| buffer[(if y < 6 { 0 } else { 12 }, y)].fg);
    let expected = [
        Color::Red,
        Color::Yellow,
        Color::Cyan,
        Color::Red,
        Color::Green,
    ];
    assert_eq!(colours, expected);
}

#[test]
fn of_a_hundred_workers_those_that_are_sick_are_seen_each_with_its_reason() {
    let mut view = seen(100_000, 10);
    view.workers.clear();
    for n in 0..101_u64 {
        let mut worker = worker(&format!("gpu-{n:03}-cuda0"), n % 5 != 3, 0);
        if !worker.record.ready {
            worker.record.state_detail = format!("reason_{n}");
            worker.record.last_state_change_at_ms = 9_000_000 + n;
        }
        worker.record.model.version = Some(if n < 28 { 41 } else { 42 });
        view.workers.push(worker);
    }
    view.workers[100].record.store.ok = false;
    let mut screen = Screen::new();
    screen.see(Ok(view));
    let lines = drawn_on(&screen, 120, 40);
    assert!(lines[0].starts_with("81 of 101 workers ready"), "{lines:?}");
    assert_eq!(lines[2], "versions: 42 by 58 workers, 41 by 23");
    let summed_up = "bad: 20 more findings: 16 bad, 2 warn, 2 note";
    assert_eq!(lines[7], summed_up, "{lines:#?}");
    let row = |n: u64| {
        let reason = format!("reason_{n} ");
        let shown = |line: &&String| !line.starts_with("bad") && line.contains(&reason);
        lines.iter().position(|line| shown(&line))
    };
    let sick = (0..101).filter(|n| n % 5 == 3);
    let rows: Vec<usize> = sick.map(|n| row(n).expect("it is shown")).collect();
    assert_eq!(rows, (9..29).collect::<Vec<_>>(), "longest first");
    let more = lines.iter().find(|line| line.starts_with("... "));
    assert_eq!(more.unwrap(), "... 76 more, all ready");
    // By name the sick are hidden, and counted.
    screen.rows.order = super::super::rows::Order::Name;
    let lines = drawn_on(&screen, 80, 24);
    let more = lines.iter().find(|line| line.starts_with("... "));
    assert_eq!(more.unwrap(), "... 92 more: 18 degraded, 74 ready");
}

#[test]
fn what_does_not_fit_is_cut_where_it_says_least_and_never_left_out_in_silence() {
    let mut view = seen(100_000, 10);
    let mut worker = view.workers.pop().unwrap();
    worker.record.worker_id = "scorer-worker-7d4b9c-x2x8k".into();
    worker.record.state_detail = "broker_disconnected".into();
    worker.record.model.version = Some(123_456);
    view.workers = vec![worker; 40];
    let mut screen = Screen::new();
    screen.see(Ok(view));
    let lines = drawn_on(&screen, 80, 20);
    let rows = lines.iter().filter(|line| line.contains("x2x8k"));
    let row = rows.clone().next().unwrap();
    let shown = [
        "..b9c-x2x8k",
        "degraded",
        "1m",
        "broker_disconnected",
        "123456",
    ];
    assert_eq!(words(row)[..5], shown, "{lines:?}");
    let more = lines.iter().find(|line| line.starts_with("... "));
    let hidden = 40 - rows.count();
    assert_eq!(more.unwrap(), &format!("... {hidden} more, all degraded"));
}

#[test]
fn keys_sort_and_filter() {
    let mut screen = Screen::new();
    screen.see(Ok(seen(100_000, 10)));
    let mut orders = Vec::new();
    for _ in 0..4 {
        orders.push((screen.rows.order.to_string(), names(&screen).remove(0)));
        press(&mut screen, "s");
    }
    let sorted = orders.iter().map(|(order, first)| (&**order, &**first));
    let expected = [
        ("state", "b-node"),
        ("jobs/s", "a-node"),
        ("p95", "b-node"),
        ("name", "a-node"),
    ];
    assert_eq!(sorted.collect::<Vec<_>>(), expected);
    for shown in [&["b-node", "a-node"][..], &["b-node"], &["a-node"]] {
        assert_eq!(names(&screen), shown);
        press(&mut screen, "f");
    }
}

#[test]
fn a_text_is_searched_for_while_it_is_typed() {
    let mut screen = Screen::new();
    screen.see(Ok(seen(100_000, 10)));
    press(&mut screen, "/B-Nx");
    assert_eq!(names(&screen), [""; 0]);
    assert!(screen.press(Key::Backspace).is_continue());
    assert_eq!(names(&screen), ["b-node"]);
    let last = |screen: &Screen| drawn(screen).pop().unwrap();
    assert_eq!(last(&screen), "search: B-N_   Enter keeps it, Esc ends it");
    // Letters are letters again after Enter.
    assert!(screen.press(Key::Enter).is_continue());
    press(&mut screen, "f");
    assert!(last(&screen).ends_with("by state, not ready with B-N"));
    assert!(screen.press(Key::Escape).is_continue());
    assert_eq!(names(&screen), ["b-node"], "not ready");
    press(&mut screen, "ff/ep_un");
    assert_eq!(names(&screen), ["b-node"], "by its reason");
    assert!(screen.press(Key::Escape).is_continue());
    assert_eq!(names(&screen), ["b-node", "a-node"]);
    // It is bounded.
    press(&mut screen, &("/".to_owned() + &"x".repeat(100)));
    assert_eq!(screen.rows.text.len(), TYPED);
    assert!(screen.press(Key::Interrupt).is_break());
}

#[test]
fn keys_end_it() {
    for key in [Key::Char('q'), Key::Escape, Key::Interrupt] {
        assert!(Screen::new().press(key).is_break());
    }
    for key in [Key::Redraw, Key::Enter, Key::Backspace, Key::Char('x')] {
        assert!(Screen::new().press(key).is_continue());
    }
}

#[test]
fn who_vanishes_is_named_until_it_is_back() {
    let mut screen = Screen::new();
    screen.see(Ok(seen(100_000, 10)));
    let mut view = seen(101_000, 10);
    view.workers.remove(0);
    screen.see(Ok(view));
    let lost = "bad: 1 worker vanished: killed, frozen, or cut off from Redis (a-node)";
    let told = |screen: &Screen| drawn(screen).iter().any(|line| line == lost);
    assert!(told(&screen), "{:#?}", drawn(&screen));
    screen.see(Ok(seen(102_000, 10)));
    assert!(!told(&screen));
}

#[test]
fn a_stranger_s_text_stays_in_its_place() {
    let mut view = seen(100_000, 10);
    for worker in &mut view.workers {
        worker.record.worker_id = "\u{1b}[2J\nevil".repeat(50);
        worker.record.state_detail = "\u{7}\n".repeat(50);
        worker.record.ready = false;
    }
    view.queues = Some(Err("\u{1b}[2J".into()));
    let mut screen = Screen::new();
    screen.see(Ok(view));
    let lines = drawn(&screen);
    let control = |line: &String| line.chars().any(char::is_control);
    assert!(!lines.iter().any(control), "{lines:?}");
    assert!(lines.iter().any(|line| line.starts_with("WORKER")));
}

#[test]
fn without_redis_nothing_is_known_and_nothing_is_green() {
    let mut screen = Screen::new();
    screen.see(Ok(seen(100_000, 10)));
    screen.see(Err("Redis: it is away".into()));
    let lines = drawn(&screen);
    assert_eq!(lines[0], "fleet unknown: Redis: it is away");
    assert!(
        !lines.iter().any(|line| line.contains("ready")),
        "{lines:?}"
    );
    assert_eq!(screen.exit(), Exit::Unavailable);
}
