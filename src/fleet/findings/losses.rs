//! Workers that vanished without a goodbye.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::fleet::observer::View;
use crate::protocol::state::State;
use crate::store::StreamEntry;

/// After this a lost worker is forgotten.
const FORGOTTEN_MS: u64 = 600_000;
const MOST: usize = 20;
/// What another worker says of it.
const LOST: &str = "lost";

/// A worker whose record ran out although it had not stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Lost {
    /// Its name, as it was written: any text.
    pub id: String,
    /// When it was first missed, by Redis' clock.
    pub at_ms: u64,
    /// Its last state; empty where only others tell of it.
    pub state: String,
}

/// Finds them from one look to the next.
#[derive(Debug, Default)]
pub struct Losses {
    /// The state of each worker at the last look.
    seen: BTreeMap<String, String>,
    lost: Vec<Lost>,
    /// When the last look was, by Redis' clock.
    at_ms: u64,
}

impl Losses {
    /// Takes a look.
    pub fn see(&mut self, view: &View) {
        let workers = view.workers.iter().map(|worker| &worker.record);
        let now: BTreeMap<String, String> = workers
            .map(|record| (record.worker_id.clone(), record.state.clone()))
            .collect();
        for (id, state) in std::mem::take(&mut self.seen) {
            if !now.contains_key(&id) && !is_goodbye(&state) {
                let at_ms = view.at_ms;
                self.lost.push(Lost { id, at_ms, state });
            }
        }
        let recent = |lost: &Lost| view.at_ms.saturating_sub(lost.at_ms) < FORGOTTEN_MS;
        self.lost
            .retain(|lost| recent(lost) && !now.contains_key(&lost.id));
        let surplus = self.lost.len().saturating_sub(MOST);
        self.lost.drain(..surplus);
        self.seen = now;
        self.at_ms = view.at_ms;
    }

    /// Reads what workers said since that look: who said goodbye is not lost. A worker that drains within a look is never
    /// seen to do so. And what they said of others: who was lost before the first look was never seen.
    pub fn hear(&mut self, events: &[StreamEntry]) {
        for event in events {
            let field = |name: &str| event.fields.get(name).map_or("", String::as_str);
            if is_goodbye(field("to")) {
                let id = field("worker_id");
                self.lost.retain(|lost| lost.id != id);
                self.seen.remove(id);
            }
            if field("to") == LOST {
                self.hear_of_loss(field("worker_id"), field("at").parse().unwrap_or(0));
            }
        }
    }

    fn hear_of_loss(&mut self, id: &str, at_ms: u64) {
        let known = self.seen.contains_key(id) || self.lost.iter().any(|lost| lost.id == id);
        let recent = self.at_ms.saturating_sub(at_ms) < FORGOTTEN_MS;
        if known || !recent || self.lost.len() >= MOST {
            return;
        }
        self.lost.push(Lost {
            id: id.to_owned(),
            at_ms,
            state: String::new(),
        });
    }

    /// The last 20 of the last ten minutes that have not come back, oldest first.
    pub fn list(&self) -> &[Lost] {
        &self.lost
    }
}

fn is_goodbye(state: &str) -> bool {
    let goodbyes = [State::Draining, State::Stopped];
    goodbyes.iter().any(|goodbye| goodbye.as_str() == state)
}
