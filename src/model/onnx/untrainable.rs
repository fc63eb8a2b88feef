//! Which weights candidates may not change, and why.

use std::collections::BTreeMap;

use super::graph::Graph;
use super::proto::GraphError;

/// Why candidates may not change a weight.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Untrainable {
    /// It determines shapes: whoever changes it determines how much there is to compute.
    #[error("decides shapes, as {0}")]
    Decides(String),
    /// The output does not depend on it.
    #[error("is read by nothing that {0} depends on")]
    Unread(String),
    /// It has no elements.
    #[error("has no elements")]
    Empty,
}

impl Graph {
    /// The weights that candidates may not change, with the reason.
    ///
    /// # Errors
    /// When a node cannot be decoded, or subgraphs are nested too deeply.
    pub fn untrainable(
        &self,
        weights: &[&str],
        output: &str,
    ) -> Result<BTreeMap<String, Untrainable>, GraphError> {
        let (flow, reach) = (self.flow(weights)?, self.reach(output)?);
        let reason = |name: &str| match flow.decides(name) {
            Some(by) => Some(Untrainable::Decides(by.to_owned())),
            None if reach.contains(name) => None,
            None => Some(Untrainable::Unread(output.to_owned())),
        };
        let barred = |name: &&str| Some(((*name).to_owned(), reason(name)?));
        Ok(weights.iter().filter_map(barred).collect())
    }
}
