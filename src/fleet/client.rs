//! The aggregator's side, for programs in Rust: keeps as many jobs at the broker as the ready workers can
//! use, republishes jobs that were unconfirmed when a connection was lost, and returns every answer once.
//! A job that the broker refuses, or that is not answered, is returned as such.
//!
//! `clients/rust/score_files.rs` is a program that uses it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use futures_util::future::OptionFuture;
use tokio::task::{JoinError, JoinHandle};
use tokio::time::Instant;

use crate::broker::amqp::{Acker, Deliveries, Delivery, Link};
use crate::broker::nodes::Nodes;
use crate::broker::topology::Topology;
use crate::broker::{BrokerError, Outgoing, Properties, PublishError};
use crate::config::Config;
use crate::protocol::encoding::Encoding;
use crate::protocol::heartbeat::{Ability, Accepts, Record};
use crate::protocol::message::JobMessage;
use crate::protocol::result::ResultMessage;
use crate::store::FleetStore;
use crate::util::backoff::Backoff;
use crate::util::clock::unix_ms;

/// Interval between two looks at the fleet, and at the time.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Jobs at the broker per job that a ready worker holds: one there, one on the way.
const AHEAD: usize = 2;
/// Results that are delivered and not acknowledged.
const UNACKNOWLEDGED: u16 = 64;
/// Answers that are remembered, to recognise a second copy.
const REMEMBERED: usize = 100_000;
/// Lost connections per job before it is given up: a broker closes the connection on a message that it
/// does not accept.
const MOST_LOSSES: u32 = 3;
/// Default time-out of an answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(15 * 60);

/// Why a job cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Answers are told apart by the name.
    #[error("{0}: a job of this name was submitted before")]
    NameTaken(String),
    /// What is in it cannot be written.
    #[error("{0}")]
    Unwritable(String),
}

/// What became of a job, or came besides.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    /// A worker's answer.
    Answered(Box<ResultMessage>),
    /// An answer to somebody else, or to a job of an earlier run; the queue keeps them for whoever comes.
    Unasked(Box<ResultMessage>),
    /// No answer came in time. If one comes later it is unasked.
    Overdue {
        /// The job.
        submission_id: String,
    },
    /// The broker does not take the job.
    Unsent {
        /// The job.
        submission_id: String,
        /// What the broker said last.
        why: String,
    },
    /// What came is no result that this version knows.
    Unreadable {
        /// Of the message; a result's begins with the name of its job.
        message_id: Option<String>,
        /// What is wrong with it.
        why: String,
    },
}

/// A job on its way to the broker.
#[derive(Debug)]
struct Pending {
    id: String,
    /// The one that it names; a validate job may name none.
    version: Option<u64>,
    needs: Ability,
    outgoing: Outgoing,
    /// The broker may have it.
    tried: bool,
    losses: u32,
}

/// A job at the broker.
#[derive(Debug)]
struct Sent {
    version: Option<u64>,
    since: Instant,
}

/// A live worker, as far as it matters here.
#[derive(Debug)]
struct Seen {
    ready: bool,
    serves: Option<u64>,
    accepts: Accepts,
}

impl From<Record> for Seen {
    fn from(record: Record) -> Self {
        Self {
            ready: record.ready,
            serves: record.model.version,
            accepts: record.accepts,
        }
    }
}

type Publishing = JoinHandle<Result<(), PublishError>>;

/// Submits jobs and collects their answers from `NAMESPACE.results.MODEL`.
#[derive(Debug)]
pub struct Client {
    config: Config,
    store: FleetStore,
    topology: Topology,
    nodes: Nodes,
    answer_within: Duration,
    link: Option<(Link, Deliveries)>,
    backoff: Backoff,
    /// The last link was lost, or not made: the next is not to follow at once.
    pause: bool,
    /// Not at the broker yet, oldest first.
    waiting: VecDeque<Pending>,
    /// Asked for a confirm of, in a task of its own: whoever drops [`Client::next`] does not drop it.
    publishing: Option<(Pending, Publishing)>,
    /// At the broker, without an answer.
    sent: HashMap<String, Sent>,
    answered: Remembered,
    /// What is dealt with: to be acknowledged when the next is asked for.
    handed: Option<(Option<String>, Acker)>,
    workers: Vec<Seen>,
    looked: Option<Instant>,
}

impl Client {
    /// A client of the fleet that serves a model. Connects when it is first needed.
    pub fn new(config: Config, model: &str) -> Self {
        Self {
            topology: Topology::new(&config.amqp, model),
            store: FleetStore::new(&config.redis),
            nodes: Nodes::new(&config.amqp),
            config,
            answer_within: ANSWER_WITHIN,
            link: None,
            backoff: Backoff::new(),
            pause: false,
            waiting: VecDeque::new(),
            publishing: None,
            sent: HashMap::new(),
            answered: Remembered::default(),
            handed: None,
            workers: Vec::new(),
            looked: None,
        }
    }

