//! `scorer init`: a folder to begin with. `init/` holds it as it is written.

use std::path::Path;

use super::{Fault, Outcome, answer};

/// Files by their name in `init/`.
macro_rules! files {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!("init/", $name)))),*]
    };
}

const FILES: &[(&str, &[u8])] = files![
    "scorer.toml",
    "compose.yaml",
    // Of `tests/model/digits`, as `scorer package` makes it.
    "package/model.json",
    "package/model.onnx",
    "package/weights.safetensors",
    "package/shards/shard_000001.safetensors",
    "package/shards/shard_000002.safetensors",
    "package/shards/shard_000003.safetensors",
    "candidates/better.json",
    "candidates/worse.json",
];

/// Writes the folder, and says what to do with it.
pub(super) fn init(dir: &Path) -> Outcome {
    write(dir).map_err(Fault::data)?;
    answer(&format!(
        "{} has a configuration, services for docker compose, a sample model and two candidates. There, run:

  scorer check --config scorer.toml
  scorer score --config scorer.toml --model package --candidate candidates/better.json --format binary_v2 --semantics param_diff
  scorer run --config scorer.toml

The last one waits for RabbitMQ and Redis: docker compose up --detach",
        dir.display()
    ))
}

fn write(dir: &Path) -> Result<(), String> {
    let at = |path: &Path, error: std::io::Error| format!("{}: {error}", path.display());
    std::fs::create_dir_all(dir).map_err(|e| at(dir, e))?;
    let mut found = std::fs::read_dir(dir).map_err(|e| at(dir, e))?;
    if found.next().is_some() {
        return Err(format!(
            "{}: not empty; name a new directory",
            dir.display()
        ));
    }
    for (name, bytes) in FILES {
        let file = dir.join(name);
        let folder = file.parent().unwrap_or(dir);
        std::fs::create_dir_all(folder).map_err(|e| at(folder, e))?;
        std::fs::write(&file, bytes).map_err(|e| at(&file, e))?;
    }
    Ok(())
}
