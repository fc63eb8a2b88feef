//! The fleet, read from Redis and RabbitMQ: for `scorer status`, its terminal view and the dashboard.
//! What cannot be read is unknown, never good.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::value::RawValue;

use crate::broker::BrokerError;
use crate::broker::amqp::Link;
use crate::broker::nodes::Nodes;
use crate::broker::topology::Topology;
use crate::config::Config;
use crate::protocol::heartbeat::Record;
use crate::store::{FleetStore, LiveRecord, StoreError, StreamEntry};

/// A node that does not answer delays the view by this much, but does not prevent it.
const BROKER_LIMIT: Duration = Duration::from_secs(2);
/// When a broker that failed is asked again; by then the earlier attempt has ended by itself.
const ASK_AGAIN: Duration = Duration::from_secs(15);

/// Models whose events are read where no model is named.
const MOST_MODELS: usize = 16;

/// Queue depths of one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Queues {
    /// Jobs.
    pub jobs: u32,
    /// Jobs in all retry queues.
    pub retry: u32,
    /// Dead-lettered jobs.
    pub dead: u32,
    /// Consumers of the job queue.
    pub consumers: u32,
}

impl std::fmt::Display for Queues {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} waiting, {} to be retried, {} dead-lettered, {} consumers",
            self.jobs, self.retry, self.dead, self.consumers
        )
    }
}

/// A live worker.
#[derive(Debug, Clone)]
pub struct Worker {
    /// Its record, as far as it can be read.
    pub record: Record,
    /// The record as it was written.
    pub live: LiveRecord,
}

/// A record that is passed on as it was written.
type RawRecord = BTreeMap<String, Box<RawValue>>;

/// What was seen at one moment.
#[derive(Debug)]
pub struct View {
    /// By Redis' clock, unix milliseconds.
    pub at_ms: u64,
    /// Live workers by model and name.
    pub workers: Vec<Worker>,
    /// The model that is observed, or whose workers were seen last.
    pub model: Option<String>,
    /// Queue depths, or why they are unknown; none if there are several models.
    pub queues: Option<Result<Queues, String>>,
}

/// The answer of `scorer status --json`.
#[derive(Debug, Serialize)]
pub struct Report {
    alive: usize,
    at_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    queue: Option<Queues>,
    ready: usize,
    workers: Vec<RawRecord>,
}

/// Observes the fleet repeatedly, on one connection each to the broker and Redis.
#[derive(Debug)]
pub struct Observer<'a> {
    config: &'a Config,
    store: Arc<FleetStore>,
    /// The model to observe; none = every model in Redis.
    model: Option<String>,
    /// Those whose workers were seen.
    seen: BTreeSet<String>,
    nodes: Nodes,
    link: Option<Link>,
    /// Why the broker's numbers are unknown, and since when.
    unknown: Option<(String, Instant)>,
}

impl<'a> Observer<'a> {
    /// Does not connect yet.
    pub fn new(config: &'a Config, model: Option<String>) -> Self {
        Self {
            config,
            store: Arc::new(FleetStore::new(&config.redis)),
            model,
            seen: BTreeSet::new(),
            nodes: Nodes::new(&config.amqp).within(BROKER_LIMIT),
            link: None,
            unknown: None,
        }
    }

    /// The fleet as it is now.
    ///
    /// # Errors
    /// When Redis does not answer.
    pub async fn look(&mut self) -> Result<View, StoreError> {
        let (store, model) = (Arc::clone(&self.store), self.model.clone());
        let model = model.as_deref();
        let reading = store.live_records(model, self.config.heartbeat.ttl);
        let (read, queues) = match model {
            Some(model) => tokio::join!(reading, self.queues(model)),
            None => (reading.await, None),
        };
        let (at_ms, records) = read?;
        let mut workers: Vec<Worker> = records.into_iter().filter_map(Worker::read).collect();
        workers.sort_by(|a, b| a.name().cmp(&b.name()));
        let queues = match (queues, only_model(&workers)) {
            (None, Some(model)) => self.queues(&model).await,
            (queues, _) => queues,
        };
        let names = workers.iter().map(|worker| &worker.record.model.name);
        let names: Vec<_> = names.filter(|name| !name.is_empty()).collect();
        let first = names.first().copied().or(self.seen.first()).cloned();
        self.seen
            .extend(names.into_iter().take(MOST_MODELS).cloned());
        while self.seen.len() > MOST_MODELS {
            self.seen.pop_first();
        }
        Ok(View {
            at_ms,
            model: self.model.clone().or(first),
            workers,
            queues,
        })
    }

