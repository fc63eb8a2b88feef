//! What Prometheus reads at `telemetry.metrics_addr`: every metric with its name, unit and help. The only
//! place that knows the prometheus crate. Events are counted by the functions below, which do nothing
//! before [`install`]; the current state is read from the last record at every scrape.

mod present;
#[cfg(feature = "worker")]
mod scrape;

#[cfg(feature = "worker")]
pub use scrape::{install, serve};

use std::sync::OnceLock;
use std::time::Duration;

use present::Work;
use prometheus::proto::MetricFamily;
use prometheus::{
    Counter, Histogram, HistogramVec, IntCounter, IntCounterVec, Registry, exponential_buckets,
    register_counter_with_registry, register_histogram_vec_with_registry,
    register_histogram_with_registry, register_int_counter_vec_with_registry,
    register_int_counter_with_registry,
};
use strum::VariantArray;

use crate::protocol::failure::{Code, Failure};
use crate::protocol::heartbeat::Record;
use crate::protocol::result::{Body, ResultMessage};
use crate::protocol::stop::{Decision, Finished, Stop, Stopped};

/// One per process, as for logs.
static METRICS: OnceLock<Metrics> = OnceLock::new();

/// Events since the start.
struct Metrics {
    registry: Registry,
    jobs: JobMetrics,
    confirms: IntCounterVec,
    confirm_seconds: Histogram,
    warmups: IntCounterVec,
    heartbeats: IntCounterVec,
    store_calls: IntCounterVec,
}

/// Events of jobs.
struct JobMetrics {
    answered: IntCounterVec,
    seconds: Histogram,
    stage_seconds: HistogramVec,
    duplicates: IntCounter,
    redelivered: IntCounter,
    retried: IntCounterVec,
    parked: IntCounterVec,
    stops: IntCounterVec,
    expected_contradictions: Counter,
    gain_ratio: Histogram,
}

/// A metric, as the reference describes it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Description {
    /// Its name, with the unit.
    pub name: String,
    /// `counter`, `gauge` or `histogram`.
    pub kind: String,
    /// The names of its labels, sorted.
    pub labels: Vec<String>,
    /// What it says.
    pub help: String,
}

/// Every metric that a worker exports.
///
/// # Errors
/// When two metrics have one name.
pub fn descriptions() -> anyhow::Result<Vec<Description>> {
    let metrics = Metrics::new()?;
    // A family without a series is not gathered.
    metrics.jobs.answered.with_label_values(&["", "", ""]);
    metrics.jobs.stage_seconds.with_label_values(&[""]);
    metrics.jobs.retried.with_label_values(&[""]);
    metrics.jobs.parked.with_label_values(&[""]);
    let families = metrics.families(&Record::default(), &Work::default())?;
    let described = families.iter().map(|family| {
        let series = family.get_metric().first();
        let labels = series.map_or(&[][..], |series| series.get_label());
        Description {
            name: family.name().to_owned(),
            kind: format!("{:?}", family.get_field_type()).to_lowercase(),
            labels: labels.iter().map(|label| label.name().to_owned()).collect(),
            help: family.help().to_owned(),
        }
    });
    Ok(described.collect())
}

/// With the limits for 64, 256 and about 1,024 windows among them.
const GAIN_RATIOS: [f64; 13] = [
    1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 24.0, 32.0, 64.0,
];

/// Half a millisecond, doubled up to 524 seconds.
fn buckets() -> prometheus::Result<Vec<f64>> {
    exponential_buckets(0.0005, 2.0, 21)
}

impl Metrics {
    fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let metrics = Self {
            jobs: JobMetrics::new(&registry)?,
            confirms: register_int_counter_vec_with_registry!(
                "scorer_confirms_total",
                "Messages published, by outcome: confirmed or refused by RabbitMQ, or lost (no confirm came).",
                &["outcome"],
                registry
            )?,
            confirm_seconds: register_histogram_with_registry!(
                "scorer_confirm_duration_seconds",
                "Time from publishing a message to its confirm.",
                buckets()?,
                registry
            )?,
            warmups: register_int_counter_vec_with_registry!(
                "scorer_warmups_total",
                "Warm-ups, by outcome: succeeded or failed.",
                &["outcome"],
                registry
            )?,
            heartbeats: register_int_counter_vec_with_registry!(
                "scorer_heartbeats_total",
                "Heartbeats, by outcome: written to Redis, or failed.",
                &["outcome"],
                registry
            )?,
            store_calls: register_int_counter_vec_with_registry!(
                "scorer_store_calls_total",
                "Redis calls of jobs, by outcome: answered, refused (Redis too old, full, or without permission), failed (no answer), or skipped (for a second after a failure).",
                &["outcome"],
                registry
            )?,
            registry,
        };
        metrics.begin();
        Ok(metrics)
    }

    /// A series that first appears with its first event has no zero to rise from.
    fn begin(&self) {
        for outcome in Confirm::VARIANTS {
            self.confirms.with_label_values(&[<&str>::from(outcome)]);
        }
        for outcome in StoreCall::VARIANTS {
            self.store_calls.with_label_values(&[<&str>::from(outcome)]);
        }
        for decision in Decision::VARIANTS {
            for outcome in [["false", "false"], ["true", "false"], ["true", "true"]] {
                let labels = [decision.as_str(), outcome[0], outcome[1]];
                self.jobs.stops.with_label_values(&labels);
            }
        }
        for outcome in ["succeeded", "failed"] {
            self.warmups.with_label_values(&[outcome]);
        }
        for outcome in ["written", "failed"] {
            self.heartbeats.with_label_values(&[outcome]);
        }
    }

    fn families(&self, record: &Record, work: &Work) -> prometheus::Result<Vec<MetricFamily>> {
        let mut families = self.registry.gather();
        families.extend(present::families(record, work)?);
        families.sort_by(|a, b| a.name().cmp(b.name()));
        Ok(families)
    }
}

