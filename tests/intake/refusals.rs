//! Every code that the contract has for a candidate, from every container, plain and compressed.

use scorer::protocol::failure::Code;
use serde_json::{Value, json};
use testkit::archive::{torch_zip, zip, zlib, zstd};
use testkit::container::{Container, Entry, Kind, Width, ZSTD};
use testkit::pickle::{Pickle, one_chunk};

use super::{BASE64, Bench};
use base64::Engine as _;

/// Something that is wrong with an update.
type Fault = fn(&mut Vec<Entry>);

const FAULTS: [(Fault, Code); 9] = [
    (
        |u| u[0].name = "nobody.weight".into(),
        Code::CandidateUnknownTensor,
    ),
    (|u| u[1].indices[2] = -1, Code::CandidateIndexOutOfRange),
    (
        |u| u[1].indices[2] = i64::from(i32::MAX),
        Code::CandidateIndexOutOfRange,
    ),
    (
        |u| u[0].indices[3] = u[0].indices[0],
        Code::CandidateDuplicateIndex,
    ),
    (|u| u[1].values[1] = f32::NAN, Code::CandidateNonFinite),
    (
        |u| u[1].values[1] = f32::NEG_INFINITY,
        Code::CandidateNonFinite,
    ),
    (|u| u.clear(), Code::CandidateEmpty),
    (
        |u| {
            u.iter_mut()
                .for_each(|e| (e.indices.clear(), e.values.clear()).0)
        },
        Code::CandidateEmpty,
    ),
    (|u| more_than_there_are(&mut u[0]), Code::CandidateTooLarge),
];

fn more_than_there_are(entry: &mut Entry) {
    let numel: usize = entry.shape.iter().product();
    entry.indices = (0..=i64::try_from(numel).unwrap()).collect();
    entry.values = vec![0.0; numel + 1];
}

fn code(result: &Value) -> &str {
    result["error"]["code"].as_str().unwrap_or("scored")
}

