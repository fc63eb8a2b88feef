//! The exports of the architectures compute the same when they are rewritten for a provider that
//! lacks operators, and have none of these operators left.

use scorer::engine::session::{Feed, Session, Source};
use scorer::model::onnx::{Graph, Head, InputInfo, LABELS, Rewrite};
use scorer::model::tensor::Elem;

use super::architectures::cases;
use super::*;

const BATCH: usize = 2;
const WINDOW: usize = 16;

const GONE: [&str; 7] = [
    "IsNaN",
    "SplitToSequence",
    "SequenceAt",
    "LogSoftmax",
    "SoftmaxCrossEntropyLoss",
    "NegativeLogLikelihoodLoss",
    "Softmax",
];

/// Whether a graph has a node of this operator, which is the fourth field of a node.
fn has(graph: &[u8], op: &str) -> bool {
    let mut field = vec![0x22, u8::try_from(op.len()).unwrap()];
    field.extend(op.bytes());
    graph.windows(field.len()).any(|bytes| bytes == field)
}

/// Two classes, tokens or colours, which differ everywhere.
fn feed(input: &InputInfo) -> Feed<'_> {
    let shape: Vec<usize> = input
        .shape
        .iter()
        .map(|size| size.unwrap_or(BATCH))
        .collect();
    let count: usize = shape.iter().product();
    let many = if input.name == "labels" { 2 } else { 40 };
    let values = (0_i64..).map(|n| n * 7 % many).take(count);
    Feed::integers(&input.name, shape, input.elem.unwrap(), values)
}

fn run(graph: &[u8], inputs: &[InputInfo], labelled: bool) -> Vec<f32> {
    let config = config(&["engine.threads=1"]).engine;
    let source = Source {
        graph: Graph::decode(graph.to_vec().into()).unwrap(),
        folder: PathBuf::new(),
        made: None,
    };
    let mut feeds: Vec<Feed<'_>> = inputs.iter().map(feed).collect();
    if labelled {
        let targets = (0_i64..).map(|n| n * 11 % 40).take(BATCH * WINDOW);
        let shape = vec![BATCH, WINDOW, 1];
        feeds.push(Feed::integers(LABELS, shape, Elem::I64, targets));
    }
    let mut session = Session::new(&config, source, &feeds, Vec::new(), 1).unwrap();
    session.run(feeds, None).unwrap()
}

#[test]
fn rewritten_architectures_compute_the_same() {
    let mut had = [false; GONE.len()];
    for (name, case) in cases() {
        let labelled = case["objective"] == "causal_lm";
        let head = match labelled {
            true => Head::LogProbs("logits"),
            false => Head::Loss("loss"),
        };
        for state in ["fresh", "unfolded"] {
            let bytes = unpacked(name, &format!("{state}.onnx.gz"));
            let graph = Graph::decode(bytes.into()).unwrap();
            let prepare = |rewrites| {
                let graph = graph.clone();
                graph.prepare(&[], head, rewrites, Path::new("")).unwrap()
            };
            let [plain, rewritten] = [prepare(&[]), prepare(&Rewrite::ALL)];
            for (op, had) in GONE.iter().zip(&mut had) {
                *had |= has(&plain, op);
                assert!(!has(&rewritten, op), "{name}, {state}: {op}");
            }
            let inputs = graph.inputs();
            let [before, after] = [plain, rewritten].map(|graph| run(&graph, &inputs, labelled));
            assert_eq!(before.len(), after.len(), "{name}, {state}");
            let furthest = before.iter().zip(&after).map(|(a, b)| (a - b).abs());
            let furthest = furthest.fold(
                0.0_f32,
                |far, d| if d > far || d.is_nan() { d } else { far },
            );
            assert!(furthest < 2e-6, "{name}, {state}: {furthest}");
        }
    }
    // Of a loss without its softmax these models have none.
    assert_eq!(had, [true, true, true, true, true, false, true]);
}
