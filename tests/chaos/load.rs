//! The aggregator: keeps submitting jobs of several kinds, each until the broker has confirmed it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::Rng as _;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use testkit::digest::digest;
use testkit::encoding::Encoding;
use testkit::hazard::{hazard_candidate, hazard_job};
use testkit::http::{Route, Server};
use testkit::wait::secs;

use crate::client::Client;
use crate::ledger::{Kind, Ledger};
use crate::plan::rng;

/// A broker that is away comes back within this.
const PATIENCE: Duration = secs(120);

/// The jobs of one round.
pub(crate) struct Load<'a> {
    ledger: &'a Ledger,
    server: &'a Server,
    client: Client,
    rng: StdRng,
    round: u64,
    /// Candidates that cannot be fetched until then.
    withheld: Vec<(Instant, String, Vec<u8>)>,
}

impl<'a> Load<'a> {
    pub(crate) fn new(
        ledger: &'a Ledger,
        server: &'a Server,
        client: Client,
        seed: u64,
        round: u64,
    ) -> Self {
        Self {
            ledger,
            server,
            client,
            rng: rng(seed, "jobs", round),
            round,
            withheld: Vec::new(),
        }
    }

    /// Submits until it is told to stop; what the broker has not taken.
    pub(crate) fn run(&mut self, stop: &AtomicBool) -> Vec<String> {
        let mut refused = Vec::new();
        for number in 0.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let id = format!("r{}-{number}", self.round);
            let (kind, job) = self.draw(&id);
            let body = Encoding::MessagePack.encode(&job);
            self.ledger.intend(&id, kind, self.round, &body);
            if self.client.submit(&id, &body, PATIENCE) {
                self.ledger.confirm(&id);
            } else {
                refused.push(id);
            }
            self.release(Instant::now());
            std::thread::sleep(Duration::from_millis(self.rng.random_range(40..240)));
        }
        self.release(Instant::now() + secs(60));
        refused
    }

    fn draw(&mut self, id: &str) -> (Kind, Value) {
        // The cube of it is the work: up to some tenths of a second.
        let size = self.rng.random_range(2..900_u16);
        let withheld = Duration::from_millis(self.rng.random_range(200..6_000));
        match self.rng.random_range(0..100) {
            0..60 => (Kind::Sound, hazard_job(id, size.into())),
            60..70 => (Kind::Refused, hazard_job(id, f32::NAN)),
            70..80 => {
                let nonce = format!("{}", size % 5);
                let validation = json!({"nonce": nonce});
                let job = json!({"v": 1, "kind": "validate", "submission_id": id, "validation": validation});
                (Kind::Validate, job)
            }
            80..95 => {
                let bytes = hazard_candidate(size.into());
                let job = self.by_url(id, &bytes);
                self.server.put(&format!("/{id}"), Route::Status(503));
                let due = Instant::now() + withheld;
                self.withheld.push((due, format!("/{id}"), bytes));
                (Kind::Flaky, job)
            }
            _ => (Kind::Gone, self.by_url(id, &hazard_candidate(2.0))),
        }
    }

    fn by_url(&self, id: &str, bytes: &[u8]) -> Value {
        let mut job = hazard_job(id, 2.0);
        job["candidate"] = json!({
            "format": "binary_v2", "semantics": "param_diff",
            "url": self.server.url(&format!("/{id}")),
            "sha256": digest(bytes), "size": bytes.len(),
        });
        job
    }

    /// Puts what is due where it can be fetched.
    fn release(&mut self, now: Instant) {
        let (due, rest) = std::mem::take(&mut self.withheld)
            .into_iter()
            .partition(|(due, _, _)| *due <= now);
        self.withheld = rest;
        for (_, path, bytes) in due {
            self.server.put(&path, Route::Bytes(bytes));
        }
    }
}
