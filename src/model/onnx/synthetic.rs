//! The graph of a decoder-only language model for benchmarks: the usual operators in the usual
//! order, with its weights as inputs. Its results mean nothing, its run time does.

use super::prepare::OUTPUT;
use super::proto::{
    Attribute, FLOAT, GraphProto, INT64, TensorProto, int, ints, model, node, value_info,
};

/// The dimensions of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decoder {
    /// Blocks.
    pub layers: usize,
    /// Width.
    pub width: usize,
    /// Attention heads; divides the width.
    pub heads: usize,
    /// Tokens.
    pub vocabulary: usize,
    /// Tokens of a window.
    pub window: usize,
}

/// A graph under construction.
struct Builder {
    graph: GraphProto,
    weights: Weights,
    names: usize,
}

/// Names and shapes.
pub type Weights = Vec<(String, Vec<usize>)>;

#[expect(clippy::cast_possible_wrap, reason = "dimensions are far below 2^63")]
fn signed(dimensions: &[usize]) -> Vec<i64> {
    dimensions.iter().map(|d| *d as i64).collect()
}

impl Builder {
    fn named(name: &str) -> Self {
        Self {
            graph: GraphProto {
                name: Some(name.into()),
                ..GraphProto::default()
            },
            weights: Vec::new(),
            names: 0,
        }
    }

    /// The graph of one output, and its weights.
    fn finish(mut self, output: &str, dims: Vec<Option<i64>>) -> (Vec<u8>, Weights) {
        self.graph.output.push(value_info(output, FLOAT, dims));
        (model(self.graph, 9, 20), self.weights)
    }

    fn node(&mut self, op: &str, inputs: &[&str], attributes: Vec<Attribute>) -> String {
        self.names += 1;
        let output = format!("{}_{}", op.to_lowercase(), self.names);
        self.push(op, inputs, &output, attributes);
        output
    }

    fn push(&mut self, op: &str, inputs: &[&str], output: &str, attributes: Vec<Attribute>) {
        let node = node(output, op, inputs, output, &attributes);
        self.graph.node.push(node);
    }

    fn weight(&mut self, name: &str, shape: &[usize]) -> String {
        let dims = signed(shape).into_iter().map(Some).collect();
        self.graph.input.push(value_info(name, FLOAT, dims));
        self.weights.push((name.to_owned(), shape.to_vec()));
        name.to_owned()
    }

    fn constant(&mut self, name: &str, dims: &[usize], elem_type: i32, raw: Vec<u8>) -> String {
        self.graph.initializer.push(TensorProto {
            name: Some(name.to_owned()),
            dims: signed(dims),
            data_type: Some(elem_type),
            raw_data: Some(raw.into()),
            ..TensorProto::default()
        });
        name.to_owned()
    }

    fn linear(&mut self, x: &str, name: &str, from: usize, to: usize) -> String {
        let weight = self.weight(&format!("{name}.weight"), &[from, to]);
        self.node("MatMul", &[x, &weight], vec![])
    }

    fn norm(&mut self, x: &str, name: &str, width: usize) -> String {
        let gain = self.weight(&format!("{name}.weight"), &[width]);
        let bias = self.weight(&format!("{name}.bias"), &[width]);
        self.node("LayerNormalization", &[x, &gain, &bias], vec![])
    }

    fn heads(&mut self, x: &str, permutation: &[i64]) -> String {
        let split = self.node("Reshape", &[x, "to_heads"], vec![]);
        self.node("Transpose", &[&split], vec![ints("perm", permutation)])
    }

    fn attention(&mut self, x: &str, name: &str, width: usize) -> String {
        let [q, k, v] =
            ["q", "k", "v"].map(|part| self.linear(x, &format!("{name}.{part}"), width, width));
        let q = self.heads(&q, &[0, 2, 1, 3]);
        let k = self.heads(&k, &[0, 2, 3, 1]);
        let v = self.heads(&v, &[0, 2, 1, 3]);
        let scores = self.node("MatMul", &[&q, &k], vec![]);
        let scaled = self.node("Mul", &[&scores, "scale"], vec![]);
        let masked = self.node("Add", &[&scaled, "mask"], vec![]);
        let shares = self.node("Softmax", &[&masked], vec![int("axis", -1)]);
        let mixed = self.node("MatMul", &[&shares, &v], vec![]);
        let joined = self.node("Transpose", &[&mixed], vec![ints("perm", &[0, 2, 1, 3])]);
        let flat = self.node("Reshape", &[&joined, "to_width"], vec![]);
        self.linear(&flat, &format!("{name}.o"), width, width)
    }

