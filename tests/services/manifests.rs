//! `scorer manifest`, the binary itself: what it writes is what a worker follows, and what it finds is what a worker
//! would find.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::manifest::{private_key, public_key, sign};
use testkit::package::{VERSION, sound};
use testkit::program::scorer;
use testkit::site::{delta_name, full_name};
use testkit::stack::Stack;
use testkit::trainer::Trainer;
use testkit::wait::START;
use testkit::worker::Settings;

const KEYED: [&str; 2] = ["--key", "key.pem"];

/// A file as the difference between the second version and the third.
fn difference(file: &str) -> [&str; 8] {
    [
        "--delta",
        file,
        "--format",
        "binary_v2",
        "--from",
        "8",
        "--to",
        "9",
    ]
}

/// A folder where training publishes: whole weights of the second version, and how to get from it to the third.
struct Folder {
    folder: TempDir,
    trainer: Trainer,
}

impl Folder {
    fn new(seed: u64) -> Self {
        let mut trainer = Trainer::new(seed);
        let folder = tempfile::tempdir().expect("a folder");
        let [second, third] = [trainer.advance(), trainer.advance()];
        let put = |name: &str, bytes: Vec<u8>| {
            std::fs::write(folder.path().join(name), bytes).expect("a file");
        };
        put(&full_name(second), trainer.full(second));
        put(&delta_name(second, third), trainer.delta(second, third));
        put("key.pem", private_key().into_bytes());
        Self { folder, trainer }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What `scorer manifest` prints here, on both outputs, and its exit code.
    fn run(&self, action: &str, arguments: &[&str], more: &[(&str, String)]) -> (String, i32) {
        let mut command = Command::new(scorer());
        let command = command.current_dir(self.folder.path());
        command
            .args(["manifest", action, "manifest.json"])
            .args(arguments);
        if action != "live" {
            command.arg("--model").arg(sound() as &Path);
        }
        let settings = more
            .iter()
            .fold(Settings::new(&[]), |settings, (key, value)| {
                settings.set(key, value)
            });
        let output = settings.apply(command).output().expect("the binary runs");
        let said = [output.stdout, output.stderr].concat();
        (
            String::from_utf8_lossy(&said).into_owned(),
            output.status.code().unwrap_or(-1),
        )
    }

    fn add(&self, arguments: &[&str]) -> (String, i32) {
        self.run("add", arguments, &[])
    }

    /// Adds both files; the third version is live.
    fn publish(&self, more: &[&str]) -> String {
        let (full, delta) = (full_name(VERSION + 1), delta_name(VERSION + 1, VERSION + 2));
        let (said, code) = self.add(&["--weights", &full, "--version", "8"]);
        assert_eq!(code, 0, "{said}");
        let delta = [&difference(&delta)[..], &["--live"]].concat();
        let (said, code) = self.add(&[&delta[..], more].concat());
        assert_eq!(code, 0, "{said}");
        said
    }

    fn manifest(&self) -> Value {
        let bytes = std::fs::read(self.path("manifest.json")).expect("a manifest");
        serde_json::from_slice(&bytes).expect("JSON")
    }

    /// Writes the manifest anew, changed.
    fn spoil(&self, spoil: impl FnOnce(&mut Value)) {
        let mut manifest = self.manifest();
        spoil(&mut manifest);
        std::fs::write(self.path("manifest.json"), manifest.to_string()).expect("a file");
    }

    /// The verdict and text of each part that was not good, the loss, and the exit code.
    fn check(&self, more: &[(&str, String)]) -> (Vec<(String, String, String)>, Option<f64>, i32) {
        let (said, code) = self.run("check", &["--json"], more);
        let report: Value = serde_json::Deserializer::from_str(&said)
            .into_iter()
            .next()
            .and_then(Result::ok)
            .unwrap_or_else(|| panic!("{said}"));
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let findings = report["findings"].as_array().expect("findings").iter();
        let found = findings.map(|f| (text(&f["part"]), text(&f["verdict"]), text(&f["found"])));
        let bad = found.filter(|(_, verdict, _)| verdict != "ok");
        (bad.collect(), report["loss"].as_f64(), code)
    }
}

#[test]
fn what_was_added_and_checked_is_what_a_worker_follows() {
    let folder = Folder::new(31);
    let said = folder.publish(&KEYED);
    let (key, live) = (public_key(), VERSION + 2);
    assert!(
        said.contains(&format!("model.update_key = \"{key}\"")),
        "{said}"
    );
    let by_key = [("model.update_key", key.clone())];
    let (bad, loss, code) = folder.check(&by_key);
    assert_eq!((bad, code), (vec![], 0));

    // With the loss that was measured as its known answer.
    let canary = loss.expect("a loss").to_string();
    folder.publish(&[&KEYED[..], &["--canary", &canary]].concat());
    let manifest = folder.manifest();
    assert_eq!(manifest["updates"][0]["canary"]["loss"].as_f64(), loss);
    assert_eq!(
        [&manifest["full"], &manifest["updates"]].map(|list| list.as_array().map(Vec::len)),
        [Some(1); 2]
    );
    assert_eq!(folder.check(&by_key).2, 0);

    let stack = Stack::shared();
    let url = format!("file://{}", folder.path("manifest.json").display());
    let worker = stack.worker_with("w1", |s| {
        s.set("model.update_url", url)
            .set("model.update_interval", "1s")
            .set("model.update_key", key)
    });
    let serves = |version: u64| {
        worker.heartbeat_when(START, &format!("version {version}"), |r| {
            r["ready"] == true && r["model"]["version"] == version
        })
    };
    assert_eq!(
        serves(live)["model"]["weights_id"],
        folder.trainer.weights_id(live)
    );
    // And back.
    let (said, code) = folder.run("live", &[&["8"], &KEYED[..]].concat(), &[]);
    assert_eq!(code, 0, "{said}");
    assert!(
        said.contains("workers are to serve version 8, before it was 9"),
        "{said}"
    );
    serves(VERSION + 1);
}

#[test]
fn what_no_worker_could_use_is_not_added() {
    let folder = Folder::new(32);
    folder.publish(&[]);
    let before = folder.manifest();
    let other = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(other.path(), folder.trainer.full(9)).expect("written");
    std::fs::write(folder.path("other.safetensors"), b"\x02\0\0\0\0\0\0\0{}").expect("written");
    std::fs::copy(
        folder.path("full-8.safetensors"),
        folder.path("copy.safetensors"),
    )
    .expect("copied");
    std::fs::write(folder.path("changed.safetensors"), folder.trainer.full(9)).expect("written");
    let delta_again = [folder.trainer.delta(8, 9), b" ".to_vec()].concat();
    std::fs::write(folder.path("again.json"), delta_again).expect("written");
    let pipe = Command::new("mkfifo").arg(folder.path("pipe")).status();
    assert!(pipe.expect("mkfifo").success());
    let elsewhere = other.path().display().to_string();
    let full =
        |file: &'static str, version: &'static str| vec!["--weights", file, "--version", version];
    let delta = |from: &'static str, format: &'static str| {
        vec![
            "--delta", "8-9.json", "--format", format, "--from", from, "--to", "10",
        ]
    };
    let no_format = vec!["--delta", "8-9.json", "--from", "8", "--to", "9"];
    let away = vec!["--weights", &elsewhere, "--version", "9"];
    for (arguments, code, says) in [
        (
            full("changed.safetensors", "8"),
            65,
            "with another file (SHA-256",
        ),
        (
            full("other.safetensors", "9"),
            65,
            "no worker could use it: the weights of version 9",
        ),
        (full("missing", "9"), 65, "missing"),
        (away, 65, "--url"),
        (delta("10", "binary_v2"), 65, "the same as from"),
        (
            delta("9", "safetensors"),
            65,
            "looks like JSON: --format binary_v2",
        ),
        (no_format, 64, "--format"),
        (
            difference("again.json").to_vec(),
            65,
            "8 to 9 is in the manifest already, with another file",
        ),
        (
            full("copy.safetensors", "7"),
            65,
            "version 7 is the package's own, and these are other weights",
        ),
        (
            [full("copy.safetensors", "9"), vec!["--url", "http://["]].concat(),
            64,
            "is no URL",
        ),
        (full("pipe", "9"), 65, "not a regular file"),
        (vec!["--weights", "copy.safetensors"], 64, "--version"),
        (
            [full("copy.safetensors", "9"), vec!["--key", "8-9.json"]].concat(),
            65,
            "openssl genpkey",
        ),
        (
            [full("copy.safetensors", "9"), vec!["--canary", "3,-1"]].concat(),
            64,
            "canary.tolerance",
        ),
    ] {
        let (said, ended) = folder.add(&arguments);
        assert_eq!(ended, code, "{arguments:?}: {said}");
        assert!(said.contains(says), "{arguments:?}: {said}");
        assert_eq!(folder.manifest(), before, "{arguments:?}");
    }
    // To a version that nothing leads to; and a manifest of another model.
    let (said, ended) = folder.run("live", &["99"], &[]);
    assert_eq!(
        (
            said.contains("no entry leads to or from version 99, only 8, 9;"),
            ended
        ),
        (true, 65),
        "{said}"
    );
    folder.spoil(|m| m["name"] = json!("other"));
    let (said, ended) = folder.add(&full("copy.safetensors", "9"));
    assert_eq!(
        (said.contains("is for the model \"other\""), ended),
        (true, 65),
        "{said}"
    );
}

#[test]
fn what_was_said_before_stays() {
    let folder = Folder::new(34);
    folder.publish(&[]);
    folder.spoil(|m| m["full"][0]["urls"] = json!(["https://m.example/8", "full-8.safetensors"]));
    let manifest = folder.path("manifest.json");
    std::fs::set_permissions(&manifest, Permissions::from_mode(0o640)).expect("mode");
    // Where a worker looks for it is not where it is kept.
    let kept = folder.path("kept.json");
    std::fs::rename(&manifest, &kept).expect("moved");
    std::os::unix::fs::symlink(&kept, &manifest).expect("a link");
    let full = ["--weights", "full-8.safetensors", "--version", "8"];
    let (said, code) = folder.add(&[&full[..], &["--canary", "3"]].concat());
    assert_eq!(code, 0, "{said}");
    let entry = folder.manifest()["full"][0].clone();
    assert_eq!(
        entry["urls"],
        json!(["https://m.example/8", "full-8.safetensors"])
    );
    assert_eq!(entry["canary"], json!({"loss": 3.0, "tolerance": 0.001}));
    folder.add(&[&full[..], &["--url", "elsewhere/8"]].concat());
    let entry = folder.manifest()["full"][0].clone();
    assert_eq!(
        (&entry["urls"], &entry["canary"]["loss"]),
        (&json!(["elsewhere/8"]), &json!(3.0))
    );
    assert_eq!(folder.manifest()["live_version"], 9);
    assert!(manifest.is_symlink());
    let mode = kept.metadata().expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o640);
}

