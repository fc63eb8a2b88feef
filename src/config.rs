//! The configuration as the rest of the crate knows it: a typed section each, what keys mean
//! together, and all problems at once, each by its key. Which keys there are and what the layers
//! say of them is in `layers`, how durations and sizes are written in `units`. The defaults, with
//! their reasons, are in `config.default.toml`.

use crate::protocol::names::{is_model_name, is_worker_id};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use toml::{Table, Value};
use url::Url;

pub use layers::Layers;
pub use tls::TlsConfig;
pub use units::format_duration;
pub use urls::redact;

use crate::protocol::signature::UpdateKey;
use layers::{Merged, Problem};

mod keys;
mod layers;
pub(crate) mod service_urls;
pub mod tls;
pub(crate) mod units;
pub(crate) mod urls;

/// Bytes of `amqp.namespace`; a model's name, a queue's role and a delay come behind it.
const LONGEST_NAMESPACE: usize = 100;

/// Everything a worker or a command can be told.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    /// The process.
    pub worker: WorkerConfig,
    /// The model package.
    pub model: ModelConfig,
    /// ONNX Runtime.
    pub engine: EngineConfig,
    /// RabbitMQ.
    pub amqp: AmqpConfig,
    /// Redis.
    pub redis: RedisConfig,
    /// The record in Redis.
    pub heartbeat: HeartbeatConfig,
    /// Stored results.
    pub results: ResultsConfig,
    /// What strangers may send.
    pub candidates: CandidatesConfig,
    /// Logs.
    pub telemetry: TelemetryConfig,
    /// Names of the environment that an orchestrator made of its services' names.
    #[serde(skip)]
    pub passed_over: Vec<String>,
    #[serde(skip)]
    effective: Table,
}

/// `[worker]`
#[derive(Debug, Clone, Deserialize)]
pub struct WorkerConfig {
    /// Names the worker in Redis and to `ctl`; see [`Config::worker_id`].
    pub id: Option<String>,
    /// The longest one evaluation may take.
    #[serde(with = "units::duration")]
    pub score_timeout: Duration,
    /// What a drain leaves running jobs.
    #[serde(with = "units::duration")]
    pub drain_timeout: Duration,
}

/// `[model]`
#[derive(Debug, Clone, Deserialize)]
pub struct ModelConfig {
    /// The model's name, where the package is not to decide it.
    pub name: Option<String>,
    /// The package directory.
    pub dir: Option<PathBuf>,
    /// Where updated weights live; see [`Config::state_dir`].
    pub state_dir: Option<PathBuf>,
    /// URL of the update manifest.
    pub update_url: Option<String>,
    /// Time between two looks at it.
    #[serde(with = "units::duration")]
    pub update_interval: Duration,
    /// The key that it must be signed with, as [`UpdateKey`] reads it.
    pub update_key: Option<String>,
    /// Swap weights one worker after another.
    pub update_stagger: bool,
    /// Accept a package some of whose shards are missing.
    pub allow_shards_subset: bool,
}

/// The execution provider that is asked for; nothing else is ever used in its place.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Deserialize, strum::IntoStaticStr, strum::VariantNames,
)]
#[strum(serialize_all = "lowercase")]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    /// NVIDIA CUDA.
    Cuda,
    /// NVIDIA TensorRT.
    Tensorrt,
    /// The CPU.
    Cpu,
}

impl Provider {
    /// The word of the configuration.
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// ONNX Runtime's name, as results and heartbeats carry it.
    pub fn execution_provider(self) -> &'static str {
        match self {
            Self::Cuda => "CUDAExecutionProvider",
            Self::Tensorrt => "TensorrtExecutionProvider",
            Self::Cpu => "CPUExecutionProvider",
        }
    }
}

/// `[engine]`
#[derive(Debug, Clone, Deserialize)]
pub struct EngineConfig {
    /// What runs the model.
    pub execution_provider: Provider,
    /// Which device of its kind.
    pub device_id: i32,
    /// CPU threads; 0 = one per core.
    pub threads: usize,
    /// Windows in one forward pass.
    pub micro_batch: usize,
    /// The shared library of ONNX Runtime.
    pub onnxruntime: Option<PathBuf>,
    /// The most device memory ONNX Runtime's arena may take, in bytes.
    #[serde(default, with = "units::optional_size")]
    pub gpu_memory_limit: Option<u64>,
    /// Deterministic kernels only.
    pub deterministic: bool,
    /// Allow TensorFloat-32 on the GPU.
    pub tf32: bool,
    /// Time between two audits of weights, losses and package.
    #[serde(with = "units::duration")]
    pub audit_interval: Duration,
}

