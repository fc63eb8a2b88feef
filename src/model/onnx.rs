//! ONNX graphs: reading them, finding out what a graph does with its weights, and preparing it for
//! a session. In the order in which a graph passes through: messages, walking the encoded file,
//! external data, the decoded graph, lifting weights, who reads what, what may not be trained, what
//! the session runs, what a provider needs rewritten, and where the session's nodes may be.

mod dataflow;
mod external;
mod flow;
mod frozen;
mod graph;
pub(crate) mod hand_made;
mod kernels;
mod lift;
mod operators;
mod parts;
mod placement;
mod prepare;
mod proto;
mod reach;
mod rewrite;
mod sized;
mod split;
pub mod synthetic;
mod untrainable;
mod values;
mod walk;
mod wiring;

pub use dataflow::{Boundary, Dataflow};
pub use external::{External, externals, plain_location, relocate};
pub use flow::{Flow, IndexLimit};
pub use graph::{Graph, InitializerInfo, InputInfo};
pub use kernels::{DATA, copy_graph, nan_graph, scatter_graph};
pub use lift::{Lifted, UnliftedTensor, lift};
pub use parts::{Known, Part, Size, choose};
pub use placement::{NodeRef, computing};
pub use prepare::{Head, LABELS, OUTPUT, WeightSpec};
pub use proto::GraphError;
pub use rewrite::Rewrite;
pub use untrainable::Untrainable;
pub use wiring::{Module, NodeInfo, Use, Wiring};
