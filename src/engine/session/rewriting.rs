//! Every rewriting computes what ONNX Runtime's CPU provider computes with the operator itself, NaN
//! and infinities included: in the graph, in bodies and in functions.

use half::f16;

use super::super::tests::configuration;
use super::*;
use crate::model::onnx::hand_made::{Made, Place, Runnable, operators};
use crate::model::onnx::{Graph, Rewrite};
use crate::model::tensor::Elem;

const PLACES: [Place; 3] = [Place::Graph, Place::Body, Place::Function];

fn run(graph: &[u8], half: bool, shape: &[usize], values: &[f32]) -> Vec<f32> {
    let config = configuration().engine;
    let source = Source {
        graph: Graph::decode(graph.to_vec().into()).unwrap(),
        folder: PathBuf::new(),
        made: None,
    };
    let bytes = values.iter().flat_map(|v| match half {
        true => f16::from_f32(*v).to_le_bytes().to_vec(),
        false => v.to_le_bytes().to_vec(),
    });
    let feed = Feed {
        name: "x",
        shape: shape.to_vec(),
        elem: if half { Elem::F16 } else { Elem::F32 },
        bytes: bytes.collect(),
    };
    let feeds = vec![feed];
    let mut session = Session::new(&config, source, &feeds, Vec::new(), 1).unwrap();
    session.run(feeds, None).unwrap()
}

/// Finite numbers within the rounding of their type; the same infinity; NaN for NaN.
fn alike(a: f32, b: f32, half: bool) -> bool {
    let rounding = if half { 1e-3 } else { 1e-6 };
    let near = (a - b).abs() <= rounding * a.abs().max(1.0);
    a.to_bits() == b.to_bits() || near || (a.is_nan() && b.is_nan())
}

/// Runs a graph as it is and rewritten, on the same values, and returns the operators after.
fn compare(of: Runnable<'_>, rewrite: Rewrite, shape: &[usize], values: &[f32]) -> Vec<String> {
    let graph = of.encode();
    let decoded = Graph::decode(graph.clone().into()).unwrap();
    let rewritten = decoded.rewritten(&[rewrite]).unwrap();
    let [before, after] = [&graph, &rewritten].map(|graph| run(graph, of.half, shape, values));
    assert_eq!(before.len(), after.len(), "{of:?}");
    for (at, (a, b)) in before.iter().zip(&after).enumerate() {
        assert!(
            alike(*a, *b, of.half),
            "{of:?}, entry {at}: {a} and {b}\n{values:?}"
        );
    }
    operators(&rewritten)
}

#[test]
fn not_equal_to_itself_is_nan() {
    let nodes = [Made {
        name: "guard",
        op: "IsNaN",
        input: &["x"],
        output: "y",
        ..Made::default()
    }];
    let values = [
        f32::NAN,
        -f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        0.0,
        -0.0,
        f32::MIN_POSITIVE / 2.0,
        -6e-8,
        f32::MAX,
        1.5,
    ];
    for (place, half) in PLACES.into_iter().flat_map(|p| [(p, false), (p, true)]) {
        for opset in [13, 20] {
            let of = Runnable {
                opset,
                place,
                half,
                shape: &[None],
                nodes: &nodes,
            };
            let after = compare(of, Rewrite::IsNan, &[values.len()], &values);
            assert!(!after.contains(&"IsNaN".to_owned()), "{after:?}");
            assert!(after.contains(&"Not".to_owned()), "{after:?}");
        }
    }
}

/// Rows of a length with what is special in the first, a middle and the last column.
fn rows(length: usize) -> Vec<f32> {
    const INFINITE: f32 = f32::INFINITY;
    #[expect(clippy::cast_precision_loss, reason = "small")]
    let plain: Vec<f32> = (0..length).map(|n| (n as f32 * 1.7).sin() * 9.0).collect();
    let mut rows = vec![plain.clone()];
    let special = [INFINITE, -INFINITE, f32::NAN, 3e38, -3e38, 100.0, -0.0];
    for value in special {
        rows.push(vec![value; length]);
        for at in [0, length / 2, length - 1] {
            let mut row = plain.clone();
            row[at] = value;
            rows.push(row);
            let mut alone = vec![-INFINITE; length];
            alone[at] = value;
            rows.push(alone);
        }
    }
    rows.concat()
}

