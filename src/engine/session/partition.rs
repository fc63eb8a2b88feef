//! Where a graph is cut, for people.

use std::collections::HashSet;

use super::SessionError;
use crate::model::onnx::{Graph, Known, Part, Size};

/// How a graph is divided into parts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Partition {
    /// What each part but the first begins with: the first weight that no earlier part reads, or the first node
    /// where there is no such weight.
    pub cuts: Vec<String>,
    /// Size of the values between the parts of one micro-batch of the usual size.
    pub size: Size,
}

impl Partition {
    /// Describes parts that begin with these nodes of the graph. `readers` is the first part that reads each weight.
    pub(super) fn of(
        graph: &Graph,
        places: &[usize],
        weights: &[String],
        readers: &[usize],
        size: Size,
    ) -> Result<Self, SessionError> {
        if places.is_empty() {
            return Ok(Self::default());
        }
        let wiring = graph.wiring();
        let wiring = wiring.map_err(|e| SessionError::Model(e.to_string()))?;
        let first_use = |weight: &&String| wiring.uses(weight).first().map(|at| at.node);
        let begin = |(part, at): (usize, &usize)| {
            let read = weights.iter().zip(readers);
            let own = read.filter(|(_, reader)| **reader == part);
            let weight = own.map(|(weight, _)| weight).min_by_key(first_use);
            let node = wiring.nodes.get(*at).map(|node| &node.name);
            weight.or(node).cloned().unwrap_or_default()
        };
        Ok(Self {
            cuts: (1..).zip(places).map(begin).collect(),
            size,
        })
    }
}

/// Size of the values that enter parts.
pub(super) fn entering(parts: &[Part], known: &Known) -> Size {
    let entering: HashSet<&String> = parts.iter().flat_map(|part| &part.enters).collect();
    known.size(entering).unwrap_or_default()
}

#[cfg(test)]
mod tests;
