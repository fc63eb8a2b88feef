//! The page of the fleet: what it says, and to whom.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use testkit::case::{honest, honest_job};
use testkit::encoding::Encoding;
use testkit::process::Group;
use testkit::program::scorer;
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually_some, secs};
use testkit::worker::Settings;

/// A running dashboard.
pub(crate) struct Dashboard {
    _process: Group,
    /// `http://HOST:PORT/`, and what follows.
    url: String,
}

impl Dashboard {
    fn start(stack: &Stack, listen: &str) -> Self {
        Self::with(&stack.settings(), &["--listen", listen])
    }

    pub(crate) fn with(settings: &Settings, arguments: &[&str]) -> Self {
        let mut command = Command::new(scorer());
        command.arg("dashboard").args(arguments);
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

    /// Status line and headers, and as much of the body as comes until it is enough.
    fn ask(&self, request: &str, enough: impl Fn(&str) -> bool) -> (String, String) {
        let mut stream = TcpStream::connect(self.address()).expect("it listens");
        stream.set_read_timeout(Some(SOON)).expect("a time-out");
        stream.write_all(request.as_bytes()).expect("it reads");
        let (mut answer, mut buffer) = (Vec::new(), [0; 65536]);
        while let Ok(length) = stream.read(&mut buffer) {
            answer.extend_from_slice(&buffer[..length]);
            let text = String::from_utf8_lossy(&answer);
            if length == 0 || enough(&text) {
                break;
            }
        }
        let text = String::from_utf8_lossy(&answer).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        (head.to_owned(), body.to_owned())
    }

    fn get(&self, path: &str, headers: &str) -> (String, String) {
        let request = format!("GET {path} HTTP/1.0\r\n{headers}\r\n");
        self.ask(&request, |_| false)
    }

    /// What the page is told now: an event of a kind.
    pub(crate) fn told(&self, kind: &str) -> Option<Value> {
        let request = "GET /events HTTP/1.0\r\nHost: localhost\r\n\r\n";
        let whole = |text: &str| {
            let now = text.split_once("event: now\n");
            now.is_some_and(|(_, rest)| rest.contains("\n\n"))
        };
        let (_, body) = self.ask(request, whole);
        let (_, rest) = body.split_once(&format!("event: {kind}\ndata: "))?;
        serde_json::from_str(rest.lines().next()?).ok()
    }

    /// The answer to a request of the page.
    fn answer(&self, path: &str) -> Value {
        let (head, body) = self.get(path, "Host: localhost\r\n");
        assert!(head.contains("application/json"), "{path}: {head}");
        serde_json::from_str(&body).expect("JSON")
    }
}

#[test]
fn the_page_is_told_of_workers_verdicts_and_parked_jobs() {
    let stack = Stack::shared();
    let worker = stack.worker_with("w1", |s| s.set("amqp.retry_delays", "[]"));
    worker.ready();
    let listen = ["--listen", "127.0.0.1:0", "--contributors", "miner"];
    let dashboard = Dashboard::with(&stack.settings(), &listen);
    eventually_some(SOON, "it watches what goes by", || {
        dashboard.told("now")?["watching_since_ms"].as_u64()
    });
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let mut good = honest_job("good", "n");
    good["context"] = json!({"miner": "m1"});
    aggregator.submit(&good);
    aggregator.submit(&honest().job_by_url("bad", "http://localhost:1/x"));
    aggregator.publish(b"no job", lapin::BasicProperties::default());
    let now = eventually_some(SOON, "everything is there", || {
        let now = dashboard.told("now")?;
        let seen = now["news"]["parked"] == 1 && now["queues"]["dead"] == 1;
        let answered = now["verdicts"].as_object()?.len() == 2;
        (seen && answered && now["totals"]["ready"] == 1).then_some(now)
    });
    assert_eq!(now["unknown"], Value::Null);
    assert_eq!(now["verdicts"]["candidate_url_forbidden"], 1, "{now}");
    assert_eq!(now["queues"]["consumers"], 1, "{now}");
    let names = dashboard.told("fleet").expect("names");
    assert_eq!(names["ids"], json!(["w1"]), "{names}");
    let news = dashboard.answer("/news");
    assert_eq!(news["parked"]["items"][0]["code"], "invalid_job", "{news}");
    let events = news["events"]["items"].as_array().expect("events");
    let ready = |event: &Value| event["text"] == "warming → ready (serving)";
    assert!(events.iter().any(ready), "{news}");
    let worker = dashboard.answer("/worker?id=w1");
    assert_eq!(worker["record"]["state"], "ready", "{worker}");
    assert_eq!(worker["stages"]["forward"]["count"], 1, "{worker}");
    let rows = dashboard.answer("/contributors");
    let names = [0, 1].map(|at| rows["rows"][at]["name"].clone());
    assert_eq!(names, ["m1", "without miner"], "{rows}");
    let minutes = eventually_some(SOON, "the candidate is in the charts", || {
        let told = dashboard.answer("/timeline?range=10m");
        (told["candidates"][0][4] == "good").then_some(told)
    });
    assert_eq!(minutes["alive"][0], 1, "{minutes}");
}

#[test]
fn a_job_is_found_by_its_name_wherever_it_is() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    worker.ready();
    let dashboard = Dashboard::start(&stack, "127.0.0.1:0");
    eventually_some(SOON, "it watches what goes by", || {
        dashboard.told("now")?["watching_since_ms"].as_u64()
    });
    let nothing = dashboard.answer("/job?id=job-1");
    assert_eq!(nothing["stored"]["state"], "unknown", "{nothing}");
    assert_eq!(nothing["running"]["state"], "absent", "{nothing}");
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&honest_job("job-1", "n"));
    let found = eventually_some(SOON, "its verdict and what is stored", || {
        let job = dashboard.answer("/job?id=job-1");
        (job["stored"]["state"] == "found").then_some(job)
    });
    let (seen, stored) = (&found["verdicts"][0], &found["stored"]["result"]);
    assert_eq!(seen["delta"], stored["delta"], "{found}");
    assert_eq!(seen["status"], "scored", "{found}");
    // As a worker writes it when it begins.
    let mut redis = stack.redis.connection();
    let mark = stack.key("crash:job-1:7");
    let _: u64 = redis::Commands::hset(&mut redis, mark, "w2/i2", "5 m3").expect("a mark");
    let running = &dashboard.answer("/job?id=job-1")["running"];
    assert_eq!(running["marks"][0]["worker"], "w2", "{running}");
    assert_eq!(running["marks"][0]["started_ms"], 5, "{running}");
    assert_eq!(running["marks"][0]["member"], "m3", "{running}");
}

