//! `scorer package --list`: every tensor of a package, what candidates may call it, where it is in the
//! graph, and whether it moves the loss.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use serde::Serialize;

use super::offline::fault;
use super::{Outcome, answer, answer_json, busy, plain, progress};
use crate::config::Config;
use crate::engine::thread::EngineHandle;
use crate::model::manifest::{GraphLocation, Manifest};
use crate::model::tensor::Dtype;
use crate::telemetry::status::WorkerStatus;

/// A tensor of a package.
#[derive(Debug, Serialize)]
struct Listed<'a> {
    name: &'a str,
    aliases: Vec<&'a str>,
    shape: &'a [usize],
    dtype: Dtype,
    places: &'a [GraphLocation],
    trainable: bool,
    /// Whether a change to it was seen to change the loss; null if no candidate may change it.
    moves_loss: Option<bool>,
}

/// Warms the package up, as a worker does, to see which tensors move its loss.
pub(super) async fn list(config: &Config, dir: &Path, json: bool) -> Outcome {
    let status = WorkerStatus::default();
    let bar = busy(format!("loading {}", dir.display()));
    let progress = status.progress;
    let engine = EngineHandle::load(dir, config, progress.clone()).await;
    let engine = engine.map_err(|e| fault(&e))?;
    bar.set_message("changing and restoring every tensor");
    let warming = async { engine.turn().await.warm().await };
    let warm = progress::until(&bar, &progress, warming).await;
    bar.finish_and_clear();
    let inert = warm.map_err(|e| fault(&e))?.inert;
    let inert = inert.iter().map(String::as_str).collect();
    let listed = listed(&engine.package.manifest, &inert);
    if json {
        return answer_json(&listed);
    }
    answer(&table(&listed))
}

fn listed<'a>(manifest: &'a Manifest, inert: &HashSet<&str>) -> Vec<Listed<'a>> {
    let mut aliases: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (alias, name) in manifest.aliases.iter().flatten() {
        aliases.entry(name).or_default().push(alias);
    }
    let tensors = manifest.tensors.iter();
    let listed = tensors.map(|(name, entry)| {
        let trainable = manifest.is_trainable(name);
        Listed {
            name,
            aliases: aliases.remove(name.as_str()).unwrap_or_default(),
            shape: &entry.shape,
            dtype: entry.dtype,
            places: &entry.places,
            trainable,
            moves_loss: trainable.then(|| !inert.contains(name.as_str())),
        }
    });
    listed.collect()
}

fn table(listed: &[Listed<'_>]) -> String {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["TENSOR", "SHAPE", "DTYPE", "PLACES", "MOVES THE LOSS"]);
    table.add_rows(listed.iter().map(|tensor| {
        let place = |place: &GraphLocation| {
            let transposed = if place.transposed { ", transposed" } else { "" };
            plain(&format!("{}{transposed}", place.initializer))
        };
        let names = std::iter::once(plain(tensor.name));
        let aliases = tensor.aliases.iter().map(|a| plain(&format!("  = {a}")));
        let lines = |lines: &mut dyn Iterator<Item = String>| lines.collect::<Vec<_>>().join("\n");
        [
            lines(&mut names.chain(aliases)),
            format!("{:?}", tensor.shape),
            tensor.dtype.as_str().to_owned(),
            lines(&mut tensor.places.iter().map(place)),
            match tensor.moves_loss {
                Some(true) => "yes",
                Some(false) => "not seen",
                None => "not trainable",
            }
            .to_owned(),
        ]
    }));
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_is_listed_with_all_its_names_and_places_and_with_what_it_does() {
        let mut manifest: Manifest = serde_json::from_value(serde_json::json!({
            "v": 1, "name": "m", "version": 1, "graph": {"file": "g", "sha256": ""},
            "inputs": {}, "outputs": {}, "objective": {"kind": "graph_loss"}, "precision": "f32", "shards": [],
            "aliases": {"head": "embed"}, "trainable": ["e*", "s*"],
            "tensors": {
                "embed": {"shape": [2, 3], "dtype": "f32", "places": [
                    {"initializer": "m.head", "transposed": false}, {"initializer": "val_7", "transposed": true}]},
                "scale": {"shape": [3], "dtype": "f32", "places": [{"initializer": "scale", "transposed": false}]},
                "norm": {"shape": [3], "dtype": "f32", "places": [{"initializer": "norm", "transposed": false}]},
            },
        }))
        .unwrap();
        let inert = HashSet::from(["scale"]);
        let found = listed(&manifest, &inert);
        let told: Vec<_> = found.iter().map(|t| (t.name, t.moves_loss)).collect();
        assert_eq!(
            told,
            [
                ("embed", Some(true)),
                ("norm", None),
                ("scale", Some(false))
            ]
        );
        assert_eq!(found[0].aliases, ["head"]);
        let table = table(&found);
        for words in ["  = head", "[2, 3]", "f32", "val_7, transposed", "not seen"] {
            assert!(table.contains(words), "{table}");
        }
        manifest.trainable = None;
        let all = listed(&manifest, &inert);
        assert_eq!(all[1].moves_loss, Some(true));
    }
}