#[test]
fn a_softmax_in_steps_is_the_operator_in_finite_and_in_other_values() {
    for (place, half) in PLACES.into_iter().flat_map(|p| [(p, false), (p, true)]) {
        for (opset, axis) in [(13, -1), (15, -1), (17, 1), (18, -1), (20, 0), (21, 1)] {
            let lengths = [1, 3, 16, 37].into_iter();
            let softmax = [
                ("LogSoftmax", Rewrite::LogSoftmax),
                ("Softmax", Rewrite::Softmax),
            ];
            for ((op, rewrite), length) in lengths.flat_map(|l| softmax.map(|s| (s, l))) {
                let nodes = [Made {
                    op,
                    input: &["x"],
                    output: "y",
                    int: &[("axis", axis)],
                    ..Made::default()
                }];
                let of = Runnable {
                    opset,
                    place,
                    half,
                    shape: &[None, None],
                    nodes: &nodes,
                };
                let values = rows(length);
                let shape = [values.len() / length, length];
                let after = compare(of, rewrite, &shape, &values);
                // Where the type is not known it takes CastLike.
                let known = place != Place::Function;
                let stays = !known && opset < 15;
                assert_eq!(after.contains(&op.to_owned()), stays, "{of:?}");
                assert_eq!(after.contains(&"CastLike".to_owned()), !known && !stays);
            }
        }
    }
}

#[test]
fn a_log_softmax_of_many_halves_does_not_overflow() {
    let nodes = [Made {
        op: "LogSoftmax",
        input: &["x"],
        output: "y",
        ..Made::default()
    }];
    let of = Runnable {
        opset: 18,
        place: Place::Graph,
        half: true,
        shape: &[None, None],
        nodes: &nodes,
    };
    compare(of, Rewrite::LogSoftmax, &[1, 70_000], &[0.5; 70_000]);
}

#[test]
fn what_is_clipped_stays_nan() {
    let clips: [(&str, &[&str]); 2] = [("Relu", &["x"]), ("Clip", &["x", "low", "high"])];
    let made = |op, input, output| Made {
        op,
        input,
        output,
        ..Made::default()
    };
    for (op, input) in clips {
        // The bounds are 0 and 1, of the type of `x`.
        let nodes = [
            made("Shape", &["x"], "shape"),
            made("CastLike", &["shape", "x"], "size"),
            made("Sub", &["size", "size"], "low"),
            made("Div", &["size", "size"], "high"),
            made(op, input, "y"),
        ];
        for (place, half) in PLACES.into_iter().flat_map(|p| [(p, false), (p, true)]) {
            let of = Runnable {
                opset: 18,
                place,
                half,
                shape: &[None],
                nodes: &nodes,
            };
            let (nan, infinite) = (f32::NAN, f32::INFINITY);
            let values = [nan, infinite, -infinite, -0.0, 0.0, 0.5, -7.0, 7.0, -nan];
            let after = compare(of, Rewrite::Clip, &[values.len()], &values);
            assert!(!after.contains(&op.to_owned()), "{after:?}");
        }
    }
}

#[test]
fn a_sum_is_a_chain_of_additions() {
    let sums: [&[&str]; 3] = [&["x"], &["x", "one"], &["x", "x", "one", "x"]];
    for input in sums {
        let nodes = [
            // Broadcast, and of the type of `x`.
            Made {
                op: "ReduceMax",
                input: &["x"],
                output: "one",
                ..Made::default()
            },
            Made {
                op: "Sum",
                input,
                output: "y",
                ..Made::default()
            },
        ];
        for (place, half) in PLACES.into_iter().flat_map(|p| [(p, false), (p, true)]) {
            for (at, special) in [1.0, f32::NAN, f32::INFINITY].into_iter().enumerate() {
                let of = Runnable {
                    opset: 18,
                    place,
                    half,
                    shape: &[None],
                    nodes: &nodes,
                };
                let mut values = [0.5, 3.25, f32::NEG_INFINITY, 7.0];
                values[at] = special;
                let after = compare(of, Rewrite::Sum, &[values.len()], &values);
                assert!(!after.contains(&"Sum".to_owned()), "{after:?}");
            }
        }
    }
}