impl JobMetrics {
    fn new(registry: &Registry) -> prometheus::Result<Self> {
        Ok(Self {
            answered: register_int_counter_vec_with_registry!(
                "scorer_jobs_total",
                "Jobs answered, by kind, status and error code (scored where there is no error).",
                &["kind", "status", "code"],
                registry
            )?,
            seconds: register_histogram_with_registry!(
                "scorer_job_duration_seconds",
                "Time from a job's delivery to the confirm of its result.",
                buckets()?,
                registry
            )?,
            stage_seconds: register_histogram_vec_with_registry!(
                "scorer_stage_duration_seconds",
                "Time of a scored job in each stage: queued, fetch, decode, apply, forward, restore.",
                &["stage"],
                buckets()?,
                registry
            )?,
            duplicates: register_int_counter_with_registry!(
                "scorer_jobs_duplicates_total",
                "Jobs answered with a stored result.",
                registry
            )?,
            redelivered: register_int_counter_with_registry!(
                "scorer_jobs_redelivered_total",
                "Deliveries that RabbitMQ marked as redelivered.",
                registry
            )?,
            retried: register_int_counter_vec_with_registry!(
                "scorer_jobs_retried_total",
                "Jobs put into a retry queue, by error code.",
                &["code"],
                registry
            )?,
            parked: register_int_counter_vec_with_registry!(
                "scorer_jobs_parked_total",
                "Jobs dead-lettered (a copy was put into the dead-letter queue), by error code.",
                &["code"],
                registry
            )?,
            stops: register_int_counter_vec_with_registry!(
                "scorer_stops_total",
                "Evaluations that were decided before the plan's end, by decision (worse, futile), whether they were finished all the same, and whether the whole plan then contradicted the decision.",
                &["decision", "finished", "contradicted"],
                registry
            )?,
            expected_contradictions: register_counter_with_registry!(
                "scorer_stops_expected_contradictions_total",
                "Contradicted stops that the alpha of the jobs allows for, from all evaluations that might have stopped and are known to have a delta of at least 0.",
                registry
            )?,
            gain_ratio: register_histogram_with_registry!(
                "scorer_largest_gain_rms_ratio",
                "The largest gain of a window over the root mean square of the differences measured before it, of each plan of at least 32 windows that was measured whole. Stopping assumes at most 8 (64 windows), 10 (256), 14 (1,024).",
                GAIN_RATIOS.to_vec(),
                registry
            )?,
        })
    }
}

/// Counts an answered job, and how long it took since its delivery. A stored result has no stages.
pub fn answered(message: &ResultMessage, took: Duration, stored: bool) {
    let Some(metrics) = METRICS.get() else { return };
    let code = message.code().map_or("scored", Code::as_str);
    let labels = [message.kind.as_str(), message.status.as_str(), code];
    metrics.jobs.answered.with_label_values(&labels).inc();
    metrics.jobs.seconds.observe(took.as_secs_f64());
    if let (false, Body::Score(body)) = (stored, &message.body) {
        let times = &body.timings_ms;
        for (stage, millis) in [
            ("queued", times.queued),
            ("fetch", times.fetch),
            ("decode", times.decode),
            ("apply", times.apply),
            ("forward", times.forward),
            ("restore", times.restore),
        ] {
            let stage = metrics.jobs.stage_seconds.with_label_values(&[stage]);
            stage.observe(millis / 1e3);
        }
    }
}

/// Notes the largest gain ratio of a plan that was measured whole.
pub fn gain_ratio(ratio: f64) {
    if let Some(metrics) = METRICS.get() {
        metrics.jobs.gain_ratio.observe(ratio);
    }
}

