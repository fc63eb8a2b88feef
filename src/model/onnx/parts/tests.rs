//! Graphs made by hand, where they may be cut, and the parts that come of it. `x` is fed, each `w` is a weight of 16
//! elements.

use super::super::hand_made::{self, Made, inside, made};
use super::super::proto::{FLOAT, NodeProto, decode_node, value_info};
use super::*;

/// A graph of these nodes, in which `yes` is a constant.
fn of_nodes(nodes: &[NodeProto], weights: &[&str]) -> (Graph, Dataflow) {
    let mut graph = hand_made::of_nodes(nodes, &["yes"]);
    let fed = value_info("x", FLOAT, vec![Some(2), Some(4)]);
    graph.proto_mut().input.push(fed);
    let graph = hand_made::with_weights(graph, weights);
    let flow = graph.dataflow(&weights.iter().copied().collect()).unwrap();
    (graph, flow)
}

fn of(nodes: &[Made<'_>], weights: &[&str]) -> (Graph, Dataflow) {
    let nodes: Vec<NodeProto> = nodes.iter().map(|node| node.node()).collect();
    of_nodes(&nodes, weights)
}

/// Values of so many floats.
fn known(values: &[(&str, Option<i64>)]) -> Known {
    let typed = |(name, floats): &(&str, Option<i64>)| {
        let info = value_info(name, FLOAT, vec![*floats]);
        ((*name).to_owned(), info)
    };
    Known {
        types: values.iter().map(typed).collect(),
        ..Known::default()
    }
}

fn eight(values: &[&'static str]) -> Known {
    let sized: Vec<_> = values.iter().map(|name| (*name, Some(8))).collect();
    known(&sized)
}

/// The bytes of values whose size is known.
fn bytes(known: &Known, values: &[&str]) -> Option<u64> {
    let names: Vec<String> = values.iter().map(|name| (*name).to_owned()).collect();
    let size = known.size(&names)?;
    (size.unknown == 0).then_some(size.bytes)
}

/// What the nodes of a part make, the inputs it reads, what enters, and what leaves.
fn told(part: &Part) -> [String; 4] {
    let nodes = part.graph.proto().node.iter();
    let made = nodes.flat_map(|bytes| decode_node(bytes).unwrap().output);
    let made: Vec<String> = made.collect();
    [&made, &part.inputs, &part.enters, &part.leaves].map(|names| names.join(" "))
}

fn parts(graph: &Graph, flow: &Dataflow, cuts: &[usize], known: &Known) -> Vec<[String; 4]> {
    let parts = graph.parts(flow, cuts, known).unwrap();
    parts.iter().map(told).collect()
}

/// Each boundary's node, work before it, and what crosses.
fn boundaries(flow: &Dataflow) -> Vec<(usize, u64, String)> {
    let found = flow.boundaries().into_iter();
    let found = found.map(|found| (found.at, found.work, found.crossing.join(" ")));
    found.collect()
}

/// Three layers around which the residual goes.
fn residual() -> (Graph, Dataflow) {
    let nodes = [
        made("Relu", &["x"], "h0"),
        made("MatMul", &["h0", "w1"], "m1"),
        made("Add", &["h0", "m1"], "h1"),
        made("MatMul", &["h1", "w2"], "m2"),
        made("Add", &["h1", "m2"], "h2"),
        made("MatMul", &["h2", "w3"], "m3"),
        made("Add", &["h2", "m3"], "y"),
    ];
    of(&nodes, &["w1", "w2", "w3"])
}

#[test]
fn a_residual_chain_is_cut_where_the_residual_alone_crosses() {
    let (graph, flow) = residual();
    assert_eq!(flow.work(), 48);
    let expected = [(3, 16, "h1".to_owned()), (5, 32, "h2".to_owned())];
    assert_eq!(boundaries(&flow), expected);
    let parts = parts(&graph, &flow, &[3, 5], &eight(&["h1", "h2"]));
    assert_eq!(
        parts,
        [
            ["h0 m1 h1", "x w1", "", "h1"],
            ["m2 h2", "w2", "h1", "h2"],
            ["m3 y", "w3", "h2", ""],
        ]
    );
}

#[test]
fn a_cut_is_chosen_by_bytes_and_then_by_equal_work() {
    let (_, flow) = residual();
    let boundaries = flow.boundaries();
    let same = [("h1", Some(8)), ("h2", Some(8))];
    let narrow = [("h1", Some(8)), ("h2", Some(7))];
    let free = [("h1", Some(8)), ("h2", None)];
    for (sizes, parts, chosen) in [
        (&same[..], 1, &[][..]),
        (&same, 2, &[3]),
        (&narrow, 2, &[5]),
        (&same, 3, &[3, 5]),
        (&narrow, 3, &[3, 5]),
        (&same, 16, &[3, 5]),
        // A size that is not fixed crosses only where nothing else is near.
        (&free, 2, &[3]),
        (&free, 3, &[3, 5]),
        (&[], 3, &[]),
    ] {
        let found = choose(&boundaries, &known(sizes), flow.work(), parts);
        assert_eq!(found, chosen, "{sizes:?} in {parts}");
    }
}

/// A factor that the first layer and the last one use.
fn factor() -> (Graph, Dataflow) {
    let nodes = [
        made("Cos", &["x"], "c"),
        made("MatMul", &["x", "w1"], "m1"),
        made("Mul", &["m1", "c"], "a1"),
        made("MatMul", &["a1", "w2"], "m2"),
        made("MatMul", &["m2", "w3"], "m3"),
        made("Mul", &["m3", "c"], "y"),
    ];
    of(&nodes, &["w1", "w2", "w3"])
}

#[test]
fn a_value_goes_from_the_part_that_makes_it_to_those_that_read_it() {
    let (graph, flow) = factor();
    let expected = [(2, 16, "c m1"), (3, 16, "c a1"), (4, 32, "c m2")];
    let expected = expected.map(|(at, work, crossing)| (at, work, crossing.to_owned()));
    assert_eq!(boundaries(&flow), expected);
    let known = eight(&["c", "a1", "m2"]);
    assert_eq!(bytes(&known, &["c", "a1"]), Some(64));
    let parts = graph.parts(&flow, &[3, 4], &known).unwrap();
    let told: Vec<_> = parts.iter().map(told).collect();
    assert_eq!(
        told,
        [
            ["c m1 a1", "x w1", "", "c a1"],
            ["m2", "w2", "a1", "m2"],
            ["m3 y", "w3", "c m2", ""],
        ]
    );
    assert_eq!(parts[2].weighted, ["m2"], "the factor reads no weight");
    let unknown = graph.parts(&flow, &[3, 4], &eight(&["a1", "m2"]));
    assert!(unknown.unwrap_err().to_string().contains("its value c"));
}

#[test]
fn a_value_that_is_always_the_same_is_a_constant_of_each_part_that_reads_it() {
    let (graph, flow) = factor();
    let mut known = eight(&["c", "a1", "m2"]);
    let tensor = TensorProto {
        name: Some("c".into()),
        ..TensorProto::default()
    };
    known.constants.insert("c".into(), tensor);
    assert_eq!(bytes(&known, &["c", "a1"]), Some(32));
    let parts = graph.parts(&flow, &[3, 4], &known).unwrap();
    let held = |part: &Part| -> Vec<String> {
        let held = part.graph.initializers().into_iter();
        held.map(|tensor| tensor.name).collect()
    };
    assert_eq!(
        (&parts[0].leaves, &parts[2].enters),
        (&vec!["a1".into()], &vec!["m2".into()])
    );
    assert_eq!(
        (held(&parts[1]), held(&parts[2])),
        (vec![], vec!["c".into()])
    );
}

#[test]
fn each_part_computes_for_itself_what_depends_on_weights_alone() {
    let nodes = [
        made("Transpose", &["w1"], "t"),
        made("MatMul", &["x", "t"], "m1"),
        made("MatMul", &["m1", "w2"], "m2"),
        made("MatMul", &["m2", "t"], "y"),
    ];
    let (graph, flow) = of(&nodes, &["w1", "w2"]);
    assert_eq!(
        flow.work(),
        48,
        "the transposed one counts wherever it is read"
    );
    let parts = parts(&graph, &flow, &[2, 3], &eight(&["m1", "m2"]));
    assert_eq!(
        parts,
        [
            ["t m1", "x w1", "", "m1"],
            ["m2", "w2", "m1", "m2"],
            ["t y", "w1", "m2", ""],
        ]
    );
}

#[test]
fn what_no_output_depends_on_is_in_no_part_and_costs_nothing() {
    let nodes = [
        made("MatMul", &["x", "w1"], "m1"),
        made("MatMul", &["m1", "w9"], "dead"),
        made("Relu", &["dead"], "deader"),
        made("MatMul", &["m1", "w2"], "y"),
    ];
    let (graph, flow) = of(&nodes, &["w1", "w2", "w9"]);
    assert_eq!(flow.work(), 32);
    let crossing = boundaries(&flow)
        .into_iter()
        .map(|(_, _, crossing)| crossing);
    assert_eq!(crossing.collect::<Vec<_>>(), ["m1", "m1"]);
    let parts = parts(&graph, &flow, &[3], &eight(&["m1"]));
    assert_eq!(parts, [["m1", "x w1", "", "m1"], ["y", "w2", "m1", ""]]);
}

#[test]
fn a_body_reads_what_enters_its_part() {
    let first = made("MatMul", &["x", "w1"], "m1").node();
    let mut branch = inside(made("MatMul", &["m1", "w2"], "z").node());
    (branch.input, branch.output) = (vec!["yes".into()], vec!["b".into()]);
    let last = made("MatMul", &["b", "w3"], "y").node();
    let (graph, flow) = of_nodes(&[first, branch, last], &["w1", "w2", "w3"]);
    // The condition is a constant of one element.
    let expected = [(1, 16, "m1".to_owned()), (2, 33, "b".to_owned())];
    assert_eq!(boundaries(&flow), expected);
    let parts = graph.parts(&flow, &[1, 2], &eight(&["m1", "b"])).unwrap();
    assert_eq!(told(&parts[1]), ["b", "w2", "m1", "b"]);
    assert_eq!(parts[1].graph.initializers()[0].name, "yes");
    assert_eq!(parts[2].weighted, ["b"]);
}

#[test]
fn looking_up_entries_of_a_weight_is_no_work() {
    let nodes = [
        made("Gather", &["w1", "x"], "e"),
        made("MatMul", &["e", "w2"], "m"),
        made("MatMul", &["m", "w1"], "y"),
    ];
    let (_, flow) = of(&nodes, &["w1", "w2"]);
    assert_eq!(flow.work(), 32);
    assert_eq!(boundaries(&flow), [(2, 16, "m".to_owned())]);
}

#[test]
fn a_graph_without_a_place_that_few_values_cross_stays_whole() {
    for (wide, cuts) in [(31, 1), (32, 0)] {
        let names: Vec<String> = (0..wide).map(|n| format!("v{n}")).collect();
        let mut nodes: Vec<Made<'_>> = names.iter().map(|n| made("Relu", &["x"], n)).collect();
        nodes.push(made("MatMul", &["x", "w1"], "m1"));
        nodes.push(made("MatMul", &["m1", "w2"], "m2"));
        let all: Vec<&str> = names.iter().map(String::as_str).chain(["m2"]).collect();
        nodes.push(made("Sum", &all, "y"));
        let (_, flow) = of(&nodes, &["w1", "w2"]);
        assert_eq!(flow.boundaries().len(), cuts, "{wide}");
    }
}

#[test]
fn a_graph_that_is_not_cut_is_its_own_part() {
    let (graph, _) = residual();
    let part = Part::whole(&graph);
    assert_eq!(told(&part)[1..], ["x w1 w2 w3", "", ""]);
    assert_eq!(part.graph.encode(), graph.encode());
}

#[test]
fn a_graph_whose_nodes_are_not_in_order_stays_whole() {
    let mut nodes = [
        made("MatMul", &["x", "w1"], "m1"),
        made("Relu", &["m1"], "r"),
        made("MatMul", &["r", "w2"], "m2"),
        made("Add", &["m2", "m1"], "y"),
    ];
    assert_eq!(of(&nodes, &["w1", "w2"]).1.boundaries().len(), 1);
    nodes.swap(1, 2);
    assert_eq!(of(&nodes, &["w1", "w2"]).1.boundaries(), []);
}

/// Each value is twice the one before, so there are more ways to the weight than any computer could go.
#[test]
fn what_is_computed_from_weights_is_followed_once() {
    let names: Vec<String> = (0..100).map(|n| format!("a{n}")).collect();
    let before = std::iter::once("w1").chain(names.iter().map(String::as_str));
    let inputs: Vec<[&str; 2]> = before.map(|name| [name, name]).collect();
    let doubled = names.iter().zip(&inputs);
    let mut nodes: Vec<_> = doubled
        .map(|(name, twice)| made("Add", twice, name))
        .collect();
    nodes.push(made("MatMul", &["x", "a99"], "m1"));
    nodes.push(made("MatMul", &["m1", "w2"], "y"));
    let (_, flow) = of(&nodes, &["w1", "w2"]);
    assert_eq!(flow.work(), 32, "it is as large as the weight");
    let readers = flow.first_readers(&HashSet::from(["w1", "w2"]));
    assert_eq!(readers, BTreeSet::from([100, 101]));
}

#[test]
fn values_of_a_long_graph_cross_where_they_are_still_read() {
    let count = 20_000;
    let names: Vec<String> = (0..count).map(|n| format!("v{n}")).collect();
    let weights: Vec<String> = (0..count).map(|n| format!("w{n}")).collect();
    let before = std::iter::once("x").chain(names.iter().map(String::as_str));
    let inputs: Vec<[&str; 2]> = before.zip(&weights).map(|(b, w)| [b, w.as_str()]).collect();
    let chain = names.iter().zip(&inputs);
    let nodes: Vec<_> = chain
        .map(|(name, input)| made("MatMul", input, name))
        .collect();
    let weights: Vec<&str> = weights.iter().map(String::as_str).collect();
    let (_, flow) = of(&nodes, &weights);
    let found = flow.boundaries();
    assert_eq!(found.len(), count - 1);
    for boundary in found {
        assert_eq!(boundary.crossing, [names[boundary.at - 1].as_str()]);
    }
}
