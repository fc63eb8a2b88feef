//! Workers follow their model by themselves: which way they go, what they refuse, what they keep,
//! and that a version that does not prove itself is taken back.

use std::sync::Arc;

use serde_json::{Value, json};
use testkit::broker::Rabbit;
use testkit::case::{honest, honest_job};
use testkit::container::{Container, Entry, Kind, Width};
use testkit::crash::Crash;
use testkit::digest::digest;
use testkit::hazard::hazard_candidate;
use testkit::http::{Route, Server};
use testkit::manifest::{self, ManifestBuilder, public_key, sign, with_canary};
use testkit::package::{Package, VERSION};
use testkit::redis_server::Redis;
use testkit::site::{MANIFEST, Site, delta_name, full_name, path};
use testkit::stack::Stack;
use testkit::wait::{SOON, START, eventually, eventually_some};
use testkit::worker::{Settings, Worker};

/// Waits until a worker takes jobs for a version, with the very weights of the training side.
#[track_caller]
fn serves(worker: &Worker, site: &Site, version: u64) -> Value {
    let record = worker.heartbeat_when(START, &format!("version {version}"), |r| {
        r["ready"] == true && r["model"]["version"] == version
    });
    assert_eq!(
        record["model"]["weights_id"],
        site.trainer.weights_id(version)
    );
    record
}

/// Waits until the worker says why it does not serve the live version.
#[track_caller]
fn fails(worker: &Worker, why: &str) -> Value {
    worker.heartbeat_when(START, why, |r| {
        r["update"]["failure"]
            .as_str()
            .is_some_and(|f| f.contains(why))
    })
}

fn job(name: &str, version: u64) -> Value {
    let mut job = honest().job(name);
    job["model_version"] = json!(version);
    job
}

