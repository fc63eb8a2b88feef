//! What is wrong with a configuration although each layer's values passed their own checks: values that
//! only the whole configuration can judge, and keys that contradict each other.

use std::net::SocketAddr;

use url::Url;

use super::problem::Problem;
use super::redis_nodes::RedisNodes;
use super::{Config, Provider, RedisMode, TlsConfig, redact, service_urls, urls};
use crate::protocol::names::{is_model_name, is_worker_id};
use crate::protocol::signature::UpdateKey;

/// Bytes of `amqp.namespace`; the model's name, the queue's role and a delay follow it in a queue's name.
const LONGEST_NAMESPACE: usize = 100;

/// Checks the configuration as a whole. Keys that were `refused` are left out: the user did not choose
/// the value that stands in for a refused one.
pub(super) fn find(config: &Config, refused: &[Problem]) -> Vec<Problem> {
    let mut checks = Checks {
        refused,
        found: Vec::new(),
    };
    checks.names(config);
    checks.device(config);
    checks.heartbeat(config);
    checks.update_key(config.model.update_key.as_deref());
    checks.tls("amqp", &config.amqp.tls, &config.amqp.urls, "amqps");
    checks.tls("redis", &config.redis.tls, &config.redis.urls, "rediss");
    checks.telemetry(config);
    checks.urls(config);
    checks.found
}

struct Checks<'a> {
    refused: &'a [Problem],
    found: Vec<Problem>,
}

impl Checks<'_> {
    fn is_refused(&self, key: &str) -> bool {
        self.refused.iter().any(|problem| problem.key == key)
    }

    fn check(&mut self, sound: bool, key: &str, text: &str) {
        if !sound && !self.is_refused(key) {
            let (key, text) = (key.to_owned(), text.to_owned());
            self.found.push(Problem { key, text });
        }
    }

    fn accept(&mut self, key: &str, checked: Result<(), String>) {
        if let Err(why) = checked {
            self.check(false, key, &why);
        }
    }

    fn names(&mut self, config: &Config) {
        self.check(
            is_worker_id(&config.worker_id()),
            "worker.id",
            "must be 1 to 128 of A-Z a-z 0-9 . _ -",
        );
        self.check(
            config.model.name.as_deref().is_none_or(is_model_name),
            "model.name",
            "must match [a-z0-9][a-z0-9_-]{0,63}",
        );
        self.check(
            config.amqp.namespace.len() <= LONGEST_NAMESPACE,
            "amqp.namespace",
            "must be at most 100 bytes, so that names of queues stay within AMQP's 255",
        );
    }

    fn device(&mut self, config: &Config) {
        let engine = &config.engine;
        let other = engine.execution_provider != Provider::WebGpu;
        self.check(
            other || engine.device_id == 0,
            "engine.device_id",
            "must be 0 with engine.execution_provider = \"webgpu\", which chooses the GPU itself",
        );
        self.check(
            other || engine.gpu_memory_limit.is_none(),
            "engine.gpu_memory_limit",
            "must not be set with engine.execution_provider = \"webgpu\", which has no such limit",
        );
        self.check(
            other || !engine.tf32,
            "engine.tf32",
            "must be false with engine.execution_provider = \"webgpu\", which has no such arithmetic",
        );
    }

    fn heartbeat(&mut self, config: &Config) {
        let heartbeat = &config.heartbeat;
        let lasts = heartbeat.ttl >= 2 * heartbeat.interval;
        self.check(
            self.is_refused("heartbeat.interval") || lasts,
            "heartbeat.ttl",
            "must be at least twice heartbeat.interval, or one late heartbeat hides the worker",
        );
    }

    fn update_key(&mut self, key: Option<&str>) {
        if let Some(Err(why)) = key.map(UpdateKey::parse) {
            let text = format!("must be an Ed25519 public key, 32 bytes as base64: {why}");
            self.check(false, "model.update_key", &text);
        }
    }

    fn tls(&mut self, section: &str, tls: &TlsConfig, urls: &[String], scheme: &str) {
        let text = format!("needs a {scheme}:// URL in {section}.url");
        let is_tls = |url: &String| Url::parse(url).is_ok_and(|url| url.scheme() == scheme);
        let used = !tls.is_set() || urls.iter().all(is_tls);
        self.check(used, &format!("{section}.tls"), &text);
        if let Err((key, text)) = tls.read() {
            self.check(false, &format!("{section}.tls.{key}"), &text);
        }
    }

    fn telemetry(&mut self, config: &Config) {
        let address = config.telemetry.metrics_addr.as_deref();
        self.check(
            address.is_none_or(|text| text.parse::<SocketAddr>().is_ok()),
            "telemetry.metrics_addr",
            "must be an address and a port, such as 127.0.0.1:9464",
        );
        let endpoint = config.telemetry.otlp_endpoint.as_deref();
        self.check(
            endpoint.is_none_or(is_collector),
            "telemetry.otlp_endpoint",
            "must be the http:// or https:// URL of a collector without its path /v1/traces, such as http://127.0.0.1:4318",
        );
    }

    /// URLs that cannot be used, or parts of which would be ignored.
    fn urls(&mut self, config: &Config) {
        self.accept("amqp.url", service_urls::amqp_nodes(&config.amqp.urls));
        self.check(
            config.redis.mode != RedisMode::Cluster || !config.redis.namespace.contains('{'),
            "redis.namespace",
            "must not contain { with redis.mode = \"cluster\": braces choose the slot, and the model's name has them",
        );
        if !self.is_refused("redis.mode") {
            self.accept("redis.url", RedisNodes::of(&config.redis).map(drop));
        }
        if let Some(text) = &config.model.update_url {
            self.accept("model.update_url", urls::check_manifest(text));
        }
        for prefix in &config.candidates.allow {
            let checked = urls::check_prefix(prefix);
            let checked = checked.map_err(|why| format!("{:?}: {why}", redact(prefix)));
            self.accept("candidates.allow", checked);
        }
    }
}

/// Whether the text is the URL of an OTLP collector over HTTP. Credentials belong in a header, which is
/// never logged.
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