/// Counts an evaluation that might have been decided early and was not, with its delta, or that was. This share of
/// those decided is finished.
pub fn might_stop(stop: Stop, finished_share: f64, outcome: Result<f64, &Stopped>) {
    let Some(metrics) = METRICS.get() else { return };
    // First, so that no scrape sees a contradiction without what allows for it.
    let allowed = allowed_contradictions(stop, finished_share, outcome);
    metrics.jobs.expected_contradictions.inc_by(allowed);
    if let Err(stopped) = outcome {
        let flag = |is: bool| if is { "true" } else { "false" };
        let (finished, contradicted) = (stopped.finished.is_some(), stopped.is_contradicted());
        let labels = [
            stopped.decision.as_str(),
            flag(finished),
            flag(contradicted),
        ];
        metrics.jobs.stops.with_label_values(&labels).inc();
    }
}

/// How many contradictions an evaluation allows for. One with a delta of at least 0 is decided to be worse, or below the
/// margin, with a probability of at most alpha, and then finished with that of the share.
fn allowed_contradictions(stop: Stop, finished_share: f64, outcome: Result<f64, &Stopped>) -> f64 {
    let finished = match outcome {
        Ok(delta) => {
            return if delta >= 0.0 {
                stop.alpha * finished_share
            } else {
                0.0
            };
        }
        Err(stopped) => stopped.finished,
    };
    match finished {
        // It stands for all that were decided like it and not finished.
        Some(Finished { delta }) if delta >= 0.0 => stop.alpha,
        Some(_) | None => 0.0,
    }
}

/// Adds one, if events are counted.
fn count(counter: impl FnOnce(&Metrics) -> IntCounter) {
    if let Some(metrics) = METRICS.get() {
        counter(metrics).inc();
    }
}

/// Counts a job that was answered with a stored result.
pub fn duplicate() {
    count(|metrics| metrics.jobs.duplicates.clone());
}

/// Counts a redelivered job.
pub fn redelivered() {
    count(|metrics| metrics.jobs.redelivered.clone());
}

/// Counts a job that was put into a retry queue.
pub fn retried(failure: Option<&Failure>) {
    let code = failure.map_or("none", |failure| failure.code.as_str());
    count(|metrics| metrics.jobs.retried.with_label_values(&[code]));
}

/// Counts a job that was dead-lettered.
pub fn parked(failure: &Failure) {
    let code = failure.code.as_str();
    count(|metrics| metrics.jobs.parked.with_label_values(&[code]));
}

/// What the broker said of a published message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum Confirm {
    /// It has the message.
    Confirmed,
    /// It did not take the message.
    Refused,
    /// No confirm came: it may or may not have the message.
    Lost,
}

/// Counts a published message, and how long its confirm took.
pub fn confirm(outcome: Confirm, took: Duration) {
    let Some(metrics) = METRICS.get() else { return };
    let outcome: &str = outcome.into();
    metrics.confirms.with_label_values(&[outcome]).inc();
    metrics.confirm_seconds.observe(took.as_secs_f64());
}

/// Counts a warm-up.
pub fn warmed(succeeded: bool) {
    let outcome = if succeeded { "succeeded" } else { "failed" };
    count(|metrics| metrics.warmups.with_label_values(&[outcome]));
}

/// Counts a heartbeat.
pub fn beat(written: bool) {
    let outcome = if written { "written" } else { "failed" };
    count(|metrics| metrics.heartbeats.with_label_values(&[outcome]));
}

/// What became of a job's call to Redis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum StoreCall {
    /// It was answered.
    Answered,
    /// Redis refused it.
    Refused,
    /// There was no answer.
    Failed,
    /// It was not made, so soon after a failure.
    Skipped,
}

/// Counts a job's call to Redis.
pub fn store_call(outcome: StoreCall) {
    let outcome: &str = outcome.into();
    count(|metrics| metrics.store_calls.with_label_values(&[outcome]));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_should_not_be_stopped_allows_for_contradictions() {
        let stop = Stop {
            alpha: 0.01,
            margin: 0.5,
            proven: false,
        };
        let stopped = |finished: Option<f64>| Stopped {
            decision: Decision::Futile,
            alpha: stop.alpha,
            margin: stop.margin,
            proven: stop.proven,
            of: 64,
            upper: 0.4,
            finished: finished.map(|delta| Finished { delta }),
        };
        let allowed = |outcome: Result<f64, &Stopped>| allowed_contradictions(stop, 0.05, outcome);
        for (delta, expected) in [(-0.1, 0.0), (0.0, 0.0005), (0.9, 0.0005)] {
            assert_eq!(allowed(Ok(delta)), expected, "measured whole: {delta}");
        }
        // The margin decides what is contradicted, and 0 what is allowed for.
        for (finished, expected, contradicted) in [
            (None, 0.0, false),
            (Some(-0.1), 0.0, false),
            (Some(0.1), 0.01, false),
            (Some(0.5), 0.01, true),
        ] {
            let stopped = stopped(finished);
            assert_eq!(allowed(Err(&stopped)), expected, "{finished:?}");
            assert_eq!(stopped.is_contradicted(), contradicted, "{finished:?}");
        }
    }
}
