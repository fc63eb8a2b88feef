//! May a job run? Its record in the store decides: it may be answered already, or have killed workers. A
//! job that other workers have marked waits until it is known whether they are alive.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::crash_marks::{CrashMark, Rule};
use crate::protocol::failure::Failure;
use crate::protocol::result::ResultMessage;
use crate::store::{JobRecord, LOOKUP_TIMEOUT, STORE_TIMEOUT};

/// Whether a job may run.
#[derive(Debug, PartialEq)]
pub(super) enum Admission {
    /// It may. The mark is in Redis, unless the job is a suspect or Redis does not answer.
    Run,
    /// It was answered before; this is the result, without context.
    Answer(Box<ResultMessage>),
    /// Too many workers died of it.
    Reject(Failure),
    /// The worker leaves before it is known whether the job may run.
    Requeue,
}

/// Looks up the job's result and marks the job, in one round trip. Where others have marked it, waits
/// until it is known of each whether it is alive; `leaving` ends the wait. While Redis fails the job
/// runs without a mark. `read` parses a stored result.
pub(super) async fn admit(
    mark: &mut CrashMark,
    read: impl Fn(&str) -> Option<ResultMessage>,
    leaving: &CancellationToken,
) -> Admission {
    let Some(mut record) = mark.look_up(LOOKUP_TIMEOUT).await else {
        return Admission::Run;
    };
    let (mut watch, status) = (mark.watch(), mark.status());
    let mut wait = None;
    loop {
        mark.suspect(&record);
        let open = match decide(&record, mark.rule(), &watch.alive, &read) {
            ControlFlow::Break(admission) => return admission,
            ControlFlow::Continue(open) => open,
        };
        if wait.is_none() {
            let workers = workers(&open);
            tracing::info!(
                job = mark.job(),
                ?workers,
                "a job waits: other workers held it, and may be alive or have died of it"
            );
            wait = Some(status.waits.begin(workers));
        }
        // Deaths that are counted now are in the record that is read next.
        if !mark.count_deaths(&open, &mut watch).await {
            if watch.gives_up(Instant::now()) {
                tracing::warn!(
                    job = mark.job(),
                    "the job runs although it is unknown what became of other workers that held it"
                );
                return Admission::Run;
            }
            tokio::select! {
                () = tokio::time::sleep(mark.poll()) => {}
                () = leaving.cancelled() => return Admission::Requeue,
            }
        }
        if let Some(now) = mark.look_up(STORE_TIMEOUT).await {
            record = now;
        }
    }
}

/// The ids in fields `WORKER_ID/INCARNATION`.
fn workers(fields: &[String]) -> Vec<String> {
    let ids = fields.iter().map(|field| {
        let id = field.rsplit_once('/').map_or(field.as_str(), |(id, _)| id);
        id.to_owned()
    });
    ids.collect()
}

/// Decides by the job's record; continues with the marks of workers that may be alive or dead. A job
/// whose stored result cannot be read runs again.
fn decide(
    record: &JobRecord,
    rule: &Rule,
    alive: &HashSet<String>,
    read: impl Fn(&str) -> Option<ResultMessage>,
) -> ControlFlow<Admission, Vec<String>> {
    if let Some(stored) = &record.stored {
        let answer = read(stored).map(|message| Admission::Answer(Box::new(message)));
        return ControlFlow::Break(answer.unwrap_or(Admission::Run));
    }
    match rule.open_marks(&record.marks, alive) {
        Err(poisoned) => ControlFlow::Break(Admission::Reject(poisoned)),
        Ok(open) if open.is_empty() => ControlFlow::Break(Admission::Run),
        Ok(open) => ControlFlow::Continue(open),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::failure::Code;
    use crate::protocol::job::Kind;
    use crate::protocol::result::{JobRef, ResultOrigin};

    fn result() -> ResultMessage {
        let origin = ResultOrigin {
            model: "m".into(),
            model_version: 7,
            weights_id: "w".into(),
            package_id: "p".into(),
            worker_id: "w2".into(),
            incarnation: "2".into(),
        };
        let job_ref = JobRef {
            submission_id: "s".into(),
            kind: Kind::Score,
            model_version: Some(7),
            context: None,
            attempt: 1,
        };
        let failure = Failure::new(Code::CandidateEmpty, "x");
        ResultMessage::new(&origin, job_ref, Err(failure))
    }

    /// What is decided, in a word, and for whom the job waits. Marks are written `FIELD=VALUE`.
    fn decided(stored: Option<&str>, marks: &str, alive: &str) -> String {
        let rule = Rule {
            own: "me/1".into(),
            poison_after: 2,
        };
        let marks = marks.split_whitespace().filter_map(|m| m.split_once('='));
        let record = JobRecord {
            stored: stored.map(Into::into),
            marks: marks.map(|(f, v)| (f.into(), v.into())).collect(),
        };
        let alive = alive.split_whitespace().map(Into::into).collect();
        let found = result();
        let read = |text: &str| (text == "readable").then(|| found.clone());
        match decide(&record, &rule, &alive, read) {
            ControlFlow::Break(Admission::Run) => "run".into(),
            ControlFlow::Break(Admission::Answer(message)) if *message == found => "answer".into(),
            ControlFlow::Break(Admission::Reject(failure)) => failure.code.as_str().into(),
            ControlFlow::Break(other) => format!("{other:?}"),
            ControlFlow::Continue(open) => format!("wait {}", open.join(" ")),
        }
    }

    #[test]
    fn a_record_answers_a_job_lets_it_run_or_wait_or_rejects_it() {
        // The stored result, the marks, who is known to be alive, and what is decided.
        for (stored, marks, alive, expected) in [
            (None, "", "", "run"),
            (Some("readable"), "", "", "answer"),
            (Some("not readable"), "", "", "run"),
            // A result counts, whatever marks stand beside it.
            (Some("readable"), "w/1=dead:5 w/2=dead:6", "", "answer"),
            (None, "me/1=5", "", "run"),
            (None, "w/1=5", "", "wait w/1"),
            (None, "w/1=5", "w/1", "run"),
            (None, "w/1=5 w/2=6", "w/2", "wait w/1"),
            (None, "w/1=dead:5", "", "run"),
            (None, "w/1=dead:5 w/2=6", "", "wait w/2"),
            (None, "w/1=dead:5 w/2=6", "w/2", "run"),
            (None, "w/1=dead:5 w/2=dead:6", "", "poisoned"),
            (None, "w/1=dead:5 w/2=dead:6 v/3=9", "v/3", "poisoned"),
            // We are alive, whoever counted us.
            (None, "me/1=dead:5 w/1=dead:6", "", "run"),
            // This worker before it was started again is another incarnation.
            (None, "me/0=dead:5 w/1=dead:6", "", "poisoned"),
        ] {
            let decided = decided(stored, marks, alive);
            assert_eq!(decided, expected, "{stored:?}, {marks:?}, alive: {alive:?}");
        }
    }
}
