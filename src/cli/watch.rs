//! `scorer status --watch` on a terminal: the fleet as it changes, until `q`.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, Borders, Cell, Paragraph, Row, Table};
use tokio::sync::mpsc;

use super::status::EVERY;
use super::{Exit, Fault, Outcome};
use crate::fleet::observer::{Observer, View, Worker};
use crate::store::{LiveRecord, StreamEntry};

/// Looks that a sparkline shows.
const KEPT: u16 = 12;
/// Events that are shown.
const EVENTS: usize = 200;
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const HELP: &str = "q quit   s sort   f filter";

/// What the rows are sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Name,
    State,
    Rate,
    Slowest,
}

impl Order {
    fn next(self) -> Self {
        match self {
            Self::Name => Self::State,
            Self::State => Self::Rate,
            Self::Rate => Self::Slowest,
            Self::Slowest => Self::Name,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::State => "state",
            Self::Rate => "jobs/s",
            Self::Slowest => "p95",
        }
    }
}

/// Which rows are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shown {
    All,
    Ready,
    NotReady,
}

impl Shown {
    fn next(self) -> Self {
        match self {
            Self::All => Self::NotReady,
            Self::NotReady => Self::Ready,
            Self::Ready => Self::All,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Ready => "ready",
            Self::NotReady => "not ready",
        }
    }

    fn takes(self, worker: &Worker) -> bool {
        match self {
            Self::All => true,
            Self::Ready => worker.ready,
            Self::NotReady => !worker.ready,
        }
    }
}

/// Jobs per second of one start of a worker, the last looks, oldest first.
#[derive(Debug, Default)]
struct Pace {
    seen: Option<(u64, u64)>,
    rates: VecDeque<f64>,
}

impl Pace {
    #[expect(clippy::cast_precision_loss, reason = "jobs between two looks")]
    fn note(&mut self, at_ms: u64, answered: u64) {
        if let Some((then, before)) = self.seen.replace((at_ms, answered)) {
            let seconds = at_ms.saturating_sub(then) as f64 / 1e3;
            if seconds > 0.0 {
                self.rates
                    .push_back(answered.saturating_sub(before) as f64 / seconds);
            }
        }
        if self.rates.len() > usize::from(KEPT) {
            self.rates.pop_front();
        }
    }

    fn now(&self) -> Option<f64> {
        self.rates.back().copied()
    }

    /// The last looks, as many as there is room for.
    fn sparkline(&self, room: u16) -> String {
        let surplus = self.rates.len().saturating_sub(room.into());
        let rates = || self.rates.iter().skip(surplus);
        let most = rates().copied().fold(0.0, f64::max);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "0 to 7"
        )]
        let bar = |rate: &f64| match most > 0.0 {
            true => BARS[((rate / most * 7.0).round() as usize).min(7)],
            false => BARS[0],
        };
        rates().map(bar).collect()
    }
}

/// Columns of the name and of the curve where there are 80. Wider screens widen the curve, then the name.
const NAME: u16 = 11;
const TREND: u16 = 5;

/// Everything on the screen.
struct Screen {
    /// What was seen last; or why nothing is known.
    view: Result<View, String>,
    paces: BTreeMap<String, Pace>,
    events: VecDeque<StreamEntry>,
    order: Order,
    shown: Shown,
}

/// Shows the fleet until somebody leaves.
pub(super) async fn watch(observer: &mut Observer<'_>) -> Outcome {
    let mut keys = keys();
    let mut terminal = ratatui::try_init().map_err(Fault::internal)?;
    let mut screen = Screen::new();
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let outcome = loop {
        tokio::select! {
            _ = ticks.tick() => screen.look(observer).await,
            key = keys.recv() => match key {
                Some(Key::Sort) => screen.order = screen.order.next(),
                Some(Key::Filter) => screen.shown = screen.shown.next(),
                Some(Key::Redraw) => {}
                Some(Key::Quit) | None => break Ok(screen.exit()),
            },
        }
        if let Err(error) = terminal.draw(|frame| screen.draw(frame)) {
            break Err(Fault::internal(error));
        }
    };
    ratatui::restore();
    outcome
}

/// What fits of a name. Names of one fleet begin alike.
fn end_of(name: &str, width: usize) -> String {
    let surplus = name.chars().count().saturating_sub(width);
    if surplus == 0 {
        return name.to_owned();
    }
    let end: String = name.chars().skip(surplus + 2).collect();
    format!("..{end}")
}

/// What a key asks for.
#[derive(Debug, PartialEq, Eq)]
enum Key {
    Quit,
    Sort,
    Filter,
    Redraw,
}