/// `[amqp]`
#[derive(Debug, Clone, Deserialize)]
pub struct AmqpConfig {
    /// `amqp://` or `amqps://` URL.
    pub url: String,
    /// Prefix of every exchange and queue.
    pub namespace: String,
    /// Unacknowledged jobs a worker holds.
    pub prefetch: u16,
    /// Declare the default queue of results.
    pub results_queue: bool,
    /// One retry queue per delay.
    #[serde(with = "units::duration_list")]
    pub retry_delays: Vec<Duration>,
    /// Process deaths after which a job is poisoned.
    pub poison_after: u32,
    /// Interval of AMQP heartbeats.
    #[serde(with = "units::duration")]
    pub heartbeat: Duration,
    /// Obey control messages.
    pub control: bool,
    /// TLS files.
    #[serde(default)]
    pub tls: TlsConfig,
}

/// `[redis]`
#[derive(Debug, Clone, Deserialize)]
pub struct RedisConfig {
    /// `redis://` or `rediss://` URL.
    pub url: String,
    /// Prefix of every key.
    pub namespace: String,
    /// TLS files.
    #[serde(default)]
    pub tls: TlsConfig,
}

/// `[heartbeat]`
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct HeartbeatConfig {
    /// Time between beats.
    #[serde(with = "units::duration")]
    pub interval: Duration,
    /// How long a record lives without a beat.
    #[serde(with = "units::duration")]
    pub ttl: Duration,
}

/// `[results]`
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct ResultsConfig {
    /// How long a stored result answers redeliveries.
    #[serde(with = "units::duration")]
    pub ttl: Duration,
}

/// `[candidates]`
#[derive(Debug, Clone, Deserialize)]
pub struct CandidatesConfig {
    /// URL prefixes that may be fetched.
    pub allow: Vec<String>,
    /// Allow private, loopback and link-local addresses.
    pub allow_private: bool,
    /// The largest inline candidate, bytes.
    #[serde(with = "units::size")]
    pub max_inline_bytes: u64,
    /// The largest fetched candidate, bytes.
    #[serde(with = "units::size")]
    pub max_bytes: u64,
    /// The most bytes all of a candidate's streams may inflate to.
    #[serde(with = "units::size")]
    pub max_inflated_bytes: u64,
    /// The most entries a candidate may touch.
    pub max_entries: u64,
    /// The longest a fetch may take, from the first look-up to the last byte.
    #[serde(with = "units::duration")]
    pub fetch_timeout: Duration,
    /// The least that a server may send of a candidate or of an update, bytes per second.
    #[serde(with = "units::size")]
    pub min_rate: u64,
    /// The most that is kept of fetched candidates, bytes.
    #[serde(with = "units::size")]
    pub cache_bytes: u64,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, strum::VariantNames)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub enum LogFormat {
    /// Pretty on a terminal, else JSON.
    Auto,
    /// For people.
    Pretty,
    /// For programs.
    Json,
}

/// `[telemetry]`
#[derive(Debug, Clone, Deserialize)]
pub struct TelemetryConfig {
    /// A `tracing` filter.
    pub log: String,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Address and port where Prometheus reads.
    pub metrics_addr: Option<String>,
    /// OpenTelemetry collector that takes spans over HTTP.
    pub otlp_endpoint: Option<String>,
}

/// Everything that is wrong with a configuration, a line per key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError {
    /// `key: what is wrong (where it was said)`, in the order of the layers; last what keys that
    /// are sound by themselves cannot be together.
    pub problems: Vec<String>,
}

impl std::fmt::Display for ConfigError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "the configuration has {} problem(s):",
            self.problems.len()
        )?;
        self.problems.iter().try_for_each(|p| write!(f, "\n  {p}"))
    }
}

