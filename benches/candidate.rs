//! What is done to a candidate besides the forward pass: decoding, checking, writing, restoring,
//! and choosing the windows. `cargo bench`; `scorer bench` measures the whole beside a bare session.

#![expect(
    clippy::expect_used,
    missing_docs,
    reason = "a failed step ends the benchmark; criterion makes undocumented functions"
)]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use rand::SeedableRng;
use rand::rngs::StdRng;
use scorer::candidate::{self, TensorUpdate, Update};
use scorer::config::{Config, Layers};
use scorer::engine::Engine;
use scorer::engine::patch::Patches;
use scorer::model::onnx::synthetic::Decoder;
use scorer::model::package::Package;
use scorer::model::plan::Plan;
use scorer::protocol::job::{Format, Rule};
use scorer::selftest::sample::encode;
use scorer::selftest::synthetic_model::make;
use serde_json::json;
use testkit::container::{Container, Entry, Kind, Width};

/// Ten million parameters: beyond the caches, and made in a second.
const MODEL: Decoder = Decoder {
    layers: 4,
    width: 384,
    heads: 6,
    vocabulary: 4_000,
    window: 128,
};
const DENSITY: f64 = 0.01;

fn config() -> Config {
    let set = ["engine.execution_provider=cpu".to_owned()];
    let layers = Layers {
        set: &set,
        ..Layers::default()
    };
    Config::load(&layers).expect("the defaults are sound")
}

/// The same update, to be written in other containers.
fn entries(update: &Update, package: &Package) -> Vec<Entry> {
    let entry = |touched: &TensorUpdate| {
        let info = &package.weights.tensors[touched.tensor];
        Entry {
            name: info.name.clone(),
            shape: info.shape.clone(),
            indices: touched.indices.iter().copied().map(i64::from).collect(),
            values: touched.values.clone(),
        }
    };
    update.tensors.iter().map(entry).collect()
}

/// A word of a job, as the crate reads it.
fn read<T: serde::de::DeserializeOwned>(word: serde_json::Value) -> T {
    serde_json::from_value(word).expect("the container's words are the contract's")
}

fn benches(criterion: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    make(MODEL, dir.path()).expect("the model is written");
    let package = Package::load(dir.path(), false, &[]).expect("the package is sound");
    let (package, config) = (Arc::new(package), config());
    let mut random = StdRng::seed_from_u64(1);
    let bytes = encode(&package, DENSITY, |_| true, &mut random).expect("memory can be written");
    let limits = (&config.candidates).into();
    let decode = || {
        candidate::decode(&bytes, Format::BinaryV2, None, &package, limits).expect("it is sound")
    };
    let update = decode();
    let mut group = criterion.benchmark_group("candidate");
    group.throughput(Throughput::Elements(update.entries()));
    group.bench_function("decode", |b| b.iter(|| black_box(decode())));
    for container in Container::all(
        &[Kind::Map, Kind::Pairs, Kind::Chunks, Kind::Compact],
        Width::F32,
    ) {
        let written = container.write(&entries(&update, &package));
        let (format, compression) = (
            read(json!(container.format())),
            read(json!(container.compression)),
        );
        let zstd = container.compression.map_or("", |_| ", zstd");
        group.bench_function(format!("decode {:?}{zstd}", container.kind), |b| {
            b.iter(|| {
                black_box(candidate::decode(
                    &written,
                    format,
                    compression,
                    &package,
                    limits,
                ))
            });
        });
    }
    group.bench_function("check", |b| {
        let patches = |update| Patches::new(&package, update, Rule::ParamDiff);
        b.iter_batched(|| update.clone(), patches, BatchSize::LargeInput);
    });
    let patches = Patches::new(&package, update.clone(), Rule::ParamDiff).expect("it is sound");
    let engine = Engine::load(Arc::clone(&package), &config.engine, Arc::default());
    let mut engine = engine.expect("ONNX Runtime is installed; see ops/setup");
    group.bench_function("write and restore", |b| {
        b.iter(|| engine.rehearse(&patches))
    });
    group.finish();
    criterion.bench_function("plan of 8 windows", |b| {
        b.iter(|| Plan::new(&package.shards, None, black_box("nonce"), package.cut()));
    });
}

criterion_group!(all, benches);
criterion_main!(all);
