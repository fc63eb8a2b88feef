//! The keys of the view.

use std::time::Duration;

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use tokio::sync::mpsc;

/// What a key asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Key {
    Quit,
    Sort,
    Filter,
    Redraw,
}

/// The keys as they are pressed. Reading them blocks, so it has a thread of its own.
pub(super) fn keys() -> mpsc::Receiver<Key> {
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
