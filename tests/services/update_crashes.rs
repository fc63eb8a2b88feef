//! A worker that dies at any change to its folder serves exactly the old or exactly the new version
//! afterwards, and reaches the new one.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;
use testkit::crash::{Change, Crash};
use testkit::http::Route;
use testkit::manifest::ManifestBuilder;
use testkit::package::VERSION;
use testkit::site::{MANIFEST, Site};
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually, secs};
use testkit::worker::Worker;

/// Workers at a time.
const SIDE_BY_SIDE: usize = 3;

/// Where the old version came from, and how the new one is reached.
#[derive(Clone, Copy)]
enum Way {
    /// A delta on the package's own weights.
    FirstDelta,
    /// Whole weights and a delta on them, in place of what was kept before.
    FullAndDelta,
}

impl Way {
    fn before(self) -> u64 {
        match self {
            Self::FirstDelta => VERSION,
            Self::FullAndDelta => VERSION + 1,
        }
    }

    fn after(self) -> u64 {
        match self {
            Self::FirstDelta => VERSION + 1,
            Self::FullAndDelta => VERSION + 3,
        }
    }

    fn manifest(self, site: &Site) -> ManifestBuilder {
        let manifest = ManifestBuilder::new(self.after());
        match self {
            Self::FirstDelta => manifest.update(site.delta(7, 8)),
            Self::FullAndDelta => manifest.full(site.full(9)).update(site.delta(9, 10)),
        }
    }
}

fn version(record: &Value) -> Option<u64> {
    record["model"]["version"].as_u64()
}

/// A namespace whose worker serves the old version and has ended, and what is published.
fn prepared(way: Way) -> (Stack, Site) {
    let stack = Stack::shared();
    let mut site = Site::new(21);
    for _ in 0..3 {
        site.trainer.advance();
    }
    std::fs::create_dir_all(stack.state_dir()).expect("a folder");
    if way.before() != VERSION {
        site.publish(&ManifestBuilder::new(8).update(site.delta(7, 8)));
        let worker = stack.worker_with("w1", |s| site.followed(s));
        serves(&worker, &site, 8);
        // The lease goes back in order, so that the next process need not wait for its end.
        worker.drain();
    }
    site.publish(&way.manifest(&site));
    (stack, site)
}

#[track_caller]
fn serves(worker: &Worker, site: &Site, wanted: u64) {
    let record = worker.heartbeat_when(secs(60), &format!("version {wanted}"), |r| {
        r["ready"] == true && version(r) == Some(wanted)
    });
    assert_eq!(
        record["model"]["weights_id"],
        site.trainer.weights_id(wanted)
    );
}

/// What a whole update does to the folder.
fn undisturbed(way: Way) -> Vec<Change> {
    let (stack, site) = prepared(way);
    let crash = Crash::never(&stack.state_dir());
    let worker = stack.worker_with("w1", |s| crash.settings(site.followed(s)));
    serves(&worker, &site, way.after());
    eventually(SOON, "downloads are swept", || {
        let last = crash.changes().pop();
        last.is_some_and(|c| c.name == "unlink" && c.path.ends_with(".part"))
    });
    crash.changes()
}

/// How a death went.
#[derive(Debug)]
struct Death {
    /// What was done before.
    done: Vec<Change>,
    /// The version that was served afterwards.
    found: u64,
}

/// Dies in place of the n-th change, starts again without and with a manifest.
fn dies_at(way: Way, n: u64) -> Death {
    let (stack, site) = prepared(way);
    let crash = Crash::before(&stack.state_dir(), n);
    let alone = |s| site.followed(s).set("model.update_stagger", false);
    let worker = stack.worker_with("w1", |s| crash.settings(alone(s)));
    let dead = || worker.ended().is_some();
    eventually(secs(60), &format!("it dies at change {n}"), dead);
    let mut done = crash.changes();
    let fatal = done.pop();
    drop(worker);

    site.server.put(MANIFEST, Route::Status(503));
    let worker = stack.worker_with("w1", |s| site.followed(s));
    let record = worker.ready();
    let found = version(&record).expect("a version");
    let expected = site.trainer.weights_id(found);
    assert_eq!(record["model"]["weights_id"], expected, "after {fatal:?}");
    site.publish(&way.manifest(&site));
    serves(&worker, &site, way.after());
    Death { done, found }
}

/// The journal was put in its place so many times.
fn journals(changes: &[Change]) -> usize {
    let written = |c: &&Change| c.name == "rename" && c.path == "w1/journal.json";
    changes.iter().filter(written).count()
}

#[track_caller]
fn dies_at_every_change(way: Way) {
    let changes = undisturbed(way);
    let count = changes.len() as u64;
    assert!(count > 15, "{changes:?}");
    let next = AtomicU64::new(1);
    let deaths = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..SIDE_BY_SIDE {
            scope.spawn(|| {
                while let n @ 1.. = next.fetch_add(1, Ordering::Relaxed)
                    && n <= count
                {
                    let death = dies_at(way, n);
                    deaths.lock().expect("no death panics").push(death);
                }
            });
        }
    });
    let deaths = deaths.into_inner().expect("no death panics");
    assert_eq!(deaths.len() as u64, count);
    // One change decides: the last time that the journal is put in its place.
    let decisive = journals(&changes);
    for death in &deaths {
        let decided = journals(&death.done) == decisive;
        let expected = if decided { way.after() } else { way.before() };
        assert_eq!(death.found, expected, "{death:?}");
    }
    for version in [way.before(), way.after()] {
        assert!(
            deaths.iter().any(|death| death.found == version),
            "{version}"
        );
    }
}

#[test]
fn the_first_update_survives_a_death_at_every_change() {
    dies_at_every_change(Way::FirstDelta);
}

#[test]
fn whole_weights_in_place_of_kept_ones_survive_a_death_at_every_change() {
    dies_at_every_change(Way::FullAndDelta);
}
