//! Graphs made by hand, and what is known of the values in them.

use prost::Message;

use super::super::proto::{ModelProto, OperatorSetId, TensorProto, ValueInfo};
use super::*;
use crate::model::onnx::proto::Attribute;

/// A node; the first of its outputs names it.
fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    let owned = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
    NodeProto {
        op_type: Some(op.into()),
        input: owned(inputs),
        output: owned(outputs),
        ..NodeProto::default()
    }
}

fn with(mut node: NodeProto, attribute: Attribute) -> NodeProto {
    node.attribute.push(attribute.encode_to_vec().into());
    node
}

fn number(name: &str, value: i64) -> Attribute {
    Attribute {
        name: Some(name.into()),
        i: Some(value),
        ..Attribute::default()
    }
}

fn graph(nodes: &[NodeProto], inputs: &[&str], outputs: &[&str], weights: &[&str]) -> GraphProto {
    let named = |names: &[&str]| -> Vec<ValueInfo> {
        let value = |name: &&str| ValueInfo {
            name: Some((*name).to_owned()),
            r#type: None,
        };
        names.iter().map(value).collect()
    };
    let tensor = |name: &&str| TensorProto {
        name: Some((*name).to_owned()),
        dims: vec![6, 4],
        ..TensorProto::default()
    };
    GraphProto {
        node: nodes.iter().map(|n| n.encode_to_vec().into()).collect(),
        input: named(inputs),
        output: named(outputs),
        initializer: weights.iter().map(tensor).collect(),
        ..GraphProto::default()
    }
}

fn body(graph: GraphProto) -> Attribute {
    Attribute {
        g: Some(graph),
        ..Attribute::default()
    }
}

/// A model of the nodes with weights `w` and `v`, a constant `c`, and inputs `tokens` and `labels`.
fn model(nodes: &[NodeProto], functions: &[FunctionProto]) -> Graph {
    let graph = graph(nodes, &["tokens", "labels"], &["out"], &["w", "v", "c"]);
    let opset = OperatorSetId {
        domain: Some("ai.onnx".into()),
        version: Some(18),
    };
    let model = ModelProto {
        graph: Some(graph),
        opset_import: vec![opset],
        functions: functions.iter().map(|f| f.encode_to_vec().into()).collect(),
        ..ModelProto::default()
    };
    Graph::decode(model.encode_to_vec().into()).unwrap()
}

fn flow_of(nodes: &[NodeProto], functions: &[FunctionProto]) -> Flow {
    model(nodes, functions).flow(&["w", "v"]).unwrap()
}

#[track_caller]
fn decides(nodes: &[NodeProto], expected: bool) {
    let flow = flow_of(nodes, &[]);
    assert_eq!(flow.decides("w").is_some(), expected, "{nodes:?}");
    assert_eq!(flow.decides("v"), None, "{nodes:?}");
}

/// A node of this operator that has `value` at this input and activations at all others.
fn at(op: &str, position: usize, value: &str) -> NodeProto {
    let mut inputs = vec!["x"; position];
    inputs.push(value);
    node(op, &inputs, &["out"])
}

#[test]
fn every_input_that_decides_is_found_with_constants_between_and_not_with_activations() {
    for (op, positions) in SHAPE_INPUTS.iter().filter(|(op, _)| *op != "Loop") {
        for position in *positions {
            let activations = node("Gather", &["v", "tokens"], &["x"]);
            let direct = at(op, *position, "w");
            decides(&[activations.clone(), direct], true);
            let derived = [
                activations.clone(),
                node("Mul", &["w", "c"], &["scaled"]),
                node("Cast", &["scaled"], &["whole"]),
                node("Shape", &["x"], &["shape"]),
                node("Concat", &["shape", "whole"], &["wanted"]),
                at(op, *position, "wanted"),
            ];
            decides(&derived, true);
            let routed = [
                activations,
                node("MatMul", &["x", "w"], &["scores"]),
                node("TopK", &["scores", "c"], &["best", "which"]),
                node("NonZero", &["which"], &["rows"]),
                at(op, *position, "rows"),
            ];
            decides(&routed, false);
        }
    }
}

