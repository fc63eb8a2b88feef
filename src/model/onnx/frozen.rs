//! The large tensors that no candidate touches. Sessions read them as inputs, too, so that all sessions of
//! a model share them: as constants, each session would have its own copy on the device.

use std::path::Path;

use super::graph::{Graph, InitializerInfo};
use super::prepare::WeightSpec;
use super::proto::GraphError;

/// A smaller tensor costs less than another input. In elements.
pub(super) const LARGE: usize = 4096;

/// Operators that read a tensor as it is. For others the runtime may compute something from a constant
/// when it loads the graph, such as a transposed copy, and would have to do so in every run.
const READERS: [&str; 3] = ["Gather", "Gemm", "MatMul"];

impl Graph {
    /// The large initializers beside the trained ones, with their contents. `dir` has the external data.
    ///
    /// # Errors
    /// When a node cannot be decoded or data cannot be read.
    pub fn frozen(&self, trained: &[String], dir: &Path) -> Result<Vec<WeightSpec>, GraphError> {
        let wiring = self.wiring()?;
        let is_read = |info: &InitializerInfo| {
            let readers = wiring.uses(&info.name);
            let plain = |op: &str| READERS.contains(&op);
            !readers.is_empty() && readers.iter().all(|r| plain(&wiring.nodes[r.node].op))
        };
        let initializers = self.initializers().into_iter();
        let frozen = initializers.filter(|info| {
            info.shape.iter().product::<usize>() >= LARGE
                && !trained.contains(&info.name)
                && !wiring.escapes(&info.name)
                && is_read(info)
        });
        let specs = frozen.filter_map(|info| Some((info.dtype?, info)));
        let specs = specs.map(|(dtype, info)| {
            Ok(WeightSpec {
                bytes: self.initializer(&info.name, dir)?,
                shape: dims(&info.shape),
                input: info.name,
                dtype,
            })
        });
        specs.collect()
    }
}

fn dims(shape: &[usize]) -> Vec<i64> {
    let sizes = shape.iter().filter_map(|size| i64::try_from(*size).ok());
    sizes.collect()
}
