//! The commands that talk to the services: submit, status, healthcheck.

use std::collections::HashSet;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use testkit::case::{Case, cases, honest};
use testkit::folder::Folder;
use testkit::http::{Route, Server};
use testkit::package::{MODEL, VERSION, fixtures};
use testkit::process::Group;
use testkit::program::scorer;
use testkit::stack::{Answer, Stack};
use testkit::wait::eventually;

/// Submits files as a person would.
fn submit_files(stack: &Stack, case: &Case, files: &[&str], more: &[&str]) -> Answer {
    let version = VERSION.to_string();
    let rate = case
        .learning_rate
        .map(|r| r.to_string())
        .unwrap_or_default();
    let format = case.format.as_deref().expect("a format");
    let mut arguments = vec![
        "submit",
        "--format",
        format,
        "--semantics",
        "gradient",
        "--model-version",
        &version,
    ];
    arguments.extend(["--learning-rate", &rate, "--inline", "--wait", "--json"]);
    for file in files {
        arguments.extend(["--candidate", file]);
    }
    arguments.extend(more);
    stack.command(&arguments)
}

#[test]
fn submit_waits_for_the_result_of_a_file_and_of_several() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    worker.ready();
    let case = honest();
    let path = case.path().display().to_string();
    let nonce = case.nonce.clone().unwrap_or_default();
    let mut with: Vec<&str> = vec!["--nonce", &nonce, "--context", r#"{"miner_id": "m1"}"#];
    let shards = case
        .shards
        .as_ref()
        .map(|ids| ids.iter().map(u64::to_string).collect::<Vec<_>>().join(","));
    if let Some(shards) = &shards {
        with.extend(["--shards", shards]);
    }
    let one = submit_files(&stack, case, &[&path], &with)
        .expect_code(0)
        .values();
    assert_eq!(one.len(), 1, "one result");
    assert_eq!(one[0]["status"], "scored", "{}", one[0]);
    assert_eq!(one[0]["context"]["miner_id"], "m1");
    let (got, want) = (one[0]["delta"].as_f64(), case.expect["delta"].as_f64());
    assert!(
        got.zip(want)
            .is_none_or(|(got, want)| (got - want).abs() < 2e-6),
        "{got:?} instead of {want:?}"
    );

    let folder = Folder::new("several");
    let copy = folder.join("copy").display().to_string();
    std::fs::copy(&path, &copy).expect("a writable folder");
    let several = submit_files(&stack, case, &[&path, &copy], &[])
        .expect_code(0)
        .values();
    assert_eq!(several.len(), 2, "{several:?}");
    assert_ne!(several[0]["submission_id"], several[1]["submission_id"]);
    assert_eq!(
        several[0]["delta"], several[1]["delta"],
        "the same bytes on the same windows"
    );
}

#[test]
fn submit_reads_one_job_per_line_and_reports_every_verdict() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    worker.ready();
    let bad = cases()
        .iter()
        .find(|c| c.expect["status"] == "rejected" && c.file.is_some());
    let bad = bad.expect("cases.json has a rejected candidate");
    let jobs = [
        honest().job("line-1"),
        bad.job("line-2"),
        honest().job("line-3"),
    ];
    let input: String = jobs.iter().map(|job| format!("{job}\n")).collect();
    let arguments = ["submit", "--jobs", "-", "--wait", "--json"];
    let answer = stack.command_with(stack.settings(), &arguments, &input);
    // Whether a rejection is the command's own negative answer is not laid down.
    assert!(
        [0, 1].contains(&answer.code),
        "exit code {}:\n{}",
        answer.code,
        answer.stderr
    );
    let mut results = answer.values();
    results.sort_by_key(|r| r["submission_id"].as_str().unwrap_or("").to_owned());
    let verdicts: Vec<(&Value, &Value)> = results
        .iter()
        .map(|r| (&r["submission_id"], &r["status"]))
        .collect();
    let (scored, rejected) = (json!("scored"), json!("rejected"));
    let ids = [json!("line-1"), json!("line-2"), json!("line-3")];
    assert_eq!(
        verdicts,
        [(&ids[0], &scored), (&ids[1], &rejected), (&ids[2], &scored)]
    );
    let wrong = stack.command_with(stack.settings(), &arguments, "{\"v\": 1, \"kind\": \n");
    assert!(
        [64, 65].contains(&wrong.code),
        "a line that is no JSON: {} {}",
        wrong.code,
        wrong.stderr
    );
    let missing = submit_files(&stack, honest(), &["/no/such/file"], &[]);
    assert!(
        [64, 65].contains(&missing.code),
        "a missing file: {} {}",
        missing.code,
        missing.stderr
    );
    assert!(
        missing.stderr.contains("/no/such/file"),
        "{}",
        missing.stderr
    );
}

