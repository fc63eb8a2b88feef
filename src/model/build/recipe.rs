//! What `scorer package` is told.

use std::path::PathBuf;

use crate::model::manifest::{Objective, PackageError, check_name};

/// The arguments of `scorer package`.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// The exported graph.
    pub graph: PathBuf,
    /// The checkpoint; without it the graph's own initializers are the tensors.
    pub weights: Option<PathBuf>,
    /// Globs of checkpoint tensors to leave out.
    pub exclude: Vec<String>,
    /// Directory of `*.safetensors` shards.
    pub shards: PathBuf,
    /// The model's name.
    pub name: String,
    /// The version of the weights.
    pub version: u64,
    /// The output directory, which must be empty or not exist yet.
    pub out: PathBuf,
    /// What is measured.
    pub objective: Objective,
}

impl Recipe {
    /// Checks what can be checked without reading a file.
    ///
    /// # Errors
    /// Names the invalid value and its bounds.
    pub fn check(&self) -> Result<(), PackageError> {
        check_name(&self.name)?;
        let nothing =
            || PackageError("--exclude: there is no checkpoint to leave anything out of".into());
        if self.weights.is_none() && !self.exclude.is_empty() {
            return Err(nothing());
        }
        self.objective.check()
    }
}