impl Config {
    /// Merges the layers and checks every key.
    ///
    /// # Errors
    /// All problems at once, each by its key.
    pub fn load(layers: &Layers<'_>) -> Result<Self, ConfigError> {
        let Merged {
            table,
            mut problems,
            passed_over,
        } = Merged::of(layers);
        match Self::typed(table) {
            Err(problem) => problems.push(problem),
            Ok(config) => {
                problems.extend(config.contradictions(&problems));
                if problems.is_empty() {
                    return Ok(Self {
                        passed_over,
                        ..config
                    });
                }
            }
        }
        let problems = problems.iter().map(ToString::to_string).collect();
        Err(ConfigError { problems })
    }

    /// Checked values always fit; should a key's bounds and its field part, the key is named.
    fn typed(table: Table) -> Result<Self, Problem> {
        let deserialized = serde_path_to_error::deserialize(Value::Table(table.clone()));
        let config: Self = deserialized.map_err(|e| Problem {
            key: e.path().to_string(),
            text: e.inner().message().to_owned(),
        })?;
        Ok(Self {
            effective: table,
            ..config
        })
    }

    /// The worker's name: `worker.id`, else the host's name with provider and device.
    pub fn worker_id(&self) -> String {
        self.worker.id.clone().unwrap_or_else(|| {
            let host = host_name();
            let engine = &self.engine;
            format!(
                "{host}-{}{}",
                engine.execution_provider.as_str(),
                engine.device_id
            )
        })
    }

    /// The worker's own folder for updated weights; none without a package.
    pub fn state_dir(&self) -> Option<PathBuf> {
        let beside = || Some(self.model.dir.as_ref()?.parent()?.join("state"));
        let folder = self.model.state_dir.clone().or_else(beside)?;
        Some(folder.join(self.worker_id()))
    }

    /// Where fetched candidates are kept; none without a package.
    pub fn candidates_dir(&self) -> Option<PathBuf> {
        Some(self.state_dir()?.join("candidates"))
    }

    /// The effective configuration as TOML, secrets replaced: passwords, and what comes behind the
    /// manifest's path, which may be a token.
    pub fn redacted(&self) -> String {
        let mut table = self.effective.clone();
        if let Some(Value::String(url)) =
            table.get_mut("model").and_then(|s| s.get_mut("update_url"))
            && let Some((place, _)) = url.split_once('?')
        {
            *url = format!("{place}?hidden");
        }
        for section in ["amqp", "redis"] {
            if let Some(Value::String(url)) = table.get_mut(section).and_then(|s| s.get_mut("url"))
            {
                *url = redact(url);
            }
        }
        toml::to_string(&table).unwrap_or_default()
    }

    /// What is wrong although every value is sound by itself. Keys that were refused are left out:
    /// nobody chose what stands in their place.
    fn contradictions(&self, refused: &[Problem]) -> Vec<Problem> {
        let mut found = Vec::new();
        let refused = |key: &str| refused.iter().any(|problem| problem.key == key);
        let mut check = |sound: bool, key: &str, text: &str| {
            if !sound && !refused(key) {
                let (key, text) = (key.to_owned(), text.to_owned());
                found.push(Problem { key, text });
            }
        };
        check(
            is_worker_id(&self.worker_id()),
            "worker.id",
            "must be 1 to 128 of A-Z a-z 0-9 . _ -",
        );
        check(
            self.model.name.as_deref().is_none_or(is_model_name),
            "model.name",
            "must match [a-z0-9][a-z0-9_-]{0,63}",
        );
        check(
            self.amqp.namespace.len() <= LONGEST_NAMESPACE,
            "amqp.namespace",
            "must be at most 100 bytes: with it, names of queues must stay below AMQP's 255",
        );
        check(
            refused("heartbeat.interval") || self.heartbeat.ttl >= 2 * self.heartbeat.interval,
            "heartbeat.ttl",
            "must be at least twice heartbeat.interval, or one late beat hides the worker",
        );
        let key = self.model.update_key.as_deref().map(UpdateKey::parse);
        if let Some(Err(why)) = key {
            let text = format!("must be an Ed25519 public key, 32 bytes as base64: {why}");
            check(false, "model.update_key", &text);
        }
        for (section, tls, url, scheme) in [
            ("amqp", &self.amqp.tls, &self.amqp.url, "amqps"),
            ("redis", &self.redis.tls, &self.redis.url, "rediss"),
        ] {
            let text = format!("needs a {scheme}:// URL in {section}.url");
            let used = !tls.is_set() || has_scheme(url, &[scheme]);
            check(used, &format!("{section}.tls"), &text);
            if let Err((key, text)) = tls.read() {
                check(false, &format!("{section}.tls.{key}"), &text);
            }
        }
        let address = self.telemetry.metrics_addr.as_deref();
        check(
            address.is_none_or(|text| text.parse::<SocketAddr>().is_ok()),
            "telemetry.metrics_addr",
            "must be an address and a port, such as 127.0.0.1:9464",
        );
        let endpoint = self.telemetry.otlp_endpoint.as_deref();
        check(
            endpoint.is_none_or(is_collector),
            "telemetry.otlp_endpoint",
            "must be the http:// or https:// URL of a collector without its path /v1/traces, such as http://127.0.0.1:4318",
        );
        for (key, why) in self.unusable_urls() {
            check(false, key, &why);
        }
        found
    }

