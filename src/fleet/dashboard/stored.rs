//! What Redis has of a job: its stored result, and the workers that compute it. "Unknown" where nothing
//! says, never "no".

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::value::RawValue;

use super::text::{NAME, cut};
use crate::store::{DEAD, FleetStore, StoreError};

/// What Redis has of a job.
#[derive(Debug, Serialize)]
pub(super) struct StoredJob {
    stored: Stored,
    running: Running,
}

/// The result that a redelivery is answered with.
#[derive(Debug, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
enum Stored {
    Found { result: Box<RawValue> },
    Absent,
    Unknown { why: String },
}

/// The marks of workers that compute the job, or died of it.
#[derive(Debug, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
enum Running {
    Found { marks: Vec<Mark> },
    Absent,
    Unknown { why: String },
}

#[derive(Debug, PartialEq, Serialize)]
struct Mark {
    worker: String,
    incarnation: String,
    /// The worker was counted as dead.
    dead: bool,
    /// None: nothing says.
    started_ms: Option<u64>,
    /// The member of a merge that is, or was at the end, worked on by itself.
    member: Option<String>,
}

/// Whom to ask for what.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) model: Option<String>,
    pub(super) submission_id: String,
    /// Of the last result that has one.
    pub(super) key: Option<String>,
    /// Versions that the job may be for.
    pub(super) versions: BTreeSet<u64>,
}

impl StoredJob {
    pub(super) fn unknown(why: &str) -> Self {
        let why = || why.to_owned();
        Self {
            stored: Stored::Unknown { why: why() },
            running: Running::Unknown { why: why() },
        }
    }

    pub(super) async fn ask(store: &FleetStore, question: &Question) -> Self {
        let Some(model) = &question.model else {
            return Self::unknown("no model is known yet");
        };
        Self {
            stored: stored(store, model, question.key.as_deref()).await,
            running: running(store, model, question).await,
        }
    }
}

/// Results are stored under a digest of all that a job asks, so only one whose result was seen is found.
async fn stored(store: &FleetStore, model: &str, key: Option<&str>) -> Stored {
    let Some(key) = key else {
        let why = "no result with a key was seen, and the key is what it is stored under";
        return Stored::Unknown { why: why.into() };
    };
    match store.stored_result(model, key).await {
        Ok(Some(text)) => match RawValue::from_string(text) {
            Ok(result) => Stored::Found { result },
            Err(error) => Stored::Unknown {
                why: format!("what is stored is not JSON: {error}"),
            },
        },
        Ok(None) => Stored::Absent,
        Err(error) => Stored::Unknown {
            why: error.to_string(),
        },
    }
}

async fn running(store: &FleetStore, model: &str, question: &Question) -> Running {
    if question.versions.is_empty() {
        let why = "no version of the model is known yet".into();
        return Running::Unknown { why };
    }
    match marks(store, model, question).await {
        Ok(marks) if marks.is_empty() => Running::Absent,
        Ok(marks) => Running::Found { marks },
        Err(error) => Running::Unknown {
            why: error.to_string(),
        },
    }
}

async fn marks(
    store: &FleetStore,
    model: &str,
    question: &Question,
) -> Result<Vec<Mark>, StoreError> {
    let mut marks = Vec::new();
    for version in &question.versions {
        let job = format!("{}:{version}", question.submission_id);
        let found = store.crash_marks(model, &job).await?;
        marks.extend(found.iter().map(|(field, value)| Mark::of(field, value)));
    }
    Ok(marks)
}

impl Mark {
    /// Of a field `WORKER_ID/INCARNATION` and its value, `STARTED_MS` or `STARTED_MS MEMBER_ID`, with `dead:` before it
    /// once the worker was counted as dead.
    fn of(field: &str, value: &str) -> Self {
        let (worker, incarnation) = field.rsplit_once('/').unwrap_or((field, ""));
        let counted = value.strip_prefix(DEAD);
        let rest = counted.unwrap_or(value);
        let (started, member) = rest.split_once(' ').unwrap_or((rest, ""));
        Self {
            worker: cut(worker, NAME).to_owned(),
            incarnation: cut(incarnation, NAME).to_owned(),
            dead: counted.is_some(),
            started_ms: started.parse().ok(),
            member: (!member.is_empty()).then(|| cut(member, NAME).to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_says_who_computes_since_when_or_died_and_at_which_member() {
        let mark =
            |(worker, incarnation): (&str, &str), dead, started_ms, member: Option<&str>| Mark {
                worker: worker.into(),
                incarnation: incarnation.into(),
                dead,
                started_ms,
                member: member.map(str::to_owned),
            };
        for (field, value, expected) in [
            ("w1/i1", "5", mark(("w1", "i1"), false, Some(5), None)),
            ("w/1/i1", "dead:5", mark(("w/1", "i1"), true, Some(5), None)),
            (
                "w1/i1",
                "5 m3",
                mark(("w1", "i1"), false, Some(5), Some("m3")),
            ),
            (
                "w1/i1",
                "dead:5 m3",
                mark(("w1", "i1"), true, Some(5), Some("m3")),
            ),
            (
                "w1/i1",
                "5 <b> 7",
                mark(("w1", "i1"), false, Some(5), Some("<b> 7")),
            ),
            ("w1/i1", "5 ", mark(("w1", "i1"), false, Some(5), None)),
            ("odd", "", mark(("odd", ""), false, None, None)),
            ("odd", "dead:", mark(("odd", ""), true, None, None)),
        ] {
            assert_eq!(Mark::of(field, value), expected, "{field} {value}");
        }
        let long = Mark::of(&"w".repeat(10_000), &format!("5 {}", "é".repeat(10_000)));
        assert!(long.worker.len() <= NAME && long.member.unwrap().len() <= NAME);
    }
}
