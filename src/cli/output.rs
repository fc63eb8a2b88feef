//! What a command prints: the answer on standard output, errors on standard error.

use super::exit::{Exit, Fault, Outcome};

/// Prints an error or a note on standard error, if anybody can read it. It may quote what strangers wrote.
pub(super) fn complain(message: &str) {
    use std::io::Write;
    let lines: Vec<String> = message.lines().map(plain).collect();
    drop(writeln!(std::io::stderr(), "scorer: {}", lines.join("\n")));
}

/// Prints an answer. A reader that has gone (`| head`) is not an error.
pub(super) fn answer(text: &str) -> Outcome {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    match out
        .write_all(text.as_bytes())
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush())
    {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Fault::internal(error)),
        Ok(()) | Err(_) => Ok(Exit::Done),
    }
}

/// Untrusted text for a terminal, with control characters escaped.
pub(super) fn plain(text: &str) -> String {
    let shown = |c: char| match c.is_control() {
        true => c.escape_default().to_string(),
        false => c.to_string(),
    };
    text.chars().map(shown).collect()
}

pub(super) fn answer_json(value: &impl serde::Serialize) -> Outcome {
    answer(&serde_json::to_string_pretty(value).map_err(Fault::internal)?)
}

/// Whether the user does not want colours: <https://no-color.org>.
pub(super) fn colourless() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_obeys_no_stranger() {
        let shown = plain("a\u{1b}]52;c;x\u{7}\nü");
        assert_eq!(shown, "a\\u{1b}]52;c;x\\u{7}\\nü");
    }
}
