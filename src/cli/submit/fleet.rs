//! What there is to say of the fleet that jobs are submitted to: what it serves, and why nobody takes them.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::Duration;

use indicatif::ProgressBar;

use crate::cli::{complain, plain};
use crate::config::Config;
use crate::protocol::heartbeat::Record;
use crate::store::{FleetStore, StoreError};

/// Results of a fleet that is well are there by then.
const EVERY: Duration = Duration::from_secs(3);
/// States, or versions, that are named.
const NAMED: usize = 4;
/// Characters of a word from a record.
const LONGEST: usize = 40;

/// The workers of one model.
pub(super) struct Fleet<'a> {
    config: &'a Config,
    model: &'a str,
    store: FleetStore,
    /// What was said last.
    pub(super) said: Option<String>,
}

impl<'a> Fleet<'a> {
    pub(super) fn new(config: &'a Config, model: &'a str) -> Self {
        Self {
            config,
            model,
            store: FleetStore::new(&config.redis),
            said: None,
        }
    }

    async fn records(&self) -> Result<Vec<Record>, StoreError> {
        let ttl = self.config.heartbeat.ttl;
        let (_, live) = self.store.live_records(Some(self.model), ttl).await?;
        Ok(live.iter().filter_map(|l| Record::read(&l.text)).collect())
    }

    /// Says so if no worker that takes jobs serves this version, or none the model. A fleet that cannot be asked says
    /// nothing.
    pub(super) async fn describe(&self, version: Option<u64>) {
        let Ok(records) = self.records().await else {
            return;
        };
        let note = if records.is_empty() {
            // Only operators may look for other models.
            let ttl = self.config.heartbeat.ttl;
            let all = self.store.live_records(None, ttl).await;
            let (_, others) = all.unwrap_or_default();
            let others = others.iter().filter_map(|l| Record::read(&l.text));
            other_models(&others.collect::<Vec<_>>(), self.model)
        } else {
            version.and_then(|version| other_version(&records, version))
        };
        if let Some(note) = note {
            complain(&format!("note: {note}"));
        }
    }

    /// Says what the jobs wait for, and says it again when that changes.
    pub(super) async fn tell(&mut self, bar: &ProgressBar) -> Infallible {
        loop {
            tokio::time::sleep(EVERY).await;
            let why = match self.records().await {
                Ok(records) => nobody(&records),
                Err(error) => Some(format!("whether a worker is ready is unknown: {error}")),
            };
            if let Some(why) = why.as_ref().filter(|_| why != self.said) {
                bar.suspend(|| complain(&format!("waiting: {}", plain(why))));
            }
            self.said = why;
        }
    }
}

/// Why nobody takes jobs; none if somebody does.
fn nobody(records: &[Record]) -> Option<String> {
    if records.iter().any(|record| record.ready) {
        return None;
    }
    if records.is_empty() {
        return Some("no worker is alive".into());
    }
    let state = |record: &Record| match record.state_detail.is_empty() {
        true => short(&record.state),
        false => format!("{} ({})", short(&record.state), short(&record.state_detail)),
    };
    let states = counted(records.iter().map(state));
    Some(format!("no worker is ready: {states}"))
}

/// Which models have workers, if this one has none: it may be mistyped.
fn other_models(others: &[Record], model: &str) -> Option<String> {
    if others.is_empty() {
        return None;
    }
    let served = counted(
        others
            .iter()
            .map(|record| format!("for {}", short(&record.model.name))),
    );
    Some(format!(
        "the jobs wait for a worker of the model {model}, and there is none: {served}"
    ))
}

/// What the workers that take jobs serve, if none of them serves this version.
fn other_version(records: &[Record], version: u64) -> Option<String> {
    let ready = records.iter().filter(|record| record.ready);
    let served: Vec<u64> = ready.filter_map(|record| record.model.version).collect();
    if served.is_empty() || served.contains(&version) {
        return None;
    }
    let served = counted(served.iter().map(|version| format!("on version {version}")));
    Some(format!(
        "the jobs are for version {version}, which no ready worker serves: {served}; --model-version says for which they are"
    ))
}

/// What occurs how often, in the order of its words.
fn counted(words: impl Iterator<Item = String>) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for word in words {
        *counts.entry(word).or_default() += 1;
    }
    let named = counts.iter().take(NAMED);
    let named: Vec<String> = named
        .map(|(word, count)| format!("{count} {word}"))
        .collect();
    let more = if counts.len() > NAMED { ", ..." } else { "" };
    named.join(", ") + more
}

fn short(word: &str) -> String {
    word.chars().take(LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn worker(ready: bool, state: &str, detail: &str, version: u64) -> Record {
        let record = json!({"worker_id": "w", "ready": ready, "state": state, "state_detail": detail,
            "model": {"name": "m", "version": version}});
        Record::read(&record.to_string()).unwrap()
    }

    #[test]
    fn it_is_told_why_nobody_takes_jobs() {
        let paused = || worker(false, "degraded", "paused", 1);
        let warming = || worker(false, "warming", "", 1);
        let ready = || worker(true, "ready", "", 1);
        for (records, why) in [
            (vec![], Some("no worker is alive")),
            (vec![ready(), paused()], None),
            (
                vec![paused()],
                Some("no worker is ready: 1 degraded (paused)"),
            ),
            (
                vec![paused(), warming(), paused()],
                Some("no worker is ready: 2 degraded (paused), 1 warming"),
            ),
        ] {
            assert_eq!(nobody(&records).as_deref(), why);
        }
        let strange = (0..9).map(|n| worker(false, &n.to_string().repeat(999), "", 1));
        let why = nobody(&strange.collect::<Vec<_>>()).unwrap_or_default();
        assert!(why.len() < 300 && why.ends_with(", ..."), "{why}");
    }

    #[test]
    fn it_is_told_that_no_ready_worker_serves_the_version() {
        let on = |version| worker(true, "ready", "", version);
        for (records, differs) in [
            (vec![], None),
            (vec![worker(false, "warming", "", 3)], None),
            (vec![on(1), on(3)], None),
            (
                vec![on(3), on(2), on(3)],
                Some(": 1 on version 2, 2 on version 3; "),
            ),
        ] {
            let note = other_version(&records, 1);
            assert_eq!(note.is_some(), differs.is_some(), "{note:?}");
            let note = note.unwrap_or_default();
            assert!(note.contains(differs.unwrap_or_default()), "{note}");
        }
    }

    #[test]
    fn who_misspells_a_model_hears_of_those_that_there_are() {
        let of = |model: &str| Record::read(&json!({"model": {"name": model}}).to_string());
        let others: Vec<Record> = [of("mine"), of("mine"), of("digits")]
            .into_iter()
            .flatten()
            .collect();
        let note = other_models(&others, "mien").unwrap_or_default();
        assert!(
            note.ends_with("there is none: 1 for digits, 2 for mine"),
            "{note}"
        );
        assert_eq!(other_models(&[], "mine"), None);
    }
}
