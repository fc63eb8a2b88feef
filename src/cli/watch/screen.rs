//! What the view shows, and how it is drawn.

use std::collections::{BTreeMap, VecDeque};

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, Borders, Cell, Paragraph, Row, Table};

use super::pace::{KEPT, Pace};
use super::rows::{Order, Shown};
use crate::cli::Exit;
use crate::fleet::observer::{Observer, View, Worker};
use crate::protocol::heartbeat::Record;
use crate::store::StreamEntry;

/// The most events that are kept.
const EVENTS: usize = 200;
const HELP: &str = "q quit   s sort   f filter";
/// Widths of the name and the trend on 80 columns. A wider screen widens the trend first, then the name.
const NAME: u16 = 11;
const TREND: u16 = 5;

/// Everything on the screen.
pub(super) struct Screen {
    /// The last look; or why nothing is known.
    view: Result<View, String>,
    /// By incarnation.
    paces: BTreeMap<String, Pace>,
    events: VecDeque<StreamEntry>,
    pub(super) order: Order,
    pub(super) shown: Shown,
}

impl Screen {
    pub(super) fn new() -> Self {
        Self {
            view: Err("not looked yet".into()),
            paces: BTreeMap::new(),
            events: VecDeque::new(),
            order: Order::Name,
            shown: Shown::All,
        }
    }

    pub(super) async fn look(&mut self, observer: &mut Observer<'_>) {
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
            for Worker { record, .. } in &view.workers {
                let pace = self.paces.entry(record.incarnation.clone());
                let pace = pace.or_default();
                pace.note(view.at_ms, record.jobs.answered());
            }
            self.paces.retain(|incarnation, _| {
                let mut workers = view.workers.iter();
                workers.any(|worker| worker.record.incarnation == *incarnation)
            });
        }
        self.view = view;
    }

    pub(super) fn exit(&self) -> Exit {
        match &self.view {
            Ok(view) if view.ready() > 0 => Exit::Done,
            Ok(_) => Exit::Negative,
            Err(_) => Exit::Unavailable,
        }
    }

    pub(super) fn draw(&self, frame: &mut Frame<'_>) {
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
        let (order, shown) = (self.order, self.shown);
        let text = format!("{HELP}   sorted by {order}, shown: {shown}");
        frame.render_widget(Paragraph::new(text).style(Modifier::DIM), help);
    }

    fn draw_workers(&self, view: &View, frame: &mut Frame<'_>, area: Rect) {
        let mut workers = self.rows(view);
        let room = usize::from(area.height.saturating_sub(1));
        let surplus = match workers.len() > room {
            true => workers.split_off(room.saturating_sub(1)).len(),
            false => 0,
        };
        let extra = area.width.saturating_sub(80);
        let trend = TREND + extra.min(KEPT - TREND);
        let name = NAME + extra.saturating_sub(trend - TREND);
        let rows = workers
            .into_iter()
            .map(|worker| self.row(worker, name, trend));
        let more = (surplus > 0).then(|| Row::new([format!("... {surplus} more")]));
        let rows = rows.chain(more);
        let widths = [name, 9, 4, 19, 6, 6, 6, 6, trend].map(Constraint::Length);
        let head = Row::new([
            "WORKER", "STATE", "FOR", "WHY", "VER", "JOBS/S", "P50", "P95", "TREND",
        ]);
        let table = Table::new(rows, widths).header(head.style(Modifier::BOLD));
        frame.render_widget(table, area);
    }

    /// The workers that are shown, in order.
    fn rows<'a>(&self, view: &'a View) -> Vec<&'a Worker> {
        let mut workers: Vec<&Worker> = view.workers.iter().collect();
        workers.retain(|worker| self.shown.takes(&worker.record));
        let descending = |of: &dyn Fn(&Record) -> Option<f64>, a: &Worker, b: &Worker| {
            let of = |worker: &Worker| of(&worker.record).unwrap_or(0.0);
            of(b).total_cmp(&of(a))
        };
        match self.order {
            Order::Name => {}
            Order::State => {
                workers.sort_by_key(|worker| (worker.record.ready, &worker.record.state));
            }
            Order::Rate => {
                let rate = |record: &Record| self.pace(record).and_then(Pace::now);
                workers.sort_by(|a, b| descending(&rate, a, b));
            }
            Order::Slowest => workers.sort_by(|a, b| descending(&|r| r.jobs.p95_ms, a, b)),
        }
        workers
    }

    fn pace(&self, record: &Record) -> Option<&Pace> {
        self.paces.get(&record.incarnation)
    }

    fn row(&self, worker: &Worker, name: u16, trend: u16) -> Row<'static> {
        let record = &worker.record;
        let text = |text: &str| match text {
            "" => "?".to_owned(),
            known => known.to_owned(),
        };
        let or_unknown = |text: Option<String>| text.unwrap_or_else(|| "?".to_owned());
        let number = |n: Option<f64>| n.map_or_else(|| "-".to_owned(), |n| format!("{n:.1}"));
        let version = record.model.version;
        let pace = self.pace(record);
        let colour = match record.ready {
            true => Color::Green,
            false => Color::Red,
        };
        Row::new([
            Cell::new(end_of(&text(&record.worker_id), name.into())),
            Cell::new(text(&record.state)).style(colour),
            Cell::new(or_unknown(worker.state_ms().map(age))),
            Cell::new(text(&record.state_detail)),
            Cell::new(or_unknown(version.map(|version| version.to_string()))),
            Cell::new(number(pace.and_then(Pace::now))),
            Cell::new(number(record.jobs.p50_ms)),
            Cell::new(number(record.jobs.p95_ms)),
            Cell::new(pace.map(|pace| pace.sparkline(trend)).unwrap_or_default()),
        ])
    }

    fn draw_events(&self, frame: &mut Frame<'_>, area: Rect) {
        let room = usize::from(area.height.saturating_sub(1));
        let last = self.events.iter().rev().take(room).map(described);
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
        Some(Ok(queues)) => format!("queue: {queues}"),
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

/// The end of a name that is too long: the names of one fleet begin alike.
fn end_of(name: &str, width: usize) -> String {
    let surplus = name.chars().count().saturating_sub(width);
    if surplus == 0 {
        return name.to_owned();
    }
    let end: String = name.chars().skip(surplus + 2).collect();
    format!("..{end}")
}

fn described(event: &StreamEntry) -> Line<'static> {
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
    use crate::store::LiveRecord;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use serde_json::json;

    fn worker(id: &str, ready: bool, scored: u64) -> Worker {
        let record = json!({
            "worker_id": id, "incarnation": id, "ready": ready,
            // By a clock of its own.
            "at_ms": 9_100_000,
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
            "queue: 5 waiting, 2 to be retried, 1 dead-lettered, 1 consumers"
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
        let mut worker = view.workers.pop().unwrap();
        worker.record.worker_id = "scorer-worker-7d4b9c-x2x8k".into();
        worker.record.state_detail = "broker_disconnected".into();
        worker.record.model.version = Some(123_456);
        view.workers = vec![worker; 40];
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
