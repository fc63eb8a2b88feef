//! What the view shows, and how it is drawn.

use std::collections::VecDeque;
use std::ops::ControlFlow;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, Borders, Paragraph};

use super::head::{headline, told};
use super::keys::Key;
use super::rows::Rows;
use super::table::table;
use crate::cli::Exit;
use crate::fleet::findings::{Losses, at_most};
use crate::fleet::observer::{Observer, View};
use crate::fleet::pace::Paces;
use crate::fleet::waiting::{Oldest, Waiting};
use crate::store::StreamEntry;

/// The most events that are kept.
const EVENTS: usize = 200;
/// The most findings that are shown.
const FINDINGS: usize = 5;
/// The longest text that can be typed.
const TYPED: usize = 40;
const HELP: &str = "q quit   s sort   f filter   / search";

/// Everything on the screen.
pub(super) struct Screen {
    /// The last look; or why nothing is known.
    view: Result<View, String>,
    paces: Paces,
    waiting: Waiting,
    oldest: Option<Oldest>,
    losses: Losses,
    events: VecDeque<StreamEntry>,
    rows: Rows,
    /// Whether keys are a text to search for.
    typing: bool,
}

impl Screen {
    pub(super) fn new() -> Self {
        Self {
            view: Err("not looked yet".into()),
            paces: Paces::default(),
            waiting: Waiting::default(),
            oldest: None,
            losses: Losses::default(),
            events: VecDeque::new(),
            rows: Rows::new(),
            typing: false,
        }
    }

    pub(super) async fn look(&mut self, observer: &mut Observer<'_>) {
        self.see(observer.look().await.map_err(|e| e.to_string()));
        let last = self.events.back().map(|event| event.id.clone());
        // What Redis does not tell now it tells at the next look.
        self.hear(observer.events(last.as_deref()).await.unwrap_or_default());
    }

    fn see(&mut self, view: Result<View, String>) {
        if let Ok(view) = &view {
            self.paces.see(view);
            self.oldest = self.waiting.see(view);
            self.losses.see(view);
        }
        self.view = view;
    }

    fn hear(&mut self, events: Vec<StreamEntry>) {
        self.losses.hear(&events);
        self.events.extend(events);
        let surplus = self.events.len().saturating_sub(EVENTS);
        self.events.drain(..surplus);
    }

    /// Does what a key asks for; it may end the view.
    pub(super) fn press(&mut self, key: Key) -> ControlFlow<()> {
        if key == Key::Interrupt {
            return ControlFlow::Break(());
        }
        if self.typing {
            self.edit(key);
            return ControlFlow::Continue(());
        }
        match key {
            Key::Char('q') => return ControlFlow::Break(()),
            Key::Escape if self.rows.text.is_empty() => return ControlFlow::Break(()),
            Key::Escape => self.rows.text.clear(),
            Key::Char('s') => self.rows.order = self.rows.order.next(),
            Key::Char('f') => self.rows.shown = self.rows.shown.next(),
            Key::Char('/') => self.typing = true,
            Key::Char(_) | Key::Enter | Key::Backspace | Key::Interrupt | Key::Redraw => {}
        }
        ControlFlow::Continue(())
    }

    /// Rows are found while the text is being typed.
    fn edit(&mut self, key: Key) {
        let text = &mut self.rows.text;
        match key {
            Key::Char(c) if text.chars().count() < TYPED => text.push(c),
            Key::Backspace => drop(text.pop()),
            Key::Enter => self.typing = false,
            Key::Escape => {
                text.clear();
                self.typing = false;
            }
            Key::Char(_) | Key::Interrupt | Key::Redraw => {}
        }
    }

    pub(super) fn exit(&self) -> Exit {
        match &self.view {
            Ok(view) if view.ready() > 0 => Exit::Done,
            Ok(_) => Exit::Negative,
            Err(_) => Exit::Unavailable,
        }
    }

    pub(super) fn draw(&self, frame: &mut Frame<'_>) {
        let (head, rows) = match &self.view {
            Ok(view) => (self.head(view, frame.area().width), view.workers.len()),
            Err(why) => (vec![unknown(why)], 1),
        };
        let length = |rows: usize| u16::try_from(rows).unwrap_or(u16::MAX - 1);
        let areas = Layout::vertical([
            Constraint::Length(length(head.len())),
            Constraint::Max(length(rows).saturating_add(1)),
            Constraint::Min(4),
            Constraint::Length(1),
        ]);
        let [top, fleet, events, help] = areas.areas(frame.area());
        frame.render_widget(Paragraph::new(head), top);
        if let Ok(view) = &self.view {
            let workers = self.rows.of(&view.workers, &self.paces);
            frame.render_widget(table(workers, &self.paces, fleet), fleet);
        }
        self.draw_events(frame, events);
        let help_line = Paragraph::new(self.help()).style(Modifier::DIM);
        frame.render_widget(help_line, help);
    }

    fn head(&self, view: &View, width: u16) -> Vec<Line<'static>> {
        let found = at_most(FINDINGS, view, self.oldest, self.losses.list());
        let mut lines = headline(view, &self.paces, self.oldest);
        lines.extend(told(&found, width));
        lines
    }

    fn help(&self) -> String {
        let Rows { order, shown, text } = &self.rows;
        match (self.typing, text.is_empty()) {
            (true, _) => format!("search: {text}_   Enter keeps it, Esc ends it"),
            (false, true) => format!("{HELP}   sorted by {order}, shown: {shown}"),
            (false, false) => format!("{HELP}   by {order}, {shown} with {text}"),
        }
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

fn unknown(why: &str) -> Line<'static> {
    let style = Style::new().fg(Color::Yellow).add_modifier(Modifier::BOLD);
    Line::styled(format!("fleet unknown: {why}"), style)
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
mod tests;
