//! One update under construction: collects entries from a format's reader and enforces every limit
//! and check that the formats share.

use super::keys::Keys;
use super::{DecodeLimits, TensorUpdate, Update, Versions, shorten, too_large};
use crate::model::package::Package;
use crate::model::prefix::{Renaming, prefixes};
use crate::protocol::failure::{Code, Failure};

/// Pieces that all tensors may come in: this many, plus `PIECES` per name of the model.
const MOST_PIECES: u64 = 1000;
const PIECES: u64 = 8;

/// An update under construction.
#[derive(Debug, Clone)]
pub(super) struct UpdateBuilder<'a> {
    package: &'a Package,
    limits: DecodeLimits,
    entries: u64,
    pieces: u64,
    pub(super) most_pieces: u64,
    /// Bytes of the body that readers may still inflate.
    pub(super) unread: u64,
    pub(super) inflated: u64,
    pub(super) most_inflated: Bound,
    pub(super) versions: Option<Versions>,
    /// Maps the candidate's names to the model's.
    renaming: Renaming,
    /// Keys of the container, for the message if none is an entry.
    pub(super) keys: Keys,
    /// Ignored tensors of integer types.
    passed_over: Keys,
    tensors: Vec<(Vec<u32>, Vec<f32>)>,
}

/// A limit in bytes, and its origin for messages.
#[derive(Debug, Clone)]
pub(super) struct Bound {
    pub(super) bytes: u64,
    pub(super) name: String,
}

impl Bound {
    /// The limit for all streams of a candidate together. No format needs more than a few words per
    /// weight, even if it compresses twice.
    fn of_inflated(package: &Package, limits: DecodeLimits) -> Self {
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

impl<'a> UpdateBuilder<'a> {
    pub(super) fn new(package: &'a Package, limits: DecodeLimits) -> Self {
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

    /// Whether the model has a tensor of this name, trainable or not.
    pub(super) fn knows(&self, name: &str) -> bool {
        let name = self.renaming.apply(name);
        name.is_some_and(|name| self.package.position(&name).is_some())
    }

    /// Whether this name may refer to a tensor of the model, directly or as a part such as `NAME.q` and
    /// `NAME::idx`.
    pub(super) fn may_mean(&self, name: &str) -> bool {
        let mut ends = name.match_indices(['.', ':']);
        self.knows(name) || ends.any(|(end, _)| self.knows(&name[..end]))
    }

    /// Looks for a prefix that only the candidate's names have, or only the model's; true if it renames.
    /// Without one, unknown names are refused later.
    pub(super) fn rename<'n>(&mut self, names: impl Iterator<Item = &'n str> + Clone) -> bool {
        if names.clone().all(|name| self.knows(name)) {
            return false;
        }
        let tensors = &self.package.weights.tensors;
        let ours = prefixes(tensors.iter().map(|tensor| tensor.name.as_str()));
        let known = |name: &str| self.package.position(name).is_some();
        let Some(renaming) = Renaming::find(names, &ours, known) else {
            return false;
        };
        tracing::debug!(?renaming, "the candidate's names have a different prefix");
        self.renaming = renaming;
        true
    }

    /// Ignores an unknown tensor of an integer type: full updates include counters and masks of modules.
    pub(super) fn pass_over(&mut self, name: &str) {
        self.passed_over.note(name);
    }

    /// The failure for a name that the model does not have.
    pub(super) fn unknown(name: &str) -> Failure {
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
    pub(super) fn declare(
        &mut self,
        name: &str,
        shape: Option<&[u64]>,
        entries: u64,
    ) -> Result<usize, Failure> {
        let shown = shorten(name);
        let called = self.renaming.apply(name);
        let tensor = called.and_then(|name| self.package.tensor(&name));
        let tensor = tensor.ok_or_else(|| Self::unknown(name))?;
        let sizes = tensor.shape.iter().map(|d| *d as u64);
        if let Some(shape) = shape.filter(|shape| !shape.iter().copied().eq(sizes.clone())) {
            let message = format!(
                "{shown}: the candidate says shape {shape:?}, the model has {:?}",
                tensor.shape
            );
            return Err(Failure::new(Code::CandidateShapeMismatch, message).with("tensor", shown));
        }
        // A tensor may come in pieces with no more entries than it has. Even an empty piece costs a
        // little, so their number is limited.
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

    /// Accounts for bytes of the body about to be inflated. A container can refer to the same bytes many
    /// times, at full cost each time.
    ///
    /// # Errors
    /// When they exceed the body and what its entries can need.
    pub(super) fn read(&mut self, bytes: u64) -> Result<(), Failure> {
        let unread = self.unread.checked_sub(bytes);
        let overread = || too_large("several tensors refer to the same bytes");
        self.unread = unread.ok_or_else(overread)?;
        Ok(())
    }

    /// Accounts for inflated bytes that a stream is about to produce.
    ///
    /// # Errors
    /// When the candidate's budget is spent.
    pub(super) fn spend(&mut self, bytes: u64) -> Result<(), Failure> {
        self.inflated = self.inflated.saturating_add(bytes);
        if self.inflated <= self.most_inflated.bytes {
            return Ok(());
        }
        let most = &self.most_inflated.name;
        Err(too_large(format!("inflates to more than {most}")))
    }

    /// Every name of a tensor, aliases included.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        let tensors = self.package.weights.tensors.iter();
        let aliases = self.package.manifest.aliases.iter().flatten();
        let aliases = aliases.map(|(alias, _)| alias.as_str());
        tensors.map(|tensor| tensor.name.as_str()).chain(aliases)
    }

    /// Adds entries of a tensor in the order sent, one value per index.
    ///
    /// # Errors
    /// An index that is negative or too large, or a value that is not finite.
    pub(super) fn add(
        &mut self,
        name: &str,
        tensor: usize,
        indices: impl ExactSizeIterator<Item = i64> + Clone,
        values: impl ExactSizeIterator<Item = f32>,
    ) -> Result<(), Failure> {
        let numel = self.package.weights.tensors[tensor].numel as u64;
        let (known, steps) = &mut self.tensors[tensor];
        let first = known.len();
        // An index that does not fit becomes u32::MAX, which is out of range for every tensor.
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

    pub(super) fn finish(self) -> Result<Update, Failure> {
        if !self.passed_over.is_empty() {
            let tensors = &self.passed_over;
            tracing::info!(%tensors, "ignored tensors: integers and booleans cannot be weights");
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

    /// The failure for a candidate without entries.
    fn nothing(&self) -> Failure {
        let mut message = "the candidate has no entries".to_owned();
        if !self.passed_over.is_empty() {
            let tensors = &self.passed_over;
            message += &format!("; of these the type cannot be a weight's: {tensors}");
        } else if self.pieces == 0 && !self.keys.is_empty() {
            let keys = &self.keys;
            message += &format!("; it has the keys {keys}, and no tensor is below them");
        }
        Failure::new(Code::CandidateEmpty, message)
    }
}
