//! What workers say themselves in their logs: when they were ready, and when each job came.
//!
//! That no job came to a worker that was not ready is judged by the log of one process alone. Its
//! clock is the same for all lines. `ready` is logged after the broker has confirmed the consumer,
//! and the next state once the consumer is cancelled. `job answered` is logged when the job's time is
//! taken, `duration_ms` counts from its delivery to that moment: the difference is when it came. It
//! covers every answered job of every kind, also while Redis or the broker are away; jobs that were
//! handed back say nothing, and come again.

use serde_json::Value;

/// A job's task may begin this late after its delivery on a busy machine.
const SLACK_US: u64 = 200_000;
/// For so long after a failure Redis is not asked.
const BREAKER_US: u64 = 1_500_000;

/// The sum of what was heard.
#[derive(Debug, Clone, Default)]
pub(crate) struct Testimony {
    /// Jobs answered.
    pub(crate) answered: usize,
    /// What came while the worker was not ready.
    pub(crate) unready: Vec<String>,
}

impl Testimony {
    /// Hears the log of one process.
    pub(crate) fn hear(&mut self, worker: &str, log: &str) {
        let mut ready: Vec<(u64, u64)> = Vec::new();
        let mut is_ready = false;
        for line in log.lines().filter_map(Line::parse) {
            match line.message() {
                "state changed" => {
                    if let Some(last) = ready.last_mut().filter(|_| is_ready) {
                        last.1 = line.at_us + SLACK_US;
                    }
                    is_ready = line.fields["to"] == "ready";
                    if is_ready {
                        ready.push((line.at_us, u64::MAX));
                    }
                }
                "job answered" => {
                    self.answered += 1;
                    let came = line.at_us - line.duration_us();
                    if !ready.iter().any(|(from, to)| (*from..=*to).contains(&came)) {
                        let (job, log) = (&line.fields["submission_id"], &line.fields["timestamp"]);
                        self.unready.push(format!(
                            "{worker} took {job} while it was not ready; answered at {log}"
                        ));
                    }
                }
                _ => {}
            }
        }
    }
}

/// Whether the worker may have computed a job without its mark, or unaware of others': Redis did not
/// answer it in time shortly before the job began or later.
pub(crate) fn excused(log: &str, started_ms: u64) -> bool {
    let since = (started_ms * 1000).saturating_sub(BREAKER_US);
    let mut lines = log.lines().filter_map(Line::parse);
    lines.any(|line| {
        line.at_us >= since
            && line.message() == "stored results and crash marks are left alone for a moment"
    })
}

struct Line {
    at_us: u64,
    fields: Value,
}

impl Line {
    fn parse(line: &str) -> Option<Self> {
        let fields: Value = serde_json::from_str(line.strip_prefix("err| ")?).ok()?;
        let at_us = micros(fields["timestamp"].as_str()?)?;
        Some(Self { at_us, fields })
    }

    fn message(&self) -> &str {
        self.fields["message"].as_str().unwrap_or_default()
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a duration of some seconds"
    )]
    fn duration_us(&self) -> u64 {
        (self.fields["duration_ms"].as_f64().unwrap_or_default() * 1e3) as u64
    }
}

/// Unix microseconds of `2026-01-31T12:00:00.123456Z`.
fn micros(timestamp: &str) -> Option<u64> {
    let (date, time) = timestamp.strip_suffix('Z')?.split_once('T')?;
    let mut date = date.split('-').map(|part| part.parse::<u64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let (time, fraction) = time.split_once('.')?;
    let mut time = time.split(':').map(|part| part.parse::<u64>().ok());
    let (hour, minute, second) = (time.next()??, time.next()??, time.next()??);
    // Years begin in March here, so that the leap day is their last.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days =
        365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 719_469;
    let seconds = ((days * 24 + hour) * 60 + minute) * 60 + second;
    Some(seconds * 1_000_000 + format!("{fraction:0<6}").parse::<u64>().ok()?)
}

#[test]
fn a_timestamp_is_read_to_the_microsecond() {
    assert_eq!(micros("1970-01-01T00:00:00.000001Z"), Some(1));
    assert_eq!(
        micros("2026-11-25T23:16:22.5Z"),
        Some(1_795_648_582_500_000)
    );
    assert_eq!(
        micros("2024-02-29T00:00:00.000000Z"),
        Some(1_709_164_800_000_000)
    );
}
