//! The page of the fleet: what it says, and to whom.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use serde_json::Value;
use testkit::case::{honest, honest_job};
use testkit::process::Group;
use testkit::program::scorer;
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually_some, secs};
use testkit::worker::Settings;

/// A running dashboard.
struct Dashboard {
    _process: Group,
    /// `http://HOST:PORT/`, and what follows.
    url: String,
}

impl Dashboard {
    fn start(stack: &Stack, listen: &str) -> Self {
        Self::with(&stack.settings(), listen)
    }

    fn with(settings: &Settings, listen: &str) -> Self {
        let mut command = Command::new(scorer());
        command.args(["dashboard", "--listen", listen]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut process = Group::spawn(settings.apply(&mut command));
        let stdout = process.child().stdout.take().expect("a pipe");
        let mut url = String::new();
        BufReader::new(stdout)
            .read_line(&mut url)
            .expect("it says where it is");
        let url = url.trim().to_owned();
        Self {
            _process: process,
            url,
        }
    }

    fn address(&self) -> &str {
        let rest = self.url.strip_prefix("http://").expect("a URL");
        rest.split('/').next().expect("an address")
    }

    /// Status line and headers, and as much of the body as comes until `enough`.
    fn ask(&self, request: &str, enough: &str) -> (String, String) {
        let mut stream = TcpStream::connect(self.address()).expect("it listens");
        stream.set_read_timeout(Some(SOON)).expect("a time-out");
        stream.write_all(request.as_bytes()).expect("it reads");
        let (mut answer, mut buffer) = (Vec::new(), [0; 65536]);
        while let Ok(length) = stream.read(&mut buffer) {
            answer.extend_from_slice(&buffer[..length]);
            let text = String::from_utf8_lossy(&answer);
            if length == 0 || (!enough.is_empty() && text.contains(enough)) {
                break;
            }
        }
        let text = String::from_utf8_lossy(&answer).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        (head.to_owned(), body.to_owned())
    }

    fn get(&self, path: &str, headers: &str) -> (String, String) {
        let request = format!("GET {path} HTTP/1.0\r\n{headers}\r\n");
        self.ask(&request, "")
    }

    /// What the page is told now.
    fn told(&self) -> Option<Value> {
        let (_, body) = self.ask("GET /events HTTP/1.0\r\nHost: localhost\r\n\r\n", "\n\n");
        let line = body.lines().find_map(|line| line.strip_prefix("data: "))?;
        serde_json::from_str(line).ok()
    }
}

#[test]
fn the_page_is_told_of_workers_verdicts_and_parked_jobs() {
    let stack = Stack::shared();
    let worker = stack.worker_with("w1", |s| s.set("amqp.retry_delays", "[]"));
    worker.ready();
    let dashboard = Dashboard::start(&stack, "127.0.0.1:0");
    eventually_some(SOON, "it watches what goes by", || {
        dashboard.told()?["watching_since_ms"].as_u64()
    });
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&honest_job("good", "n"));
    aggregator.submit(&honest().job_by_url("bad", "http://localhost:1/x"));
    aggregator.publish(b"no job", lapin::BasicProperties::default());
    let page = eventually_some(SOON, "everything is there", || {
        let page = dashboard.told()?;
        let seen = page["parked"].as_array()?.len() == 1 && page["queues"]["dead"] == 1;
        let verdicts = page["verdicts"].as_object()?.len();
        (seen && verdicts == 2).then_some(page)
    });
    assert_eq!(page["unknown"], Value::Null);
    assert_eq!(page["verdicts"]["scored"], 1, "{page}");
    assert_eq!(page["verdicts"]["candidate_url_forbidden"], 1, "{page}");
    assert_eq!(page["deltas"].as_array().map(Vec::len), Some(1), "{page}");
    assert_eq!(page["parked"][0]["code"], "invalid_job", "{page}");
    let row = &page["workers"][0];
    assert_eq!(
        (&row["id"], &row["ready"]),
        (&"w1".into(), &true.into()),
        "{page}"
    );
    let events = page["events"].as_array().expect("events");
    assert!(events.iter().any(|event| event["to"] == "ready"), "{page}");
    assert_eq!(page["queues"]["consumers"], 1, "{page}");
}

#[test]
fn only_this_machine_or_who_has_the_token_is_answered() {
    let stack = Stack::shared();
    let local = Dashboard::start(&stack, "127.0.0.1:0");
    let (head, body) = local.get("/", "Host: localhost\r\n");
    assert!(
        head.contains("200") && body.contains("<title>scorer</title>"),
        "{head}"
    );
    assert!(
        head.contains("content-security-policy: default-src 'none'"),
        "{head}"
    );
    for (path, kind) in [("/page.js", "text/javascript"), ("/page.css", "text/css")] {
        let (head, _) = local.get(path, "Host: localhost\r\n");
        assert!(head.contains("200") && head.contains(kind), "{head}");
    }
    let (rebound, _) = local.get("/", "Host: evil.example\r\n");
    assert!(rebound.contains("403"), "{rebound}");
    let (posted, _) = local.ask(
        "POST / HTTP/1.0\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n",
        "",
    );
    assert!(posted.contains("405"), "{posted}");

    let open = Dashboard::start(&stack, "0.0.0.0:0");
    let (_, token) = open
        .url
        .split_once("/?token=")
        .expect("a token in the address");
    let (without, body) = open.get("/", "Host: localhost\r\n");
    assert!(
        without.contains("403") && body.contains("token"),
        "{without}"
    );
    let (with, _) = open.get(&format!("/?token={token}"), "Host: h\r\n");
    assert!(with.contains("303") && with.contains("HttpOnly"), "{with}");
    let (cookie, _) = open.get("/", &format!("Cookie: scorer_token={token}\r\n"));
    assert!(cookie.contains("200"), "{cookie}");
}

#[test]
fn without_its_services_the_page_says_unknown() {
    let stack = Stack::shared();
    let nowhere = stack
        .settings()
        .set("redis.url", "redis://127.0.0.1:1/0")
        .set("amqp.url", "amqp://127.0.0.1:1/%2f");
    let dashboard = Dashboard::with(&nowhere, "127.0.0.1:0");
    let why = eventually_some(secs(30), "it says that nothing is known", || {
        dashboard.told()?["unknown"].as_str().map(str::to_owned)
    });
    assert!(why.contains("Redis"), "{why}");
}
