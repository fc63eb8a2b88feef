//! An aggregator's side, for programs in Rust: keeps as many jobs at the broker as the ready workers can
//! use, publishes again what was not confirmed when a link was lost, and hands over every answer once.
//!
//! `ops/aggregator/score_files.rs` is a program that uses it.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use crate::broker::amqp::{Acker, Deliveries, Delivery, Link};
use crate::broker::topology::Topology;
use crate::broker::{BrokerError, Outgoing, Properties, PublishError};
use crate::clock::unix_ms;
use crate::config::Config;
use crate::fleet::Worker;
use crate::job::Encoding;
use crate::job::message::JobMessage;
use crate::result::ResultMessage;
use crate::retry::Backoff;
use crate::store::read_fleet;

/// Between two looks at the fleet.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Jobs at the broker for each place that a ready worker has: one there, one on the way.
const AHEAD: usize = 2;
/// Results that are delivered and not acknowledged.
const UNACKNOWLEDGED: u16 = 64;
/// Answers that are remembered, so that a second copy is known as one.
const REMEMBERED: usize = 100_000;

/// Why a job cannot be submitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Answers are told apart by the name.
    #[error("{0}: a job of this name was submitted before")]
    NameTaken(String),
    /// What is in it cannot be written.
    #[error("{0}")]
    Unwritable(String),
}

/// The answer to a job.
#[derive(Debug)]
pub struct Answer {
    /// What a worker says.
    pub result: ResultMessage,
    /// False: nobody here asked, or it was long ago. The queue of results keeps answers for whoever
    /// comes.
    pub asked: bool,
}

/// Submits jobs and collects their answers from `NAMESPACE.results.MODEL`.
#[derive(Debug)]
pub struct Client {
    config: Config,
    topology: Topology,
    link: Option<(Link, Deliveries)>,
    backoff: Backoff,
    /// Not at the broker yet, oldest first.
    waiting: VecDeque<(String, Outgoing)>,
    /// At the broker, without an answer.
    sent: HashSet<String>,
    answered: Remembered,
    /// The answer that is dealt with.
    handed: Option<(String, Acker)>,
    room: usize,
    looked: Option<Instant>,
}

impl Client {
    /// A client of the fleet that serves a model. Connects when it is first needed.
    pub fn new(config: Config, model: &str) -> Self {
        Self {
            topology: Topology::new(&config.amqp, model),
            config,
            link: None,
            backoff: Backoff::new(),
            waiting: VecDeque::new(),
            sent: HashSet::new(),
            answered: Remembered::default(),
            handed: None,
            room: 0,
            looked: None,
        }
    }

    /// Takes a job; it goes to the broker within [`Client::next`], when a worker can use it.
    ///
    /// # Errors
    /// When its name is taken, or it cannot be written.
    pub fn submit(&mut self, job: &JobMessage) -> Result<(), SubmitError> {
        let id = match job {
            JobMessage::Score(job) => &job.submission_id,
            JobMessage::Validate(job) => &job.submission_id,
        };
        let waits = self.waiting.iter().any(|(waiting, _)| waiting == id);
        let handed = self.handed.as_ref().is_some_and(|(handed, _)| handed == id);
        if waits || handed || self.sent.contains(id) || self.answered.knows(id) {
            return Err(SubmitError::NameTaken(id.clone()));
        }
        let body = Encoding::MessagePack.encode(job);
        let body = body.map_err(|e| SubmitError::Unwritable(format!("{id}: {e}")))?;
        let outgoing = Outgoing {
            exchange: self.topology.jobs_exchange(),
            routing_key: self.topology.model.clone(),
            body,
            properties: Properties {
                content_type: Some(Encoding::MessagePack.content_type().into()),
                message_id: Some(id.clone()),
                timestamp: Some(unix_ms() / 1000),
                attempt: 1,
                ..Properties::default()
            },
            mandatory: true,
        };
        self.waiting.push_back((id.clone(), outgoing));
        Ok(())
    }

    /// Jobs without an answer.
    pub fn outstanding(&self) -> usize {
        self.waiting.len() + self.sent.len()
    }

