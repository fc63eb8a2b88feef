//! The keys of the view.

use std::time::Duration;

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use tokio::sync::mpsc;

/// A key that the view knows; what it does depends on whether a text is being typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key {
    Char(char),
    Enter,
    Escape,
    Backspace,
    /// Control and C, which ends the view whatever it does.
    Interrupt,
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
            KeyCode::Char(c) if key.modifiers.contains(KeyModifiers::CONTROL) => {
                (c == 'c').then_some(Key::Interrupt)
            }
            KeyCode::Char(c) => Some(Key::Char(c)),
            KeyCode::Enter => Some(Key::Enter),
            KeyCode::Esc => Some(Key::Escape),
            KeyCode::Backspace => Some(Key::Backspace),
            _ => None,
        },
        Event::Resize(_, _) => Some(Key::Redraw),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::crossterm::event::KeyEvent;

    #[test]
    fn keys_are_told_apart() {
        let pressed = |code: KeyCode| key(&Event::Key(code.into()));
        assert_eq!(pressed(KeyCode::Char('s')), Some(Key::Char('s')));
        assert_eq!(pressed(KeyCode::Esc), Some(Key::Escape));
        assert_eq!(pressed(KeyCode::Enter), Some(Key::Enter));
        assert_eq!(pressed(KeyCode::Backspace), Some(Key::Backspace));
        assert_eq!(pressed(KeyCode::F(1)), None);
        assert_eq!(key(&Event::Resize(80, 24)), Some(Key::Redraw));
        let control = |c| Event::Key(KeyEvent::new(KeyCode::Char(c), KeyModifiers::CONTROL));
        assert_eq!(key(&control('c')), Some(Key::Interrupt));
        assert_eq!(key(&control('s')), None);
    }
}
