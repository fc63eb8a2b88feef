//! The heartbeat: a worker's record, its entry in the index of live workers, and its events.

use std::time::Duration;

use super::{CALL_TIMEOUT, Store, StoreError, own_name};
use crate::util::clock::millis;

/// What one heartbeat carries.
#[derive(Debug)]
pub struct Beat<'a> {
    /// The worker's name.
    pub worker_id: &'a str,
    /// The id of this start of the worker.
    pub incarnation: &'a str,
    /// The record, JSON.
    pub record: &'a str,
    /// When the record expires.
    pub ttl: Duration,
    /// Events to append, each as field-value pairs.
    pub events: &'a [Vec<(&'a str, String)>],
    /// Whether the worker is leaving the index.
    pub leaving: bool,
    /// An incarnation known to be dead, whose record may be taken over at once.
    pub dead: Option<&'a str>,
}

/// Who holds the worker's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ownership {
    /// This incarnation.
    Ours,
    /// Another incarnation, whose record has not expired.
    Theirs {
        /// Its id.
        incarnation: String,
        /// Its process.
        pid: u32,
        /// The boot and the PID namespace of that number, as a digest, if its record has it.
        pid_space: Option<String>,
    },
}

/// `incarnation`, `pid` and `pid_space` of the record that holds a name; the first is empty if it is ours.
type Holder = (String, u32, String);

impl Store {
    /// Writes one heartbeat.
    ///
    /// # Errors
    /// When Redis does not take it in time.
    pub async fn beat(&self, beat: &Beat<'_>) -> Result<Ownership, StoreError> {
        let own_name = own_name(beat.worker_id, beat.incarnation);
        let mut call = self.scripts.beat.key(self.keys.worker(beat.worker_id));
        call.key(self.keys.worker(&own_name))
            .key(self.keys.workers())
            .key(self.keys.events());
        call.arg(beat.incarnation).arg(beat.record);
        call.arg(millis(beat.ttl));
        call.arg(beat.worker_id)
            .arg(&own_name)
            .arg(beat.dead.unwrap_or("-"))
            .arg(u8::from(beat.leaving));
        for event in beat.events {
            call.arg(event.len() * 2);
            for (field, value) in event {
                call.arg(field).arg(value);
            }
        }
        let beaten = self.connection.call(
            CALL_TIMEOUT,
            self.keys.slot(),
            |mut connection| async move { call.invoke_async::<Holder>(&mut connection).await },
        );
        match beaten.await {
            Ok((incarnation, _, _)) if incarnation.is_empty() => Ok(Ownership::Ours),
            Ok((incarnation, pid, pid_space)) => Ok(Ownership::Theirs {
                incarnation,
                pid,
                pid_space: Some(pid_space).filter(|space| !space.is_empty()),
            }),
            Err(error) => Err(StoreError(format!("{}: {error}", self.connection.place()))),
        }
    }
}