    fn block(&mut self, x: &str, name: &str, width: usize) -> String {
        let normed = self.norm(x, &format!("{name}.norm1"), width);
        let attended = self.attention(&normed, &format!("{name}.attention"), width);
        let x = self.node("Add", &[x, &attended], vec![]);
        let normed = self.norm(&x, &format!("{name}.norm2"), width);
        let up = self.linear(&normed, &format!("{name}.mlp.up"), width, 4 * width);
        let active = self.node("Gelu", &[&up], vec![]);
        let down = self.linear(&active, &format!("{name}.mlp.down"), 4 * width, width);
        self.node("Add", &[&x, &down], vec![])
    }
}

/// The graph, `tokens` int64 `[batch, window]` -> `logits` f32 `[batch, window, vocabulary]`, and
/// the names and shapes of its weights.
pub fn decoder(shape: Decoder) -> (Vec<u8>, Weights) {
    let Decoder {
        layers,
        width,
        heads,
        vocabulary,
        window,
    } = shape;
    let mut builder = Builder::named("synthetic");
    let b = &mut builder;
    let tokens = value_info("tokens", INT64, vec![None, signed(&[window]).pop()]);
    b.graph.input.push(tokens);
    constants(b, shape);
    let embedding = b.weight("embed.weight", &[vocabulary, width]);
    let positions = b.weight("positions.weight", &[window, width]);
    let embedded = b.node("Gather", &[&embedding, "tokens"], vec![int("axis", 0)]);
    let mut x = b.node("Add", &[&embedded, &positions], vec![]);
    for layer in 0..layers {
        x = b.block(&x, &format!("layers.{layer:02}"), width);
    }
    let normed = b.norm(&x, "norm", width);
    let head = b.weight("head.weight", &[width, vocabulary]);
    b.push("MatMul", &[&normed, &head], "logits", vec![]);
    debug_assert_eq!(width % heads, 0);
    let dims = vec![None, None, signed(&[vocabulary]).pop()];
    builder.finish("logits", dims)
}

#[expect(clippy::cast_precision_loss, reason = "a head is narrow")]
fn constants(b: &mut Builder, model: Decoder) {
    let head = model.width / model.heads;
    let shape = |dims: [usize; 4]| -> Vec<u8> {
        signed(&dims).iter().flat_map(|d| d.to_le_bytes()).collect()
    };
    // 0 copies the dimension from the input.
    b.constant("to_heads", &[4], INT64, shape([0, 0, model.heads, head]));
    let to_width = shape([0, 0, model.width, 0])[..24].to_vec();
    b.constant("to_width", &[3], INT64, to_width);
    let scale = (head as f32).sqrt().recip();
    b.constant("scale", &[], FLOAT, scale.to_le_bytes().to_vec());
    let future = |row: usize, column: usize| if column > row { -1e9_f32 } else { 0.0 };
    let mask = (0..model.window)
        .flat_map(|row| (0..model.window).map(move |column| (row, column)))
        .flat_map(|(row, column)| future(row, column).to_le_bytes())
        .collect();
    b.constant("mask", &[model.window, model.window], FLOAT, mask);
}

/// A graph that allocates as many floats as its int64 input `size` `[1]` says, and adds them up.
pub fn greedy() -> Vec<u8> {
    let mut builder = Builder::named("greedy");
    let size = value_info("size", INT64, vec![Some(1)]);
    builder.graph.input.push(size);
    let one = builder.constant("one", &[1], FLOAT, 1_f32.to_le_bytes().to_vec());
    let ones = builder.node("Expand", &[&one, "size"], vec![]);
    builder.push("ReduceSum", &[&ones], OUTPUT, vec![]);
    builder.finish(OUTPUT, vec![Some(1)]).0
}
