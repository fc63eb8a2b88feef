//! The record that a worker publishes into Redis.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::message::V1;

/// A heartbeat record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "heartbeat.v1")]
#[expect(
    missing_docs,
    reason = "the fields are the contract's; schemas/README.md explains each"
)]
pub struct Record {
    pub v: V1,
    pub worker_id: String,
    pub incarnation: String,
    pub seq: u64,
    pub at_ms: u64,
    pub started_at_ms: u64,
    pub host: String,
    pub pid: u32,
    // Workers of before this was known do not say it.
    #[serde(default)]
    pub pid_space: Option<String>,
    pub build: Build,
    pub state: String,
    pub state_detail: String,
    pub ready: bool,
    pub accepting: bool,
    pub last_ready_at_ms: Option<u64>,
    pub last_state_change_at_ms: u64,
    pub warm: WarmFacts,
    pub model: ModelFacts,
    pub engine: EngineFacts,
    pub host_info: HostFacts,
    pub jobs: JobFacts,
    pub progress: ProgressFacts,
    pub broker: BrokerFacts,
    // Workers of before this was known do not say it.
    #[serde(default)]
    pub store: StoreFacts,
    pub memory: MemoryFacts,
    pub update: Option<UpdateFacts>,
    pub last_error: Option<LastError>,
}

/// What was built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct Build {
    pub version: String,
    pub git: Option<String>,
}

/// The last warm-up.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct WarmFacts {
    pub attempt: u64,
    pub last_at_ms: Option<u64>,
    pub last_ms: Option<u64>,
    pub baseline_loss: Option<f64>,
    pub next_retry_at_ms: Option<u64>,
    // Workers of before this was known do not say it.
    #[serde(default)]
    #[schemars(length(max = 32))]
    pub inert: Vec<String>,
    #[serde(default)]
    pub inert_count: u64,
}

/// The model that is served.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct ModelFacts {
    pub name: String,
    pub version: Option<u64>,
    pub weights_id: Option<String>,
    pub plan: Option<String>,
    pub shards: Vec<u64>,
    pub baseline_cache_entries: u64,
}

/// What runs it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct EngineFacts {
    pub execution_provider: String,
    pub device: String,
    pub precision: Option<String>,
    pub onnxruntime: Option<String>,
}

/// The machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct HostFacts {
    pub cpu_model: String,
    pub cores: u64,
    pub ram_bytes: u64,
    pub gpu_model: Option<String>,
    pub gpu_memory_bytes: Option<u64>,
    pub os: String,
    pub arch: String,
}

/// Jobs since the start.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct JobFacts {
    pub in_flight: u64,
    pub buffered: u64,
    pub scored: u64,
    pub rejected: u64,
    pub failed: u64,
    pub duplicates: u64,
    pub redelivered: u64,
    pub avg_ms: Option<f64>,
    pub p50_ms: Option<f64>,
    pub p95_ms: Option<f64>,
    pub last_scored_at_ms: Option<u64>,
}

/// Advanced by the computing thread itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct ProgressFacts {
    pub counter: u64,
    pub at_ms: u64,
    pub busy_ms: u64,
}

/// The link to RabbitMQ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct BrokerFacts {
    pub connected: bool,
    pub consuming: bool,
    pub blocked: bool,
    pub generation: u64,
}

/// What jobs ask of Redis.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct StoreFacts {
    pub ok: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

impl Default for StoreFacts {
    fn default() -> Self {
        Self {
            ok: true,
            last_error: None,
        }
    }
}

/// Memory of the process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct MemoryFacts {
    pub rss_bytes: u64,
}

/// How the worker follows its model.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct UpdateFacts {
    pub live_version: Option<u64>,
    pub looked_at_ms: Option<u64>,
    pub bytes_here: u64,
    pub bytes_wanted: u64,
    pub refused: Option<RefusedVersion>,
    pub failure: Option<String>,
}

/// A version that did not prove itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct RefusedVersion {
    pub version: u64,
    pub why: String,
    pub at_ms: u64,
}

/// The last thing that went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "see Record")]
pub struct LastError {
    pub code: String,
    pub message: String,
    pub at_ms: u64,
}