    /// URLs that cannot be, or of which something would be ignored.
    fn unusable_urls(&self) -> Vec<(&'static str, String)> {
        let mut found = Vec::new();
        let mut note =
            |key, checked: Result<(), String>| found.extend(checked.err().map(|why| (key, why)));
        note("amqp.url", service_urls::amqp(&self.amqp.url).map(drop));
        note("redis.url", service_urls::redis(&self.redis.url).map(drop));
        if let Some(text) = &self.model.update_url {
            note("model.update_url", urls::check_manifest(text));
        }
        for prefix in &self.candidates.allow {
            let checked = urls::check_prefix(prefix);
            note(
                "candidates.allow",
                checked.map_err(|why| format!("{:?}: {why}", redact(prefix))),
            );
        }
        found
    }
}

/// What runs the model, in words.
pub fn device_name(config: &Config) -> String {
    match config.engine.execution_provider {
        Provider::Cpu => "cpu".into(),
        Provider::Cuda | Provider::Tensorrt => format!("cuda:{}", config.engine.device_id),
    }
}

/// The host's name, with what no key may carry replaced.
pub fn host_name() -> String {
    let name = sysinfo::System::host_name().unwrap_or_else(|| "localhost".into());
    name.chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '.' || c == '-' {
                c
            } else {
                '-'
            }
        })
        .collect()
}

fn has_scheme(text: &str, schemes: &[&str]) -> bool {
    Url::parse(text).is_ok_and(|url| schemes.contains(&url.scheme()))
}

