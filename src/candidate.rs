//! A candidate's bytes become a checked update: every name known, every index in range and once,
//! every value finite, every size within its bound, before anything touches the weights.

pub mod binary_v2;
pub mod fetch;

use crate::config::CandidatesConfig;
use crate::failure::{Code, Failure};
use crate::job::{Candidate, Format};
use crate::package::Package;

/// The entries of one tensor, ascending by index.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorUpdate {
    /// Position in the package's weights.
    pub tensor: usize,
    /// Row-major index in the checkpoint's layout, value as sent (widened to f32).
    pub entries: Vec<(u32, f32)>,
}

/// A checked update.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Update {
    /// Ascending by tensor.
    pub tensors: Vec<TensorUpdate>,
}

impl Update {
    /// Number of entries in all tensors.
    pub fn entries(&self) -> u64 {
        self.tensors.iter().map(|t| t.entries.len() as u64).sum()
    }

    /// Euclidean norm of the values as sent.
    pub fn l2_norm(&self) -> f64 {
        let values = self.tensors.iter().flat_map(|t| &t.entries);
        values
            .map(|(_, v)| f64::from(*v).powi(2))
            .sum::<f64>()
            .sqrt()
    }
}

/// Decodes a candidate.
///
/// # Errors
/// The first thing that is wrong, as the code of the contract.
pub fn decode(
    bytes: &[u8],
    candidate: &Candidate,
    package: &Package,
    limits: &CandidatesConfig,
) -> Result<Update, Failure> {
    if candidate.compression.is_some() {
        return Err(Failure::new(
            Code::InvalidJob,
            "candidate.compression: zstd is not supported by this worker",
        ));
    }
    let mut gathered = Gathered::new(package, limits);
    match candidate.format {
        Format::BinaryV2 => binary_v2::decode(bytes, &mut gathered)?,
        Format::Safetensors | Format::PtChunks => {
            let message = format!(
                "candidate.format: {} is not supported by this worker",
                candidate.format.as_str()
            );
            return Err(Failure::new(Code::InvalidJob, message));
        }
    }
    gathered.finish()
}

/// Collects entries from a format's reader and enforces every bound and check that all share.
#[derive(Debug)]
pub struct Gathered<'a> {
    package: &'a Package,
    limits: &'a CandidatesConfig,
    entries: u64,
    inflated: u64,
    tensors: Vec<Vec<(u32, f32)>>,
    touched: usize,
}

impl<'a> Gathered<'a> {
    fn new(package: &'a Package, limits: &'a CandidatesConfig) -> Self {
        let tensors = vec![Vec::new(); package.weights.tensors.len()];
        Self {
            package,
            limits,
            entries: 0,
            inflated: 0,
            tensors,
            touched: 0,
        }
    }

    /// Admits a declared tensor before anything is allocated for it.
    ///
    /// # Errors
    /// Unknown name, wrong shape, or more entries than the tensor or the limits allow.
    pub fn declare(
        &mut self,
        name: &str,
        shape: Option<&[u64]>,
        entries: u64,
    ) -> Result<usize, Failure> {
        let shown = shorten(name);
        let tensor = self.package.tensor(name).ok_or_else(|| {
            Failure::new(
                Code::CandidateUnknownTensor,
                format!("the model has no trainable tensor {shown:?}"),
            )
            .with("tensor", shown.clone())
        })?;
        let same_shape = |shape: &[u64]| {
            shape
                .iter()
                .copied()
                .eq(tensor.shape.iter().map(|d| *d as u64))
        };
        if let Some(shape) = shape.filter(|s| !same_shape(s)) {
            let message = format!(
                "{shown}: the candidate says shape {shape:?}, the model has {:?}",
                tensor.shape
            );
            return Err(Failure::new(Code::CandidateShapeMismatch, message).with("tensor", shown));
        }
        if entries > tensor.numel as u64 {
            let message = format!("{shown}: {entries} entries for {} elements", tensor.numel);
            return Err(Failure::new(Code::CandidateTooLarge, message).with("tensor", shown));
        }
        self.entries = self.entries.saturating_add(entries);
        if self.entries > self.limits.max_entries {
            let message = format!(
                "more than candidates.max_entries = {} entries",
                self.limits.max_entries
            );
            return Err(Failure::new(Code::CandidateTooLarge, message));
        }
        Ok(tensor.index)
    }

    /// Accounts for bytes that a stream is about to inflate to.
    ///
    /// # Errors
    /// When the candidate's budget is spent.
    pub fn spend(&mut self, bytes: u64) -> Result<(), Failure> {
        self.inflated = self.inflated.saturating_add(bytes);
        if self.inflated <= self.limits.max_inflated_bytes {
            return Ok(());
        }
        let message = format!(
            "inflates to more than candidates.max_inflated_bytes = {}",
            self.limits.max_inflated_bytes
        );
        Err(Failure::new(Code::CandidateTooLarge, message))
    }

    /// Takes a tensor's entries in the order they were sent.
    ///
    /// # Errors
    /// An index that is negative or too large, or a value that is not finite.
    pub fn add(
        &mut self,
        name: &str,
        tensor: usize,
        entries: impl Iterator<Item = (i64, f32)>,
    ) -> Result<(), Failure> {
        let numel = self.package.weights.tensors[tensor].numel as u64;
        let gathered = &mut self.tensors[tensor];
        self.touched += usize::from(gathered.is_empty());
        gathered.reserve(entries.size_hint().0);
        for (index, value) in entries {
            let Some(index) = u32::try_from(index).ok().filter(|i| u64::from(*i) < numel) else {
                let message = format!("{}: index {index} is not within 0..{numel}", shorten(name));
                return Err(Failure::new(Code::CandidateIndexOutOfRange, message)
                    .with("tensor", shorten(name)));
            };
            if !value.is_finite() {
                let message = format!(
                    "{}: the value at index {index} is not finite",
                    shorten(name)
                );
                return Err(
                    Failure::new(Code::CandidateNonFinite, message).with("tensor", shorten(name))
                );
            }
            gathered.push((index, value));
        }
        Ok(())
    }

    fn finish(self) -> Result<Update, Failure> {
        let mut update = Update::default();
        for (tensor, mut entries) in self.tensors.into_iter().enumerate() {
            if entries.is_empty() {
                continue;
            }
            if !entries.is_sorted_by(|a, b| a.0 < b.0) {
                entries.sort_by_key(|(index, _)| *index);
            }
            if let Some(pair) = entries.windows(2).find(|pair| pair[0].0 == pair[1].0) {
                let name = &self.package.weights.tensors[tensor].name;
                let message = format!("{name}: index {} is given twice", pair[0].0);
                return Err(Failure::new(Code::CandidateDuplicateIndex, message)
                    .with("tensor", name.clone()));
            }
            update.tensors.push(TensorUpdate { tensor, entries });
        }
        if update.tensors.is_empty() {
            return Err(Failure::new(
                Code::CandidateEmpty,
                "the candidate has no entries",
            ));
        }
        Ok(update)
    }
}

/// A stranger's name, short enough for a log line.
fn shorten(name: &str) -> String {
    const MOST: usize = 120;
    if name.chars().count() <= MOST {
        name.to_owned()
    } else {
        name.chars().take(MOST).chain("...".chars()).collect()
    }
}
