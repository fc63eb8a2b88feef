//! The sections of the configuration, typed.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::tls::TlsConfig;
use super::units;

/// `[worker]`
#[derive(Debug, Clone, Deserialize)]
pub struct WorkerConfig {
    /// Names the worker in Redis and to `ctl`; see [`super::Config::worker_id`].
    pub id: Option<String>,
    /// The longest one evaluation may take.
    #[serde(deserialize_with = "units::duration")]
    pub score_timeout: Duration,
    /// What a drain leaves running jobs.
    #[serde(deserialize_with = "units::duration")]
    pub drain_timeout: Duration,
    /// The share of stopped evaluations that are measured to the end all the same, 0 to 1.
    pub finish_stopped: f64,
}

/// `[model]`
#[derive(Debug, Clone, Deserialize)]
pub struct ModelConfig {
    /// The model's name, where the package is not to decide it.
    pub name: Option<String>,
    /// The package directory.
    pub dir: Option<PathBuf>,
    /// Where updated weights live; see [`super::Config::state_dir`].
    pub state_dir: Option<PathBuf>,
    /// URL of the update manifest.
    pub update_url: Option<String>,
    /// Time between two looks at it.
    #[serde(deserialize_with = "units::duration")]
    pub update_interval: Duration,
    /// The key that it must be signed with, as base64.
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
    /// Any GPU with a Vulkan driver, through WebGPU.
    WebGpu,
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
            Self::WebGpu => "WebGpuExecutionProvider",
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
    /// The plugin library of the provider `webgpu`.
    pub webgpu_plugin: Option<PathBuf>,
    /// Parts the graph is cut into; 0 = as many as pay, otherwise at most so many.
    pub parts: usize,
    /// The most bytes of values between the parts that are kept.
    #[serde(deserialize_with = "units::size")]
    pub activation_cache: u64,
    /// CPU threads; 0 = one per core.
    pub threads: usize,
    /// Windows in one forward pass.
    pub micro_batch: usize,
    /// The shared library of ONNX Runtime.
    pub onnxruntime: Option<PathBuf>,
    /// The most device memory ONNX Runtime's arena may take, in bytes.
    #[serde(default, deserialize_with = "units::optional_size")]
    pub gpu_memory_limit: Option<u64>,
    /// Deterministic kernels only.
    pub deterministic: bool,
    /// Allow TensorFloat-32 on the GPU.
    pub tf32: bool,
    /// Time between two audits of weights, losses and package.
    #[serde(deserialize_with = "units::duration")]
    pub audit_interval: Duration,
}

/// `[amqp]`
#[derive(Debug, Clone, Deserialize)]
pub struct AmqpConfig {
    /// `amqp://` or `amqps://` URLs, one for each node of the cluster.
    #[serde(rename = "url", deserialize_with = "units::texts")]
    pub urls: Vec<String>,
    /// How long the broker lets a worker hold a job.
    #[serde(deserialize_with = "units::duration")]
    pub consumer_timeout: Duration,
    /// Prefix of every exchange and queue.
    pub namespace: String,
    /// Unacknowledged jobs a worker holds.
    pub prefetch: u16,
    /// Declare the default queue of results.
    pub results_queue: bool,
    /// One retry queue per delay.
    #[serde(deserialize_with = "units::durations")]
    pub retry_delays: Vec<Duration>,
    /// Process deaths after which a job is poisoned.
    pub poison_after: u32,
    /// Interval of AMQP heartbeats.
    #[serde(deserialize_with = "units::duration")]
    pub heartbeat: Duration,
    /// Obey control messages.
    pub control: bool,
    /// TLS files.
    #[serde(default)]
    pub tls: TlsConfig,
}

/// What `redis.url` leads to.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Deserialize, strum::IntoStaticStr, strum::VariantNames,
)]
#[strum(serialize_all = "lowercase")]
#[serde(rename_all = "lowercase")]
pub enum RedisMode {
    /// One server.
    Single,
    /// Sentinels, which name the master.
    Sentinel,
    /// Some nodes of a cluster, which name the others.
    Cluster,
}

/// `[redis]`
#[derive(Debug, Clone, Deserialize)]
pub struct RedisConfig {
    /// `redis://` or `rediss://` URLs, those of several nodes but in the mode `single`.
    #[serde(rename = "url", deserialize_with = "units::texts")]
    pub urls: Vec<String>,
    /// What they lead to.
    pub mode: RedisMode,
    /// The sentinels' name of the master.
    pub master: String,
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
    #[serde(deserialize_with = "units::duration")]
    pub interval: Duration,
    /// How long a record lives without a beat.
    #[serde(deserialize_with = "units::duration")]
    pub ttl: Duration,
}

/// `[results]`
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct ResultsConfig {
    /// How long a stored result answers redeliveries.
    #[serde(deserialize_with = "units::duration")]
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
    #[serde(deserialize_with = "units::size")]
    pub max_inline_bytes: u64,
    /// The largest fetched candidate, bytes.
    #[serde(deserialize_with = "units::size")]
    pub max_bytes: u64,
    /// The most bytes all of a candidate's streams may inflate to.
    #[serde(deserialize_with = "units::size")]
    pub max_inflated_bytes: u64,
    /// The most entries a candidate may touch.
    pub max_entries: u64,
    /// The most members of a merge.
    pub max_members: usize,
    /// The longest a fetch may take, from the first look-up to the last byte.
    #[serde(deserialize_with = "units::duration")]
    pub fetch_timeout: Duration,
    /// The least that a server may send of a candidate or of an update, bytes per second.
    #[serde(deserialize_with = "units::size")]
    pub min_rate: u64,
    /// The most that is kept of fetched candidates, bytes.
    #[serde(deserialize_with = "units::size")]
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