/// The losses of 6 examples of 3 classes, the second of which is ignored, as a vector or a matrix of
/// targets.
#[test]
fn a_cross_entropy_in_steps_is_the_operator() {
    #[expect(clippy::cast_precision_loss, reason = "small")]
    let mut values: Vec<f32> = (0..18).map(|n| (n as f32 * 1.7).sin() * 9.0).collect();
    (values[0], values[7], values[16]) = (f32::NEG_INFINITY, f32::INFINITY, f32::NAN);
    let targets = Made {
        op: "Constant",
        output: "flat",
        ints: &[("value_ints", &[0, -100, 1, 2, 2, 1])],
        ..Made::default()
    };
    let shapes: [(&[i64], &[usize]); 2] = [(&[6], &[6, 3]), (&[2, 3], &[2, 3, 3])];
    let ignored: [&[(&str, i64)]; 2] = [&[("ignore_index", -100)], &[]];
    for ((labels, shape), ignored) in shapes.into_iter().flat_map(|s| ignored.map(|i| (s, i))) {
        for op in ["SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"] {
            let targets = match ignored {
                [] => Made {
                    ints: &[("value_ints", &[0, 1, 1, 2, 2, 1])],
                    ..targets
                },
                _ => targets,
            };
            let nodes = [
                targets,
                Made {
                    op: "Constant",
                    output: "shape",
                    ints: &[("value_ints", labels)],
                    ..Made::default()
                },
                Made {
                    op: "Reshape",
                    input: &["flat", "shape"],
                    output: "labels",
                    ..Made::default()
                },
                Made {
                    op,
                    input: &["x", "labels"],
                    output: "y",
                    int: ignored,
                    reduction: "none",
                    ..Made::default()
                },
            ];
            for (place, half) in PLACES.into_iter().flat_map(|p| [(p, false), (p, true)]) {
                for opset in [15, 20] {
                    let free = vec![None; shape.len()];
                    let of = Runnable {
                        opset,
                        place,
                        half,
                        shape: &free,
                        nodes: &nodes,
                    };
                    let after = compare(of, Rewrite::CrossEntropy, shape, &values);
                    let has = |op: &str| after.iter().any(|other| other == op);
                    assert!(!has(op) && !has("LogSoftmax") && has("Neg"), "{after:?}");
                }
            }
        }
    }
}

#[test]
fn a_constant_of_a_shape_is_an_expanded_number() {
    // Of as many dimensions as the input, and of none.
    for end in [2, 0] {
        let shape = [("start", 0), ("end", end)];
        let with = |op, input, output| Made {
            op,
            input,
            output,
            ..Made::default()
        };
        let nodes = [
            Made {
                int: &shape,
                ..with("Shape", &["x"], "shape")
            },
            with("ConstantOfShape", &["shape"], "zeros"),
            with("Exp", &["zeros"], "ones"),
            with("Mul", &["ones", "x"], "y"),
        ];
        for place in PLACES {
            let of = Runnable {
                opset: 18,
                place,
                half: false,
                shape: &[None, None],
                nodes: &nodes,
            };
            let values = [1.5, f32::NAN, f32::INFINITY, -0.0, 1e30, -7.0];
            let after = compare(of, Rewrite::ConstantOfShape, &[2, 3], &values);
            let has = |op: &str| after.iter().any(|other| other == op);
            assert!(!has("ConstantOfShape") && has("Expand"), "{after:?}");
        }
    }
}

struct Sequence<'a> {
    /// Size and axis of the dimension that is split.
    shape: &'a [Option<i64>],
    axis: i64,
    /// Nothing, a number or a vector.
    split: Option<Made<'a>>,
    keep: i64,
    positions: &'a [i64],
}