#[test]
fn a_merge_is_shown_with_what_its_members_are_worth() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    worker.ready();
    let dashboard = Dashboard::start(&stack, "127.0.0.1:0");
    eventually_some(SOON, "it watches what goes by", || {
        dashboard.told("now")?["watching_since_ms"].as_u64()
    });
    let (head, _) = dashboard.get("/merge?id=merge-1", "Host: localhost\r\n");
    assert!(head.contains("404"), "{head}");
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let mut job = honest_job("merge-1", "n");
    let candidate = job["candidate"].take();
    job.as_object_mut().expect("a job").remove("candidate");
    job["kind"] = json!("merge");
    job["members"] = ["one", "other"]
        .map(|id| json!({"id": id, "candidate": candidate}))
        .into();
    aggregator.submit_as(&job, Encoding::Json, |properties| properties);
    let now = eventually_some(SOON, "the merge was seen", || {
        dashboard.told("now").filter(|now| now["merges"] == 1)
    });
    assert_eq!(now["classes"], json!({"merged": 1}), "{now}");
    let list = dashboard.answer("/merges");
    assert_eq!(list["merges"][0]["submission_id"], "merge-1", "{list}");
    let merge = dashboard.answer("/merge?id=merge-1");
    let members = &merge["members"];
    assert_eq!([&members[0]["id"], &members[1]["id"]], ["one", "other"]);
    let contribution = |at: usize| &members[at]["contribution"]["value"];
    assert_eq!(contribution(0), contribution(1), "{merge}");
    assert_eq!(merge["measured"]["gap"]["large"], false, "{merge}");
}

#[test]
fn a_fleet_that_nobody_has_can_be_looked_at_and_says_that_it_is_simulated() {
    let stack = Stack::shared();
    let listen = ["--listen", "127.0.0.1:0", "--demo", "1000"];
    let dashboard = Dashboard::with(&stack.settings(), &listen);
    let now = eventually_some(secs(60), "the fleet", || dashboard.told("now"));
    assert_eq!(now["demo"], 1000);
    let update = now.to_string().len();
    assert!(update < 50_000, "an update of {update} bytes");
    let job = dashboard.answer("/job?id=x");
    assert_eq!(job["stored"]["why"], "the fleet is simulated", "{job}");
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
    for (path, kind) in [("/main.js", "text/javascript"), ("/page.css", "text/css")] {
        let (head, _) = local.get(path, "Host: localhost\r\n");
        assert!(head.contains("200") && head.contains(kind), "{head}");
    }
    let (rebound, _) = local.get("/", "Host: evil.example\r\n");
    assert!(rebound.contains("403"), "{rebound}");
    let (posted, _) = local.ask(
        "POST / HTTP/1.0\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n",
        |_| false,
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
    let dashboard = Dashboard::with(&nowhere, &["--listen", "127.0.0.1:0"]);
    let why = eventually_some(secs(30), "it says that nothing is known", || {
        dashboard.told("now")?["unknown"]
            .as_str()
            .map(str::to_owned)
    });
    assert!(why.contains("Redis"), "{why}");
}
