//! What is true at the moment of a scrape: the metrics that are read from the worker's last record.

use std::time::Duration;

use prometheus::proto::MetricFamily;
use prometheus::{
    Registry, register_counter_vec_with_registry, register_counter_with_registry,
    register_gauge_vec_with_registry, register_gauge_with_registry,
};
use strum::VariantArray;

use crate::protocol::heartbeat::Record;
use crate::protocol::state::State;

/// Metrics of one scrape.
struct Present(Registry);

/// What the computing thread has done so far.
#[derive(Debug, Default)]
pub(super) struct Work {
    /// How long it has worked.
    pub(super) busy: Duration,
    /// Bytes of values between the parts of the graph that it keeps.
    pub(super) activation_bytes: u64,
    /// Micro-batches that began at the first part with another weight.
    pub(super) hits: u64,
    /// Micro-batches that began earlier.
    pub(super) misses: u64,
}

/// The metrics of a record and of the work.
pub(super) fn families(record: &Record, work: &Work) -> prometheus::Result<Vec<MetricFamily>> {
    let present = Present(Registry::new());
    present.worker(record)?;
    present.engine(record)?;
    present.state(record)?;
    present.broker(record)?;
    present.jobs(record, work.busy)?;
    present.activations(work)?;
    Ok(present.0.gather())
}

impl Present {
    fn gauge(&self, name: &str, help: &str, value: f64) -> prometheus::Result<()> {
        register_gauge_with_registry!(name, help, self.0).map(|gauge| gauge.set(value))
    }

    fn flag(&self, name: &str, help: &str, is: bool) -> prometheus::Result<()> {
        self.gauge(name, help, f64::from(u8::from(is)))
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "times, versions and bytes below 2^53"
    )]
    fn worker(&self, record: &Record) -> prometheus::Result<()> {
        let names = [
            "version",
            "git",
            "model",
            "worker_id",
            "execution_provider",
            "device",
        ];
        let build = register_gauge_vec_with_registry!(
            "scorer_build_info",
            "Always 1; the labels name the build, the model, the worker and its device.",
            &names,
            self.0
        )?;
        let (build_facts, engine) = (&record.build, &record.engine);
        let values: [&str; 6] = [
            &build_facts.version,
            build_facts.git.as_deref().unwrap_or_default(),
            &record.model.name,
            &record.worker_id,
            &engine.execution_provider,
            &engine.device,
        ];
        build.with_label_values(&values).set(1.0);
        self.gauge(
            "scorer_model_version",
            "Version of the weights that are served; 0 before a model is loaded.",
            record.model.version.unwrap_or_default() as f64,
        )?;
        self.gauge(
            "process_resident_memory_bytes",
            "Resident memory of the process.",
            record.memory.rss_bytes as f64,
        )?;
        self.gauge(
            "process_start_time_seconds",
            "Unix time at which the process started.",
            record.started_at_ms as f64 / 1e3,
        )
    }

    #[expect(clippy::cast_precision_loss, reason = "nodes of a graph")]
    fn engine(&self, record: &Record) -> prometheus::Result<()> {
        let engine = &record.engine;
        self.flag(
            "scorer_software_device",
            "1 if the device is software in place of a GPU, which is meant for tests, else 0.",
            engine.software_device,
        )?;
        let placement = engine.placement.unwrap_or_default();
        let nodes = register_gauge_vec_with_registry!(
            "scorer_graph_nodes",
            "Nodes of the graph by where they run; 0 before a model is loaded.",
            &["on"],
            self.0
        )?;
        for (on, count) in [("device", placement.device), ("host", placement.host)] {
            nodes.with_label_values(&[on]).set(count as f64);
        }
        Ok(())
    }

    #[expect(clippy::cast_precision_loss, reason = "a time below 2^53")]
    fn state(&self, record: &Record) -> prometheus::Result<()> {
        let states = register_gauge_vec_with_registry!(
            "scorer_state",
            "1 for the worker's current state, 0 for every other state.",
            &["state"],
            self.0
        )?;
        for state in State::VARIANTS {
            let is = record.state == state.as_str();
            let state = states.with_label_values(&[state.as_str()]);
            state.set(f64::from(u8::from(is)));
        }
        let detail = register_gauge_vec_with_registry!(
            "scorer_state_detail",
            "1 for the reason of the current state.",
            &["detail"],
            self.0
        )?;
        detail.with_label_values(&[&record.state_detail]).set(1.0);
        self.gauge(
            "scorer_state_change_timestamp_seconds",
            "Unix time of the last change of state.",
            record.last_state_change_at_ms as f64 / 1e3,
        )?;
        self.flag(
            "scorer_ready",
            "1 if the worker takes jobs, else 0.",
            record.ready,
        )
    }

    fn broker(&self, record: &Record) -> prometheus::Result<()> {
        let broker = &record.broker;
        self.flag(
            "scorer_broker_connected",
            "1 if the worker is connected to RabbitMQ, else 0.",
            broker.connected,
        )?;
        self.flag(
            "scorer_broker_consuming",
            "1 if RabbitMQ has confirmed the worker's consumer, else 0.",
            broker.consuming,
        )?;
        self.flag(
            "scorer_broker_blocked",
            "1 while RabbitMQ blocks publishing because it is short of memory or disk, else 0.",
            broker.blocked,
        )
    }

    #[expect(clippy::cast_precision_loss, reason = "a few jobs")]
    fn jobs(&self, record: &Record, busy: Duration) -> prometheus::Result<()> {
        self.gauge(
            "scorer_jobs_in_flight",
            "Jobs being scored.",
            record.jobs.in_flight as f64,
        )?;
        self.gauge(
            "scorer_jobs_buffered",
            "Jobs that wait behind those being scored.",
            record.jobs.buffered as f64,
        )?;
        let worked = register_counter_with_registry!(
            "scorer_device_busy_seconds_total",
            "Time the computing thread has spent working.",
            self.0
        )?;
        worked.inc_by(busy.as_secs_f64());
        Ok(())
    }

    #[expect(clippy::cast_precision_loss, reason = "bytes and counts below 2^53")]
    fn activations(&self, work: &Work) -> prometheus::Result<()> {
        self.gauge(
            "scorer_activation_bytes",
            "Bytes of the values between the parts of the graph that are kept.",
            work.activation_bytes as f64,
        )?;
        let lookups = register_counter_vec_with_registry!(
            "scorer_activation_lookups_total",
            "Micro-batches of candidates that leave the first part of the graph alone, by outcome: hit (computed from the first part with another weight on) or miss (from an earlier part on, because the values between were not kept).",
            &["outcome"],
            self.0
        )?;
        for (outcome, count) in [("hit", work.hits), ("miss", work.misses)] {
            lookups.with_label_values(&[outcome]).inc_by(count as f64);
        }
        Ok(())
    }
}
