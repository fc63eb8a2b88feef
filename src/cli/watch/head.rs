//! What is said above the table: the fleet in numbers, and what is wrong with it.

use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;

use crate::cli::status::{names, queue_line};
use crate::fleet::findings::{Finding, Severity, Versions, span};
use crate::fleet::observer::View;
use crate::fleet::pace::Paces;
use crate::fleet::waiting::Oldest;

/// Looks over which devices are found busy or not.
const BUSY_LOOKS: usize = 10;

/// The fleet in numbers.
pub(super) fn headline(view: &View, paces: &Paces, oldest: Option<Oldest>) -> Vec<Line<'static>> {
    let mut text = format!(
        "{} of {} workers ready, {:.1} jobs/s",
        view.ready(),
        view.workers.len(),
        paces.rate()
    );
    if let Some(busy) = paces.busy(view, BUSY_LOOKS) {
        text.push_str(&format!(", busy {:.0}%", busy * 100.0));
    }
    match oldest {
        Some(Oldest::About(ms)) => text.push_str(&format!(", oldest job about {}", span(ms))),
        Some(Oldest::AtLeast(ms)) => {
            text.push_str(&format!(", oldest job at least {}", span(ms)));
        }
        None => {}
    }
    let queue = queue_line(view.queues.as_ref());
    let queue = queue.unwrap_or_else(|| "queue: unknown".to_owned());
    let mut lines = vec![Line::from(text), Line::from(queue)];
    let versions = Versions::of(view);
    if versions.are_several() {
        lines.push(Line::from(format!("versions: {versions}")));
    }
    lines
}

/// What is wrong, one line each.
pub(super) fn told(findings: &[Finding], width: u16) -> Vec<Line<'static>> {
    let line = |finding: &Finding| {
        let text = format!("{}: {}{}", finding.severity, finding.text, names(finding));
        let style = Style::new().fg(colour(finding.severity));
        let style = match finding.severity {
            Severity::Bad => style.add_modifier(Modifier::BOLD),
            Severity::Warn | Severity::Note => style,
        };
        Line::styled(start_of(&text, width.into()), style)
    };
    findings.iter().map(line).collect()
}

/// The colour of what is so bad.
pub(super) fn colour(severity: Severity) -> Color {
    match severity {
        Severity::Bad => Color::Red,
        Severity::Warn => Color::Yellow,
        Severity::Note => Color::Cyan,
    }
}

/// As much of a text as fits; it shows that it was cut.
fn start_of(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let start: String = text.chars().take(width.saturating_sub(2)).collect();
    format!("{start}..")
}
