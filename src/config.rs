//! The configuration: loaded from its layers, checked, and typed, with all problems reported at once.
//! The defaults, with their reasons, are in `config.default.toml`.

mod contradictions;
mod keys;
mod layers;
mod problem;
pub(crate) mod redis_nodes;
mod sections;
mod service_links;
pub(crate) mod service_urls;
pub mod tls;
pub(crate) mod units;
pub(crate) mod urls;

use std::path::PathBuf;

use serde::Deserialize;
use toml::{Table, Value};

pub use layers::Layers;
pub use sections::{
    AmqpConfig, CandidatesConfig, EngineConfig, HeartbeatConfig, LogFormat, ModelConfig, Provider,
    RedisConfig, RedisMode, ResultsConfig, TelemetryConfig, WorkerConfig,
};
pub use tls::TlsConfig;
pub use units::format_duration;
pub use urls::{redact, redact_all};

use layers::Merged;
use problem::Problem;

/// The name of every key, in the order of `config.default.toml`.
pub fn key_names() -> impl Iterator<Item = &'static str> {
    keys::KEYS.iter().map(|(name, _)| *name)
}

/// The configuration of a worker or a command.
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
    /// Limits of candidates.
    pub candidates: CandidatesConfig,
    /// Logs.
    pub telemetry: TelemetryConfig,
    /// Environment variables that an orchestrator set for its services, and that were ignored.
    #[serde(skip)]
    pub passed_over: Vec<String>,
    #[serde(skip)]
    effective: Table,
}

/// Everything that is wrong with a configuration, a line per key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError {
    /// `key: what is wrong (where it was given)`, in the order of the layers; contradictions between keys
    /// come last.
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
                problems.extend(contradictions::find(&config, &problems));
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

    /// Checked values always fit; if a key's bounds and its field's type disagree, the key is named.
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

    /// The worker's name: `worker.id`, else host name, provider and device.
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

    /// The effective configuration as TOML, with passwords hidden, and the query of the manifest's URL,
    /// which may hold a token.
    pub fn redacted(&self) -> String {
        let mut table = self.effective.clone();
        if let Some(Value::String(url)) =
            table.get_mut("model").and_then(|s| s.get_mut("update_url"))
            && let Some((place, _)) = url.split_once('?')
        {
            *url = format!("{place}?hidden");
        }
        for section in ["amqp", "redis"] {
            let urls = match table.get_mut(section).and_then(|s| s.get_mut("url")) {
                Some(Value::Array(urls)) => urls.as_mut_slice(),
                Some(url) => std::slice::from_mut(url),
                None => &mut [],
            };
            for url in urls {
                if let Value::String(url) = url {
                    *url = redact(url);
                }
            }
        }
        toml::to_string(&table).unwrap_or_default()
    }
}

/// The device that runs the model.
pub fn device_name(config: &Config) -> String {
    config.engine.device_name()
}

impl EngineConfig {
    /// The device that runs the model.
    pub fn device_name(&self) -> String {
        match self.execution_provider {
            Provider::Cpu => "cpu".into(),
            provider @ (Provider::Cuda | Provider::WebGpu) => {
                format!("{}:{}", provider.as_str(), self.device_id)
            }
        }
    }
}

/// The host's name, with characters that a key may not contain replaced.
pub fn host_name() -> String {
    let system = rustix::system::uname();
    let name = system.nodename().to_string_lossy();
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '-';
    name.replace(|c| !legal(c), "-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

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
                format!("engine.execution_provider: must be cuda or webgpu or cpu, it is \"x\" (--config {file})"),
                format!("telemetry.log_format: must be auto or pretty or json, it is \"y\" (--config {file})"),
                "amqp.prefetch: must be from 1 to 65535, it is 65536 (SCORER_AMQP__PREFETCH)".into(),
                "worker.score_timeout: \"fast\" is not a duration such as 250ms, 5s, 5m or 24h (--set)".into(),
                // The default of 5 s is too short for the environment's interval.
                "heartbeat.ttl: must be at least twice heartbeat.interval, or one late heartbeat hides the worker".into(),
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
            (
                "engine.execution_provider=tensorrt",
                "engine.execution_provider",
            ),
            ("model.name=A", "model.name"),
            ("amqp.url=http://h", "amqp.url"),
            ("amqp.url=amqp://h/v?connection_timeout=5", "amqp.url"),
            ("amqp.url=[\"amqp://h\", \"amqp://h:5672\"]", "amqp.url"),
            ("amqp.url=[\"amqp://a\", \"amqp://b/v\"]", "amqp.url"),
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
    fn a_cluster_has_one_database_and_the_model_chooses_the_slot() {
        let cluster = "redis.mode=cluster";
        let several = r#"redis.url=["redis://a", "redis://b/0"]"#;
        let config = load(&[cluster, several]).unwrap();
        assert_eq!(config.redis.urls, ["redis://a", "redis://b/0"]);
        assert_eq!(refused(&[several]), ["redis.url"]);
        assert_eq!(refused(&[cluster, "redis.url=redis://a/1"]), ["redis.url"]);
        let braces = "redis.namespace={}";
        assert_eq!(refused(&[cluster, braces]), ["redis.namespace"]);
        load(&[braces]).unwrap();
    }

    #[test]
    fn webgpu_chooses_the_gpu_itself() {
        let webgpu = "engine.execution_provider=webgpu";
        let config = load(&[webgpu]).unwrap();
        assert_eq!(device_name(&config), "webgpu:0");
        let second = "engine.device_id=1";
        for (set, key) in [
            (second, "engine.device_id"),
            ("engine.gpu_memory_limit=1GiB", "engine.gpu_memory_limit"),
            ("engine.tf32=true", "engine.tf32"),
        ] {
            assert_eq!(refused(&[webgpu, set]), [key]);
        }
        load(&["engine.execution_provider=cuda", second]).unwrap();
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
        let mixed = [
            "amqp.url=[\"amqp://a\", \"amqp://b\"]",
            &format!("amqp.tls.ca={cert}"),
        ];
        assert_eq!(refused(&mixed), ["amqp.tls"]);
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

    #[test]
    fn a_list_of_nodes_is_a_list_in_every_layer_and_hides_each_password() {
        let two = r#"["amqp://u:hunter2@a/x", "amqp://u:hunter2@b/x"]"#;
        let set = [format!("amqp.url={two}")];
        let environment = vec![("SCORER_AMQP__URL".into(), format!(" {two}").into())];
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, format!("amqp.url = {two}")).unwrap();
        let path = file.path();
        for layers in [
            Layers {
                set: &set,
                ..Layers::default()
            },
            Layers {
                environment,
                ..Layers::default()
            },
            Layers {
                file: Some(path),
                ..Layers::default()
            },
        ] {
            let config = Config::load(&layers).unwrap();
            let expected = ["amqp://u:hunter2@a/x", "amqp://u:hunter2@b/x"];
            assert_eq!(config.amqp.urls, expected);
            let shown = r#"url = ["amqp://u:hidden@a/x", "amqp://u:hidden@b/x"]"#;
            assert!(config.redacted().contains(shown), "{}", config.redacted());
        }
        for unfit in [r#"["amqp://u:hunter2@a"#, r#"["amqp://u:hunter2@a"] x"#] {
            let unfit = format!("amqp.url={unfit}");
            let problems = load(&[&unfit]).unwrap_err().problems;
            assert!(problems[0].contains("no TOML array"), "{problems:?}");
            assert!(!problems[0].contains("hunter2"), "{problems:?}");
        }
    }
}
