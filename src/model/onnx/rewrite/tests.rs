use super::super::hand_made::{Made, Place, Runnable, made, operators};
use super::super::proto::{decode_node, value_info};
use super::*;
use prost::Message as _;

fn number<'a>(output: &'a str, int: &'a [(&'a str, i64)]) -> Made<'a> {
    Made {
        int,
        ..made("Constant", &[], output)
    }
}

fn encoded(nodes: &[Made<'_>], shape: &[Option<i64>]) -> Vec<u8> {
    let of = Runnable {
        opset: 18,
        place: Place::Graph,
        half: false,
        shape,
        nodes,
    };
    of.encode()
}

fn rewritten(model: &[u8], rewrites: &[Rewrite]) -> Vec<u8> {
    let graph = Graph::decode(model.to_vec().into()).unwrap();
    graph.rewritten(rewrites).unwrap()
}

/// Name, operator, inputs and output of each node.
fn listed(model: &[u8]) -> Vec<String> {
    let graph = Graph::decode(model.to_vec().into()).unwrap();
    let nodes = graph.proto().node.iter();
    let nodes = nodes.map(|bytes| decode_node(bytes).unwrap());
    nodes
        .map(|node| {
            format!(
                "{} {:?} {}({})",
                node.name(),
                node.output,
                node.op(),
                node.input.join(", ")
            )
        })
        .collect()
}

#[test]
fn new_nodes_are_named_after_the_old_one_and_others_stay() {
    let nodes = [
        made("Tanh", &["x"], "positive"),
        made("IsNaN", &["positive"], "bad"),
        made("Cast", &["bad"], "y"),
    ];
    let model = encoded(&nodes, &[None]);
    let after = listed(&rewritten(&model, &Rewrite::ALL));
    let before = listed(&model);
    assert_eq!(after[0], before[0]);
    assert_eq!(
        after[1],
        r#"bad/equal ["bad/equal"] Equal(positive, positive)"#
    );
    assert_eq!(after[2], r#"bad/not ["bad"] Not(bad/equal)"#);
    assert_eq!(after[3..], before[2..]);
}

#[test]
fn only_the_rewritings_that_are_asked_for_are_made() {
    let nodes = [
        made("IsNaN", &["x"], "bad"),
        made("LogSoftmax", &["x"], "y"),
    ];
    let model = encoded(&nodes, &[None]);
    assert_eq!(rewritten(&model, &[]), model);
    assert_eq!(rewritten(&model, &[Rewrite::Sequence]), model);
    let has = |rewrite, op: &str| {
        let after = operators(&rewritten(&model, &[rewrite]));
        after.iter().any(|other| other == op)
    };
    assert!(!has(Rewrite::IsNan, "IsNaN") && has(Rewrite::IsNan, "LogSoftmax"));
    assert!(has(Rewrite::LogSoftmax, "IsNaN") && !has(Rewrite::LogSoftmax, "LogSoftmax"));
}

/// Another domain's operator of the same name is another operator.
#[test]
fn operators_of_other_domains_stay() {
    let nodes = [made("IsNaN", &["x"], "y")];
    let graph = Graph::decode(encoded(&nodes, &[None]).into()).unwrap();
    let mut node = decode_node(&graph.proto().node[0]).unwrap();
    node.domain = Some("own".into());
    let mut other = graph;
    other.proto_mut().node[0] = node.encode_to_vec().into();
    assert_eq!(other.rewritten(&Rewrite::ALL).unwrap(), other.encode());
}

#[test]
fn a_sequence_stays_where_its_parts_or_readers_are_not_known() {
    let six: &[Option<i64>] = &[Some(6)];
    let zero = number("zero", &[("value_int", 0)]);
    let four = number("four", &[("value_int", 4)]);
    let parts = made("SplitToSequence", &["x"], "parts");
    let fours = made("SplitToSequence", &["x", "four"], "parts");
    let at = |position: &'static [&'static str]| made("SequenceAt", position, "y");
    let first = at(&["parts", "zero"]);
    let last = at(&["parts", "minus"]);
    let minus = number("minus", &[("value_int", -1)]);
    let kept = |int| Made { int, ..fours };
    let inside = Made {
        in_body: true,
        ..made("SequenceAt", &["parts", "zero"], "inner")
    };
    let free: &[Option<i64>] = &[None];
    let cases = [
        ("size", vec![minus, parts, last], free),
        ("rank", vec![minus, parts, last], &[][..]),
        ("chunk of", vec![minus, four, fours, last], free),
        (
            "chunks",
            vec![zero, made("SplitToSequence", &["x", "x"], "parts"), first],
            six,
        ),
        (
            "keepdims",
            vec![zero, four, kept(&[("keepdims", 0)]), first],
            six,
        ),
        ("position", vec![parts, at(&["parts", "x"])], six),
        (
            "beyond",
            vec![number("zero", &[("value_int", 6)]), parts, first],
            six,
        ),
        (
            "length",
            vec![zero, parts, made("SequenceLength", &["parts"], "n"), first],
            six,
        ),
        ("body", vec![zero, parts, inside, first], six),
        (
            "output",
            vec![parts, made("Identity", &["parts"], "y")],
            six,
        ),
    ];
    for (case, nodes, shape) in cases {
        let model = encoded(&nodes, shape);
        assert_eq!(rewritten(&model, &Rewrite::ALL), model, "{case}");
    }
    // And where all is known, it goes.
    let after = operators(&rewritten(
        &encoded(&[zero, parts, first], six),
        &Rewrite::ALL,
    ));
    assert_eq!(
        after.join(" "),
        "Constant Constant Constant Constant Slice Cast"
    );
}

#[test]
fn a_loss_that_is_reduced_or_weighted_stays() {
    let loss = |input, reduction| Made {
        reduction,
        ..made("SoftmaxCrossEntropyLoss", input, "y")
    };
    let plain = loss(&["x", "x"], "none");
    let stay = [
        loss(&["x", "x"], ""),
        loss(&["x", "x"], "mean"),
        loss(&["x", "x"], "sum"),
        loss(&["x", "x", "x"], "none"),
    ];
    for kept in stay {
        let model = encoded(&[kept], &[None]);
        assert_eq!(rewritten(&model, &Rewrite::ALL), model, "{kept:?}");
    }
    let model = encoded(&[plain], &[None]);
    assert_ne!(rewritten(&model, &Rewrite::ALL), model);
}

/// A bound that is left out still keeps infinities out.
#[test]
fn a_clip_without_both_bounds_stays() {
    for input in [&["x"][..], &["x", "x"], &["x", "", "x"]] {
        let model = encoded(&[made("Clip", input, "y")], &[None]);
        assert_eq!(rewritten(&model, &Rewrite::ALL), model, "{input:?}");
    }
}

/// A double stays: what has no kernel for this operator has none for doubles either.
#[test]
fn a_log_softmax_of_doubles_stays() {
    let nodes = [made("LogSoftmax", &["x"], "y")];
    let mut graph = Graph::decode(encoded(&nodes, &[None]).into()).unwrap();
    const DOUBLE: i32 = 11;
    let double = value_info("x", DOUBLE, vec![None]);
    graph.proto_mut().input = vec![double];
    assert_eq!(graph.rewritten(&Rewrite::ALL).unwrap(), graph.encode());
}

#[test]
fn the_loss_head_is_rewritten_without_a_cast_of_what_is_f32() {
    let nodes = [made("Tanh", &["x"], "logits")];
    let graph = super::super::hand_made::graph(&nodes, &["x"]);
    let head = super::super::Head::LogProbs("logits");
    let prepared = |rewrites| graph.clone().prepare(&["x"], head, rewrites, "".as_ref());
    let plain = operators(&prepared(&[]).unwrap());
    assert_eq!(plain, ["Tanh", "LogSoftmax", "GatherElements"]);
    let after = operators(&prepared(&Rewrite::ALL).unwrap());
    let steps = "Tanh Constant ReduceMax Sub Exp ReduceSum Log Sub GatherElements";
    assert_eq!(after.join(" "), steps);
}

#[test]
fn a_constant_of_a_shape_stays_if_it_is_of_integers() {
    let of = |elem: i32, bytes: &[u8]| {
        let model = encoded(&[made("ConstantOfShape", &["x"], "y")], &[None]);
        let mut graph = Graph::decode(model.into()).unwrap();
        let value = super::super::proto::TensorProto {
            dims: vec![1],
            data_type: Some(elem),
            raw_data: Some(bytes.to_vec().into()),
            ..Default::default()
        };
        let value = Attribute {
            name: Some("value".into()),
            t: Some(value),
            r#type: Some(4),
            ..Attribute::default()
        };
        let mut node = super::super::proto::decode_node(&graph.proto().node[0]).unwrap();
        node.attribute = vec![prost::Message::encode_to_vec(&value).into()];
        graph.proto_mut().node[0] = prost::Message::encode_to_vec(&node).into();
        operators(&graph.rewritten(&[Rewrite::ConstantOfShape]).unwrap())
    };
    let integers = of(super::super::proto::INT64, &1_i64.to_le_bytes());
    assert_eq!(integers[0], "ConstantOfShape");
    let floats = of(super::super::proto::FLOAT, &1_f32.to_le_bytes());
    assert_eq!(floats[..3], ["Constant", "Squeeze", "Expand"]);
}

/// In a function an attribute may be that of each call.
#[test]
fn a_node_with_an_attribute_of_the_call_stays() {
    let of = Runnable {
        opset: 18,
        place: Place::Function,
        half: false,
        shape: &[None],
        nodes: &[made("LogSoftmax", &["x"], "y")],
    };
    let mut graph = Graph::decode(of.encode().into()).unwrap();
    let mut function: FunctionProto = decode(&graph.model.functions[0], "a function").unwrap();
    let mut node = decode_node(&function.node[0]).unwrap();
    let axis = Attribute {
        name: Some("axis".into()),
        ref_attr_name: Some("dim".into()),
        ..Attribute::default()
    };
    node.attribute.push(axis.encode_to_vec().into());
    function.node[0] = node.encode_to_vec().into();
    graph.model.functions[0] = function.encode_to_vec().into();
    assert_eq!(graph.rewritten(&Rewrite::ALL).unwrap(), graph.encode());
}