fn files(stack: &Stack, worker: &str) -> Vec<String> {
    let folder = stack.state_dir().join(worker);
    let entries = std::fs::read_dir(folder).expect("the worker's folder");
    let names = entries.map(|e| {
        e.expect("an entry")
            .file_name()
            .to_string_lossy()
            .into_owned()
    });
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[test]
fn a_worker_follows_by_deltas_and_judges_by_the_version_that_a_job_names() {
    let stack = Stack::shared();
    let mut site = Site::new(11);
    site.publish(&ManifestBuilder::new(VERSION));
    let worker = stack.worker_with("w1", |s| site.followed(s));
    serves(&worker, &site, VERSION);
    let aggregator = stack.aggregator();
    aggregator.collect_results();

    // Asked for before the version is published: it waits on the ladder.
    aggregator.submit(&job("early", VERSION + 2));
    site.advance();
    serves(&worker, &site, VERSION + 1);
    let live = site.advance();
    let record = serves(&worker, &site, live);
    assert_eq!(record["update"]["live_version"], live);
    assert_eq!(record["update"]["failure"], Value::Null);

    aggregator.submit(&job("late", VERSION));
    aggregator.submit(&job("now", live));
    let late = aggregator.result("late").json();
    assert_eq!(late["error"]["code"], "model_version_mismatch");
    assert_eq!(
        late["error"]["detail"],
        json!({"worker": live, "job": VERSION})
    );
    let early = aggregator.result("early").json();
    let now = aggregator.result("now").json();
    let package = site.trainer.package(live);
    let offline = stack.offline(honest(), &package.path());
    for result in [&early, &now] {
        assert_eq!(result["status"], "scored", "{result}");
        assert_eq!(result["weights_id"], site.trainer.weights_id(live));
        for field in ["delta", "stderr", "loss_before", "loss_after", "plan"] {
            assert_eq!(result[field], offline[field], "{field}");
        }
    }
    let events = stack.events("w1");
    let updating = events.iter().filter(|e| e["to"] == "updating");
    let details: Vec<&str> = updating.map(|e| e["detail"].as_str()).collect();
    assert_eq!(details, ["update_to_v8", "update_to_v9"]);
}

#[test]
fn what_was_reached_outlives_the_process_and_old_versions_go() {
    let stack = Stack::shared();
    let mut site = Site::new(12);
    site.publish(&ManifestBuilder::new(VERSION));
    let worker = stack.worker_with("w1", |s| site.followed(s));
    serves(&worker, &site, VERSION);
    for _ in 0..3 {
        let version = site.advance();
        serves(&worker, &site, version);
    }
    eventually(SOON, "two versions are kept, and no download", || {
        let kept = files(&stack, "w1");
        let weights = kept.iter().filter(|f| f.ends_with(".safetensors")).count();
        weights == 2 && !kept.iter().any(|f| f.ends_with(".part"))
    });
    worker.kill();
    let asked = site.server.asked(&path(&delta_name(9, 10)));
    let worker = stack.worker_with("w1", |s| site.followed(s));
    serves(&worker, &site, 10);
    assert_eq!(site.server.asked(&path(&delta_name(9, 10))), asked);
    let reached = stack
        .events("w1")
        .iter()
        .filter(|e| e["to"] == "updating")
        .count();
    assert_eq!(reached, 3, "the restart needs no update");

    // Back to the version before, which is here, and to the package's own.
    for version in [9, VERSION] {
        site.publish(&ManifestBuilder::new(version));
        serves(&worker, &site, version);
    }
    // What is kept is checked: a file that was changed is not served.
    let version = site.trainer.version();
    site.publish(&ManifestBuilder::new(version).full(site.full(version)));
    serves(&worker, &site, version);
    worker.kill();
    let kept = files(&stack, "w1").into_iter();
    for file in kept.filter(|f| f.ends_with(".safetensors")) {
        let file = stack.state_dir().join("w1").join(file);
        let mut bytes = std::fs::read(&file).expect("kept weights");
        *bytes.last_mut().expect("not empty") ^= 1;
        std::fs::write(&file, bytes).expect("writable");
    }
    let worker = stack.worker_with("w1", |s| site.followed(s));
    serves(&worker, &site, version);
    assert!(worker.log().contains("weights that were kept are not used"));
}

#[test]
fn the_cheapest_way_is_gone_and_the_next_where_it_is_closed() {
    let stack = Stack::shared();
    let mut site = Site::new(13);
    for _ in 0..3 {
        site.trainer.advance();
    }
    // Two small steps, the second of which is missing on the server: whole weights are next.
    let gone = site.delta(8, 9);
    site.server
        .put(&path(&delta_name(8, 9)), Route::Status(404));
    let manifest = ManifestBuilder::new(9)
        .update(site.delta(7, 8))
        .update(gone)
        .full(site.full(9));
    site.publish(&manifest);
    let worker = stack.worker_with("w1", |s| site.followed(s));
    serves(&worker, &site, 9);
    assert_eq!(site.server.asked(&path(&delta_name(7, 8))), 1);
    assert_eq!(site.server.asked(&path(&full_name(9))), 1);

    // The delta's digest is right and its contents are not; whole weights of the wrong graph are
    // no way; whole weights and a delta are.
    let nonsense = b"[]".to_vec();
    let mut broken = site.delta(9, 10);
    broken["sha256"] = json!(testkit::digest::digest(&nonsense));
    broken["size"] = json!(nonsense.len());
    broken["urls"] = json!(["nonsense"]);
    site.server.put(&path("nonsense"), Route::Mirror(nonsense));
    let mut foreign = site.full(10);
    foreign["graph_sha256"] = json!("0".repeat(64));
    let manifest = ManifestBuilder::new(10).update(broken).full(foreign);
    site.publish(&manifest);
    let record = fails(&worker, "no usable route from version 7, 9 to 10");
    assert!(
        record["update"]["failure"]
            .to_string()
            .contains("from 9 to 10")
    );
    assert_eq!(record["ready"], true);
    site.publish(&manifest.full(site.full(9)).update(site.delta(9, 10)));
    serves(&worker, &site, 10);
}

#[test]
fn mirrors_are_tried_in_order_and_downloads_go_on_where_they_broke_off() {
    let stack = Stack::shared();
    let mut site = Site::new(14);
    site.trainer.advance();
    let bytes = site.trainer.full(8);
    let half = bytes.len() / 2;
    let (dying, wrong, sound) = (path("dying"), path("wrong"), path("sound"));
    site.server
        .put(&dying, Route::Breaking(bytes.clone(), half));
    let mut other = bytes.clone();
    other[half + 1] ^= 1;
    site.server.put(&wrong, Route::Mirror(other));
    site.server.put(&path("coded"), Route::Coded(bytes.clone()));
    site.server.put(&sound, Route::Mirror(bytes));
    let elsewhere = "http://127.0.0.1:9/8";
    let entry = manifest::full(
        &site.trainer,
        8,
        &[elsewhere, "coded", "dying", "wrong", "sound"],
    );
    site.publish(&ManifestBuilder::new(8).full(entry));
    let worker = stack.worker_with("w1", |s| site.followed(s));
    serves(&worker, &site, 8);
    // The second half came from the wrong mirror; then all of it, to be sure; then the next mirror.
    assert_eq!(site.server.ranges(&dying), [None]);
    assert_eq!(site.server.ranges(&wrong), [Some(half as u64), None]);
    assert_eq!(site.server.ranges(&sound), [None]);
    assert!(worker.log().contains("it is not beside the manifest"));
}

#[test]
fn a_manifest_that_nobody_vouches_for_is_refused() {
    let stack = Stack::shared();
    let mut site = Site::new(15);
    site.trainer.advance();
    let manifest = ManifestBuilder::new(8).update(site.delta(7, 8));
    site.publish_signed_by(&manifest, None);
    let keyed = |s| site.followed(s).set("model.update_key", public_key());
    let worker = stack.worker_with("w1", keyed);
    fails(&worker, "no signature");
    site.publish_signed_by(&manifest, Some(&sign(b"another manifest")));
    let record = fails(&worker, "not that of model.update_key");
    assert_eq!(record["ready"], true);
    assert_eq!(record["model"]["version"], VERSION);
    assert_eq!(site.server.asked(&path(&delta_name(7, 8))), 0);
    site.publish(&manifest);
    serves(&worker, &site, 8);
    // Of another model, or not a manifest at all.
    site.publish_signed_by(&ManifestBuilder::new(8), Some(""));
    fails(&worker, "the signature");
}

#[test]
fn a_version_that_does_not_prove_itself_is_taken_back_and_tried_again_with_another_manifest() {
    let stack = Stack::shared();
    let mut site = Site::new(16);
    site.trainer.advance();
    let wrong = with_canary(site.delta(7, 8), 1.0, 0.001);
    site.publish(&ManifestBuilder::new(8).update(wrong));
    let worker = stack.worker_with("w1", |s| site.followed(s));
    let record = worker.heartbeat_when(START, "version 8 is refused", |r| {
        r["ready"] == true && r["update"]["refused"]["version"] == 8
    });
    assert_eq!(record["model"]["version"], VERSION);
    assert_eq!(
        record["model"]["weights_id"],
        site.trainer.weights_id(VERSION)
    );
    let why = record["update"]["refused"]["why"]
        .as_str()
        .expect("a reason");
    assert!(why.contains("canary"), "{why}");
    let tries = || {
        stack
            .events("w1")
            .iter()
            .filter(|e| e["to"] == "updating")
            .count()
    };
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&honest_job("still", "a"));
    assert_eq!(aggregator.result("still").json()["status"], "scored");
    // Not at once, not when asked, and not by the next process.
    let answer = stack
        .command(&["ctl", "update", "--worker", "w1"])
        .expect_code(1);
    assert!(
        answer.stdout.starts_with("w1  refused: version 8"),
        "{}",
        answer.stdout
    );
    worker.kill();
    let worker = stack.worker_with("w1", |s| site.followed(s));
    let looked = |r: &Value| r["ready"] == true && r["update"]["looked_at_ms"].is_u64();
    worker.heartbeat_when(START, "a look", looked);
    assert_eq!(tries(), 1);
    site.publish(&ManifestBuilder::new(8).update(site.delta(7, 8)));
    serves(&worker, &site, 8);
    worker.heartbeat_when(SOON, "nothing is refused any more", |r| {
        r["update"]["refused"].is_null()
    });
    let mut states = stack.states("w1");
    states.dedup();
    assert!(
        states
            .join(" ")
            .contains("updating warming degraded warming ready"),
        "{states:?}"
    );
}

