//! A candidate's bytes become a checked update: every name known, every index in range and once,
//! every value finite, every size within its bound, before anything touches the weights.

mod binary_v2;
mod cache;
pub mod fetch;
mod foreign;
mod keys;
mod packed;
mod pt_chunks;
mod safetensors;
pub mod sketch;
mod zstd;

use crate::config::CandidatesConfig;
use crate::model::package::Package;
use crate::model::prefix::{Renaming, prefixes};
use crate::protocol::failure::{Code, Failure};
use crate::protocol::job::{Candidate, Compression, Format};
use crate::util::file_type::{self, Looks};
use keys::Keys;

/// Of a shape; what has more is none.
const MOST_DIMENSIONS: usize = 8;
/// Pieces in which the tensors of a model may come: so many, and so many for each of its names.
const MOST_PIECES: u64 = 1000;
const PIECES: u64 = 8;

/// The entries of one tensor, ascending by index.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorUpdate {
    /// Position in the package's weights.
    pub tensor: usize,
    /// Row-major indices in the checkpoint's layout.
    pub indices: Vec<u32>,
    /// One for each index, as sent (widened to f32).
    pub values: Vec<f32>,
}

/// A checked update.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Update {
    /// Ascending by tensor.
    pub tensors: Vec<TensorUpdate>,
    /// Where it leads from and to, if its container says so.
    pub versions: Option<Versions>,
}

/// What a container says of the versions it leads from and to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    /// `old_version`
    pub old: u64,
    /// `new_version`
    pub new: u64,
}

impl Update {
    /// Number of entries in all tensors.
    pub fn entries(&self) -> u64 {
        self.tensors.iter().map(|t| t.indices.len() as u64).sum()
    }

    /// Euclidean norm of the values as sent.
    pub fn l2_norm(&self) -> f64 {
        let values = self.tensors.iter().flat_map(|t| &t.values);
        values.map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
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
    let mut gathered = Gathered::new(package, limits);
    let inflated;
    let bytes = match candidate.compression {
        None => bytes,
        Some(Compression::Zstd) => {
            inflated = zstd::inflate(bytes, &mut gathered)?;
            &inflated
        }
    };
    gathered.unread = bytes.len() as u64;
    let read = match candidate.format {
        Format::BinaryV2 => binary_v2::decode(bytes, &mut gathered),
        Format::Safetensors => safetensors::decode(bytes, &mut gathered),
        Format::PtChunks => pt_chunks::decode(bytes, &mut gathered),
    };
    read.map_err(|failure| match candidate.compression {
        None if Looks::of(bytes) == Looks::Zstd => {
            malformed(failure.message + "; the job does not say \"compression\": \"zstd\"")
        }
        None | Some(Compression::Zstd) => failure,
    })?;
    gathered.finish()
}

/// Collects entries from a format's reader and enforces every bound and check that all share.
#[derive(Debug, Clone)]
pub struct Gathered<'a> {
    package: &'a Package,
    limits: &'a CandidatesConfig,
    entries: u64,
    pieces: u64,
    most_pieces: u64,
    /// Bytes of the body that were not inflated yet.
    unread: u64,
    inflated: u64,
    most_inflated: Bound,
    versions: Option<Versions>,
    /// How the candidate's names become the model's.
    renaming: Renaming,
    /// What the container has, to be said where none of it is an entry.
    keys: Keys,
    /// Tensors whose type cannot be a weight's.
    passed_over: Keys,
    tensors: Vec<(Vec<u32>, Vec<f32>)>,
}

/// The most bytes that something may take, and who says so.
#[derive(Debug, Clone)]
struct Bound {
    bytes: u64,
    name: String,
}

impl Bound {
    /// What all streams of a candidate may inflate to. No format needs more than some words for each
    /// weight, be it packed twice.
    fn of_inflated(package: &Package, limits: &CandidatesConfig) -> Self {
        const OF_A_WEIGHT: u64 = 64;
        const OF_A_TENSOR: u64 = 4096;
        const OF_THE_WHOLE: u64 = 1 << 20;
        let tensors = &package.weights.tensors;
        let needed = tensors.iter().fold(OF_THE_WHOLE, |sum, tensor| {
            sum + OF_A_TENSOR + OF_A_WEIGHT * tensor.numel as u64
        });
        let configured = limits.max_inflated_bytes;
        if needed < configured {
            let name = format!("an update of every weight of the model needs ({needed} bytes)");
            return Self {
                bytes: needed,
                name,
            };
        }
        Self {
            bytes: configured,
            name: format!("candidates.max_inflated_bytes = {configured}"),
        }
    }
}

