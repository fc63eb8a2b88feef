//! The configuration: every key with its type, the four layers, and all problems at once.
//! The only reader of the environment. Defaults live in `config.default.toml`, with their reasons.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use toml::{Table, Value};
use url::Url;

pub use layers::Layers;
pub use units::format_duration;

mod layers;
mod units;

/// Keys of the contract that this version reads but cannot honour: ignoring them would be worse
/// than refusing, since who sets them relies on them.
const UNSUPPORTED: &[&str] = &[
    "model.update_url",
    "model.update_key",
    "amqp.tls.ca",
    "amqp.tls.cert",
    "amqp.tls.key",
    "redis.tls.ca",
    "redis.tls.cert",
    "redis.tls.key",
    "telemetry.metrics_addr",
    "telemetry.otlp_endpoint",
];

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
    /// Accept a package some of whose shards are missing.
    pub allow_shards_subset: bool,
}

/// The execution provider that is asked for; nothing else is ever used in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
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
        match self {
            Self::Cuda => "cuda",
            Self::Tensorrt => "tensorrt",
            Self::Cpu => "cpu",
        }
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
}

/// PEM files of a TLS connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct TlsConfig {
    /// Certificate authority to trust beside the system's.
    pub ca: Option<PathBuf>,
    /// Client certificate.
    pub cert: Option<PathBuf>,
    /// Its private key.
    pub key: Option<PathBuf>,
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
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
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
}

/// Everything that is wrong with a configuration, a line per key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError {
    /// `key: what is wrong`, in the order of the layers.
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
        let mut problems = Vec::new();
        let mut merged: Table = toml::from_str(layers::DEFAULTS).map_err(|e| ConfigError {
            problems: vec![format!("embedded defaults: {e}")],
        })?;
        if let Some(path) = layers.file {
            layers::merge_file(&mut merged, path, &mut problems);
        }
        layers::merge_environment(&mut merged, &layers.environment, &mut problems);
        layers::merge_set(&mut merged, layers.set, &mut problems);
        layers::check_types(&merged, &mut problems);
        if !problems.is_empty() {
            return Err(ConfigError { problems });
        }
        let deserialized = serde_path_to_error::deserialize(Value::Table(merged.clone()));
        let mut config: Self = deserialized.map_err(|e| ConfigError {
            problems: vec![format!("{}: {}", e.path(), e.inner().message())],
        })?;
        config.effective = merged;
        let problems = config.contradictions();
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(ConfigError { problems })
        }
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

    /// The effective configuration as TOML, passwords replaced.
    pub fn redacted(&self) -> String {
        let mut table = self.effective.clone();
        for section in ["amqp", "redis"] {
            if let Some(Value::String(url)) = table.get_mut(section).and_then(|s| s.get_mut("url"))
            {
                *url = redact(url);
            }
        }
        toml::to_string(&table).unwrap_or_default()
    }

    fn sets(&self, key: &str) -> bool {
        let mut parts = key.split('.');
        let section = parts.next().and_then(|name| self.effective.get(name));
        parts
            .fold(section, |value, name| value.and_then(|v| v.get(name)))
            .is_some()
    }

    fn contradictions(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut check = |sound: bool, problem: &str| {
            if !sound {
                problems.push(problem.to_owned());
            }
        };
        check(
            is_worker_id(&self.worker_id()),
            "worker.id: must be 1 to 128 of A-Z a-z 0-9 . _ -",
        );
        check(
            self.model.name.as_deref().is_none_or(is_model_name),
            "model.name: must match [a-z0-9][a-z0-9_-]{0,63}",
        );
        check(
            self.engine.micro_batch >= 1,
            "engine.micro_batch: must be at least 1",
        );
        check(
            self.engine.device_id >= 0,
            "engine.device_id: must be at least 0",
        );
        check(
            self.amqp.prefetch >= 1,
            "amqp.prefetch: must be at least 1; 0 would mean without bound",
        );
        check(
            self.amqp.poison_after >= 1,
            "amqp.poison_after: must be at least 1",
        );
        check(
            !self.amqp.namespace.is_empty(),
            "amqp.namespace: must not be empty",
        );
        check(
            !self.redis.namespace.is_empty(),
            "redis.namespace: must not be empty",
        );
        check(
            has_scheme(&self.amqp.url, &["amqp", "amqps"]),
            "amqp.url: must be an amqp:// or amqps:// URL",
        );
        check(
            has_scheme(&self.redis.url, &["redis", "rediss", "redis+unix", "unix"]),
            "redis.url: must be a redis:// or rediss:// URL",
        );
        check(
            self.heartbeat.ttl >= 2 * self.heartbeat.interval,
            "heartbeat.ttl: must be at least twice heartbeat.interval, or one late beat hides the worker",
        );
        check(
            !self.heartbeat.interval.is_zero(),
            "heartbeat.interval: must be greater than 0",
        );
        check(
            self.results.ttl >= Duration::from_secs(1),
            "results.ttl: must be at least 1s",
        );
        check(
            !self.worker.score_timeout.is_zero(),
            "worker.score_timeout: must be greater than 0",
        );
        check(
            self.amqp.retry_delays.iter().all(|d| !d.is_zero()),
            "amqp.retry_delays: every delay must be greater than 0",
        );
        for key in UNSUPPORTED {
            check(
                !self.sets(key),
                &format!("{key}: this version cannot honour it; leave it out"),
            );
        }
        for prefix in &self.candidates.allow {
            check(
                Url::parse(prefix).is_ok(),
                &format!("candidates.allow: {prefix:?} is not a URL prefix"),
            );
        }
        problems
    }
}