#[test]
fn status_shows_the_fleet_and_its_exit_code_says_whether_anyone_is_ready() {
    let stack = Stack::shared();
    let empty = stack.command(&["status", "--json"]).expect_code(1).value();
    assert_eq!(
        (&empty["workers"], &empty["ready"]),
        (&json!([]), &json!(0)),
        "{empty}"
    );
    let (one, two) = (stack.worker("w1"), stack.worker("w2"));
    one.ready();
    two.ready();
    let status = stack.command(&["status", "--json"]).expect_code(0).value();
    assert!(status["at_ms"].is_u64(), "{status}");
    assert_eq!(
        (&status["alive"], &status["ready"]),
        (&json!(2), &json!(2)),
        "{status}"
    );
    let workers = status["workers"].as_array().expect("a list");
    let mut ids: Vec<&str> = workers
        .iter()
        .filter_map(|w| w["worker_id"].as_str())
        .collect();
    ids.sort_unstable();
    assert_eq!(ids, ["w1", "w2"]);
    for worker in workers {
        assert!(
            worker["age_ms"]
                .as_i64()
                .is_some_and(|age| (0..5000).contains(&age)),
            "{worker}"
        );
        assert_eq!(
            (&worker["state"], &worker["model"]["name"]),
            (&json!("ready"), &json!(MODEL))
        );
    }
    assert_eq!(
        status["queue"],
        json!({"jobs": 0, "retry": 0, "dead": 0, "consumers": 2}),
        "{status}"
    );
    let text = stack.command(&["status"]).expect_code(0).stdout;
    assert!(text.contains("w1") && text.contains("w2"), "{text}");
    two.drain();
    stack.command(&["ctl", "pause"]).expect_code(0);
    one.state("degraded", "paused");
    let aggregator = stack.aggregator();
    aggregator.submit(&honest().job("waits"));
    let waiting = || stack.command(&["status", "--json"]).expect_code(1).value();
    eventually(testkit::wait::SOON, "the job is counted", || {
        waiting()["queue"]["jobs"] == 1
    });
    assert_eq!(waiting()["ready"], 0);
    let text = stack.command(&["status"]).expect_code(1).stdout;
    assert!(
        text.contains("1 waiting") && text.contains("0 consumers"),
        "{text}"
    );
}

#[test]
fn status_does_not_need_the_broker_and_declares_nothing() {
    let stack = Stack::shared();
    let text = stack.command(&["status"]).expect_code(1).stdout;
    assert!(text.contains("0 consumers"), "{text}");
    assert_eq!(stack.aggregator().depth(&stack.jobs_queue()), None);
    // A port that nobody listens on.
    let settings = stack
        .settings()
        .set("amqp.url", "amqp://guest:guest@127.0.0.1:1/%2f");
    let answer = stack
        .command_with(settings.clone(), &["status"], "")
        .expect_code(1);
    assert!(
        answer.stdout.contains("queue: unknown"),
        "{}",
        answer.stdout
    );
    let answer = stack.command_with(settings, &["status", "--json"], "");
    assert!(answer.expect_code(1).value()["queue"].is_null());
}