    /// How long an answer may take from the broker's confirm of its job on; 15 minutes without this.
    #[must_use]
    pub fn answer_within(self, answer_within: Duration) -> Self {
        Self {
            answer_within,
            ..self
        }
    }

    /// The node of the broker that is in use, as host:port.
    pub fn node(&self) -> Option<&str> {
        self.link.as_ref().map(|(link, _)| link.node.as_str())
    }

    /// Takes a job; it goes to the broker within [`Client::next`], when a worker can use it.
    ///
    /// # Errors
    /// When its name is taken, or it cannot be written.
    pub fn submit(&mut self, job: &JobMessage) -> Result<(), SubmitError> {
        self.accept(job, None)
    }

    /// The same with a priority: from RabbitMQ 4.0 on, jobs of a higher one are delivered first, 4 being what
    /// a job without one has. Before, it changes nothing.
    ///
    /// # Errors
    /// As [`Client::submit`].
    pub fn submit_with_priority(
        &mut self,
        job: &JobMessage,
        priority: u8,
    ) -> Result<(), SubmitError> {
        self.accept(job, Some(priority))
    }

    fn accept(&mut self, job: &JobMessage, priority: Option<u8>) -> Result<(), SubmitError> {
        let id = job.submission_id();
        if self.knows(id) {
            return Err(SubmitError::NameTaken(id.into()));
        }
        let body = Encoding::MessagePack.encode(job);
        let body = body.map_err(|e| SubmitError::Unwritable(format!("{id}: {e}")))?;
        let properties = Properties {
            content_type: Some(Encoding::MessagePack.content_type().into()),
            message_id: Some(id.into()),
            timestamp: Some(unix_ms() / 1000),
            priority,
            attempt: 1,
            ..Properties::default()
        };
        self.waiting.push_back(Pending {
            id: id.into(),
            version: job.model_version(),
            needs: job.needs(),
            outgoing: self.topology.job(body, properties),
            tried: false,
            losses: 0,
        });
        Ok(())
    }

    fn knows(&self, id: &str) -> bool {
        let handed = self
            .handed
            .as_ref()
            .and_then(|(handed, _)| handed.as_deref());
        let publishing = self.publishing.as_ref().map(|(job, _)| job.id.as_str());
        self.waiting.iter().any(|job| job.id == id)
            || [handed, publishing].contains(&Some(id))
            || self.sent.contains_key(id)
            || self.answered.knows(id)
    }

    /// Jobs without an answer.
    pub fn outstanding(&self) -> usize {
        self.waiting.len() + self.sent.len() + usize::from(self.publishing.is_some())
    }

