//! "Your own model" of `docs/getting-started.md` runs as it is printed: its programs, its commands, its two workers.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use testkit::folder::Folder;
use testkit::package::fixtures;
use testkit::process::Group;
use testkit::program::scorer;
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually};
use testkit::worker::Settings;

/// What the reader brings: held-out tokens, and a model before and after it was trained. The exporter is torch's, so the
/// graph is there, too; `clients/python/tests_torch` runs that program.
const BROUGHT: &str = r#"
import base64, json, pathlib, shutil, sys, zlib
import numpy
from safetensors.numpy import load_file, save_file

model = pathlib.Path(sys.argv[1])
shutil.copyfile(model / "graph-named.onnx", "model.onnx")
shutil.copyfile(model / "checkpoint.safetensors", "checkpoint.safetensors")
shards = [load_file(path)["tokens"].reshape(-1) for path in sorted((model / "shards").iterdir())]
numpy.save("held-out.npy", numpy.concatenate(shards))
trained = {name: tensor.copy() for name, tensor in load_file("checkpoint.safetensors").items()}
cases = json.loads((model / "cases.json").read_text())["cases"]
case = next(case for case in cases if case["name"] == "difference-few-steps")
for name, entry in json.loads((model / case["file"]).read_text()).items():
    if isinstance(entry, dict):
        packed, k = zlib.decompress(base64.b64decode(entry["data"])), entry["k"]
        values = numpy.frombuffer(packed[: -4 * k], "<f4" if len(packed) == 8 * k else "<f2")
        trained[name].reshape(-1)[numpy.frombuffer(packed[-4 * k :], "<i4")] += values
save_file(trained, "trained.safetensors")
"#;

/// A program or a command, in the order of the page.
enum Step {
    Program(String),
    Command(String),
}

fn steps() -> Vec<Step> {
    let page = include_str!("../../docs/getting-started.md");
    let (_, rest) = page
        .split_once("\n## Your own model\n")
        .expect("the section");
    let (section, _) = rest.split_once("\n## ").expect("another section follows");
    let joined = section.replace("\\\n", " ");
    let (mut found, mut lines) = (Vec::new(), joined.lines());
    while let Some(line) = lines.next() {
        if line == "```python" {
            let program: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
            found.push(Step::Program(program.join("\n")));
        } else if let Some(command) = line.strip_prefix("    ") {
            found.push(Step::Command(command.to_owned()));
        }
    }
    found
}

/// A command in the folder, with the services of the test.
fn shell(folder: &Folder, line: &str, stack: &Stack) -> Command {
    let settings = Settings::new(&[
        ("SCORER_AMQP__URL", &stack.rabbit.url()),
        ("SCORER_AMQP__NAMESPACE", &stack.namespace),
        ("SCORER_REDIS__URL", &stack.redis.url()),
        ("SCORER_REDIS__NAMESPACE", &stack.namespace),
    ]);
    let program = scorer();
    let bin = program.parent().expect("a folder").display();
    let path = std::env::var("PATH").expect("a PATH");
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exec {line}")]);
    settings.apply(&mut command);
    command.current_dir(folder.path());
    command.env("PATH", format!("{bin}:{path}"));
    command
}

/// Standard output and standard error of what succeeds.
fn said(mut command: Command) -> (String, String) {
    let ran = command.output().expect("it starts");
    let [out, err] = [ran.stdout, ran.stderr].map(|text| String::from_utf8(text).expect("text"));
    assert_eq!(ran.status.code(), Some(0), "{command:?}: {out}{err}");
    (out, err)
}

fn python(folder: &Folder, program: &str, arguments: &[&Path]) {
    let mut command = Command::new("python3");
    command.args(["-c", program]).args(arguments);
    let client = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/python/src");
    command.current_dir(folder.path()).env("PYTHONPATH", client);
    said(command);
}

#[test]
fn the_section_ends_with_two_workers_and_a_verdict() {
    let (folder, stack) = (Folder::new("own"), Stack::shared());
    python(&folder, BROUGHT, &[&fixtures()]);
    let (mut workers, mut judged) = (Vec::new(), 0);
    for step in steps() {
        match step {
            // torch's, and what is there already.
            Step::Program(program) if program.starts_with("# export_graph.py") => {}
            Step::Command(line) if line.starts_with("pip ") || line.starts_with("docker ") => {}
            Step::Program(program) => python(&folder, &program, &[]),
            Step::Command(line) if line.starts_with("scorer run ") => {
                let mut running = shell(&folder, &line, &stack);
                let quiet = running.stdout(Stdio::null()).stderr(Stdio::null());
                workers.push(Group::spawn(quiet));
            }
            Step::Command(line) if line.starts_with("scorer status") => {
                let both = || {
                    let shown = shell(&folder, &line, &stack).output();
                    let shown = shown.expect("it starts").stdout;
                    String::from_utf8_lossy(&shown).contains("2 alive, 2 ready")
                };
                eventually(SOON, "both workers are ready", both);
            }
            Step::Command(line) => {
                let (out, err) = said(shell(&folder, &line, &stack));
                assert!(!err.contains("warning"), "{line}: {err}");
                if line.starts_with("scorer score ") {
                    let result: Value = serde_json::from_str(&out).expect("JSON");
                    assert!(result["delta"].as_f64().expect("a number") > 0.0, "{out}");
                    judged += 1;
                } else if line.starts_with("scorer submit ") {
                    assert!(out.contains("scored"), "{out}");
                    judged += 1;
                }
            }
        }
    }
    assert_eq!((workers.len(), judged), (2, 2));
}