impl<'a> Gathered<'a> {
    fn new(package: &'a Package, limits: &'a CandidatesConfig) -> Self {
        let tensors = vec![Default::default(); package.weights.tensors.len()];
        let aliases = package.manifest.aliases.iter().flatten();
        let names = (tensors.len() + aliases.count()) as u64;
        Self {
            package,
            limits,
            entries: 0,
            pieces: 0,
            most_pieces: MOST_PIECES + PIECES * names,
            unread: 0,
            inflated: 0,
            most_inflated: Bound::of_inflated(package, limits),
            versions: None,
            renaming: Renaming::default(),
            keys: Keys::default(),
            passed_over: Keys::default(),
            tensors,
        }
    }

    /// Whether a tensor of the model is called so, be it one that may not be touched.
    fn knows(&self, name: &str) -> bool {
        let name = self.renaming.apply(name);
        name.is_some_and(|name| self.package.position(&name).is_some())
    }

    /// Whether something of this name may be meant for a tensor of the model: it is called so, or a part
    /// of it is, as in `NAME.q` and `NAME::idx`.
    fn may_mean(&self, name: &str) -> bool {
        let mut ends = name.match_indices(['.', ':']);
        self.knows(name) || ends.any(|(end, _)| self.knows(&name[..end]))
    }