/// A place for OTLP over HTTP; who we are there is said by a header, which the log never shows.
fn is_collector(text: &str) -> bool {
    Url::parse(text).is_ok_and(|url| {
        let bare = url.username().is_empty() && url.password().is_none() && url.query().is_none();
        matches!(url.scheme(), "http" | "https")
            && url.has_host()
            && bare
            && url.fragment().is_none()
            && !url.path().trim_end_matches('/').ends_with("/v1/traces")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(set: &[&str]) -> Result<Config, ConfigError> {
        let set: Vec<String> = set.iter().map(|s| (*s).into()).collect();
        Config::load(&Layers {
            set: &set,
            ..Layers::default()
        })
    }

    /// The keys of the problems, in order.
    fn refused(set: &[&str]) -> Vec<String> {
        let problems = load(set).unwrap_err().problems;
        problems
            .iter()
            .map(|p| p.split(':').next().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn problems_of_all_kinds_in_all_four_layers_come_at_once() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "[engine]\nexecution_provider = \"x\"\n[telemetry]\nlog_format = \"y\"\n";
        std::fs::write(&file, text).unwrap();
        let error = Config::load(&Layers {
            file: Some(file.path()),
            environment: vec![
                ("SCORER_AMQP__PREFETCH".into(), "65536".into()),
                ("SCORER_HEARTBEAT__INTERVAL".into(), "3s".into()),
            ],
            set: &["worker.score_timeout=fast".into()],
        })
        .unwrap_err();
        let file = file.path().display();
        assert_eq!(
            error.problems,
            [
                format!("engine.execution_provider: must be cuda or tensorrt or cpu, it is \"x\" (--config {file})"),
                format!("telemetry.log_format: must be auto or pretty or json, it is \"y\" (--config {file})"),
                "amqp.prefetch: must be from 1 to 65535, it is 65536 (SCORER_AMQP__PREFETCH)".into(),
                "worker.score_timeout: \"fast\" is not a duration such as 250ms, 5s, 5m or 24h (--set)".into(),
                // The default of 5 s is too short for the environment's interval.
                "heartbeat.ttl: must be at least twice heartbeat.interval, or one late beat hides the worker".into(),
            ]
        );
    }

    #[test]
    fn a_refused_key_is_not_blamed_for_what_stands_in_its_place() {
        assert_eq!(
            refused(&["heartbeat.interval=3s", "heartbeat.ttl=ages"]),
            ["heartbeat.ttl"]
        );
        assert_eq!(
            refused(&["heartbeat.ttl=1s", "heartbeat.interval=often"]),
            ["heartbeat.interval"]
        );
    }

    #[test]
    fn what_keys_cannot_be_is_named() {
        for (set, key) in [
            ("worker.id=a b", "worker.id"),
            ("model.name=A", "model.name"),
            ("amqp.url=http://h", "amqp.url"),
            ("amqp.url=amqp://h/v?connection_timeout=5", "amqp.url"),
            ("redis.url=redis://h/abc", "redis.url"),
            ("redis.url=redis://h?database=3", "redis.url"),
            ("candidates.allow=[\"https://h/?x\"]", "candidates.allow"),
            ("redis.url=localhost", "redis.url"),
            ("model.update_url=/srv/manifest.json", "model.update_url"),
            ("model.update_url=https://u:p@h/m.json", "model.update_url"),
            ("model.update_key=c2hvcnQ=", "model.update_key"),
            ("heartbeat.ttl=1999ms", "heartbeat.ttl"),
            ("candidates.allow=[\"/srv\"]", "candidates.allow"),
        ] {
            assert_eq!(refused(&[set]), [key], "{set}");
        }
    }

    #[test]
    fn a_collector_is_a_place_without_secrets() {
        let set = |url: &str| format!("telemetry.otlp_endpoint={url}");
        for fit in ["http://h:4318", "https://h/otlp/", "http://[::1]:4318"] {
            assert!(load(&[&set(fit)]).is_ok(), "{fit}");
        }
        for unfit in [
            "h:4318",
            "grpc://h:4317",
            "http://me:secret@h:4318",
            "http://h:4318/?key=secret",
            "http://h:4318/v1/traces",
            "http://h:4318/v1/traces/",
            "http://h:4318/#x",
        ] {
            assert_eq!(refused(&[&set(unfit)]), ["telemetry.otlp_endpoint"]);
        }
    }

    #[test]
    fn what_tls_is_to_use_is_there_and_used() {
        let missing = ["amqp.url=amqps://h/x", "amqp.tls.ca=/nowhere/ca.pem"];
        assert_eq!(refused(&missing), ["amqp.tls.ca"]);
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let cert = file("cert.pem", "-----BEGIN CERTIFICATE-----");
        let plain = format!("redis.tls.ca={cert}");
        assert_eq!(refused(&[&plain]), ["redis.tls"]);
        let half = format!("redis.tls.cert={cert}");
        assert_eq!(refused(&["redis.url=rediss://h", &half]), ["redis.tls.key"]);
        let other = format!("redis.tls.key={cert}");
        assert_eq!(
            refused(&["redis.url=rediss://h", &half, &other]),
            ["redis.tls.key"]
        );
        let key = file("key.pem", "-----BEGIN PRIVATE KEY-----");
        let key = format!("redis.tls.key={key}");
        load(&["redis.url=rediss://h", &half, &key, &plain]).unwrap();
    }

    #[test]
    fn a_drain_may_wait_for_nothing_and_the_ladder_may_have_no_rungs() {
        let config = load(&["worker.drain_timeout=0s", "amqp.retry_delays=[]"]).unwrap();
        assert_eq!(config.worker.drain_timeout, Duration::ZERO);
        assert!(config.amqp.retry_delays.is_empty());
    }

    #[test]
    fn secrets_are_hidden() {
        let config = load(&[
            "amqp.url=amqp://u:hunter2@h/x",
            "redis.url=redis://:hunter2@h/0",
            "model.update_url=https://h/m.json?token=hunter2",
        ])
        .unwrap();
        assert!(
            !config.redacted().contains("hunter2"),
            "{}",
            config.redacted()
        );
    }
}
