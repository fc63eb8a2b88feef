//! The graph for inputs of fixed sizes: ONNX Runtime then computes shapes once, when it loads the graph,
//! and not in every run.

use super::graph::Graph;
use super::proto::{ValueInfo, value_info};

impl Graph {
    /// The graph as an ONNX file in which these inputs have these shapes; other inputs keep theirs.
    pub fn sized<'s>(&self, inputs: impl Iterator<Item = (&'s str, &'s [usize])>) -> Vec<u8> {
        let mut sized = self.clone();
        for (name, shape) in inputs {
            let mut known = sized.proto_mut().input.iter_mut();
            if let Some(input) = known.find(|input| input.name() == name) {
                fix(input, shape);
            }
        }
        sized.encode()
    }
}

fn fix(input: &mut ValueInfo, shape: &[usize]) {
    let Some(elem) = input.tensor().and_then(|tensor| tensor.elem_type) else {
        return;
    };
    let dims = shape.iter().map(|size| i64::try_from(*size).ok()).collect();
    *input = value_info(input.name.clone().unwrap_or_default().as_str(), elem, dims);
}