    /// Finds the prefix that all entries have and the model has not, or the reverse; true where names
    /// change. Where there is none, those that are unknown will be refused.
    fn rename<'n>(&mut self, names: impl Iterator<Item = &'n str> + Clone) -> bool {
        if names.clone().all(|name| self.knows(name)) {
            return false;
        }
        let tensors = &self.package.weights.tensors;
        let ours = prefixes(tensors.iter().map(|tensor| tensor.name.as_str()));
        let known = |name: &str| self.package.position(name).is_some();
        let Some(renaming) = Renaming::find(names, &ours, known) else {
            return false;
        };
        tracing::debug!(?renaming, "the candidate's names have another prefix");
        self.renaming = renaming;
        true
    }

    /// Leaves out a tensor that the model does not have and whose type cannot be a weight's: whole
    /// updates come with the counters and masks of the modules.
    fn pass_over(&mut self, name: &str) {
        self.passed_over.note(name);
    }

    /// What is to be said of a name that the model does not have.
    fn unknown(name: &str) -> Failure {
        let shown = shorten(name);
        Failure::new(
            Code::CandidateUnknownTensor,
            format!("the model has no trainable tensor {shown:?}"),
        )
        .with("tensor", shown)
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
        let called = self.renaming.apply(name);
        let tensor = called.and_then(|name| self.package.tensor(&name));
        let tensor = tensor.ok_or_else(|| Self::unknown(name))?;
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
        // One tensor may come in pieces; together they cannot be more than it has. Each costs a
        // little, even an empty one.
        self.pieces += 1;
        let most = self.most_pieces;
        if self.pieces > most {
            return Err(too_large(format!(
                "more than {most} tensors, or pieces of them"
            )));
        }
        let known = self.tensors[tensor.index].0.len() as u64;
        if entries > tensor.numel as u64 - known {
            let message = format!(
                "{shown}: {entries} entries after {known} for {} elements",
                tensor.numel
            );
            return Err(too_large(message).with("tensor", shown));
        }
        self.entries = self.entries.saturating_add(entries);
        self.unread = self.unread.saturating_add(entries.saturating_mul(8));
        if self.entries > self.limits.max_entries {
            let most = self.limits.max_entries;
            return Err(too_large(format!(
                "more than candidates.max_entries = {most} entries"
            )));
        }
        Ok(tensor.index)
    }

    /// Accounts for bytes of the body that are about to be inflated: a container can name the same
    /// ones many times, and each time would cost as much.
    ///
    /// # Errors
    /// When they are more than the body has and its entries can need.
    fn read(&mut self, bytes: u64) -> Result<(), Failure> {
        match self.unread.checked_sub(bytes) {
            Some(unread) => {
                self.unread = unread;
                Ok(())
            }
            None => Err(too_large("the same bytes are given for several tensors")),
        }
    }

    /// Accounts for bytes that a stream is about to inflate to.
    ///
    /// # Errors
    /// When the candidate's budget is spent.
    pub fn spend(&mut self, bytes: u64) -> Result<(), Failure> {
        self.inflated = self.inflated.saturating_add(bytes);
        if self.inflated <= self.most_inflated.bytes {
            return Ok(());
        }
        let most = &self.most_inflated.name;
        Err(too_large(format!("inflates to more than {most}")))
    }

    /// Every name by which a candidate may call a tensor.
    fn names(&self) -> impl Iterator<Item = &str> {
        let tensors = self.package.weights.tensors.iter();
        let aliases = self.package.manifest.aliases.iter().flatten();
        let aliases = aliases.map(|(alias, _)| alias.as_str());
        tensors.map(|tensor| tensor.name.as_str()).chain(aliases)
    }

    /// Takes a tensor's entries in the order they were sent: as many values as indices.
    ///
    /// # Errors
    /// An index that is negative or too large, or a value that is not finite.
    pub fn add(
        &mut self,
        name: &str,
        tensor: usize,
        indices: impl ExactSizeIterator<Item = i64> + Clone,
        values: impl ExactSizeIterator<Item = f32>,
    ) -> Result<(), Failure> {
        let numel = self.package.weights.tensors[tensor].numel as u64;
        let (known, steps) = &mut self.tensors[tensor];
        let first = known.len();
        // What does not fit becomes the largest number, which is no index of any tensor.
        let mut largest = 0;
        known.extend(indices.clone().map(|index| {
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            largest = largest.max(index);
            index
        }));
        steps.extend(values);
        let refuse = |code, message: String| {
            let name = shorten(name);
            Err(Failure::new(code, format!("{name}: {message}")).with("tensor", name))
        };
        if u64::from(largest) >= numel {
            let inside = |index: &i64| u64::try_from(*index).is_ok_and(|i| i < numel);
            let index = { indices }.find(|i| !inside(i)).unwrap_or(-1);
            let message = format!("index {index} is not within 0..{numel}");
            return refuse(Code::CandidateIndexOutOfRange, message);
        }
        match steps[first..].iter().position(|value| !value.is_finite()) {
            Some(at) => {
                let message = format!("the value at index {} is not finite", known[first + at]);
                refuse(Code::CandidateNonFinite, message)
            }
            None => Ok(()),
        }
    }

    fn finish(self) -> Result<Update, Failure> {
        if !self.passed_over.is_empty() {
            let tensors = &self.passed_over;
            tracing::info!(%tensors, "passed over: neither integers nor truth values are weights");
        }
        let nothing = self.nothing();
        let mut update = Update {
            tensors: Vec::new(),
            versions: self.versions,
        };
        for (tensor, (mut indices, mut values)) in self.tensors.into_iter().enumerate() {
            if indices.is_empty() {
                continue;
            }
            if !indices.is_sorted_by(|a, b| a < b) {
                let mut entries: Vec<(u32, f32)> = indices.into_iter().zip(values).collect();
                entries.sort_by_key(|(index, _)| *index);
                if let Some(pair) = entries.windows(2).find(|pair| pair[0].0 == pair[1].0) {
                    let name = &self.package.weights.tensors[tensor].name;
                    let message = format!("{name}: index {} is given twice", pair[0].0);
                    return Err(Failure::new(Code::CandidateDuplicateIndex, message)
                        .with("tensor", name.clone()));
                }
                (indices, values) = entries.into_iter().unzip();
            }
            update.tensors.push(TensorUpdate {
                tensor,
                indices,
                values,
            });
        }
        if update.tensors.is_empty() {
            return Err(nothing);
        }
        Ok(update)
    }

    /// What is to be said of a candidate without entries.
    fn nothing(&self) -> Failure {
        let mut message = "the candidate has no entries".to_owned();
        if !self.passed_over.is_empty() {
            let tensors = &self.passed_over;
            message += &format!("; of these the type cannot be a weight's: {tensors}");
        } else if self.pieces == 0 && !self.keys.is_empty() {
            message += &format!(
                "; it has the keys {}, and no tensor is below them",
                self.keys
            );
        }
        Failure::new(Code::CandidateEmpty, message)
    }
}

/// The natural number that a float is, if it is one.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "it has neither a fraction nor a sign, and fits"
)]
fn natural(number: f64) -> Option<u64> {
    const BEYOND: f64 = 18_446_744_073_709_551_616.0;
    let natural = number.fract() == 0.0 && (0.0..BEYOND).contains(&number);
    natural.then_some(number as u64)
}

/// A refusal of bytes that are not of the format at all.
fn not_a(format: &str, bytes: &[u8]) -> Failure {
    malformed(format!("not {format}: {}", file_type::describe(bytes)))
}

fn malformed(message: impl Into<String>) -> Failure {
    Failure::new(Code::CandidateMalformed, message)
}

fn too_large(message: impl Into<String>) -> Failure {
    Failure::new(Code::CandidateTooLarge, message)
}

/// A stranger's name, short enough for a log line.
fn shorten(name: &str) -> String {
    const MOST: usize = 120;
    cut(name, MOST)
}

fn cut(name: &str, most: usize) -> String {
    match name.char_indices().nth(most) {
        None => name.to_owned(),
        Some((end, _)) => format!("{}...", &name[..end]),
    }
}
