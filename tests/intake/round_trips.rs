//! The same update in every container is the same update: the same entries, the same score.

use rand::rngs::StdRng;
use rand::seq::index::sample;
use rand::{Rng, SeedableRng};
use scorer::candidate::{Update, decode};
use scorer::config::CandidatesConfig;
use scorer::model::package::Package;
use scorer::model::weights::TensorInfo;
use scorer::protocol::result::similarity;
use serde_json::{Value, json};
use testkit::container::{Container, Entry, Kind, Width};

use super::{Bench, config, format};

fn read(
    container: Container,
    bytes: &[u8],
    package: &Package,
    limits: &CandidatesConfig,
) -> Update {
    let (format, compression) = format(container);
    let update = decode(bytes, format, compression, package, limits.into());
    let update = update.unwrap_or_else(|e| panic!("{container:?}: {e}"));
    // Only one container says where it leads.
    Update {
        versions: None,
        ..update
    }
}

/// Some entries of some tensors, in any order, that the width can say exactly.
fn random_update(seed: u64, package: &Package, width: Width) -> Vec<Entry> {
    let mut random = StdRng::seed_from_u64(seed);
    let tensors = &package.weights.tensors;
    let count = random.random_range(1..5);
    let touched = sample(&mut random, tensors.len(), count);
    let entry = |at: usize| {
        let tensor = &tensors[at];
        let k = random.random_range(1..=tensor.numel.min(300));
        let indices = sample(&mut random, tensor.numel, k);
        let indices = indices
            .into_iter()
            .map(|i| i64::try_from(i).unwrap())
            .collect();
        let mut value = || width.round(random.random_range(-0.01..0.01_f32));
        Entry {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            indices,
            values: (0..k).map(|_| value()).collect(),
        }
    };
    touched.into_iter().map(entry).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_container_gives_the_same_update() {
    let (bench, limits) = (Bench::new(&[]).await, config(&[]).candidates);
    for width in [Width::F32, Width::F16, Width::Bf16] {
        for seed in 0..50 {
            let written = random_update(seed, bench.package(), width);
            let mut known: Option<Update> = None;
            for container in Container::all(&Kind::SPARSE, width) {
                let found = read(
                    container,
                    &container.write(&written),
                    bench.package(),
                    &limits,
                );
                let known = known.get_or_insert_with(|| found.clone());
                assert_eq!(found, *known, "seed {seed}, {container:?}");
            }
            let entries: usize = written.iter().map(|entry| entry.indices.len()).sum();
            assert_eq!(known.unwrap().entries(), entries as u64);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_container_gives_the_same_score() {
    let bench = Bench::new(&[]).await;
    let facts = |result: &Value| {
        let mut facts = result.clone();
        facts["candidate"]["sha256"] = Value::Null;
        for field in ["timings_ms", "scored_at_ms"] {
            facts[field] = Value::Null;
        }
        facts
    };
    for seed in 0..3 {
        let written = random_update(seed, bench.package(), Width::F16);
        let mut known: Option<Value> = None;
        // What f16 can say, every width of 32 bits can.
        let ways = [Width::F16, Width::F32].map(|width| Container::all(&Kind::SPARSE, width));
        for container in ways.concat() {
            let result = bench
                .judge(container, &container.write(&written), json!({}))
                .await;
            assert_eq!(result["status"], "scored", "{container:?}: {result}");
            assert_eq!(result["candidate"]["sketch"].as_array().unwrap().len(), 64);
            let known = known.get_or_insert_with(|| facts(&result));
            assert_eq!(facts(&result), *known, "seed {seed}, {container:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dense_tensor_is_all_of_its_entries() {
    let (bench, limits) = (Bench::new(&[]).await, config(&[]).candidates);
    let mut random = StdRng::seed_from_u64(1);
    for width in [Width::F32, Width::F16, Width::Bf16] {
        let mut update = bench.update();
        for entry in &mut update {
            let numel: usize = entry.shape.iter().product();
            entry.indices = (0..i64::try_from(numel).unwrap()).collect();
            entry.values.clear();
            let mut value = || width.round(random.random_range(-1.0..1.0_f32));
            entry.values.resize_with(numel, &mut value);
        }
        let sparse = Container::all(&[Kind::Pairs], width).remove(0);
        let known = read(sparse, &sparse.write(&update), bench.package(), &limits);
        for dense in Container::all(&[Kind::Dense], width) {
            let found = read(dense, &dense.write(&update), bench.package(), &limits);
            assert_eq!(found, known, "{dense:?}");
        }
    }
}

/// Who compares results finds who copied whom, whatever was done to the bytes.
#[tokio::test(flavor = "multi_thread")]
async fn results_tell_copies_half_copies_and_strangers_apart() {
    let bench = Bench::new(&[]).await;
    let update = |seed, from: usize, to: usize| {
        let mut random = StdRng::seed_from_u64(seed);
        let tensors = &bench.package().weights.tensors;
        let large = tensors.iter().filter(|tensor| tensor.numel > 10_000);
        let mut entry = |tensor: &TensorInfo| {
            let indices = sample(&mut random, tensor.numel, 200).into_iter();
            let indices = indices.map(|i| i64::try_from(i).unwrap());
            Entry {
                name: tensor.name.clone(),
                shape: tensor.shape.clone(),
                indices: indices.skip(from).take(to - from).collect(),
                values: vec![0.01; to - from],
            }
        };
        large.map(&mut entry).collect::<Vec<_>>()
    };
    let [plain, zipped] =
        [&[Kind::Map][..], &[Kind::Views]].map(|kind| Container::all(kind, Width::F32)[1]);
    let original = update(1, 0, 200);
    let mut copy = original.clone();
    for entry in &mut copy {
        entry.indices.reverse();
        entry.values.fill(-0.003);
    }
    copy.reverse();
    let mut half = update(1, 0, 100);
    for (entry, own) in half.iter_mut().zip(update(2, 0, 100)) {
        for (index, value) in own.indices.into_iter().zip(own.values) {
            if !entry.indices.contains(&index) {
                entry.indices.push(index);
                entry.values.push(value);
            }
        }
    }
    let sketch = async |container: Container, update: &[Entry]| {
        let result = bench
            .judge(container, &container.write(update), json!({}))
            .await;
        let values = serde_json::from_value(result["candidate"]["sketch"].clone());
        let values: Vec<Option<u64>> = values.unwrap_or_else(|e| panic!("{e}: {result}"));
        values
    };
    let first = sketch(plain, &original).await;
    let similar = async |update: &[Entry]| {
        let other = sketch(zipped, update).await;
        similarity(&first, &other).unwrap()
    };
    assert!(similar(&copy).await > 0.99);
    let half = similar(&half).await;
    assert!((0.1..0.6).contains(&half), "{half}");
    let stranger = similar(&update(3, 0, 200)).await;
    assert!(stranger < 0.1, "{stranger}");
}