    /// What comes next; none when every job has its outcome. Whoever asks has dealt with the one before,
    /// which is acknowledged now: after a crash it comes again. Waits for workers to be ready and for
    /// services to come back, for as long as it takes. Cancel-safe: nothing is lost when it is dropped.
    pub async fn next(&mut self) -> Option<Outcome> {
        if let Some((id, acker)) = self.handed.take() {
            id.into_iter().for_each(|id| self.answered.add(id));
            // If this is lost it is delivered again, and known.
            acker.ack().await;
        }
        while self.outstanding() > 0 {
            if let Some(overdue) = self.overdue() {
                return Some(overdue);
            }
            let outcome = match self.link {
                Some(_) => self.turn().await,
                None => self.connect().await,
            };
            if outcome.is_some() {
                return outcome;
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

    fn overdue(&mut self) -> Option<Outcome> {
        let mut late = self.sent.iter();
        let late = late.find(|(_, sent)| sent.since.elapsed() > self.answer_within);
        let submission_id = late?.0.clone();
        self.sent.remove(&submission_id);
        Some(Outcome::Overdue { submission_id })
    }

    async fn connect(&mut self) -> Option<Outcome> {
        // One whose link is gone hears of it at once.
        if let Some((_, publishing)) = &mut self.publishing {
            let outcome = publishing.await;
            return self.confirmed(outcome);
        }
        if self.pause {
            // No longer than until somebody has to look at the time again.
            tokio::time::sleep(self.backoff.next_delay()).await;
        }
        self.pause = true;
        match self.link().await {
            Ok(linked) => self.link = Some(linked),
            Err(error) => tracing::warn!(%error, "no connection to RabbitMQ yet"),
        }
        None
    }

    async fn link(&mut self) -> Result<(Link, Deliveries), BrokerError> {
        let link = Link::connect(&mut self.nodes, "scorer-client").await?;
        let queue = self.topology.results_queue();
        let results = link.consume(&queue, "", UNACKNOWLEDGED).await?;
        Ok((link, results))
    }

    /// Looks, sends, and takes what comes within a second.
    async fn turn(&mut self) -> Option<Outcome> {
        self.look().await;
        self.publish();
        let (link, deliveries) = self.link.as_mut()?;
        let publishing = self.publishing.as_mut();
        let confirm = OptionFuture::from(publishing.map(|(_, publishing)| publishing));
        tokio::select! {
            delivery = deliveries.next() => match delivery {
                Some(delivery) => return self.take(delivery).await,
                None => self.link = None,
            },
            Some(outcome) = confirm => return self.confirmed(outcome),
            () = link.lost.cancelled() => self.link = None,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        None
    }

    /// Who lives. A fleet that is unknown can use no jobs.
    async fn look(&mut self) {
        let due = self.looked.is_none_or(|at| at.elapsed() >= LOOK_EVERY);
        if self.waiting.is_empty() || !due {
            return;
        }
        let (model, ttl) = (&self.topology.model, self.config.heartbeat.ttl);
        let read = self.store.live_records(Some(model), ttl).await;
        self.workers = match read {
            Ok((_, records)) => {
                let read = records.iter().filter_map(|live| Record::read(&live.text));
                read.map(Seen::from).collect()
            }
            Err(error) => {
                tracing::warn!(%error, "cannot read the fleet from Redis; jobs wait");
                Vec::new()
            }
        };
        // After the answer: where Redis is slow, other things come between two looks.
        self.looked = Some(Instant::now());
    }

    /// Whether the workers that answer a job for this version at once can use another one: those that
    /// serve it, else newer ones, which say that it is too old. A worker that has still to get there
    /// would only send the job round the retry ladder.
    fn has_room(&self, version: Option<u64>) -> bool {
        let count = |fits: &dyn Fn(Option<u64>) -> bool| {
            let ready = self.workers.iter().filter(|worker| worker.ready);
            ready.filter(|worker| fits(worker.serves)).count()
        };
        let answering = match version {
            None => count(&|_| true),
            Some(_) => match count(&|serves| serves == version) {
                0 => count(&|serves| serves > version),
                ready => ready,
            },
        };
        let sent = self.sent.values().filter(|sent| sent.version == version);
        sent.count() < answering * usize::from(self.config.amqp.prefetch) * AHEAD
    }

    /// Whether any live worker may be given such a job: all of them consume the same queue.
    fn is_known(&self, needs: Ability) -> bool {
        let mut accepts = self.workers.iter().map(|worker| &worker.accepts);
        accepts.all(|accepts| accepts.contains(needs))
    }

    /// The next job that somebody can use.
    fn take_waiting(&mut self) -> Option<Pending> {
        let mut usable = HashMap::new();
        let at = self.waiting.iter().position(|job| {
            let usable = usable.entry((job.version, job.needs));
            *usable.or_insert_with(|| self.is_known(job.needs) && self.has_room(job.version))
        });
        self.waiting.remove(at?)
    }

    /// One at a time, so that "returned" means this one.
    fn publish(&mut self) {
        if self.publishing.is_some() || self.link.is_none() {
            return;
        }
        let job = self.take_waiting();
        let (Some((link, _)), Some(mut job)) = (&self.link, job) else {
            return;
        };
        job.tried = true;
        let (publisher, outgoing) = (link.jobs.clone(), job.outgoing.clone());
        let publishing = tokio::spawn(async move { publisher.publish(outgoing).await });
        self.publishing = Some((job, publishing));
    }

    fn confirmed(
        &mut self,
        outcome: Result<Result<(), PublishError>, JoinError>,
    ) -> Option<Outcome> {
        let (mut job, _) = self.publishing.take()?;
        match outcome.unwrap_or_else(|e| Err(PublishError::Lost(e.to_string()))) {
            Ok(()) => {
                self.backoff.reset();
                let (version, since) = (job.version, Instant::now());
                self.sent.insert(job.id, Sent { version, since });
            }
            Err(PublishError::Refused(why)) => {
                tracing::warn!(%why, id = job.id, "the job waits");
                // Until the next look.
                self.workers.clear();
                self.waiting.push_front(job);
            }
            Err(PublishError::Lost(why) | PublishError::Unroutable(why)) => {
                self.link = None;
                job.losses += 1;
                if job.losses >= MOST_LOSSES {
                    let submission_id = job.id;
                    return Some(Outcome::Unsent { submission_id, why });
                }
                tracing::warn!(%why, id = job.id, "the job will be published again");
                self.waiting.push_front(job);
            }
        }
        None
    }

    /// What a message is, if it is not the second copy of an answer.
    async fn take(&mut self, delivery: Delivery) -> Option<Outcome> {
        let properties = &delivery.properties;
        let result = match ResultMessage::decode(&delivery.body, properties.label()) {
            Ok(result) => Box::new(result),
            Err(why) => {
                let message_id = properties.message_id.clone();
                self.handed = Some((None, delivery.acker));
                return Some(Outcome::Unreadable { message_id, why });
            }
        };
        self.backoff.reset();
        let asked = self.settles(&result);
        if !asked && self.answered.knows(&result.submission_id) {
            delivery.acker.ack().await;
            return None;
        }
        let name = asked.then(|| result.submission_id.clone());
        self.handed = Some((name, delivery.acker));
        Some(match asked {
            true => Outcome::Answered(result),
            false => Outcome::Unasked(result),
        })
    }

    /// Whether it answers a job of ours, which waits no longer then. One whose link was lost may be
    /// answered before it is published again; one that was never published is not.
    fn settles(&mut self, result: &ResultMessage) -> bool {
        let id = &result.submission_id;
        let fits = |version: Option<u64>| version.is_none_or(|v| v == result.model_version);
        if self.sent.get(id).is_some_and(|sent| fits(sent.version)) {
            return self.sent.remove(id).is_some();
        }
        let ours = |job: &Pending| job.tried && job.id == *id && fits(job.version);
        if self.publishing.as_ref().is_some_and(|(job, _)| ours(job)) {
            return self.publishing.take().is_some();
        }
        let waiting = self.waiting.iter().position(ours);
        waiting.and_then(|at| self.waiting.remove(at)).is_some()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Layers;
    use crate::protocol::job::{Format, Semantics};
    use crate::protocol::message::{
        Blob, CandidateMessage, MemberMessage, MergeMessage, ScoreMessage, ScoreValidation, V1,
        ValidateMessage,
    };
    use crate::protocol::stop::Stop;

    fn ready(accepts: &[Ability]) -> Seen {
        Seen {
            ready: true,
            serves: Some(7),
            accepts: Accepts::of(accepts),
        }
    }

    fn candidate() -> CandidateMessage {
        CandidateMessage {
            format: Format::Safetensors,
            compression: None,
            semantics: Semantics::ParamDiff,
            learning_rate: None,
            url: None,
            data: Some(Blob(vec![1])),
            sha256: None,
            size: None,
        }
    }

    /// A score job that may end early.
    fn may_stop() -> JobMessage {
        JobMessage::Score(ScoreMessage {
            v: V1,
            submission_id: "score".into(),
            model: None,
            model_version: 7,
            candidate: candidate(),
            validation: Some(ScoreValidation {
                stop: Some(Stop {
                    alpha: 0.01,
                    margin: 0.0,
                    proven: false,
                }),
                ..ScoreValidation::default()
            }),
            deadline_ms: None,
            context: None,
        })
    }

    fn merge() -> JobMessage {
        let member = |id: &str| MemberMessage {
            id: id.into(),
            candidate: candidate(),
            weight: None,
        };
        JobMessage::Merge(MergeMessage {
            v: V1,
            submission_id: "merge".into(),
            model: None,
            model_version: 7,
            members: vec![member("a"), member("b")],
            on_rejected: None,
            validation: None,
            deadline_ms: None,
            context: None,
        })
    }

    #[test]
    fn a_job_waits_while_a_live_worker_does_not_know_what_it_asks_for() {
        let config = Config::load(&Layers::default()).unwrap();
        for (job, needs) in [(may_stop(), Ability::Stop), (merge(), Ability::Merge)] {
            let mut client = Client::new(config.clone(), "tinylm");
            client.submit(&job).unwrap();
            let old = || ready(&[Ability::Score, Ability::Validate]);
            let new = || ready(&[Ability::Score, Ability::Validate, needs]);
            client.workers = vec![new(), old()];
            assert!(client.take_waiting().is_none());
            client.workers = vec![new()];
            assert!(client.take_waiting().is_some());
        }
    }

    #[test]
    fn a_job_waits_while_a_live_worker_does_not_know_its_kind() {
        let config = Config::load(&Layers::default()).unwrap();
        let mut client = Client::new(config, "tinylm");
        let job = ValidateMessage {
            v: V1,
            submission_id: "loss".into(),
            model: None,
            model_version: Some(7),
            validation: None,
            deadline_ms: None,
            context: None,
        };
        client.submit(&JobMessage::Validate(job)).unwrap();
        let knows_all = || ready(&[Ability::Score, Ability::Validate]);
        let starting = Seen {
            ready: false,
            serves: None,
            ..ready(&[Ability::Score])
        };
        client.workers = vec![knows_all(), starting];
        assert!(client.take_waiting().is_none());
        client.workers = vec![knows_all()];
        assert!(client.take_waiting().is_some());
    }
}