    /// The next answer; none when every job has its own. Whoever asks has dealt with the one before,
    /// which is acknowledged now: after a crash it comes again. Waits for as long as it takes, for workers
    /// to be ready and for services to come back. Cancel-safe: nothing is lost when it is dropped.
    pub async fn next(&mut self) -> Option<Answer> {
        if let Some((id, acker)) = self.handed.take() {
            self.answered.add(id);
            // If this is lost it is delivered again, and known.
            acker.ack().await;
        }
        while self.outstanding() > 0 {
            let Some((link, _)) = &self.link else {
                self.connect().await;
                continue;
            };
            let lost = link.lost.clone();
            self.look().await;
            self.send().await;
            let Some((_, deliveries)) = &mut self.link else {
                continue;
            };
            tokio::select! {
                delivery = deliveries.next() => match delivery {
                    Some(delivery) => if let Some(answer) = self.take(delivery).await {
                        return Some(answer);
                    },
                    None => self.link = None,
                },
                () = lost.cancelled() => self.link = None,
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
        None
    }

    /// Says goodbye to the broker.
    pub async fn close(self) {
        if let Some((link, _)) = self.link {
            link.close().await;
        }
    }

    async fn connect(&mut self) {
        match self.link().await {
            Ok(linked) => {
                self.backoff.reset();
                self.link = Some(linked);
            }
            Err(error) => {
                tracing::warn!(%error, "no link to the broker yet");
                tokio::time::sleep(self.backoff.wait()).await;
            }
        }
    }

    async fn link(&self) -> Result<(Link, Deliveries), BrokerError> {
        let link = Link::connect(&self.config.amqp, "scorer-client").await?;
        let queue = self.topology.results_queue();
        let results = link.consume(&queue, "", UNACKNOWLEDGED).await?;
        Ok((link, results))
    }

    /// How many more jobs the workers that are ready can use. A fleet that is unknown is given none.
    async fn look(&mut self) {
        let due = self.looked.is_none_or(|at| at.elapsed() >= LOOK_EVERY);
        if self.waiting.is_empty() || !due {
            return;
        }
        self.looked = Some(Instant::now());
        let (config, model) = (&self.config, &self.topology.model);
        let read = read_fleet(&config.redis, Some(model), config.heartbeat.ttl).await;
        let ready = match read {
            Ok((_, records)) => {
                let parsed = records
                    .iter()
                    .map(|text| serde_json::from_str::<Worker>(text));
                parsed.flatten().filter(|worker| worker.ready).count()
            }
            Err(error) => {
                tracing::warn!(%error, "the fleet is unknown; jobs wait");
                0
            }
        };
        let places = ready * usize::from(config.amqp.prefetch) * AHEAD;
        self.room = places.saturating_sub(self.sent.len());
    }

    async fn send(&mut self) {
        while self.room > 0 {
            let Some((id, outgoing)) = self.waiting.front().cloned() else {
                return;
            };
            let Some((link, _)) = &self.link else { return };
            match link.jobs.publish(outgoing).await {
                Ok(()) => {
                    self.waiting.pop_front();
                    self.sent.insert(id);
                    self.room -= 1;
                }
                Err(PublishError::Refused(why)) => {
                    tracing::warn!(%why, %id, "the job waits");
                    self.room = 0;
                }
                Err(PublishError::Lost(why) | PublishError::Unroutable(why)) => {
                    tracing::warn!(%why, %id, "the job will be published again");
                    self.link = None;
                }
            }
        }
    }

    /// An answer, if it is one and the first of its job.
    async fn take(&mut self, delivery: Delivery) -> Option<Answer> {
        let encoding = delivery.properties.encoding();
        let result = match ResultMessage::decode(&delivery.body, encoding) {
            Ok(result) => result,
            Err(error) => {
                tracing::warn!(%error, "what is no result is left out");
                delivery.acker.ack().await;
                return None;
            }
        };
        let id = &result.submission_id;
        // One that was published when its link was lost may be answered before it is published again.
        let waited = self.waiting.iter().position(|(waiting, _)| waiting == id);
        let waited = waited.and_then(|at| self.waiting.remove(at)).is_some();
        let asked = self.sent.remove(id) || waited;
        if !asked && self.answered.knows(id) {
            delivery.acker.ack().await;
            return None;
        }
        self.room += usize::from(asked);
        self.handed = Some((id.clone(), delivery.acker));
        Some(Answer { result, asked })
    }
}

/// The last names, each once.
#[derive(Debug, Default)]
struct Remembered {
    names: HashSet<String>,
    order: VecDeque<String>,
}

impl Remembered {
    fn knows(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    fn add(&mut self, name: String) {
        if self.names.insert(name.clone()) {
            self.order.push_back(name);
        }
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.names.remove(&oldest);
        }
    }
}