/// Reading keys blocks, so it has a thread.
fn keys() -> mpsc::Receiver<Key> {
    let (pressed, keys) = mpsc::channel(8);
    std::thread::spawn(move || {
        while !pressed.is_closed() {
            if !event::poll(Duration::from_millis(200)).unwrap_or(true) {
                continue;
            }
            let Ok(event) = event::read() else { return };
            if let Some(key) = key(&event)
                && pressed.blocking_send(key).is_err()
            {
                return;
            }
        }
    });
    keys
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "foreign enums of every key there is"
)]
fn key(event: &Event) -> Option<Key> {
    match event {
        Event::Key(key) if key.kind == KeyEventKind::Press => match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Some(Key::Quit),
            KeyCode::Char('q') | KeyCode::Esc => Some(Key::Quit),
            KeyCode::Char('s') => Some(Key::Sort),
            KeyCode::Char('f') => Some(Key::Filter),
            _ => None,
        },
        Event::Resize(_, _) => Some(Key::Redraw),
        _ => None,
    }
}

impl Screen {
    fn new() -> Self {
        Self {
            view: Err("not looked yet".into()),
            paces: BTreeMap::new(),
            events: VecDeque::new(),
            order: Order::Name,
            shown: Shown::All,
        }
    }

    async fn look(&mut self, observer: &mut Observer<'_>) {
        self.see(observer.look().await.map_err(|e| e.to_string()));
        let last = self.events.back().map(|event| event.id.clone());
        // What Redis does not tell now it tells at the next look.
        let events = observer.events(last.as_deref()).await;
        self.events.extend(events.unwrap_or_default());
        let surplus = self.events.len().saturating_sub(EVENTS);
        self.events.drain(..surplus);
    }

    fn see(&mut self, view: Result<View, String>) {
        if let Ok(view) = &view {
            let live = |worker: &Worker| worker.incarnation.clone().unwrap_or_default();
            for (worker, _) in &view.workers {
                let pace = self.paces.entry(live(worker)).or_default();
                pace.note(view.at_ms, worker.answered());
            }
            self.paces.retain(|incarnation, _| {
                view.workers
                    .iter()
                    .any(|(worker, _)| live(worker) == *incarnation)
            });
        }
        self.view = view;
    }

    fn exit(&self) -> Exit {
        match &self.view {
            Ok(view) if view.ready() > 0 => Exit::Done,
            Ok(_) => Exit::Negative,
            Err(_) => Exit::Unavailable,
        }
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        let rows = match &self.view {
            Ok(view) => u16::try_from(view.workers.len()).unwrap_or(u16::MAX),
            Err(_) => 1,
        };
        let areas = Layout::vertical([
            Constraint::Length(2),
            Constraint::Max(rows.saturating_add(1)),
            Constraint::Min(4),
            Constraint::Length(1),
        ]);
        let [head, fleet, events, help] = areas.areas(frame.area());
        match &self.view {
            Ok(view) => {
                frame.render_widget(Paragraph::new(headline(view)), head);
                self.draw_workers(view, frame, fleet);
            }
            Err(why) => {
                let unknown = Style::new().fg(Color::Yellow).add_modifier(Modifier::BOLD);
                let text = Line::styled(format!("fleet unknown: {why}"), unknown);
                frame.render_widget(Paragraph::new(text), head);
            }
        }
        self.draw_events(frame, events);
        let (order, shown) = (self.order.as_str(), self.shown.as_str());
        let text = format!("{HELP}   sorted by {order}, shown: {shown}");
        frame.render_widget(Paragraph::new(text).style(Modifier::DIM), help);
    }

