//! Graphs made by hand, and which of their nodes compute. `w` is a weight, `x` an input, `i` an
//! input of integers; a value's type is told by its first letter: `f` floats, `n` integers, `b`
//! booleans, anything else is not given.

use prost::Message;

use super::super::proto::{
    Attribute, FLOAT, INT64, ModelProto, OperatorSetId, ValueInfo, int, value_info,
};
use super::*;

fn value(name: &str) -> ValueInfo {
    let elem = match name.as_bytes() {
        [b'w' | b'x' | b'f', ..] => FLOAT,
        [b'i' | b'n', ..] => INT64,
        [b'b', ..] => BOOL,
        _ => {
            return ValueInfo {
                name: Some(name.into()),
                r#type: None,
            };
        }
    };
    value_info(name, elem, vec![None])
}

/// A node in words, `name: outputs = Operator(inputs)`; `domain.Operator` is of another domain.
fn node(words: &str, bodies: &[GraphProto]) -> NodeProto {
    let (name, rest) = words.split_once(": ").unwrap();
    let (outputs, call) = rest.split_once(" = ").unwrap();
    let (op, inputs) = call.strip_suffix(')').unwrap().split_once('(').unwrap();
    let (domain, op) = op.rsplit_once('.').unwrap_or(("", op));
    let list = |names: &str| -> Vec<String> {
        let names = names.split(", ").filter(|name| !name.is_empty());
        names
            .map(|name| name.trim_matches('_').to_owned())
            .collect()
    };
    let held = bodies.iter().map(|body| Attribute {
        g: Some(body.clone()),
        ..Attribute::default()
    });
    let scanned = (op == "Scan").then(|| int("num_scan_inputs", 1));
    NodeProto {
        name: Some(name.into()),
        op_type: Some(op.into()),
        domain: Some(domain.into()),
        input: list(inputs),
        output: list(outputs),
        attribute: held
            .chain(scanned)
            .map(|a| a.encode_to_vec().into())
            .collect(),
        ..NodeProto::default()
    }
}