/// Whether the text can name a model.
pub fn is_model_name(name: &str) -> bool {
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (1..=64).contains(&name.len())
        && name.bytes().next().is_some_and(legal)
        && name.bytes().all(|b| legal(b) || b == b'_' || b == b'-')
}

fn is_worker_id(id: &str) -> bool {
    (1..=128).contains(&id.len())
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b'_' || b == b'-')
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

/// A URL without its password.
pub fn redact(text: &str) -> String {
    match Url::parse(text) {
        Ok(mut url) if url.password().is_some() => match url.set_password(Some("hidden")) {
            Ok(()) => url.into(),
            Err(()) => "hidden".into(),
        },
        Ok(_) => text.to_owned(),
        Err(_) => "hidden".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::layers::{DEFAULTS, KEYS};
    use super::*;

    fn load(environment: &[(&str, &str)], set: &[&str]) -> Result<Config, ConfigError> {
        let environment = environment
            .iter()
            .map(|(k, v)| ((*k).into(), (*v).into()))
            .collect();
        let set: Vec<String> = set.iter().map(|s| (*s).into()).collect();
        Config::load(&Layers {
            file: None,
            environment,
            set: &set,
        })
    }

    #[test]
    fn every_known_key_is_documented_in_the_defaults() {
        for (key, _) in KEYS {
            let last = key.rsplit('.').next().unwrap();
            assert!(
                DEFAULTS.contains(last),
                "{key} is missing in config.default.toml"
            );
        }
        load(&[], &[]).unwrap();
    }

    #[test]
    fn set_wins_over_the_environment_and_values_are_read_for_the_keys_type() {
        let config = load(
            &[
                ("SCORER_WORKER__ID", "7"),
                ("SCORER_AMQP__PREFETCH", "9"),
                ("PATH", "/bin"),
            ],
            &[
                "amqp.prefetch=2",
                "candidates.allow=[\"file:///\"]",
                "amqp.retry_delays=[\"100ms\"]",
            ],
        )
        .unwrap();
        assert_eq!(config.worker_id(), "7");
        assert_eq!(config.amqp.prefetch, 2);
        assert_eq!(config.candidates.allow, ["file:///"]);
        assert_eq!(config.amqp.retry_delays, [Duration::from_millis(100)]);
        assert_eq!(config.candidates.max_inline_bytes, 4 << 20);
    }

    #[test]
    fn all_problems_come_at_once_by_key() {
        let error = load(
            &[
                ("SCORER_AMQP__PREFECH", "1"),
                ("SCORER_ENGINE__THREADS", "many"),
            ],
            &["worker.score_timeout=fast", "heartbeat.ttl=5 s", "nonsense"],
        )
        .unwrap_err();
        let text = error.to_string();
        for key in [
            "amqp.prefech",
            "engine.threads",
            "worker.score_timeout",
            "heartbeat.ttl",
            "nonsense",
        ] {
            assert!(text.contains(key), "{text}");
        }
    }

    #[test]
    fn a_key_that_cannot_be_honoured_is_refused_and_not_ignored() {
        let error = load(&[], &["amqp.tls.ca=/x.pem", "model.update_url=https://x"]).unwrap_err();
        assert_eq!(error.problems.len(), 2, "{error}");
    }

    #[test]
    fn secrets_are_hidden() {
        let config = load(
            &[],
            &[
                "amqp.url=amqp://u:hunter2@h/x",
                "redis.url=redis://:hunter2@h/0",
            ],
        )
        .unwrap();
        assert!(
            !config.redacted().contains("hunter2"),
            "{}",
            config.redacted()
        );
    }
}
