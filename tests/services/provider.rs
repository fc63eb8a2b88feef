//! A provider that is not there is a state with a name, and `scorer check` says what to do.

use std::process::{Command, Stdio};

use testkit::package::VERSION;
use testkit::port::free_port;
use testkit::program::scorer;
use testkit::stack::Stack;
use testkit::wait::{START, eventually, secs, throughout};

/// No machine has it, so that the test means the same on one with a GPU.
const NO_SUCH_DEVICE: u32 = 99;

#[test]
fn a_missing_provider_is_degraded_and_never_consumes() {
    let stack = Stack::shared();
    let worker = stack.worker_with("w1", |s| {
        s.set("engine.execution_provider", "cuda")
            .set("engine.device_id", NO_SUCH_DEVICE)
    });
    let record = worker.state("degraded", "ep_unavailable");
    assert_eq!(
        (record["ready"].as_bool(), record["accepting"].as_bool()),
        (Some(false), Some(false))
    );
    assert!(
        record["last_error"]["message"]
            .as_str()
            .is_some_and(|m| !m.is_empty()),
        "{record}"
    );
    assert_ne!(
        record["engine"]["execution_provider"], "CPUExecutionProvider",
        "it says CPU instead"
    );
    worker.heartbeat_when(START, "it tries again", |r| {
        r["warm"]["attempt"].as_u64() >= Some(2)
    });
    let aggregator = stack.aggregator();
    throughout(secs(1), "no consumer", || {
        aggregator
            .depth(&stack.jobs_queue())
            .is_none_or(|(_, consumers)| consumers == 0)
    });
    worker.drain();
}

#[test]
fn check_says_what_is_missing_and_exits_69() {
    let stack = Stack::shared();
    let settings = stack
        .settings()
        .set("engine.execution_provider", "cuda")
        .set("engine.device_id", NO_SUCH_DEVICE);
    let answer = stack.command_with(settings, &["check"], "").expect_code(69);
    let said = format!("{}{}", answer.stdout, answer.stderr).to_lowercase();
    assert!(
        said.contains("cuda"),
        "it does not name the provider:\n{said}"
    );
    assert!(!said.contains(".."), "a sentence ends twice:\n{said}");
    assert!(
        said.contains("onnxruntime") || said.contains("onnx runtime"),
        "it does not say what to get:\n{said}"
    );
}

#[test]
fn check_goes_on_where_a_service_is_away_and_says_what_to_do() {
    let stack = Stack::shared();
    let nobody = free_port();
    let settings = stack
        .settings()
        .set(
            "amqp.url",
            format!("amqp://me:secret@127.0.0.1:{nobody}/%2f"),
        )
        .set("redis.url", format!("redis://127.0.0.1:{nobody}/0"));
    let answer = stack.command_with(settings, &["check"], "").expect_code(0);
    for (service, key) in [("RabbitMQ", "amqp.url"), ("Redis", "redis.url")] {
        let mut lines = answer.stdout.lines();
        let line = lines.find(|line| line.contains(service)).expect(service);
        assert!(line.starts_with("warn"), "{}", answer.stdout);
        assert!(lines.next().is_some_and(|advice| advice.contains(key)));
    }
    assert!(!answer.stdout.contains("secret"), "{}", answer.stdout);
    assert!(!answer.stdout.contains('\u{1b}'), "no colours in a pipe");
}

#[test]
fn check_passes_where_all_is_well_and_names_a_broken_package() {
    let stack = Stack::shared();
    let answer = stack.command(&["check", "--json"]).expect_code(0);
    let report = answer.value();
    let verdicts: Vec<_> = report["findings"]
        .as_array()
        .expect("findings")
        .iter()
        .map(|f| (f["part"].as_str(), f["verdict"].as_str()))
        .collect();
    let ok = |part| (Some(part), Some("ok"));
    let parts = [
        "configuration",
        "package",
        "provider",
        "graph",
        "warm-up",
        "RabbitMQ",
        "Redis",
    ];
    assert_eq!(verdicts, parts.map(ok), "{report}");
    assert_eq!(report["version"], VERSION);

    let package = testkit::package::Package::copy();
    let spoilt = package.spoil_a_shard();
    let settings = stack.settings().set("model.dir", package.path().display());
    let answer = stack.command_with(settings, &["check"], "").expect_code(65);
    assert!(answer.stdout.contains(&spoilt), "{}", answer.stdout);
    assert_eq!(answer.stderr, "", "what is wrong is said once");
    let lines: Vec<_> = answer.stdout.lines().collect();
    let begins = |at: usize, words: &[&str]| {
        let found: Vec<_> = lines[at].split_whitespace().take(words.len()).collect();
        assert_eq!(found, words, "{}", answer.stdout);
    };
    begins(0, &["ok", "configuration"]);
    begins(1, &["FAIL", "package"]);
    begins(2, &["->", "ops/runbook.md"]);
    begins(3, &["-", "provider", "not", "checked:"]);
    begins(4, &["-", "warm-up"]);
    begins(5, &["ok", "RabbitMQ"]);
}

/// What a command says in a terminal, here one that `script` makes.
fn in_a_terminal(stack: &Stack, command: &str, set: &[(&str, &str)], colours: bool) -> String {
    let mut settings = stack.settings();
    for (key, value) in set {
        settings = settings.set(key, value);
    }
    let mut inner = Command::new(scorer());
    settings.apply(inner.arg(command));
    let words = std::iter::once(inner.get_program()).chain(inner.get_args());
    let words: Vec<_> = words
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    let mut script = Command::new("script");
    script
        .args([
            "--quiet",
            "--return",
            "--command",
            &words.join(" "),
            "/dev/null",
        ])
        .env("TERM", "xterm-256color")
        .env("NO_COLOR", if colours { "" } else { "1" });
    for (key, value) in inner.get_envs() {
        match value {
            Some(value) => script.env(key, value),
            None => script.env_remove(key),
        };
    }
    let output = script.stdin(Stdio::null()).output();
    let output = output.expect("script, of Debian's bsdutils");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_terminal_is_shown_what_is_waited_for_and_colours_unless_they_are_unwanted() {
    let stack = Stack::shared();
    let (green, moved) = ("\u{1b}[32m", "warming up: changing and restoring");
    let coloured = in_a_terminal(&stack, "check", &[], true);
    assert!(coloured.contains(green), "{coloured:?}");
    assert!(coloured.contains(moved), "{coloured:?}");
    assert!(coloured.contains(" %, "), "how far it is: {coloured:?}");
    let plain = in_a_terminal(&stack, "check", &[], false);
    assert!(plain.contains("RabbitMQ"), "{plain:?}");
    assert!(!plain.contains(green), "{plain:?}");

    // A worker: below its log, and gone when it is ready.
    let shown = std::thread::scope(|scope| {
        let shown = scope.spawn(|| in_a_terminal(&stack, "run", &[("worker.id", "shown")], true));
        eventually(START, "it is ready", || {
            stack.record("shown").is_some_and(|r| r["ready"] == true)
        });
        stack.command(&["ctl", "drain", "--worker", "shown"]);
        shown.join().expect("it ends")
    });
    assert!(shown.contains("warming: loading_model,"), "{shown:?}");
    assert!(shown.contains("\u{1b}[32m INFO"), "{shown:?}");
}
