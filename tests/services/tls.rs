//! Both services behind TLS that asks for a certificate, from an authority of our own.

use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
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
    let behind = |settings: Settings| {
        let settings = settings
            .env(
                "SCORER_AMQP__URL",
                &format!("amqps://guest:guest@localhost:{amqps}/%2f"),
            )
            .env(
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