/// The parts at the positions, flattened and joined.
fn sequence(of: &Sequence<'_>, check: impl FnOnce(&[Made<'_>])) {
    let named = |kind: &str, at: usize| format!("{kind}{at}");
    let names: Vec<[String; 3]> = (0..of.positions.len())
        .map(|at| ["position", "part", "flat"].map(|kind| named(kind, at)))
        .collect();
    let values: Vec<[(&str, i64); 1]> = of.positions.iter().map(|p| [("value_int", *p)]).collect();
    let reads: Vec<[&str; 2]> = names.iter().map(|[at, ..]| ["parts", at]).collect();
    let flats: Vec<[&str; 2]> = names
        .iter()
        .map(|[_, part, _]| [part.as_str(), "all"])
        .collect();
    let all: Vec<&str> = names.iter().map(|[.., flat]| flat.as_str()).collect();
    let attributes = [("axis", of.axis), ("keepdims", of.keep)];
    let constant = |output, int| Made {
        op: "Constant",
        output,
        int,
        ..Made::default()
    };
    let with = |op, input, output| Made {
        op,
        input,
        output,
        ..Made::default()
    };
    let input: &[&str] = if of.split.is_some() {
        &["x", "sizes"]
    } else {
        &["x"]
    };
    let mut nodes: Vec<Made<'_>> = of.split.into_iter().collect();
    nodes.push(Made {
        name: "packed",
        int: &attributes,
        ..with("SplitToSequence", input, "parts")
    });
    nodes.push(Made {
        ints: &[("value_ints", &[-1])],
        ..constant("all", &[])
    });
    for (at, [position, part, flat]) in names.iter().enumerate() {
        nodes.push(constant(position, &values[at]));
        nodes.push(with("SequenceAt", &reads[at], part));
        nodes.push(with("Reshape", &flats[at], flat));
    }
    nodes.push(Made {
        int: &[("axis", 0)],
        ..with("Concat", &all, "y")
    });
    check(&nodes);
}

#[test]
fn a_part_of_a_sequence_is_a_slice() {
    let number = Made {
        op: "Constant",
        output: "sizes",
        int: &[("value_int", 4)],
        ..Made::default()
    };
    let vector = Made {
        op: "Constant",
        output: "sizes",
        ints: &[("value_ints", &[2, 1, 3])],
        ..Made::default()
    };
    let free = |axis, split, keep, positions| Sequence {
        shape: &[None, None],
        axis,
        split,
        keep,
        positions,
    };
    let of = |axis, split, keep, positions| Sequence {
        shape: &[Some(6), Some(6)],
        ..free(axis, split, keep, positions)
    };
    let cases = [
        (of(0, Some(vector), 1, &[0, 1, 2]), "Slice"),
        (of(-1, Some(vector), 1, &[-1, -3, -3]), "Slice"),
        // `keepdims` counts only where the sizes are not given.
        (of(1, Some(vector), 0, &[2, 0]), "Slice"),
        (of(1, Some(number), 1, &[0, 1]), "Slice"),
        (of(0, Some(number), 1, &[-1]), "Slice"),
        (of(0, None, 1, &[5, 0, -2]), "Slice"),
        (of(1, None, 0, &[5, 0, -2]), "Squeeze"),
        (of(-2, None, 0, &[1]), "Squeeze"),
        // From the start the size of the whole need not be known.
        (free(1, Some(number), 1, &[1, 0]), "Slice"),
        (free(-1, None, 0, &[5, 2]), "Squeeze"),
    ];
    #[expect(clippy::cast_precision_loss, reason = "small")]
    let mut values: Vec<f32> = (0..36).map(|n| n as f32).collect();
    (values[3], values[17], values[30]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
    for (case, reader) in cases {
        for (opset, half) in [(13, false), (17, true), (18, false), (21, true)] {
            for place in [Place::Graph, Place::Body] {
                sequence(&case, |nodes| {
                    let of = Runnable {
                        opset,
                        place,
                        half,
                        shape: case.shape,
                        nodes,
                    };
                    let after = compare(of, Rewrite::Sequence, &[6, 6], &values);
                    let has = |op: &str| after.iter().any(|other| other == op);
                    assert!(has("Slice") && has(reader), "{after:?}");
                    assert!(!has("SplitToSequence") && !has("SequenceAt"), "{after:?}");
                });
            }
        }
    }
}