#[test]
fn commands_at_the_same_time_lose_nothing_of_each_other() {
    let folder = Folder::new(35);
    folder.publish(&KEYED);
    let versions = 10..20_u64;
    std::thread::scope(|scope| {
        for version in versions.clone() {
            let folder = &folder;
            scope.spawn(move || {
                let (from, to) = (version.to_string(), (version + 1).to_string());
                let delta = [
                    "--delta",
                    "8-9.json",
                    "--format",
                    "binary_v2",
                    "--from",
                    &from,
                    "--to",
                    &to,
                ];
                let (said, code) = folder.add(&[&delta[..], &KEYED].concat());
                assert_eq!(code, 0, "{said}");
            });
        }
    });
    let manifest = folder.manifest();
    let updates = manifest["updates"].as_array().expect("updates").iter();
    let mut found: Vec<_> = updates.filter_map(|delta| delta["from"].as_u64()).collect();
    found.sort_unstable();
    assert_eq!(found, [8].into_iter().chain(versions).collect::<Vec<_>>());
    let by_key = [("model.update_key", public_key())];
    let (bad, ..) = folder.check(&by_key);
    assert_eq!(bad, []);
}

#[test]
fn a_check_names_what_a_worker_would_refuse() {
    type Spoil = fn(&mut Value);
    let folder = Folder::new(33);
    folder.publish(&KEYED);
    let sound = folder.manifest();
    let whole = std::fs::read(folder.path("full-8.safetensors")).expect("a file");
    std::fs::write(folder.path("half"), &whole[..whole.len() / 2]).expect("written");
    let mut flipped = whole;
    flipped[100] ^= 1;
    std::fs::write(folder.path("flipped"), flipped).expect("written");
    let table: [(Spoil, &[&str], &str); 11] = [
        (
            |m| m["full"][0]["sha256"] = json!("0".repeat(64)),
            &["full[0] fail", "route fail"],
            "its SHA-256 is",
        ),
        (
            |m| m["full"][0]["size"] = json!(10),
            &["full[0] fail", "route fail"],
            "10",
        ),
        // What one mirror sent is not taken for what the next one has.
        (
            |m| m["full"][0]["urls"] = json!(["half", "flipped", "full-8.safetensors"]),
            &["full[0] fail", "full[0] fail"],
            "its SHA-256 is",
        ),
        // Another entry says where the same file is not.
        (
            |m| {
                let mut other = m["full"][0].clone();
                (other["graph_sha256"], other["urls"]) =
                    (json!("0".repeat(64)), json!(["missing"]));
                m["full"].as_array_mut().expect("a list").push(other);
            },
            &["full[1] fail"],
            "missing",
        ),
        // Workers that have version 8 would come to other weights than new ones.
        (
            |m| {
                let mut other = m["full"][0].clone();
                other["version"] = json!(9);
                m["full"].as_array_mut().expect("a list").push(other);
            },
            &["updates[0] fail"],
            "leads to other weights",
        ),
        // The other mirror is good enough for a worker.
        (
            |m| m["full"][0]["urls"] = json!(["missing", "full-8.safetensors"]),
            &["full[0] fail"],
            "missing",
        ),
        (
            |m| m["full"][0]["graph_sha256"] = json!("0".repeat(64)),
            &["full[0] warn", "route fail"],
            "for another graph",
        ),
        (
            |m| m["updates"][0]["format"] = json!("safetensors"),
            &["updates[0] fail", "route fail"],
            "the update from 8 to 9",
        ),
        (
            |m| m["updates"][0]["canary"] = json!({"loss": 0.5, "tolerance": 0.1}),
            &["loss fail"],
            "the canary says 0.5 +- 0.1",
        ),
        (
            |m| m["live_version"] = json!("nine"),
            &["manifest fail"],
            "live_version",
        ),
        (
            |m| m["name"] = json!("other"),
            &["manifest fail"],
            "it is for model \"other\"",
        ),
    ];
    for (spoil, expected, says) in table {
        std::fs::write(folder.path("manifest.json"), sound.to_string()).expect("written");
        folder.spoil(spoil);
        let (bad, _, code) = folder.check(&[]);
        let found: Vec<_> = bad
            .iter()
            .map(|(part, verdict, _)| format!("{part} {verdict}"))
            .collect();
        assert_eq!(
            (found.iter().map(String::as_str).collect(), code),
            (expected.to_vec(), 1),
            "{bad:?}"
        );
        assert!(
            bad.iter().any(|(.., found)| found.contains(says)),
            "{says}: {bad:?}"
        );
    }
    // Other bytes than those that were signed, and no signature at all.
    std::fs::write(folder.path("manifest.json"), sound.to_string()).expect("written");
    let by_key = [("model.update_key", public_key())];
    for says in ["not that of model.update_key", "no signature"] {
        let (bad, _, code) = folder.check(&by_key);
        assert_eq!(
            (bad.len(), bad[0].0.as_str(), code),
            (1, "signature", 1),
            "{bad:?}"
        );
        assert!(bad[0].2.contains(says), "{bad:?}");
        std::fs::remove_file(folder.path("manifest.json.sig")).ok();
    }
    // Signed by another program, as documented: base64 of Ed25519 over the exact bytes.
    std::fs::write(
        folder.path("manifest.json.sig"),
        sign(sound.to_string().as_bytes()),
    )
    .expect("written");
    assert_eq!(folder.check(&by_key).2, 0);
    let (said, _) = folder.run("live", &["8"], &[]);
    assert!(said.contains("until it is signed: --key"), "{said}");
}