#[test]
fn what_is_cast_to_a_whole_number_decides_whatever_reads_it() {
    let cast = |to: i32| with(node("Cast", &["w"], &["n"]), number("to", to.into()));
    let reads = NodeProto {
        domain: Some("com.example".into()),
        ..node("Anything", &["tokens", "n"], &["out"])
    };
    decides(&[cast(INT64), reads.clone()], true);
    decides(&[cast(INT32), reads.clone()], true);
    decides(&[cast(1), reads], false);
}

#[test]
fn what_has_a_shape_does_not_decide_it() {
    let shape = node("Shape", &["w"], &["shape"]);
    decides(
        &[shape, node("Reshape", &["tokens", "shape"], &["out"])],
        false,
    );
    for (op, position) in [
        ("Resize", 0),
        ("Slice", 0),
        ("Pad", 2),
        ("Expand", 0),
        ("TopK", 0),
    ] {
        decides(&[at(op, position, "w")], false);
    }
}

#[test]
fn bodies_are_followed_in_and_out() {
    let shaped = |name: &str| node("ConstantOfShape", &[name], &["zeros"]);
    let inner = graph(&[shaped("w")], &[], &["zeros"], &[]);
    decides(&[with(node("If", &["c"], &["out"]), body(inner))], true);
    let own = graph(&[shaped("w")], &[], &["zeros"], &["w"]);
    decides(&[with(node("If", &["c"], &["out"]), body(own))], false);
    let branch = graph(&[node("Neg", &["w"], &["n"])], &[], &["n"], &[]);
    let chosen = with(node("If", &["c"], &["size"]), body(branch.clone()));
    decides(&[chosen, shaped("size")], true);
    let asked = with(node("If", &["tokens"], &["size"]), body(branch));
    decides(&[asked, shaped("size")], true);
    let dynamic = graph(&[node("Neg", &["tokens"], &["n"])], &[], &["n"], &[]);
    let branches = with(
        node("If", &["tokens"], &["size"]),
        body(graph(&[node("Neg", &["w"], &["n"])], &[], &["n"], &[])),
    );
    decides(&[with(branches, body(dynamic)), shaped("size")], true);
}

