//! Containers that no common writer writes, and that still say what they mean.

use serde_json::{Value, json};
use testkit::archive::{torch_zip, zlib, zstd};
use testkit::container::{Container, Entry, Kind, Width, ZSTD};
use testkit::pickle::{Pickle, one_chunk};

use super::Bench;

fn of(kind: Kind) -> Container {
    Container {
        kind,
        width: Width::F32,
        long: false,
        compression: None,
        versions: (6, 7),
    }
}

/// Two values, and where they belong, as a compact chunk holds them.
fn packed() -> Vec<u8> {
    let mut plain: Vec<u8> = [0.5f32, -0.25]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    plain.extend([0i32, 3].iter().flat_map(|i| i.to_le_bytes()));
    zlib(&plain)
}

fn latin1(pickle: &mut Pickle, bytes: &[u8]) {
    pickle.op(b"c_codecs\nencode\n");
    pickle.text(&bytes.iter().copied().map(char::from).collect::<String>());
    pickle.text("latin1");
    pickle.op(b"\x86R");
}

fn entries(result: &Value) -> u64 {
    assert_eq!(result["status"], "scored", "{result}");
    result["candidate"]["entries"].as_u64().unwrap()
}

/// A pickle names the same object twice when the same update is meant for two tensors.
#[tokio::test(flavor = "multi_thread")]
async fn chunks_may_share_their_data() {
    let bench = Bench::new(&[]).await;
    let update = bench.update();
    let mut pickle = Pickle::new();
    pickle.op(b"}");
    pickle.text("chunks");
    pickle.op(b"](");
    for (at, entry) in update.iter().take(2).enumerate() {
        pickle.op(b"}(");
        pickle.text("name");
        pickle.text(&entry.name);
        pickle.text("k");
        pickle.number(2);
        pickle.text("data");
        match at {
            0 => {
                latin1(&mut pickle, &packed());
                pickle.op(b"q\x00");
            }
            _ => pickle.op(b"h\x00"),
        }
        pickle.op(b"u");
    }
    pickle.op(b"es.");
    let file = torch_zip(pickle.0, Vec::new());
    let result = bench.judge(of(Kind::Compact), &file, json!({})).await;
    assert_eq!(entries(&result), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shape_of_none_is_not_said() {
    let bench = Bench::new(&[]).await;
    let file = one_chunk(&bench.update()[0].name, |pickle| {
        pickle.text("shape");
        pickle.op(b"N");
        pickle.text("k");
        pickle.number(2);
        pickle.text("data");
        latin1(pickle, &packed());
    });
    let result = bench.judge(of(Kind::Compact), &file, json!({})).await;
    assert_eq!(entries(&result), 2);
}

/// What text with escapes costs is charged, and an honest update of every weight pays for it.
#[tokio::test(flavor = "multi_thread")]
async fn an_update_of_every_weight_may_hold_an_escape() {
    let bench = Bench::new(&["candidates.max_inline_bytes=16MiB"]).await;
    let tensors = &bench.package().weights.tensors;
    let all = tensors.iter().map(|tensor| {
        let shape = bench.package().tensor(&tensor.name).unwrap().shape.to_vec();
        let numel: usize = shape.iter().product();
        // What does not compress takes the most room.
        let noise = |i: usize| (i as f32).sin() * 1e-6;
        Entry {
            name: tensor.name.clone(),
            shape,
            indices: (0..i64::try_from(numel).unwrap()).collect(),
            values: (0..numel).map(noise).collect(),
        }
    });
    let update: Vec<Entry> = all.collect();
    let whole: usize = update.iter().map(|entry| entry.indices.len()).sum();
    for compression in [None, Some(ZSTD)] {
        let container = Container {
            compression,
            ..of(Kind::Map)
        };
        let mut plain: Value = serde_json::from_slice(&of(Kind::Map).write(&update)).unwrap();
        plain["made by"] = json!("\"me\"");
        let bytes = serde_json::to_vec(&plain).unwrap();
        let bytes = match compression {
            None => bytes,
            Some(_) => zstd(&bytes),
        };
        let result = bench.judge(container, &bytes, json!({})).await;
        assert_eq!(entries(&result), whole as u64, "{compression:?}");
    }
}

/// The results of two workers are compared byte by byte.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_bytes_are_refused_in_the_same_words() {
    let bench = Bench::new(&[]).await;
    let tensor = |name: &str| {
        format!("\"{name}\":{{\"dtype\":\"F32\",\"shape\":[9],\"data_offsets\":[3,7]}}")
    };
    let header = format!("{{{},{},{}}}", tensor("a"), tensor("b"), tensor("c"));
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    let first = bench.judge(of(Kind::Pairs), &bytes, json!({})).await;
    assert_eq!(first["status"], "rejected", "{first}");
    for _ in 0..20 {
        let again = bench.judge(of(Kind::Pairs), &bytes, json!({})).await;
        assert_eq!(again["error"], first["error"]);
    }
}