    fn draw_workers(&self, view: &View, frame: &mut Frame<'_>, area: Rect) {
        let mut workers: Vec<&(Worker, LiveRecord)> = view.workers.iter().collect();
        workers.retain(|(worker, _)| self.shown.takes(worker));
        let extra = area.width.saturating_sub(80);
        let trend = TREND + extra.min(KEPT - TREND);
        let name = NAME + extra.saturating_sub(trend - TREND);
        let rate = |worker: &Worker| self.pace(worker).and_then(Pace::now).unwrap_or(0.0);
        match self.order {
            Order::Name => {}
            Order::State => workers.sort_by_key(|(worker, _)| (worker.ready, worker.state.clone())),
            Order::Rate => workers.sort_by(|(a, _), (b, _)| rate(b).total_cmp(&rate(a))),
            Order::Slowest => {
                let slow = |worker: &Worker| worker.jobs.p95_ms.unwrap_or(0.0);
                workers.sort_by(|(a, _), (b, _)| slow(b).total_cmp(&slow(a)));
            }
        }
        let room = usize::from(area.height.saturating_sub(1));
        let surplus = match workers.len() > room {
            true => workers.split_off(room.saturating_sub(1)).len(),
            false => 0,
        };
        let rows = workers
            .into_iter()
            .map(|(worker, record)| self.row(worker, (name, trend), record.age_ms));
        let more = (surplus > 0).then(|| Row::new([format!("... {surplus} more")]));
        let rows = rows.chain(more);
        let widths = [
            Constraint::Length(name),
            Constraint::Length(9),
            Constraint::Length(4),
            Constraint::Length(19),
            Constraint::Length(6),
            Constraint::Length(6),
            Constraint::Length(6),
            Constraint::Length(6),
            Constraint::Length(trend),
        ];
        let head = Row::new([
            "WORKER", "STATE", "FOR", "WHY", "VER", "JOBS/S", "P50", "P95", "TREND",
        ]);
        let table = Table::new(rows, widths).header(head.style(Modifier::BOLD));
        frame.render_widget(table, area);
    }

    fn pace(&self, worker: &Worker) -> Option<&Pace> {
        self.paces.get(worker.incarnation.as_deref()?)
    }

    fn row(&self, worker: &Worker, (name, trend): (u16, u16), age_ms: u64) -> Row<'static> {
        let text = |text: &Option<String>| text.clone().unwrap_or_else(|| "?".into());
        let number = |n: Option<f64>| n.map_or_else(|| "-".into(), |n| format!("{n:.1}"));
        let pace = self.pace(worker);
        let colour = match worker.ready {
            true => Color::Green,
            false => Color::Red,
        };
        Row::new([
            Cell::new(end_of(&text(&worker.worker_id), name.into())),
            Cell::new(text(&worker.state)).style(colour),
            Cell::new(worker.state_ms(age_ms).map_or_else(|| "?".into(), age)),
            Cell::new(text(&worker.state_detail)),
            Cell::new(
                worker
                    .model
                    .version
                    .map_or_else(|| "?".into(), |v| v.to_string()),
            ),
            Cell::new(number(pace.and_then(Pace::now))),
            Cell::new(number(worker.jobs.p50_ms)),
            Cell::new(number(worker.jobs.p95_ms)),
            Cell::new(pace.map(|pace| pace.sparkline(trend)).unwrap_or_default()),
        ])
    }

    fn draw_events(&self, frame: &mut Frame<'_>, area: Rect) {
        let room = usize::from(area.height.saturating_sub(1));
        let last = self.events.iter().rev().take(room).map(told);
        let block = Block::new()
            .borders(Borders::TOP)
            .title("events, latest first");
        frame.render_widget(Paragraph::new(last.collect::<Vec<_>>()).block(block), area);
    }
}

fn headline(view: &View) -> Vec<Line<'static>> {
    let workers = format!(
        "{} workers alive, {} ready",
        view.workers.len(),
        view.ready()
    );
    let queue = match &view.queues {
        None => "queue: unknown, there are several models: set model.name".into(),
        Some(Ok(q)) => format!(
            "queue: {} waiting, {} to be tried again, {} parked, {} consumers",
            q.jobs, q.retry, q.dead, q.consumers
        ),
        Some(Err(why)) => format!("queue: unknown, {why}"),
    };
    vec![Line::from(workers), Line::from(queue)]
}