#[test]
fn submit_takes_urls_and_gives_every_candidate_a_name_of_its_own() {
    let stack = Stack::shared();
    let server = Server::start();
    let worker = stack.worker_with("w1", |settings| {
        settings.set("candidates.allow_private", true).set(
            "candidates.allow",
            format!("[\"{}\", \"file:///\"]", server.url("/")),
        )
    });
    worker.ready();
    let case = honest();
    let http = server.put("/epoch/update.json", Route::Bytes(case.bytes()));
    let file = format!("file://{}", case.path().display());
    let version = VERSION.to_string();
    let rate = case.learning_rate.expect("a gradient").to_string();
    let with = |candidates: &[&str]| {
        let mut arguments = vec![
            "submit",
            "--semantics",
            "gradient",
            "--learning-rate",
            &rate,
        ];
        arguments.extend(["--model-version", &version, "--wait", "--json"]);
        for candidate in candidates {
            arguments.extend(["--candidate", candidate]);
        }
        stack.command(&arguments)
    };
    let results = with(&[&http, &http, &file]).expect_code(0).values();
    let ids: HashSet<&str> = results
        .iter()
        .filter_map(|r| r["submission_id"].as_str())
        .collect();
    assert!(
        ids.contains("update") && ids.contains("update-2"),
        "{ids:?}"
    );
    assert_eq!(ids.len(), 3, "{ids:?}");
    // Twice to learn the digest, and twice by the worker.
    assert_eq!(server.asked("/epoch/update.json"), 4);
    let missing = with(&[&server.url("/none.json")]).expect_code(65);
    assert!(missing.stderr.contains("/none.json"), "{}", missing.stderr);
}

#[test]
fn submit_prints_what_has_come_when_its_time_is_up() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    worker.ready();
    let newer = {
        let mut job = honest().job("never");
        job["model_version"] = json!(VERSION + 1);
        job
    };
    let input = format!("{}\n{newer}\n", honest().job("soon"));
    let arguments = [
        "submit",
        "--jobs",
        "-",
        "--wait",
        "--json",
        "--timeout",
        "5s",
    ];
    // The newer job climbs the retry ladder, which takes much longer than the command waits.
    let answer = stack
        .command_with(stack.settings(), &arguments, &input)
        .expect_code(69);
    let results = answer.values();
    assert_eq!(results.len(), 1, "{results:?}");
    assert_eq!(results[0]["submission_id"], "soon");
    assert!(answer.stderr.contains("never"), "{}", answer.stderr);
    let wrong = ["submit", "--jobs", "-", "--timeout", "3s"];
    stack
        .command_with(stack.settings(), &wrong, &input)
        .expect_code(64);
}

#[test]
fn healthcheck_answers_for_the_worker_on_this_host() {
    let stack = Stack::shared();
    let check = |probe: &str| {
        let settings = stack.settings().set("worker.id", "w1");
        stack
            .command_with(settings, &["healthcheck", probe], "")
            .code
    };
    assert_eq!(
        (check("--live"), check("--ready")),
        (1, 1),
        "before there is a worker"
    );
    let worker = stack.worker("w1");
    worker.ready();
    assert_eq!(
        (check("--live"), check("--ready")),
        (0, 0),
        "while it serves"
    );
    stack.command(&["ctl", "pause"]).expect_code(0);
    worker.state("degraded", "paused");
    assert_eq!(
        (check("--live"), check("--ready")),
        (0, 1),
        "while it is paused"
    );
    worker.kill();
    eventually(testkit::wait::SOON, "the record goes", || {
        stack.record("w1").is_none()
    });
    assert_eq!((check("--live"), check("--ready")), (1, 1), "after it died");
}

#[test]
fn an_aggregator_that_only_publishes_finds_its_result_later() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let job = honest().job("fire-and-forget");
    let settings = stack.settings();
    let answer = stack.command_with(settings, &["submit", "--jobs", "-"], &format!("{job}\n"));
    answer.expect_code(0);
    assert_eq!(
        aggregator.result("fire-and-forget").json()["status"],
        "scored"
    );
}

