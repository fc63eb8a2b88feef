//! What a check found on one part: a line for people, an object for programs.

use console::style;
use serde::Serialize;

use super::output::plain;

/// Columns before what was found: the verdict and the part.
const INDENT: usize = 21;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    /// A worker needs nothing more.
    Ok,
    /// A worker starts and waits for it, or serves although somebody should look at it.
    Warn,
    /// No worker becomes ready.
    Fail,
    /// Not checked, because something before it failed.
    Skip,
}

/// The finding on one part.
#[derive(Debug, Serialize)]
pub(super) struct Finding {
    part: String,
    pub(super) verdict: Verdict,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) advice: Option<String>,
}

impl Finding {
    pub(super) fn ok(part: &str, found: String) -> Self {
        Self::new(part, Verdict::Ok, found, None)
    }

    pub(super) fn new(part: &str, verdict: Verdict, found: String, advice: Option<String>) -> Self {
        Self {
            part: part.to_owned(),
            verdict,
            found: plain(&found),
            advice,
        }
    }

    pub(super) fn line(&self) -> String {
        let word = match self.verdict {
            Verdict::Ok => style("ok  ").green(),
            Verdict::Warn => style("warn").yellow(),
            Verdict::Fail => style("FAIL").red(),
            Verdict::Skip => style("-   ").dim(),
        };
        let advice = self.advice.as_ref();
        let advice = advice.map(|advice| format!("\n{:INDENT$}-> {advice}", ""));
        let (part, found) = (&self.part, &self.found);
        format!("{word}  {part:<15}{found}{}", advice.unwrap_or_default())
    }
}