/// A time in at most four characters.
fn age(millis: u64) -> String {
    match millis / 1000 {
        seconds @ 0..60 => format!("{seconds}s"),
        seconds @ 60..3600 => format!("{}m", seconds / 60),
        seconds @ 3600..86_400 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

fn told(event: &StreamEntry) -> Line<'static> {
    let field = |name: &str| event.fields.get(name).map_or("?", String::as_str);
    let at: u64 = field("at").parse().unwrap_or_default();
    let time = |unit: u64, of: u64| at / 1000 / unit % of;
    let clock = format!(
        "{:02}:{:02}:{:02}Z",
        time(3600, 24),
        time(60, 60),
        time(1, 60)
    );
    let (worker, detail) = (field("worker_id"), field("detail"));
    Line::from(match event.fields.get("command") {
        Some(command) => format!("{clock} {worker}: {command} {}", field("outcome")),
        None => format!(
            "{clock} {worker}: {} -> {} ({detail})",
            field("from"),
            field("to")
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::observer::Queues;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use serde_json::json;

    fn worker(id: &str, ready: bool, scored: u64) -> (Worker, LiveRecord) {
        let record = json!({
            "worker_id": id, "incarnation": id, "ready": ready,
            // By a clock of its own.
            "at_ms": 9_100_000,
            "state": if ready { "ready" } else { "degraded" },
            "state_detail": if ready { "serving" } else { "ep_unavailable" },
            "last_state_change_at_ms": 9_040_000, "model": {"name": "m", "version": 7},
            "jobs": {"scored": scored, "p50_ms": 12.25, "p95_ms": if ready { 30.0 } else { 99.0 }},
        });
        (
            serde_json::from_value(record).unwrap(),
            LiveRecord::default(),
        )
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

    fn drawn(screen: &Screen) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(80, 12)).unwrap();
        terminal.draw(|frame| screen.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let line = |y| (0..80).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..12).map(|y| line(y).trim_end().to_owned()).collect()
    }

    #[test]
    fn eighty_columns_hold_the_fleet() {
        let mut screen = Screen::new();
        screen.see(Ok(seen(100_000, 10)));
        screen.see(Ok(seen(102_000, 16)));
        let fields = [
            ("worker_id", "b-node"),
            ("from", "warming"),
            ("to", "degraded"),
            ("detail", "ep_unavailable"),
            ("at", "3723000"),
        ];
        let fields = fields.map(|(name, value)| (name.to_owned(), value.to_owned()));
        screen.events.push_back(StreamEntry {
            id: "1-1".into(),
            fields: fields.into(),
        });
        let lines = drawn(&screen);
        assert_eq!(lines[0], "2 workers alive, 1 ready");
        assert_eq!(
            lines[1],
            "queue: 5 waiting, 2 to be tried again, 1 parked, 1 consumers"
        );
        let words = |line: &str| {
            line.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            words(&lines[3]),
            [
                "a-node", "ready", "1m", "serving", "7", "3.0", "12.2", "30.0", "█"
            ]
        );
        assert_eq!(
            words(&lines[4]),
            [
                "b-node",
                "degraded",
                "1m",
                "ep_unavailable",
                "7",
                "0.0",
                "12.2",
                "99.0",
                "▁"
            ]
        );
        assert_eq!(
            lines[6],
            "01:02:03Z b-node: warming -> degraded (ep_unavailable)"
        );
        assert!(lines[11].starts_with(HELP), "{lines:?}");
    }

    #[test]
    fn what_does_not_fit_is_cut_where_it_says_least_and_never_left_out_in_silence() {
        let mut view = seen(100_000, 10);
        let (mut worker, text) = view.workers.pop().unwrap();
        worker.worker_id = Some("scorer-worker-7d4b9c-x2x8k".into());
        worker.state_detail = Some("broker_disconnected".into());
        worker.model.version = Some(123_456);
        view.workers = (0..40).map(|_| (worker.clone(), text.clone())).collect();
        let mut screen = Screen::new();
        screen.see(Ok(view));
        let lines = drawn(&screen);
        let row = lines[3].split_whitespace().take(5);
        let shown = [
            "..b9c-x2x8k",
            "degraded",
            "1m",
            "broker_disconnected",
            "123456",
        ];
        assert_eq!(row.collect::<Vec<_>>(), shown, "{lines:?}");
        let more = lines.iter().find(|line| line.contains("more"));
        let hidden = 40 - lines.iter().filter(|line| line.contains("x2x8k")).count();
        assert_eq!(more.unwrap(), &format!("... {hidden} more"));
    }

    #[test]
    fn keys_are_what_the_last_line_says() {
        let pressed = |code: KeyCode| key(&Event::Key(code.into()));
        assert_eq!(pressed(KeyCode::Char('s')), Some(Key::Sort));
        assert_eq!(pressed(KeyCode::Char('f')), Some(Key::Filter));
        assert_eq!(pressed(KeyCode::Char('q')), Some(Key::Quit));
        assert_eq!(pressed(KeyCode::Esc), Some(Key::Quit));
        assert_eq!(pressed(KeyCode::Char('x')), None);
        assert_eq!(key(&Event::Resize(80, 24)), Some(Key::Redraw));
    }

    #[test]
    fn keys_sort_and_filter() {
        let mut screen = Screen::new();
        screen.see(Ok(seen(100_000, 10)));
        let first = |screen: &Screen| drawn(screen)[3].split(' ').next().unwrap().to_owned();
        assert_eq!(first(&screen), "a-node");
        screen.order = Order::Slowest;
        assert_eq!(first(&screen), "b-node");
        screen.order = Order::Name;
        screen.shown = screen.shown.next();
        assert_eq!(
            (first(&screen).as_str(), screen.shown),
            ("b-node", Shown::NotReady)
        );
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
}