#[test]
fn the_manifest_is_asked_for_conditionally_and_at_once_when_somebody_asks() {
    let stack = Stack::shared();
    let mut site = Site::new(17);
    site.publish(&ManifestBuilder::new(VERSION));
    let rarely = |s| site.followed(s).set("model.update_interval", "1h");
    let worker = stack.worker_with("w1", rarely);
    serves(&worker, &site, VERSION);
    let answer = stack.command(&["ctl", "update"]).expect_code(0);
    assert_eq!(
        answer.stdout,
        "w1  done: version 7 is live and served already\n"
    );
    assert_eq!(site.server.unchanged(MANIFEST), 1);
    let version = site.advance();
    let answer = stack.command(&["ctl", "update"]).expect_code(0);
    assert_eq!(answer.stdout, "w1  done: version 8 is served\n");
    serves(&worker, &site, version);
    // A job for a newer version makes it look, too.
    let version = site.advance();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&job("newer", version));
    serves(&worker, &site, version);
    assert_eq!(aggregator.result("newer").json()["status"], "scored");
}

#[test]
fn a_full_disk_is_an_error_that_loses_nothing() {
    let stack = Stack::shared();
    let mut site = Site::new(18);
    site.publish(&ManifestBuilder::new(VERSION));
    std::fs::create_dir_all(stack.state_dir()).expect("a folder");
    let crash = Crash::never(&stack.state_dir());
    let worker = stack.worker_with("w1", |s| crash.settings(site.followed(s)));
    serves(&worker, &site, VERSION);
    let first = site.advance();
    serves(&worker, &site, first);
    let second = site.advance();
    serves(&worker, &site, second);
    let weights = || {
        let files = files(&stack, "w1").into_iter();
        files.filter(|f| f.ends_with(".safetensors")).count()
    };
    assert_eq!(weights(), 2);
    crash.fill(true);
    let third = site.advance();
    let record = fails(&worker, "No space left on device");
    assert_eq!(record["ready"], true);
    assert_eq!(record["model"]["version"], second);
    // For the sake of room the version before went; the one that is served is there.
    assert_eq!(weights(), 1);
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&job("meanwhile", second));
    assert_eq!(aggregator.result("meanwhile").json()["status"], "scored");
    crash.fill(false);
    stack.command(&["ctl", "update"]).expect_code(0);
    serves(&worker, &site, third);
}

