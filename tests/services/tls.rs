//! Both services behind TLS that asks for a certificate, from an authority of our own.

use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use scorer::config::{Config, Layers};
use scorer::store::FleetStore;
use testkit::aggregator::runtime;
use testkit::broker::Rabbit;
use testkit::case::honest_job;
use testkit::folder::Folder;
use testkit::port::free_port;
use testkit::redis_server::Redis;
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually};
use testkit::worker::Settings;

/// The files of an authority, and of what it has signed.
struct Authority {
    folder: Folder,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("an authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // What it signs has another name, or would seem to be signed by itself.
        params
            .distinguished_name
            .push(DnType::CommonName, "authority");
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("an authority");
        let folder = Folder::new("tls");
        std::fs::write(folder.join("ca.pem"), issuer.pem()).expect("a writable folder");
        Self { folder, issuer }
    }

    fn sign(&self, name: &str) {
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let params = CertificateParams::new(names).expect("a certificate");
        let key = KeyPair::generate().expect("a key");
        let signed = params.signed_by(&key, &self.issuer).expect("a signature");
        let write = |kind: &str, text: String| {
            std::fs::write(self.folder.join(&format!("{name}-{kind}.pem")), text)
                .expect("a writable folder");
        };
        write("cert", signed.pem());
        write("key", key.serialize_pem());
    }

    fn file(&self, name: &str) -> String {
        self.folder
            .join(&format!("{name}.pem"))
            .display()
            .to_string()
    }
}

#[test]
fn services_behind_tls_are_reached_with_a_private_authority_and_a_certificate() {
    let authority = Authority::new();
    authority.sign("server");
    authority.sign("client");
    let (amqps, rediss) = (free_port(), free_port());
    let rabbit = Rabbit::stopped();
    rabbit.configure(&format!(
        "listeners.ssl.1 = 127.0.0.1:{amqps}\nssl_options.cacertfile = {}\nssl_options.certfile = {}\nssl_options.keyfile = {}\nssl_options.verify = verify_peer\nssl_options.fail_if_no_peer_cert = true\n",
        authority.file("ca"), authority.file("server-cert"), authority.file("server-key"),
    ));
    rabbit.start();
    let redis = Redis::stopped().with(&[
        "--tls-port",
        &rediss.to_string(),
        "--tls-auth-clients",
        "yes",
        "--tls-ca-cert-file",
        &authority.file("ca"),
        "--tls-cert-file",
        &authority.file("server-cert"),
        "--tls-key-file",
        &authority.file("server-key"),
    ]);
    redis.start();
    let stack = Stack::on(Arc::new(rabbit), Arc::new(redis));
    // A cluster with one node left. Each process has an order of its own, so most begin with a dead one.
    let nodes = [free_port(), free_port(), amqps];
    let nodes = nodes.map(|port| format!("amqps://guest:guest@localhost:{port}/%2f"));
    let behind = |settings: Settings| {
        let settings = settings.env("SCORER_AMQP__URL", &format!("{nodes:?}")).env(
            "SCORER_REDIS__URL",
            &format!("rediss://localhost:{rediss}/0"),
        );
        ["amqp", "redis"]
            .into_iter()
            .fold(settings, |settings, section| {
                settings.set(&format!("{section}.tls.ca"), authority.file("ca"))
            })
    };
    let known = |settings: Settings| {
        ["amqp", "redis"]
            .into_iter()
            .fold(behind(settings), |settings, section| {
                settings
                    .set(
                        &format!("{section}.tls.cert"),
                        authority.file("client-cert"),
                    )
                    .set(&format!("{section}.tls.key"), authority.file("client-key"))
            })
    };
    let worker = stack.worker_with("w1", known);
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&honest_job("behind-tls", "n"));
    assert_eq!(aggregator.result("behind-tls").json()["status"], "scored");
    eventually(SOON, "status asks both", || {
        let seen = stack.command_with(known(stack.settings()), &["status"], "");
        let asked_both = seen.stdout.contains("0 dead-lettered, 1 consumers");
        seen.expect_code(0);
        asked_both
    });

    // Without a certificate nobody gets in.
    let stranger = stack.command_with(behind(stack.settings()), &["status"], "");
    assert_eq!(stranger.expect_code(69).stdout, "");
    let stranger = stack.command_with(behind(stack.settings()), &["topology", "--declare"], "");
    assert!(stranger.expect_code(69).stderr.contains("RabbitMQ"));
}