    /// Changes of state after an entry of the stream, or the last few, oldest first; also after the last
    /// worker has gone.
    ///
    /// # Errors
    /// When Redis does not answer.
    pub async fn events(&self, after: Option<&str>) -> Result<Vec<StreamEntry>, StoreError> {
        let Some(model) = &self.model else {
            let mut events = Vec::new();
            for model in &self.seen {
                events.extend(self.store.events(model, after).await?);
            }
            events.sort_by_key(StreamEntry::when);
            return Ok(events);
        };
        self.store.events(model, after).await
    }

    /// Closes the connection to the broker.
    pub async fn close(self) {
        if let Some(link) = self.link {
            link.close().await;
        }
    }

    async fn queues(&mut self, model: &str) -> Option<Result<Queues, String>> {
        if let Some((why, since)) = &self.unknown
            && since.elapsed() < ASK_AGAIN
        {
            return Some(Err(why.clone()));
        }
        let topology = Topology::new(&self.config.amqp, model);
        let limit = self.nodes.longest();
        let asked = tokio::time::timeout(limit, self.depths(&topology)).await;
        let answered = asked.unwrap_or_else(|_| {
            let text = format!("RabbitMQ: no answer within {} s", limit.as_secs());
            Err(text)
        });
        self.unknown = answered
            .as_ref()
            .err()
            .map(|why| (why.clone(), Instant::now()));
        if self.unknown.is_some() {
            self.link = None;
        }
        Some(answered)
    }

    async fn depths(&mut self, topology: &Topology) -> Result<Queues, String> {
        let why = |error: BrokerError| error.to_string();
        let usable = |link: &Link| !link.lost.is_cancelled();
        let link = match self.link.take().filter(usable) {
            Some(link) => link,
            None => Link::connect(&mut self.nodes, "scorer-status")
                .await
                .map_err(why)?,
        };
        let link = self.link.insert(link);
        let mut queues = Queues::default();
        if let Some((jobs, consumers)) = link.depth(&topology.jobs_queue()).await.map_err(why)? {
            (queues.jobs, queues.consumers) = (jobs, consumers);
        }
        for rung in topology.retry_queues() {
            let depth = link.depth(&rung).await.map_err(why)?;
            queues.retry += depth.map_or(0, |(jobs, _)| jobs);
        }
        let dead = link.depth(&topology.dead_queue()).await.map_err(why)?;
        queues.dead = dead.map_or(0, |(jobs, _)| jobs);
        Ok(queues)
    }
}

/// The models of these workers. A record that does not name its model says nothing of the others.
fn models(workers: &[Worker]) -> BTreeSet<&str> {
    let names = workers.iter().map(|worker| &*worker.record.model.name);
    names.filter(|name| !name.is_empty()).collect()
}

/// The model of all live workers, if they have the same one.
fn only_model(workers: &[Worker]) -> Option<String> {
    let models = models(workers);
    let first = models.first().filter(|_| models.len() == 1);
    first.map(|&name| name.to_owned())
}

impl Worker {
    fn read(live: LiveRecord) -> Option<Self> {
        let record = Record::read(&live.text)?;
        Some(Self { record, live })
    }

    fn name(&self) -> (&str, &str) {
        (&self.record.model.name, &self.record.worker_id)
    }

    /// How long the worker has been in its state; none where the record does not say. Both times in the
    /// record are by the worker's own clock, so only their difference is used.
    pub fn state_ms(&self) -> Option<u64> {
        let Record {
            at_ms,
            last_state_change_at_ms: changed,
            ..
        } = self.record;
        let known = at_ms > 0 && changed > 0;
        known.then(|| {
            at_ms
                .saturating_sub(changed)
                .saturating_add(self.live.age_ms)
        })
    }
}

impl View {
    /// The models of the workers.
    pub fn models(&self) -> BTreeSet<&str> {
        models(&self.workers)
    }

    /// Workers that take jobs.
    pub fn ready(&self) -> usize {
        let ready = self.workers.iter().filter(|worker| worker.record.ready);
        ready.count()
    }

    /// The report for programs.
    pub fn report(&self) -> Report {
        let aged = self.workers.iter();
        let aged = aged.filter_map(|worker| aged_record(&worker.live));
        Report {
            alive: self.workers.len(),
            at_ms: self.at_ms,
            queue: self
                .queues
                .as_ref()
                .and_then(|queues| queues.as_ref().ok().copied()),
            ready: self.ready(),
            workers: aged.collect(),
        }
    }
}

/// The record as it was written, with its age.
fn aged_record(live: &LiveRecord) -> Option<RawRecord> {
    let mut record: RawRecord = serde_json::from_str(&live.text).ok()?;
    let age = serde_json::value::to_raw_value(&live.age_ms).ok()?;
    record.insert("age_ms".into(), age);
    Some(record)
}