#[test]
fn loops_are_followed_round_and_by_their_counts_and_conditions() {
    let turns = |nodes: &[NodeProto], condition: &str, carried: &[&str]| {
        let outputs: Vec<&str> = std::iter::once(condition)
            .chain(carried.iter().copied())
            .collect();
        body(graph(nodes, &["turn", "go", "a", "b"], &outputs, &[]))
    };
    let keep = node("Identity", &["go"], &["again"]);
    let plain = turns(std::slice::from_ref(&keep), "again", &["a", "b"]);
    let looped = |inputs: &[&str]| node("Loop", inputs, &["out", "other"]);
    decides(&[with(looped(&["w", "", "c", "c"]), plain.clone())], true);
    decides(&[with(looped(&["c", "w", "c", "c"]), plain.clone())], true);
    decides(&[with(looped(&["tokens", "", "w", "c"]), plain)], false);
    let asks = node("Less", &["w", "c"], &["again"]);
    decides(
        &[with(
            looped(&["c", "", "c", "c"]),
            turns(&[asks], "again", &["a", "b"]),
        )],
        true,
    );
    // What one turn makes, the next but one uses: `w` goes to `a` and from there to `b`.
    let swap = [keep, node("Expand", &["c", "b"], &["wide"])];
    let rotating = turns(&swap, "again", &["a", "a"]);
    decides(&[with(looped(&["c", "", "w", "c"]), rotating)], true);
    // One turn after the other hands a weight on, and the last but one a constant of its own.
    let names: Vec<String> = (0..12).map(|n| format!("v{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let inputs = [&["turn", "go"], &names[..]].concat();
    let outputs = [&["again", "v11"], &names[..11]].concat();
    let shift = [
        node("Identity", &["go"], &["again"]),
        node("ConstantOfShape", &["v11"], &["zeros"]),
    ];
    let long = body(graph(&shift, &inputs, &outputs, &[]));
    let start = [&["c", "", "w"], &["c"; 11][..]].concat();
    decides(&[with(node("Loop", &start, &["out"]), long.clone())], true);
    let start = [&["c", "", "w"], &["tokens"; 11][..]].concat();
    decides(&[with(node("Loop", &start, &["out"]), long)], true);
    let step = graph(
        &[node("Tile", &["row", "state"], &["rows"])],
        &["state", "row"],
        &["rows"],
        &[],
    );
    decides(
        &[with(node("Scan", &["w", "tokens"], &["out"]), body(step))],
        true,
    );
}

#[test]
fn functions_are_followed_and_see_only_what_they_are_given() {
    let function = |nodes: &[NodeProto]| FunctionProto {
        name: Some("F".into()),
        domain: Some("local".into()),
        input: vec!["x".into(), "size".into()],
        output: vec!["y".into()],
        node: nodes.iter().map(|n| n.encode_to_vec().into()).collect(),
        ..FunctionProto::default()
    };
    let call = |inputs: &[&str], output: &str| NodeProto {
        domain: Some("local".into()),
        ..node("F", inputs, &[output])
    };
    let reshapes = function(&[node("Reshape", &["x", "size"], &["y"])]);
    let flow = flow_of(
        &[call(&["tokens", "w"], "out")],
        std::slice::from_ref(&reshapes),
    );
    assert!(flow.decides("w").is_some_and(|by| by.contains("Reshape")));
    let flow = flow_of(&[call(&["w", "c"], "out")], &[reshapes]);
    assert_eq!(flow.decides("w"), None);
    let hands_on = function(&[node("Neg", &["size"], &["y"])]);
    let nodes = [
        call(&["tokens", "w"], "n"),
        node("Range", &["c", "n", "c"], &["out"]),
    ];
    assert!(flow_of(&nodes, &[hands_on]).decides("w").is_some());
    let of = |overload: &str, op: &str| FunctionProto {
        overload: Some(overload.into()),
        ..function(&[node(op, &["x", "size"], &["y"])])
    };
    let overloaded = NodeProto {
        overload: Some(b"a".to_vec()),
        ..call(&["tokens", "w"], "out")
    };
    let both = [of("a", "Reshape"), of("b", "Add")];
    assert!(
        flow_of(std::slice::from_ref(&overloaded), &both)
            .decides("w")
            .is_some()
    );
    let other = [of("b", "Reshape"), of("a", "Add")];
    assert_eq!(flow_of(&[overloaded], &other).decides("w"), None);
    let itself = function(&[call(&["x", "size"], "y")]);
    let error = model(&[call(&["tokens", "w"], "out")], &[itself]).flow(&["w"]);
    assert!(error.unwrap_err().to_string().contains("within each other"));
}

#[test]
fn who_picks_rows_or_classes_by_an_input_limits_it() {
    let limits = |nodes: &[NodeProto]| -> Vec<(String, Option<i64>, Option<i64>)> {
        let limits = flow_of(nodes, &[]).limits.into_iter();
        limits
            .map(|limit| (limit.input, limit.below, limit.ignored))
            .collect()
    };
    let of = |input: &str, below, ignored| vec![(input.to_owned(), below, ignored)];
    let picks = |axis| {
        with(
            node("Gather", &["w", "tokens"], &["out"]),
            number("axis", axis),
        )
    };
    assert_eq!(
        limits(&[node("Gather", &["w", "tokens"], &["out"])]),
        of("tokens", Some(6), None)
    );
    assert_eq!(limits(&[picks(1)]), of("tokens", Some(4), None));
    assert_eq!(limits(&[picks(-2)]), of("tokens", Some(6), None));
    let handed = [
        with(
            node("Cast", &["tokens"], &["a"]),
            number("to", INT64.into()),
        ),
        node("Unsqueeze", &["a", "c"], &["b"]),
        node("Cast", &["w"], &["table"]),
        node("Gather", &["table", "b"], &["out"]),
    ];
    assert_eq!(limits(&handed[..3]), []);
    assert_eq!(limits(&handed), of("tokens", None, None));
    let clamped = [
        node("Max", &["tokens", "c"], &["a"]),
        node("Gather", &["w", "a"], &["out"]),
    ];
    assert_eq!(limits(&clamped), []);
    let loss = |attribute| {
        let plain = node("SoftmaxCrossEntropyLoss", &["x", "labels"], &["out"]);
        limits(&[with(plain, attribute)])
    };
    assert_eq!(
        loss(number("ignore_index", -100)),
        of("labels", None, Some(-100))
    );
    assert_eq!(loss(number("other", 1)), of("labels", None, None));
}
