//! What the queues say.

use super::{Finding, Seen, Severity, brief, many, span};
use crate::fleet::observer::{Queues, View};
use crate::fleet::waiting::Oldest;

/// A job that has waited for so long is late.
const LATE_MS: u64 = 60_000;
const VERY_LATE_MS: u64 = 600_000;

pub(super) fn unknown(seen: Seen<'_>) -> Vec<Finding> {
    let why = match &seen.view.queues {
        Some(Ok(_)) => return Vec::new(),
        Some(Err(why)) => brief(why),
        None if seen.view.workers.is_empty() => return Vec::new(),
        None => "there are several models, set model.name".to_owned(),
    };
    let text = format!("how many jobs wait is unknown: {why}");
    vec![Finding::overall(Severity::Warn, text, 0)]
}

pub(super) fn waiting(seen: Seen<'_>) -> Vec<Finding> {
    let Some(queues) = known(seen.view) else {
        return Vec::new();
    };
    let (jobs, takers) = (count(queues.jobs), seen.view.ready());
    let mut found = Vec::new();
    if jobs > 0 && queues.consumers == 0 {
        let waits = many(jobs, "job waits", "jobs wait");
        let text = format!("{waits} and the queue has no consumer");
        found.push(Finding::overall(Severity::Bad, text, jobs));
    }
    if let Some(oldest) = seen.oldest
        && oldest.millis() > late_ms(seen.view)
    {
        let severity = match oldest.millis() > VERY_LATE_MS || takers == 0 {
            true => Severity::Bad,
            false => Severity::Warn,
        };
        let age = match oldest {
            Oldest::About(ms) => format!("about {}", span(ms)),
            Oldest::AtLeast(ms) => format!("at least {}", span(ms)),
        };
        let waits = many(jobs, "job has waited", "waiting jobs has waited");
        let idle = match (seen.view.workers.len(), seen.view.workers.len() - takers) {
            (_, 0) => String::new(),
            (alive, idle) => format!("; {idle} of {alive} workers take no jobs"),
        };
        let text = match jobs {
            1 => format!("{waits} for {age}{idle}"),
            _ => format!("the oldest of {waits} for {age}{idle}"),
        };
        found.push(Finding::overall(severity, text, jobs));
    }
    found
}

/// Where a job itself takes long, so may its wait.
fn late_ms(view: &View) -> u64 {
    let workers = view.workers.iter().map(|worker| &worker.record);
    let ready = workers.filter(|record| record.ready);
    let mut slow: Vec<f64> = ready.filter_map(|record| record.jobs.p95_ms).collect();
    slow.sort_by(f64::total_cmp);
    let median = slow.get(slow.len() / 2).copied().unwrap_or_default();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "bounded on the next line"
    )]
    let median = median as u64;
    median.clamp(LATE_MS, VERY_LATE_MS)
}

pub(super) fn dead(seen: Seen<'_>) -> Vec<Finding> {
    let dead = known(seen.view).map_or(0, |queues| count(queues.dead));
    let are = many(dead, "job is", "jobs are");
    let text = format!("{are} dead-lettered: see scorer dead list");
    let found = (dead > 0).then(|| Finding::overall(Severity::Warn, text, dead));
    found.into_iter().collect()
}

pub(super) fn retry(seen: Seen<'_>) -> Vec<Finding> {
    let retry = known(seen.view).map_or(0, |queues| count(queues.retry));
    let text = format!("{} to be retried", many(retry, "job waits", "jobs wait"));
    let found = (retry > 0).then(|| Finding::overall(Severity::Note, text, retry));
    found.into_iter().collect()
}

fn known(view: &View) -> Option<Queues> {
    view.queues.as_ref()?.as_ref().ok().copied()
}

fn count(jobs: u32) -> usize {
    usize::try_from(jobs).unwrap_or(usize::MAX)
}
