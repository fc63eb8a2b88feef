//! A model package on disk: its manifest, its files, its held-out data, and the ONNX graph in it.

pub mod build;
pub mod checkpoint;
mod compare;
mod error;
pub(crate) mod files;
pub(crate) mod fit;
mod glob;
pub mod manifest;
mod names;
mod objective;
pub mod onnx;
pub mod package;
pub mod plan;
pub mod prefix;
mod shard;
pub mod tensor;
pub mod weights;
pub(crate) mod weights_file;