#[test]
fn buckets_are_read_like_any_other_place() {
    for scheme in ["s3", "gs", "az"] {
        reads_a_bucket(scheme);
    }
}

/// `SCHEME://model` is the folder `/model` of the test's server.
fn reads_a_bucket(scheme: &str) {
    let stack = Stack::shared();
    let mut site = Site::new(19);
    let version = site.trainer.advance();
    site.publish(&ManifestBuilder::new(version).update(site.delta(VERSION, version)));
    let in_bucket = |s: Settings| {
        bucket_environment(&site.server.url(""))
            .into_iter()
            .fold(site.followed(s), |s, (key, value)| s.env(key, &value))
            .set(
                "model.update_url",
                format!("{scheme}://model/manifest.json"),
            )
    };
    let worker = stack.worker_with("w1", in_bucket);
    serves(&worker, &site, version);
    eventually(SOON, "the manifest is asked for conditionally", || {
        site.server.unchanged(MANIFEST) > 0
    });
    let allowed =
        |s: Settings| in_bucket(s).set("candidates.allow", format!("[\"{scheme}://model/\"]"));
    let worker = stack.worker_with("w2", allowed);
    serves(&worker, &site, version);
    let case = honest();
    site.server
        .put(&path("candidate"), Route::Mirror(case.bytes()));
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let mut asked = case.job_by_url("from-a-bucket", &format!("{scheme}://model/candidate"));
    asked["model_version"] = json!(version);
    stack
        .command(&["ctl", "drain", "--worker", "w1"])
        .expect_code(0);
    aggregator.submit(&asked);
    let result = aggregator.result("from-a-bucket").json();
    assert_eq!(result["status"], "scored", "{scheme}: {result}");
    let mut elsewhere = case.job_by_url("from-elsewhere", &format!("{scheme}://other/candidate"));
    elsewhere["model_version"] = json!(version);
    aggregator.submit(&elsewhere);
    let refused = aggregator.result("from-elsewhere").json();
    assert_eq!(refused["error"]["code"], "candidate_url_forbidden");
    site.server.put(&path("coded"), Route::Coded(case.bytes()));
    let mut coded = case.job_by_url("coded", &format!("{scheme}://model/coded"));
    coded["model_version"] = json!(version);
    aggregator.submit(&coded);
    eventually(SOON, "the answer is seen to be coded", || {
        worker.log().contains("is coded (gzip)")
    });
}

/// What sends every cloud's client to this server.
fn bucket_environment(server: &str) -> Vec<(&'static str, String)> {
    let server = server.trim_end_matches('/').to_owned();
    vec![
        ("AWS_ENDPOINT", server.clone()),
        ("AWS_ALLOW_HTTP", "true".to_owned()),
        ("AWS_ACCESS_KEY_ID", "tests".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "no secret".to_owned()),
        ("GOOGLE_BASE_URL", server.clone()),
        ("GOOGLE_ALLOW_HTTP", "true".to_owned()),
        ("GOOGLE_SKIP_SIGNATURE", "true".to_owned()),
        ("AZURE_STORAGE_ACCOUNT_NAME", "tests".to_owned()),
        ("AZURE_STORAGE_ENDPOINT", server),
        ("AZURE_ALLOW_HTTP", "true".to_owned()),
        ("AZURE_SKIP_SIGNATURE", "true".to_owned()),
    ]
}