#[test]
fn bench_reports_every_figure_and_needs_no_service() {
    let stack = Stack::shared();
    let package = testkit::package::sound().display().to_string();
    let settings = stack
        .settings()
        .set("amqp.url", "amqp://guest:guest@127.0.0.1:1/%2f")
        .set("redis.url", "redis://127.0.0.1:1/0")
        .set("engine.parts", 3);
    let arguments = ["bench", "--model", &package, "--seconds", "1", "--json"];
    let report = stack
        .command_with(settings.clone(), &arguments, "")
        .expect_code(0)
        .value();
    for figure in [
        "bare_ms",
        "candidates_per_s",
        "first_ms",
        "median_ms",
        "first_ratio",
        "peak_rss_bytes",
        "weights_bytes",
    ] {
        assert!(
            report[figure].as_f64().is_some_and(|v| v > 0.0),
            "{figure}: {report}"
        );
    }
    let costs = report["ratio_from"]
        .as_array()
        .expect("a cost of each part");
    let costs = costs.iter().chain([
        &report["ratio_whole"],
        &report["mixed"]["predicted"],
        &report["mixed"]["measured"],
        &report["mixed_fresh"]["predicted"],
        &report["mixed_fresh"]["measured"],
    ]);
    assert!(costs.clone().all(|c| c.as_f64() > Some(0.0)), "{report}");
    let cuts = report["cuts"].as_array().map(Vec::len);
    assert_eq!((costs.count(), cuts), (3 + 5, Some(2)), "{report}");
    for density in ["0.001", "0.01", "0.05"] {
        // How fast it is is not a test's to say on a busy machine; that it is compared is.
        for figure in ["evaluate_ms", "ratio"] {
            assert!(
                report[figure][density].as_f64().is_some_and(|v| v > 0.0),
                "{figure}: {report}"
            );
        }
    }
    for stage in ["fetch", "decode", "check", "patch", "forward", "restore"] {
        assert!(
            report["stages_ms"][stage]
                .as_f64()
                .is_some_and(f64::is_finite),
            "{report}"
        );
    }
    assert!(
        report["idle_share"]
            .as_f64()
            .is_some_and(|v| (0.0..=1.0).contains(&v)),
        "{report}"
    );
    assert_eq!(report["provider"], "CPUExecutionProvider");
    stack.command_with(settings, &["bench"], "").expect_code(64);
}

#[test]
fn a_package_without_a_whole_window_is_refused() {
    let (stack, folder) = (Stack::shared(), Folder::new("package"));
    let model = fixtures();
    let file = |name: &str| model.join(name).display().to_string();
    let (graph, weights, shards) = (
        file("graph-named.onnx"),
        file("checkpoint.safetensors"),
        file("shards"),
    );
    let out = folder.join("out").display().to_string();
    let mut arguments = vec!["package", "--graph", &graph, "--weights", &weights];
    arguments.extend([
        "--shards",
        &shards,
        "--name",
        MODEL,
        "--version",
        "1",
        "--out",
        &out,
    ]);
    arguments.extend(["--window", "1000000"]);
    let refused = stack.command(&arguments).expect_code(65);
    assert!(
        refused.stderr.contains("1000001 tokens of a window"),
        "{}",
        refused.stderr
    );
    assert!(refused.stderr.contains(&shards), "{}", refused.stderr);
}

#[test]
fn every_shell_completes_the_commands() {
    let stack = Stack::shared();
    for (shell, word) in [
        ("bash", "_scorer()"),
        ("zsh", "#compdef scorer"),
        ("fish", "complete -c scorer"),
    ] {
        let script = stack.command(&["completions", shell]).expect_code(0).stdout;
        assert!(
            script.contains(word) && script.contains("healthcheck"),
            "{script}"
        );
    }
}

#[test]
fn a_watched_fleet_is_lines_where_there_is_no_terminal() {
    let stack = Stack::shared();
    let mut command = Command::new(scorer());
    stack.settings().apply(command.args(["status", "--watch"]));
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut watching = Group::spawn(&mut command);
    let stdout = watching.child().stdout.take().expect("a pipe");
    let lines = BufReader::new(stdout).lines().map_while(Result::ok);
    let looks: Vec<_> = lines
        .filter(|line| line == "no worker is alive")
        .take(2)
        .collect();
    assert_eq!(looks.len(), 2, "again every second");
}