#[tokio::test(flavor = "multi_thread")]
async fn every_container_is_refused_for_what_is_wrong_with_it() {
    let bench = Bench::new(&[]).await;
    for container in Container::all(&Kind::SPARSE, Width::F32) {
        let sound = bench.update();
        let result = bench
            .judge(container, &container.write(&sound), json!({}))
            .await;
        assert_eq!(code(&result), "scored", "{container:?}: {result}");
        for (at, (fault, expected)) in FAULTS.iter().enumerate() {
            let mut update = sound.clone();
            fault(&mut update);
            let result = bench
                .judge(container, &container.write(&update), json!({}))
                .await;
            assert_eq!(
                code(&result),
                expected.as_str(),
                "fault {at}, {container:?}: {result}"
            );
            assert_eq!(result["status"], "rejected");
        }
        if container.format() != "safetensors" {
            let mut update = sound.clone();
            update[1].shape.push(1);
            let result = bench
                .judge(container, &container.write(&update), json!({}))
                .await;
            assert_eq!(code(&result), "candidate_shape_mismatch", "{container:?}");
        }
        let huge = json!({"learning_rate": 1e30});
        let result = bench.judge(container, &container.write(&sound), huge).await;
        assert!(
            ["candidate_non_finite", "non_finite_loss"].contains(&code(&result)),
            "{container:?}: {result}"
        );
        let wrong = json!({"sha256": "00".repeat(32)});
        let result = bench
            .judge(container, &container.write(&sound), wrong)
            .await;
        assert_eq!(code(&result), "candidate_digest_mismatch", "{container:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dense_tensors_are_checked_like_others() {
    let bench = Bench::new(&[]).await;
    let dense = |mut entry: Entry| {
        let numel: usize = entry.shape.iter().product();
        entry.indices = (0..i64::try_from(numel).unwrap()).collect();
        entry.values = vec![1e-3; numel];
        entry
    };
    let sound: Vec<Entry> = bench.update().into_iter().map(dense).collect();
    // All of the embedding under its alias, after all of it under its name.
    let twice: Fault = |u| {
        let mut again = u[2].clone();
        again.name = "model.embed_tokens.weight".into();
        u.push(again);
    };
    let faults: [(Fault, &str); 6] = [
        (|_| (), "scored"),
        (
            |u| u[0].name = "nobody.weight".into(),
            "candidate_unknown_tensor",
        ),
        (|u| u[1].shape.push(1), "candidate_shape_mismatch"),
        (|u| u[1].values[1] = f32::INFINITY, "candidate_non_finite"),
        (|u| u.clear(), "candidate_empty"),
        (twice, "candidate_too_large"),
    ];
    for container in Container::all(&[Kind::Dense], Width::F32) {
        for (at, (fault, expected)) in faults.iter().enumerate() {
            let mut update = sound.clone();
            fault(&mut update);
            let result = bench
                .judge(container, &container.write(&update), json!({}))
                .await;
            assert_eq!(
                code(&result),
                *expected,
                "fault {at}, {container:?}: {result}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_is_cut_anywhere_is_refused() {
    let bench = Bench::new(&[]).await;
    let kinds = [&Kind::SPARSE[..], &[Kind::Dense]].concat();
    let mut small = bench.update();
    small.truncate(1);
    small[0].indices =
        (0..i64::try_from(small[0].shape.iter().product::<usize>()).unwrap()).collect();
    small[0].values = vec![0.5; small[0].indices.len()];
    for container in Container::all(&kinds, Width::F32) {
        let whole = container.write(&small);
        for length in (0..whole.len()).step_by(1 + whole.len() / 50) {
            let result = bench.judge(container, &whole[..length], json!({})).await;
            assert_eq!(
                result["status"], "rejected",
                "{length} of {container:?}: {result}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_of_the_configuration_hold_for_every_container() {
    let few = Bench::new(&["candidates.max_entries=11"]).await;
    let narrow = Bench::new(&["candidates.max_inflated_bytes=60B"]).await;
    let short = Bench::new(&["candidates.max_inline_bytes=100B"]).await;
    for container in Container::all(&Kind::SPARSE, Width::F32) {
        let bytes = container.write(&few.update());
        let packed = matches!(
            container.kind,
            Kind::Map | Kind::List | Kind::Compact | Kind::CompactText
        );
        for (bench, limited) in [
            (&few, true),
            (&narrow, packed || container.compression.is_some()),
            (&short, true),
        ] {
            let result = bench.judge(container, &bytes, json!({})).await;
            let expected = if limited {
                "candidate_too_large"
            } else {
                "scored"
            };
            assert_eq!(code(&result), expected, "{container:?}: {result}");
        }
    }
}

/// Bytes that are no container, or one that says what no writer does, and words of the refusal.
#[tokio::test(flavor = "multi_thread")]
async fn what_no_writer_writes_is_refused_in_words() {
    let bench = Bench::new(&[]).await;
    let update = bench.update();
    let (name, k) = (update[0].name.as_str(), 2);
    let entry = |data: &[u8]| json!({name: {"k": k, "data": BASE64.encode(data)}}).to_string();
    let of = |kind, compression| Container {
        kind,
        width: Width::F32,
        long: false,
        compression,
        versions: (6, 7),
    };
    let (json, zstd_json) = (of(Kind::Map, None), of(Kind::Map, Some(ZSTD)));
    let (tensors, torch) = (of(Kind::Pairs, None), of(Kind::Chunks, None));
    let header = |text: &str| {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        bytes
    };
    let pickled = |operations: &[u8]| torch_zip([b"\x80\x02", operations].concat(), Vec::new());
    let chunk = |write: &dyn Fn(&mut Pickle)| one_chunk(name, write);
    let pair = |of: i64, length: i64, stride: i64| {
        chunk(&move |pickle: &mut Pickle| {
            for (key, (field, storage)) in
                [("indices", "Int"), ("values", "Float")].iter().enumerate()
            {
                pickle.text(field);
                pickle.tensor(storage, key, of, length, stride);
            }
        })
    };
    let cases: Vec<(Container, Vec<u8>, &str)> = vec![
        (json, b"no JSON".to_vec(), "not binary_v2 JSON"),
        (json, entry(b"no zlib").into_bytes(), "not zlib"),
        (
            json,
            entry(&zlib(&[0; 15])).into_bytes(),
            "inflates to 15 bytes",
        ),
        (zstd_json, entry(b"no zstd").into_bytes(), "not zstd"),
        (
            zstd_json,
            zstd(&zstd(entry(&zlib(&[0; 16])).as_bytes())),
            "not binary_v2 JSON",
        ),
        (tensors, b"short".to_vec(), "shorter than its header"),
        (tensors, header("{"), "not safetensors"),
        (
            tensors,
            header(&format!(
                "{{\"{name}::indices\":{{\"dtype\":\"I32\",\"shape\":[0],\"data_offsets\":[0,0]}}}}"
            )),
            "no ::values",
        ),
        (
            tensors,
            header(&format!(
                "{{\"{name}::values\":{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}}}"
            )),
            "no ::indices",
        ),
        (
            tensors,
            header(&" ".repeat(200_000)),
            "a header of 200000 bytes",
        ),
        (torch, b"no zip".to_vec(), "not a zip archive"),
        (
            torch,
            zip(&[("archive/other".into(), Vec::new())]),
            "without data.pkl",
        ),
        (
            torch,
            pickled(b"cos\nsystem\nX\x02\0\0\0id\x85R."),
            "os.system",
        ),
        (
            torch,
            pickled(b"cbuiltins\neval\nX\x01\0\0\x001\x85R."),
            "builtins.eval",
        ),
        (
            torch,
            pickled(b"\x8c\x05posix\x8c\x06system\x93."),
            "posix.system",
        ),
        (torch, pickled(b"}."), "no list of chunks"),
        (torch, pickled(b"."), "not there"),
        (torch, pickled(b"i"), "operation (0x69)"),
        (
            torch,
            pickled(b"}(X\x06\0\0\0chunks]X\x06\0\0\0chunks]u."),
            "chunks is given twice",
        ),
        (torch, chunk(&|_| ()), "neither indices nor k"),
        (torch, pair(2, 3, 1), "reaches beyond its storage"),
        (torch, pair(3, 2, 1), "reaches beyond its storage"),
        (torch, pair(2, 2, i64::MAX), "reaches beyond its storage"),
        (torch, pair(2, -1, 1), "negative"),
        (
            torch,
            chunk(&|pickle| {
                pickle.text("indices");
                pickle.tensor("Float", 0, 2, 2, 1);
                pickle.text("values");
                pickle.tensor("Float", 1, 2, 2, 1);
            }),
            "neither int32 nor int64",
        ),
        (
            torch,
            chunk(&|pickle| {
                pickle.text("indices");
                pickle.tensor("Int", 7, 2, 2, 1);
            }),
            "not in the archive",
        ),
    ];
    for (container, bytes, words) in cases {
        let result = bench.judge(container, &bytes, json!({})).await;
        let message = result["error"]["message"].as_str().unwrap_or_default();
        assert!(message.contains(words), "{words}: {result}");
        assert!(message.len() < 600, "{message}");
    }
}