/// The file that leads from one version to its neighbour, in a container.
fn in_container(site: &Site, (from, to): (u64, u64), container: Container) -> Value {
    let entry = |(name, changes): (String, Vec<(usize, f32)>)| {
        let index = |(index, _): &(usize, f32)| i64::try_from(*index).expect("a small tensor");
        Entry {
            shape: site.trainer.shape(&name),
            indices: changes.iter().map(index).collect(),
            values: changes.iter().map(|(_, d)| *d).collect(),
            name,
        }
    };
    let step: Vec<Entry> = site
        .trainer
        .difference(from, to)
        .into_iter()
        .map(entry)
        .collect();
    let (name, bytes) = (format!("{from}-{to}"), container.write(&step));
    let mut listed = json!({
        "from": from, "to": to, "urls": [name], "format": container.format(),
        "sha256": digest(&bytes), "size": bytes.len(),
    });
    if let Some(compression) = container.compression {
        listed["compression"] = json!(compression);
    }
    site.server.put(&path(&name), Route::Mirror(bytes));
    listed
}

#[test]
fn updates_come_in_every_container_and_lead_where_they_say() {
    let stack = Stack::shared();
    let mut site = Site::new(21);
    let mut containers = Container::all(&[Kind::Pairs, Kind::Chunks, Kind::Compact], Width::F32);
    let mut manifest = Vec::new();
    let mut from = VERSION;
    for container in &mut containers {
        let to = site.trainer.advance();
        container.versions = (from, to);
        manifest.push(in_container(&site, (from, to), *container));
        from = to;
    }
    let all = manifest
        .into_iter()
        .fold(ManifestBuilder::new(from), ManifestBuilder::update);
    site.publish(&all);
    let worker = stack.worker_with("w1", |s| site.followed(s));
    serves(&worker, &site, from);

    let to = site.trainer.advance();
    let mut lying = containers[2];
    lying.versions = (from - 1, to - 1);
    let lying = in_container(&site, (from, to), lying);
    site.publish(&ManifestBuilder::new(to).update(lying));
    let said = format!("the file leads from {} to {}", from - 1, to - 1);
    fails(&worker, &said);
    serves(&worker, &site, from);
}

#[test]
fn without_redis_nobody_waits_for_a_turn() {
    let stack = Stack::on(Rabbit::shared(), Arc::new(Redis::started()));
    let mut site = Site::new(20);
    site.publish(&ManifestBuilder::new(VERSION));
    let worker = stack.worker_with("w1", |s| site.followed(s));
    serves(&worker, &site, VERSION);
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    stack.redis.kill();
    let version = site.advance();
    aggregator.submit(&job("without-redis", version));
    let result = aggregator.result("without-redis").json();
    assert_eq!(result["status"], "scored");
    assert_eq!(result["weights_id"], site.trainer.weights_id(version));
}

/// Weights that never come to an end: of a model whose loop turns as often as one of them says.
#[test]
fn a_version_that_hangs_holds_up_neither_its_worker_nor_the_fleet() {
    let (stack, server, package) = (Stack::shared(), Server::start(), Package::hazard());
    let follows = |s: Settings| {
        s.set("model.dir", package.path().display())
            .set("model.update_url", server.url(MANIFEST))
            .set("model.update_interval", "1s")
    };
    let publish = |version: u64, size: f32| {
        let delta = hazard_candidate(size);
        let entry = json!({
            "from": VERSION, "to": version, "urls": ["delta"], "format": "binary_v2",
            "sha256": digest(&delta), "size": delta.len(),
        });
        server.put(&path("delta"), Route::Mirror(delta));
        let manifest = ManifestBuilder::new(version).update(entry);
        server.put(MANIFEST, Route::Mirror(manifest.bytes()));
    };
    let fleet = ["w1", "w2"].map(|id| stack.worker_with(id, follows));
    fleet.iter().for_each(|worker| drop(worker.ready()));
    publish(VERSION + 1, -1e12);
    let refused =
        |r: &Value| r["ready"] == true && r["update"]["refused"]["version"] == VERSION + 1;
    let serving = || fleet.iter().position(|worker| refused(&worker.heartbeat()));
    let first = eventually_some(START, "one has tried the version", serving);
    let record = fleet[first].heartbeat();
    let why = record["update"]["refused"]["why"].as_str().expect("why");
    assert!(why.contains("no progress"), "{why}");
    assert_eq!(record["model"]["version"], VERSION, "{record}");
    let tried = format!("update_to_v{}", VERSION + 1);
    fleet[1 - first].heartbeat_when(START, "the next has its turn", |r| {
        r["state_detail"] == *tried || refused(r)
    });
    let events = stack.events(["w1", "w2"][first]);
    assert!(events.iter().any(|e| e["detail"] == "stuck"), "{events:?}");
}
