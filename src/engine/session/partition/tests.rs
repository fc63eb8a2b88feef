//! A graph in three parts, as ONNX Runtime runs it. Its first two parts read the same weight.

use super::super::*;
use crate::config::Provider;
use crate::engine::tests::configuration;
use crate::model::onnx::hand_made::{Place, Runnable, made, with_weights};
use crate::model::tensor::{Dtype, Elem};

const PASS: Pass = Pass {
    plan: [1; 32],
    batch: 2,
};

fn floats(n: u8) -> Vec<u8> {
    let values = (1..=n).map(f32::from);
    values.flat_map(f32::to_le_bytes).collect()
}

fn feeds() -> Vec<Feed<'static>> {
    rows(2)
}

/// Inputs of so many rows.
fn rows(rows: u8) -> Vec<Feed<'static>> {
    vec![Feed {
        name: "x",
        shape: vec![rows.into(), 4],
        elem: Elem::F32,
        bytes: floats(4 * rows),
    }]
}

fn session(parts: usize, budget: u64) -> Session {
    ending_with("last", parts, budget)
}

fn ending_with(last: &str, parts: usize, budget: u64) -> Session {
    made_on(Provider::Cpu, last, parts, budget)
}

fn made_on(provider: Provider, last: &str, parts: usize, budget: u64) -> Session {
    let ending = ["m3", last];
    let nodes = [
        made("MatMul", &["x", "tied"], "m1"),
        made("Relu", &["m1"], "r1"),
        made("MatMul", &["r1", "own"], "m2"),
        made("MatMul", &["m2", "tied"], "m3"),
        made("MatMul", &ending, "y"),
    ];
    let graph = Runnable {
        opset: 20,
        place: Place::Graph,
        half: false,
        shape: &[None, Some(4)],
        nodes: &nodes,
    };
    let graph = Graph::decode(graph.encode().into()).unwrap();
    let names = ["own", "tied", "last"];
    let source = Source {
        graph: with_weights(graph, &names),
        folder: PathBuf::new(),
        made: None,
    };
    let weight = |name: &&str| WeightSpec {
        input: (*name).to_owned(),
        shape: vec![4, 4],
        dtype: Dtype::F32,
        bytes: floats(16).into(),
    };
    let mut config = configuration().engine;
    config.execution_provider = provider;
    (config.parts, config.activation_cache) = (parts, budget);
    let weights = names.iter().map(weight).collect();
    Session::new(&config, source, &feeds(), weights, 1).unwrap()
}

#[test]
fn a_cut_is_named_by_the_first_weight_behind_it_that_no_earlier_part_reads() {
    let session = session(3, 1 << 20);
    let partition = session.partition();
    assert_eq!(partition.cuts, ["own", "last"]);
    let bytes = 2 * (2 * 4 * 4);
    assert_eq!((partition.size.bytes, partition.size.unknown), (bytes, 0));
    assert_eq!([0, 1, 2].map(|weight| session.part_of(weight)), [1, 0, 2]);
}

#[test]
fn where_no_candidate_could_start_there_is_no_cut() {
    let session = ending_with("tied", 3, 1 << 20);
    assert_eq!(session.partition().cuts, ["own"]);
}

#[test]
fn a_graph_of_one_part_has_no_cuts() {
    let session = session(1, 1 << 20);
    assert_eq!(*session.partition(), Partition::default());
    assert_eq!([0, 1].map(|weight| session.part_of(weight)), [0, 0]);
}

/// Runs with what is kept, and says what was found of it and how many bytes are kept then.
fn look(session: &mut Session, from: usize) -> (Option<Lookup>, u64) {
    let whole = session.run(feeds(), None).unwrap();
    assert_eq!(session.lookup(), None);
    let reuse = Reuse {
        pass: PASS,
        number: 0,
        from,
    };
    let found = session.run(feeds(), Some(reuse)).unwrap();
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&found), bits(&whole));
    (session.lookup(), session.activation_bytes())
}

#[test]
fn a_lookup_hits_what_an_earlier_run_left() {
    let mut session = session(3, 1 << 20);
    let (hit, miss) = (Some(Lookup::Hit), Some(Lookup::Miss));
    for (from, found) in [
        // Nothing is before it.
        (0, (None, 0)),
        (1, (miss, 32)),
        (1, (hit, 32)),
        (2, (miss, 64)),
        (2, (hit, 64)),
        (1, (hit, 64)),
        // No weight differs: a baseline.
        (3, (None, 64)),
    ] {
        assert_eq!(look(&mut session, from), found, "{from}");
    }
    session.forget_activations(None);
    assert_eq!(look(&mut session, 3), (None, 64), "a baseline leaves all");
    assert_eq!(look(&mut session, 2), (hit, 64));
}

#[test]
fn without_room_every_lookup_misses_and_the_bits_are_the_same() {
    let mut session = session(3, 63);
    for _ in 0..2 {
        assert_eq!(look(&mut session, 2), (Some(Lookup::Miss), 0));
    }
}

#[test]
fn what_sessions_made_goes_before_they_do() {
    for provider in [Provider::Cpu, Provider::WebGpu] {
        let mut session = made_on(provider, "last", 3, 1 << 20);
        let mut run = |count: u8| {
            let batch = usize::from(count);
            let reuse = Reuse {
                pass: Pass { batch, ..PASS },
                number: 0,
                from: session.parts(),
            };
            session.run(rows(count), Some(reuse)).unwrap();
            session.activation_bytes()
        };
        // What crosses both cuts, in a row.
        let row = 2 * 4 * 4;
        assert_eq!([2, 3, 4].map(&mut run), [2 * row, 5 * row, 9 * row]);
        // A fourth size is one too many.
        assert_eq!([5, 2].map(&mut run), [5 * row, 2 * row]);
    }
}
