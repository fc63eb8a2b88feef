//! Where the nodes of every test graph run. `UPDATE=1 cargo test --test device placement` writes the table anew.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use scorer::config::EngineConfig;
use scorer::engine::Engine;
use scorer::engine::trial::build;
use scorer::model::build::Recipe;
use scorer::model::manifest::Objective;
use scorer::model::package::Package;

use crate::config;
use crate::table::{model_dir, table, unpacked};

/// A graph and what else a package of it is made of.
struct Source {
    name: String,
    graph: PathBuf,
    weights: Option<PathBuf>,
    shards: PathBuf,
    objective: Objective,
}

fn source(folder: &str, graph: &str, weights: &str, objective: Objective) -> Source {
    let dir = model_dir().join(folder);
    let shards = dir.join("shards");
    Source {
        name: dir
            .join(graph)
            .strip_prefix(model_dir())
            .unwrap()
            .display()
            .to_string(),
        graph: dir.join(format!("{graph}.onnx")),
        weights: (!weights.is_empty()).then(|| dir.join(format!("{weights}.safetensors"))),
        shards: match shards.is_dir() {
            true => shards,
            false => model_dir().join("hazard/shards"),
        },
        objective,
    }
}

fn small() -> Vec<Source> {
    let mut all = Vec::new();
    for graph in ["graph-named", "graph-folded", "graph-two-places"] {
        all.push(source("", graph, "checkpoint", Objective::causal_lm(128)));
    }
    for (folder, graph, weights) in [
        ("half", "graph-f16", "checkpoint-f16"),
        ("half", "graph-bf16", "checkpoint-bf16"),
        ("inputs", "graph", "checkpoint"),
        ("hazard", "graph", "checkpoint"),
        ("merged", "graph-traced", "checkpoint"),
        ("merged", "graph-scripted", "checkpoint"),
        ("external", "graph", "checkpoint"),
        ("elsewhere", "graph", "checkpoint"),
        ("elsewhere", "initializers", "checkpoint"),
        ("elsewhere", "bfloat16", ""),
    ] {
        all.push(source(folder, graph, weights, Objective::causal_lm(16)));
    }
    for graph in [
        "adapter",
        "copies",
        "experts",
        "gate",
        "normalised",
        "steep",
    ] {
        all.push(source("inert", graph, graph, Objective::GraphLoss {}));
    }
    all.push(source(
        "digits",
        "graph",
        "checkpoint",
        Objective::GraphLoss {},
    ));
    all
}

/// The models of Hugging Face in three states. Compressed: they are unpacked into this folder.
fn architectures(folder: &Path) -> Vec<Source> {
    let home = model_dir().join("architectures");
    let cases = table(&home)["cases"].as_object().unwrap().clone();
    let of = |(name, case): (&String, &serde_json::Value)| {
        let states = [
            ("fresh", "fresh"),
            ("trained", "trained"),
            ("unfolded", "fresh"),
        ];
        let objective = match case["objective"].as_str().unwrap() {
            "causal_lm" => Objective::causal_lm(16),
            _ => Objective::GraphLoss {},
        };
        let shards = home.join("shards").join(case["data"].as_str().unwrap());
        let plain = |state: &str, file: String| {
            let out = folder.join(format!("{name}-{state}-{file}"));
            let bytes = unpacked(name, &format!("{file}.gz"));
            std::fs::write(&out, bytes).unwrap();
            out
        };
        states.map(|(graph, weights)| Source {
            name: format!("{name}/{graph}"),
            graph: plain(graph, format!("{graph}.onnx")),
            weights: Some(plain(graph, format!("{weights}.safetensors"))),
            shards: shards.clone(),
            objective,
        })
    };
    cases.iter().flat_map(of).collect()
}

/// Packages the graph and loads it; what the table says of it.
fn place(source: &Source, config: &EngineConfig) -> String {
    let out = tempfile::tempdir().unwrap();
    let recipe = Recipe {
        exclude: Vec::new(),
        graph: source.graph.clone(),
        weights: source.weights.clone(),
        shards: source.shards.clone(),
        name: "placement".into(),
        version: 1,
        out: out.path().to_owned(),
        objective: source.objective,
    };
    if build(&recipe).is_err() {
        return "   refused when it is packaged".into();
    }
    let package = Arc::new(Package::load(out.path(), false, &[]).unwrap());
    let engine = match Engine::load(package, config, Arc::default()) {
        Ok(engine) => engine,
        Err(error) => return format!("   {}: {}", error.detail, error.message),
    };
    let placement = engine.placement();
    let mut operators = BTreeMap::<&str, usize>::new();
    for node in &placement.host_nodes {
        *operators.entry(&node.operator).or_default() += 1;
    }
    let operators = operators.iter().map(|(op, count)| format!("{op} {count}"));
    let operators = operators.collect::<Vec<_>>().join(", ");
    let (device, host) = (placement.device, placement.host_nodes.len());
    format!("{device:>6}{host:>6}   {operators}")
        .trim_end()
        .to_owned()
}

/// Two at a time: the sessions of a process share one device, and this ended the process before they took turns.
fn places(sources: &[Source], config: &EngineConfig) -> BTreeMap<String, String> {
    let next = Mutex::new(sources.iter());
    let lines = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some(source) = next.lock().unwrap().next() else {
                        break;
                    };
                    let line = place(source, config);
                    lines.lock().unwrap().insert(source.name.clone(), line);
                }
            });
        }
    });
    lines.into_inner().unwrap()
}

#[test]
fn every_graph_computes_on_the_device_or_is_refused_by_name() {
    let config = config(&[]).engine;
    let folder = tempfile::tempdir().unwrap();
    let mut sources = small();
    sources.extend(architectures(folder.path()));
    let found = places(&sources, &config);
    assert_eq!(found.len(), sources.len());
    let mut table = format!(
        "{:<26}{:>6}{:>6}   on the host\n",
        "graph", "device", "host"
    );
    for (name, line) in found {
        table += &format!("{name:<26}{line}\n");
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/device/placement.txt");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &table).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        table, committed,
        "run UPDATE=1 cargo test --test device placement"
    );
}