fn graph(inputs: &[&str], nodes: &[NodeProto], outputs: &[&str]) -> GraphProto {
    let made = nodes.iter().flat_map(|node| &node.output);
    let typed = made
        .map(|name| value(name))
        .filter(|value| value.r#type.is_some());
    GraphProto {
        node: nodes.iter().map(|n| n.encode_to_vec().into()).collect(),
        input: inputs.iter().map(|name| value(name)).collect(),
        output: outputs.iter().map(|name| value(name)).collect(),
        value_info: typed.map(|value| value.encode_to_vec()).collect(),
        ..GraphProto::default()
    }
}

/// The nodes that compute, of all in the graph and its bodies.
fn found(nodes: &[NodeProto]) -> Vec<String> {
    fn add(graph: &GraphProto, host: &mut Vec<NodeRef>) {
        for bytes in &graph.node {
            let node = decode_node(bytes).unwrap();
            host.push(NodeRef {
                name: node.name().into(),
                domain: node.domain().into(),
                operator: node.op_type().into(),
            });
            for body in bodies(&node).unwrap() {
                add(&body, host);
            }
        }
    }
    let graph = graph(&["w", "x", "i"], nodes, &[]);
    let mut host = Vec::new();
    add(&graph, &mut host);
    computing_of(graph, &host)
}

fn computing_of(graph: GraphProto, host: &[NodeRef]) -> Vec<String> {
    let model = ModelProto {
        graph: Some(graph),
        opset_import: vec![OperatorSetId {
            domain: None,
            version: Some(18),
        }],
        ..ModelProto::default()
    };
    let model = Bytes::from(model.encode_to_vec());
    let nodes = computing(model, &HashSet::from(["w"]), &HashSet::new(), host).unwrap();
    nodes.into_iter().map(|node| node.name).collect()
}

/// Of each graph, whether its last node computes.
fn check(cases: &[(&str, bool)]) {
    for (words, expected) in cases {
        let nodes: Vec<NodeProto> = words.split("; ").map(|words| node(words, &[])).collect();
        let found = found(&nodes);
        let last = nodes.last().unwrap().name();
        let computes = found.iter().any(|name| name == last);
        assert_eq!(computes, *expected, "{words}");
    }
}

#[test]
fn a_node_computes_by_what_it_reads_and_makes() {
    check(&[
        // It reads a weight itself, whatever it makes of it, but not where it reads its shape.
        ("a: f = MatMul(x, w)", true),
        ("a: n = ArgMax(w)", true),
        ("a: n = Shape(w)", false),
        ("a: n = Size(w)", false),
        ("a: n = other.Shape(w)", true),
        // Floats that depend on a weight.
        ("a: f = Mul(x, w); b: f2 = Reshape(f, i)", true),
        ("a: f = Mul(x, w); b: n = ArgMax(f)", true),
        ("a: f = Mul(x, w); b: n = Cast(f)", true),
        ("a: f = Mul(x, w); b: n = Shape(f)", false),
        (
            "a: f = Mul(x, w); b: n = Shape(f); c: n2 = Gather(n, i)",
            false,
        ),
        ("a: f = Mul(x, w); b: n = Shape(f); c: f2 = Cast(n)", false),
        // Floats that do not.
        ("a: f = Mul(x, x)", false),
        ("a: b = IsNaN(x)", false),
        // Integers and booleans, even where they depend on a weight.
        (
            "a: f = Mul(x, w); b: n = ArgMax(f); c: n2 = Add(n, i)",
            false,
        ),
        ("a: f = Mul(x, w); b: b = Less(f, x); c: b2 = Not(b)", false),
        // But not what makes floats of them.
        ("a: f = Mul(x, w); b: n = ArgMax(f); c: f2 = Cast(n)", true),
        (
            "a: f = Mul(x, w); b: b = Less(f, x); c: f2 = Where(b, x, x)",
            true,
        ),
        (
            "a: f = Mul(x, w); b: n = ArgMax(f); c: f2 = Gather(x, n)",
            true,
        ),
    ]);
}

#[test]
fn a_type_that_the_graph_does_not_give_is_told_by_the_operator_or_may_be_a_float() {
    check(&[
        // Types that are not given may be floats.
        (
            "a: f = Mul(x, w); b: n = ArgMax(f); c: unknown = NewOperator(n, i)",
            true,
        ),
        ("a: unknown = Mul(x, x); b: unknown2 = Neg(unknown)", false),
        // Many an operator tells the type that the graph does not give.
        (
            "a: f = Mul(x, w); b: one = ArgMax(f); c: two = Add(one, i)",
            false,
        ),
        (
            "a: f = Mul(x, w); b: one, two = TopK(f, i); c: three = Concat(two, two)",
            false,
        ),
        (
            "a: f = Mul(x, w); b: one, two = TopK(f, i); c: three = Concat(one, one)",
            true,
        ),
        (
            "a: f = Mul(x, w); b: one = Less(f, x); c: two = Where(one, i, i)",
            false,
        ),
        (
            "a: f = Mul(x, w); b: one = Less(f, x); c: two = OneHot(one, i, x)",
            true,
        ),
        // One of several inputs or outputs is enough; an input left out is none.
        (
            "a: f = Mul(x, w); b: f2, n = TopK(f, i); c: n2 = Add(n, n)",
            false,
        ),
        ("a: f = Mul(x, w); b: n = Clip(i, _, f)", true),
        ("a: f = Mul(x, x); b: f2 = Clip(f, _, x)", false),
    ]);
}

#[test]
fn a_node_that_cannot_be_told_from_others_computes() {
    let host = |name: &str, domain: &str, operator: &str| NodeRef {
        name: name.into(),
        domain: domain.into(),
        operator: operator.into(),
    };
    let nodes = [
        node("a: n = Add(i, i)", &[]),
        node(": n2 = Add(i, i)", &[]),
        node(": n3 = Add(i, i)", &[]),
        node(": n4 = Cast(i)", &[]),
        node(": f = Cast(w)", &[]),
        node("twice: n5 = Add(i, i)", &[]),
        node("twice: f2 = Sub(w, w)", &[]),
        node("other: n6 = com.microsoft.Add(i, i)", &[]),
    ];
    let cases = [
        (host("a", "", "Add"), 1, false),
        (host("a", "ai.onnx", "Add"), 1, false),
        (host("other", "com.microsoft", "Add"), 1, false),
        (host("other", "", "Add"), 1, true),
        (host("a", "", "Sub"), 1, true),
        (host("fused by someone", "", "Add"), 1, true),
        // As many as the graph has, all of which are harmless; or one that may be the one that is not.
        (host("", "", "Add"), 2, false),
        (host("", "", "Add"), 3, true),
        (host("", "", "Cast"), 1, true),
        (host("twice", "", "Add"), 1, false),
        (host("twice", "", "Sub"), 1, true),
    ];
    for (asked, times, expected) in cases {
        let graph = graph(&["w", "x", "i"], &nodes, &[]);
        let found = computing_of(graph, &vec![asked.clone(); times]);
        assert_eq!(!found.is_empty(), expected, "{asked:?}");
    }
}

/// A frozen layer is no input of the session, and yet has to be computed on the device.
#[test]
fn what_reads_a_large_constant_computes() {
    let nodes = [
        node("small: f = Mul(x, small)", &[]),
        node("table: n = Gather(table, i)", &[]),
        node("frozen: f2 = RNN(x, large)", &[]),
        node("after: f3 = Neg(f2)", &[]),
    ];
    let constant = |name: &str, elem: i32, size: i64| TensorProto {
        name: Some(name.into()),
        dims: vec![64, size],
        data_type: Some(elem),
        ..TensorProto::default()
    };
    let mut graph = graph(&["w", "x", "i"], &nodes, &[]);
    graph.initializer = vec![
        constant("small", FLOAT, 63),
        constant("table", INT64, 64),
        constant("large", FLOAT, 64),
    ];
    let host = nodes.iter().map(|node| NodeRef {
        name: node.name().into(),
        domain: String::new(),
        operator: node.op_type().into(),
    });
    let host: Vec<NodeRef> = host.collect();
    assert_eq!(computing_of(graph, &host), ["frozen", "after"]);
}

#[test]
fn of_a_node_with_bodies_the_nodes_within_count() {
    let branch = |nodes: &[NodeProto], output| graph(&[], nodes, &[output]);
    // A weight is read from within; a name that the body defines itself is another value.
    let weight = branch(&[node("in: f = Neg(w)", &[])], "f");
    let shadow = branch(
        &[node("new: w = Neg(x)", &[]), node("in: f = Neg(w)", &[])],
        "f",
    );
    let choose = |body: &GraphProto| node("if: f9 = If(i)", std::slice::from_ref(body));
    let after = node("after: f8 = Neg(f9)", &[]);
    assert_eq!(found(&[choose(&weight), after.clone()]), ["in", "after"]);
    assert_eq!(found(&[choose(&shadow), after.clone()]), [""; 0]);
    // What a body only hands out is tainted, and so is what a tainted condition chooses.
    let handed = branch(&[], "w");
    assert_eq!(found(&[choose(&handed), after.clone()]), ["after"]);
    let plain = branch(&[node("in: f = Neg(x)", &[])], "f");
    let decide = [
        node("a: f = Mul(x, w)", &[]),
        node("b: b = Less(f, x)", &[]),
        node("if: f9 = If(b)", &[plain]),
        after,
    ];
    assert_eq!(found(&decide), ["a", "b", "after"]);
}

#[test]
fn values_are_followed_from_turn_to_turn() {
    // The second carried value becomes the first one's in the turn after: what is tainted in the
    // end is known only after as many turns as there are values.
    let body = graph(
        &["i_turn", "b_go", "f_a", "f_b", "f_c"],
        &[
            node("first: f_a2 = Neg(f_a)", &[]),
            node("second: f_b2 = Neg(f_b)", &[]),
            node("apart: f_c2 = Neg(f_c)", &[]),
            node("turn: n_turn = Add(i_turn, i)", &[]),
        ],
        &["b_go", "f_b2", "w", "f_c2"],
    );
    let nodes = [
        node("loop: f1, f2, f3 = Loop(i, _, x, x, x)", &[body]),
        node("one: f4 = Neg(f1)", &[]),
        node("three: f5 = Neg(f3)", &[]),
    ];
    assert_eq!(found(&nodes), ["first", "second", "one"]);

    // What is scanned is not carried: only the sum becomes tainted.
    let body = graph(
        &["f_sum", "f_slice"],
        &[
            node("add: f_next = Add(f_sum, w)", &[]),
            node("slice: f_out = Neg(f_slice)", &[]),
        ],
        &["f_next", "f_out"],
    );
    let nodes = [
        node("scan: f1, f2 = Scan(x, x)", &[body]),
        node("sum: f3 = Neg(f1)", &[]),
        node("rest: f4 = Neg(f2)", &[]),
    ];
    assert_eq!(found(&nodes), ["add", "sum"]);

    // A loop that takes no turn returns what it was given.
    let body = graph(&["i_turn", "b_go", "f_a"], &[], &["b_go", "x"]);
    let nodes = [
        node("loop: f1 = Loop(i, _, w)", &[body]),
        node("one: f4 = Neg(f1)", &[]),
    ];
    assert_eq!(found(&nodes), ["one"]);
}

/// Local functions are inlined before; should one be left, it is a node like any other.
#[test]
fn what_is_not_known_is_a_node_like_any_other() {
    let body = graph(&["f_in"], &[node("in: f_out = Neg(f_in)", &[])], &["f_out"]);
    let nodes = [
        node("call: f = own.Function(x, w)", &[]),
        node("map: f2 = SequenceMap(f)", std::slice::from_ref(&body)),
    ];
    assert_eq!(found(&nodes), ["call", "map", "in"]);
    let apart = [node("map: f2 = SequenceMap(x)", &[body])];
    assert_eq!(found(&apart), [""; 0]);
}