/// What makes a server take TLS on this port, with a certificate on both sides.
fn behind_tls(authority: &Authority, port: u16) -> Vec<String> {
    let words = [
        ("--tls-port", port.to_string()),
        ("--tls-auth-clients", "yes".to_owned()),
        ("--tls-replication", "yes".to_owned()),
        ("--tls-ca-cert-file", authority.file("ca")),
        ("--tls-cert-file", authority.file("server-cert")),
        ("--tls-key-file", authority.file("server-key")),
    ];
    let words = words.into_iter();
    words
        .flat_map(|(key, value)| [key.to_owned(), value])
        .collect()
}

fn started(redis: Redis, words: &[String]) -> Redis {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let redis = redis.with(&words);
    redis.start();
    redis
}

/// Whether a Redis is reached, or why not.
fn greeted(authority: &Authority, mode: &str, url: &str) -> Result<String, String> {
    let set = [
        format!("redis.mode={mode}"),
        format!("redis.url={url}"),
        format!("redis.tls.ca={}", authority.file("ca")),
        format!("redis.tls.cert={}", authority.file("client-cert")),
        format!("redis.tls.key={}", authority.file("client-key")),
    ];
    let layers = Layers {
        set: &set,
        ..Layers::default()
    };
    let config = Config::load(&layers).expect("a sound configuration");
    scorer::config::tls::install_provider();
    let greeting = async { FleetStore::new(&config.redis).greet().await };
    runtime().block_on(greeting).map_err(|e| e.to_string())
}

#[test]
fn a_cluster_is_reached_behind_tls() {
    let authority = Authority::new();
    authority.sign("server");
    authority.sign("client");
    let (port, bus) = (free_port(), free_port());
    let mut words = behind_tls(&authority, port);
    let cluster = ["--cluster-enabled", "yes", "--cluster-port"].map(str::to_owned);
    words.extend(cluster);
    words.extend([bus.to_string(), "--tls-cluster".into(), "yes".into()]);
    let node = started(Redis::stopped(), &words);
    node.tell(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]);
    let url = format!("rediss://localhost:{port}");
    eventually(SOON, "the cluster is there", || {
        greeted(&authority, "cluster", &url).is_ok()
    });
}

#[test]
fn sentinels_and_their_master_are_reached_behind_tls_with_a_login_for_each() {
    let authority = Authority::new();
    authority.sign("server");
    authority.sign("client");
    let (master, watched) = (free_port(), free_port());
    let server = started(Redis::stopped(), &behind_tls(&authority, master));
    server.tell(&["ACL", "SETUSER", "worker", "on", ">hunter2", "~*", "+@all"]);
    let settings = format!(
        "user watcher on >hunter3 allchannels +@all\nsentinel monitor mymaster 127.0.0.1 {master} 1\n"
    );
    let mut words = behind_tls(&authority, watched);
    words.push("--sentinel".to_owned());
    let _sentinel = started(Redis::stopped().with_file(&settings), &words);
    let url = |password: &str| {
        format!(
            "rediss://worker:hunter2@localhost:{watched}?sentinel_user=watcher&sentinel_password={password}"
        )
    };
    eventually(SOON, "the master is named", || {
        greeted(&authority, "sentinel", &url("hunter3")).is_ok()
    });
    let refused = greeted(&authority, "sentinel", &url("wrong")).expect_err("a wrong password");
    assert!(refused.contains("authentication failed"), "{refused}");
    assert!(!refused.contains("hunter2"), "{refused}");
}
