//! `scorer init`: its folder works as its last words say.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use testkit::folder::Folder;
use testkit::package::{Package, fixtures};
use testkit::process::Group;
use testkit::program::scorer;
use testkit::stack::Stack;
use testkit::wait::DRAIN;
use testkit::worker::Settings;

fn init(dir: &Path) -> Output {
    let ran = Command::new(scorer()).arg("init").arg(dir).output();
    ran.expect("the binary runs")
}

/// A new folder, and the commands that were printed.
fn begun() -> (Folder, Vec<String>) {
    let folder = Folder::new("init");
    let ran = init(&folder.join("demo"));
    assert_eq!(ran.status.code(), Some(0));
    let said = String::from_utf8(ran.stdout).expect("text");
    let commands = said.lines().filter_map(|line| line.strip_prefix("  "));
    let commands: Vec<String> = commands.map(str::to_owned).collect();
    assert_eq!(commands.len(), 3, "{said}");
    (folder, commands)
}

/// A command line in the folder, with nothing set but what is given.
fn shell(folder: &Folder, line: &str, settings: &Settings) -> Command {
    let program = scorer();
    let bin = program.parent().expect("a folder").display();
    let path = std::env::var("PATH").expect("a PATH");
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exec {line}")]);
    settings.apply(&mut command);
    command.current_dir(folder.join("demo"));
    command.env("PATH", format!("{bin}:{path}"));
    command
}

fn answer(mut command: Command) -> String {
    let ran = command.output().expect("sh runs");
    let err = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.status.code(), Some(0), "{err}");
    String::from_utf8(ran.stdout).expect("text")
}

#[test]
fn the_printed_commands_check_score_and_run() {
    let (folder, commands) = begun();
    let stack = Stack::shared();
    let settings = Settings::new(&[
        ("SCORER_AMQP__URL", &stack.rabbit.url()),
        ("SCORER_AMQP__NAMESPACE", &stack.namespace),
        ("SCORER_REDIS__URL", &stack.redis.url()),
        ("SCORER_REDIS__NAMESPACE", &stack.namespace),
    ]);
    let checked = answer(shell(&folder, &commands[0], &settings));
    assert!(checked.contains("digits version 1"), "{checked}");
    let delta = |line: &str| {
        let text = answer(shell(&folder, line, &settings));
        let result: Value = serde_json::from_str(&text).expect("JSON");
        result["delta"].as_f64().expect("a number")
    };
    assert!(delta(&commands[1]) > 0.0);
    assert!(delta(&commands[1].replace("better", "worse")) < 0.0);

    let mut running = shell(&folder, &commands[2], &settings);
    let mut worker = Group::spawn(running.stdout(Stdio::null()).stderr(Stdio::null()));
    let submit = "scorer submit --config scorer.toml --candidate candidates/better.json \
                  --semantics param_diff --wait --json --timeout 2m";
    assert!(delta(submit) > 0.0);
    worker.signal(Signal::SIGTERM);
    let ended = worker.wait(DRAIN).expect("it drains");
    assert_eq!(ended.code(), Some(0));
}

#[test]
fn a_folder_with_anything_in_it_is_left_alone() {
    let folder = Folder::new("init");
    std::fs::write(folder.join("notes"), "mine").expect("a writable folder");
    let ran = init(folder.path());
    assert_eq!(ran.status.code(), Some(65));
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(said.contains("not empty"), "{said}");
    let left = std::fs::read_dir(folder.path()).expect("a folder").count();
    assert_eq!(left, 1);
}

#[test]
fn the_sample_is_what_is_made_of_the_digits() {
    let from = fixtures().join("digits");
    let objective = ["--objective", "graph_loss"];
    let made = Package::made(&from, "graph.onnx", "checkpoint.safetensors", &objective);
    made.edit(|manifest| {
        manifest["name"] = json!("digits");
        manifest["version"] = json!(1);
    });
    let (folder, _) = begun();
    let sample = folder.join("demo/package");
    let read = |path: &Path| std::fs::read(path).expect("a file of the package");
    let parsed = |path: &Path| serde_json::from_slice::<Value>(&read(path)).expect("JSON");
    let manifest = parsed(&sample.join("model.json"));
    assert_eq!(manifest, parsed(&made.path().join("model.json")));
    let shards = manifest["shards"].as_array().expect("shards").iter();
    let files = shards.chain([&manifest["graph"], &manifest["weights"]]);
    for file in files.map(|entry| entry["file"].as_str().expect("a name")) {
        assert!(
            read(&sample.join(file)) == read(&made.path().join(file)),
            "{file}"
        );
    }
    for (sample, digits) in [
        ("better", "difference-sparse"),
        ("worse", "noise-difference"),
    ] {
        let ours = read(&folder.join(&format!("demo/candidates/{sample}.json")));
        assert!(
            ours == read(&from.join(format!("candidates/{digits}.json"))),
            "{sample}"
        );
    }
}
