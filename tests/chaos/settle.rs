//! Waits for what is still to come after the faults of a round, and finds what never will.

use std::time::{Duration, Instant};

use testkit::wait::secs;

use crate::client::Client;
use crate::plan::DELAYS;
use crate::strike::Site;

/// Nothing waits anywhere for so long: nothing more will come. Longer than a beat, so that what
/// workers say of the jobs they hold is news.
const STILL: Duration = secs(3);
/// A ladder, waits for news of the dead, a killer that begins again after Redis forgot its deaths, and dead
/// letters that RabbitMQ sends again.
const PATIENCE: Duration = secs(120);
/// The broker is well, and takes what is submitted again.
const CONFIRM: Duration = secs(20);
const POLL: Duration = Duration::from_millis(100);

/// What came of it.
#[derive(Debug, Default)]
pub(crate) struct Settled {
    pub(crate) violations: Vec<String>,
    /// Lost with a queue that was deleted, and submitted again.
    pub(crate) resubmitted: usize,
    pub(crate) lost: usize,
}

/// Returns when every job is answered, parked, or known to be lost.
pub(crate) fn settle(site: &Site) -> Settled {
    let mut client = site.client();
    let mut settled = Settled::default();
    let began = Instant::now();
    let mut still_since: Option<Instant> = None;
    loop {
        let open = site.ledger.open();
        if open.is_empty() {
            return settled;
        }
        if began.elapsed() > PATIENCE {
            let what = format!("neither answered nor lost after {PATIENCE:?}: {open:?}");
            settled.violations.push(what);
            give_up(site, &open, &mut settled);
            return settled;
        }
        if !nothing_waits(site, &mut client) {
            still_since = None;
        } else if still_since.get_or_insert_with(Instant::now).elapsed() > STILL {
            if site.broker.holds_nothing(&site.stack.jobs_queue()) {
                // Read again: the last one may have been answered while we looked.
                submit_again(site, &mut client, &mut settled);
            }
            still_since = None;
        }
        std::thread::sleep(POLL);
    }
}

fn nothing_waits(site: &Site, client: &mut Client) -> bool {
    let jobs = site.stack.jobs_queue();
    let ladder = DELAYS.iter().map(|delay| format!("{jobs}.retry.{delay}"));
    let mut queues = std::iter::once(jobs.clone()).chain(ladder);
    let waiting = |depth| matches!(depth, Ok(None | Some((0, _))));
    queues.all(|queue| waiting(client.depth(&queue))) && site.fleet.held() == Some(0)
}

/// As an aggregator does that has waited long enough. Only what may have been in a deleted queue may
/// be missing.
fn submit_again(site: &Site, client: &mut Client, settled: &mut Settled) {
    let open = site.ledger.open();
    let (again, lost): (Vec<String>, Vec<String>) = open.into_iter().partition(|id| {
        let entries = site.ledger.entries();
        entries.get(id).is_some_and(|e| e.exposed && !e.resubmitted)
    });
    if !lost.is_empty() {
        settled.violations.push(format!("lost: {lost:?}"));
        give_up(site, &lost, settled);
    }
    for id in again {
        let body = {
            let mut entries = site.ledger.entries();
            let entry = entries.get_mut(&id).expect("an entry");
            entry.resubmitted = true;
            entry.body.clone()
        };
        if !client.submit(&id, &body, CONFIRM) {
            return settled
                .violations
                .push(format!("the broker did not take {id} again"));
        }
        settled.resubmitted += 1;
    }
}

fn give_up(site: &Site, ids: &[String], settled: &mut Settled) {
    settled.lost += ids.len();
    let mut entries = site.ledger.entries();
    for id in ids {
        if let Some(entry) = entries.get_mut(id) {
            entry.lost = true;
        }
    }
}
