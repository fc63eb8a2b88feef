//! Bodies that name nobody: parked with the reason, answered where AMQP says to whom, never lost.

use lapin::BasicProperties;
use serde_json::json;
use testkit::case::honest;
use testkit::encoding::{Encoding, pack};
use testkit::package::MODEL;
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually};

#[test]
fn a_body_that_names_nobody_is_parked_and_answered_under_its_message_id() {
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    let worker = stack.worker("w1");
    worker.ready();
    aggregator.collect_results();
    let mut nameless = honest().job("x");
    nameless
        .as_object_mut()
        .expect("a map")
        .remove("submission_id");
    let mut misnamed = honest().job("x");
    misnamed["submission_id"] = json!("spaces are not allowed");
    let bodies: Vec<(&str, Vec<u8>, Encoding)> = vec![
        ("garbage", vec![0xc1, 0xff, 0x00], Encoding::MessagePack),
        ("empty", Vec::new(), Encoding::MessagePack),
        (
            "list",
            pack(&rmpv::Value::Array(vec![1.into()])),
            Encoding::MessagePack,
        ),
        ("json-text", b"\"hello\"".to_vec(), Encoding::Json),
        (
            "half-json",
            b"{\"v\": 1, \"submission_id\": \"x".to_vec(),
            Encoding::Json,
        ),
        (
            "nameless",
            Encoding::MessagePack.encode(&nameless),
            Encoding::MessagePack,
        ),
        ("misnamed", Encoding::Json.encode(&misnamed), Encoding::Json),
    ];
    for (name, body, encoding) in &bodies {
        let properties =
            BasicProperties::default().with_content_type(encoding.content_type().into());
        aggregator.publish(body, properties.with_message_id((*name).into()));
        let result = aggregator.result(name);
        let json = result.json();
        assert_eq!(
            (&json["status"], &json["error"]["code"]),
            (&json!("rejected"), &json!("invalid_job")),
            "{name}"
        );
        assert_eq!(
            result.content_type.as_deref(),
            Some(encoding.content_type()),
            "{name}"
        );
        assert!(
            result.id().starts_with(&format!("{name}:")),
            "{name}: message_id {}",
            result.id()
        );
        let parked = aggregator.take_parked();
        assert_eq!(
            &parked.body, body,
            "{name}: the parked copy is the body as it came"
        );
        assert_eq!(
            parked.headers.get("x-error-code").map(String::as_str),
            Some("invalid_job"),
            "{name}"
        );
        assert!(
            parked
                .headers
                .get("x-error-message")
                .is_some_and(|m| !m.is_empty()),
            "{name}"
        );
        assert_eq!(
            parked.headers.get("x-worker-id").map(String::as_str),
            Some("w1"),
            "{name}"
        );
        assert_eq!(
            parked.message_id.as_deref(),
            Some(*name),
            "{name}: the parked copy keeps its message_id"
        );
    }

    // Without a message_id nobody can be answered; the copy is parked all the same.
    let answered = aggregator.results().len();
    aggregator.publish(
        b"nobody",
        BasicProperties::default().with_content_type("application/json".into()),
    );
    assert_eq!(aggregator.take_parked().body, b"nobody");
    aggregator.submit(&honest().job("afterwards"));
    aggregator.result("afterwards");
    assert_eq!(
        aggregator.results().len(),
        answered + 1,
        "a body without a name was answered"
    );
    let rejected = worker.next_heartbeat();
    assert_eq!(rejected["jobs"]["scored"], 1, "{}", rejected["jobs"]);
    worker.drain();
    aggregator.expect_empty(&stack.jobs_queue());
    assert_eq!(
        aggregator.depth(&stack.object(&format!("dead.{MODEL}"))),
        Some((0, 0)),
        "each parked once"
    );
}

/// As clients send it that know JSON alone, or compress what they send.
#[test]
fn json_of_every_name_is_read_and_whoever_sends_something_else_hears_what_it_looks_like() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let context = r#"{"share":1.10,"block":123456789012345678901234567890,"none":null}"#;
    let job = |id: &str| {
        format!(
            r#"{{"v":1.0,"kind":"validate","submission_id":"{id}","deadline_ms":4102444800000.0,
                "validation":{{"nonce":null}},"context":{context}}}"#
        )
    };
    let typed = |name: &str| BasicProperties::default().with_content_type(name.into());
    for (id, name) in [
        ("text", "text/json"),
        ("suffix", "application/vnd.acme+json; charset=utf-8"),
    ] {
        let marked = format!("\u{feff}{}", job(id));
        aggregator.publish(marked.as_bytes(), typed(name));
        let result = aggregator.result(id);
        assert_eq!(result.json()["status"], "scored", "{}", result.json());
        assert_eq!(result.content_type.as_deref(), Some("application/json"));
        let text = String::from_utf8_lossy(&result.body).into_owned();
        assert!(text.contains(&format!("\"context\":{context}")), "{text}");
    }
    let gzip = b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xabV*S\xb22\xac\x05\0".to_vec();
    let json = |id: &str| job(id).into_bytes();
    for (id, body, properties, why) in [
        (
            "untyped",
            json("untyped"),
            BasicProperties::default(),
            "looks like JSON; content_type is missing",
        ),
        (
            "plain",
            json("plain"),
            typed("text/plain"),
            "looks like JSON; content_type is text/plain",
        ),
        (
            "coded",
            gzip,
            typed("application/json").with_content_encoding("gzip".into()),
            "content_encoding gzip is not read",
        ),
    ] {
        aggregator.publish(&body, properties.with_message_id(id.into()));
        let result = aggregator.result(id).json();
        let message = result["error"]["message"].as_str().expect("a message");
        assert!(message.starts_with(why), "{message}");
        aggregator.take_parked();
    }
    worker.drain();
    aggregator.expect_empty(&stack.jobs_queue());
}

#[test]
fn an_id_that_fills_all_that_amqp_allows_stops_nobody() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    // The answer's own message_id is made of it, and would be longer than AMQP allows.
    let longest = "x".repeat(255);
    let named = BasicProperties::default().with_message_id(longest.as_str().into());
    aggregator.publish(b"no job", named);
    aggregator.submit(&honest().job("sound"));
    let answered = |id: &str| {
        eventually(SOON, "both are answered", || {
            aggregator
                .results()
                .iter()
                .any(|m| m.json()["submission_id"] == id)
        });
    };
    answered("sound");
    answered(&longest);
    aggregator.take_parked();
    worker.drain();
    aggregator.expect_empty(&stack.jobs_queue());
}
