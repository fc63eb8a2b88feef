//! Whether an initializer of a graph holds a tensor of a checkpoint: as it is, transposed, rounded or
//! scaled.

use bytes::Bytes;

use super::checkpoint::Tensor;
use super::onnx::InitializerInfo;
use super::tensor::Dtype;
use super::weights::{read_element, round_to};

pub(super) type Initializer = (InitializerInfo, Bytes);

/// How an initializer stores a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    AsIs,
    Transposed,
}

/// Whether an initializer holds the tensor's values if both are rounded to this type, and in which
/// layout.
pub(super) fn agrees(
    tensor: &Tensor,
    (info, bytes): &Initializer,
    rounded: Dtype,
) -> Option<Layout> {
    let dtype = info.dtype?;
    let numel = tensor.bytes.len() / tensor.dtype.size();
    if bytes.len() != numel * dtype.size() {
        return None;
    }
    let equal = |held: usize, own: usize| {
        let held = round_to(rounded, read_element(bytes, dtype, held));
        let own = round_to(rounded, read_element(&tensor.bytes, tensor.dtype, own));
        held.to_bits() == own.to_bits()
    };
    if info.shape == tensor.shape && (0..numel).all(|at| equal(at, at)) {
        return Some(Layout::AsIs);
    }
    let [rows, columns] = *tensor.shape.as_slice() else {
        return None;
    };
    let flipped = |at: usize| (at % rows) * columns + at / rows;
    let is_flipped = info.shape == [columns, rows] && (0..numel).all(|at| equal(at, flipped(at)));
    is_flipped.then_some(Layout::Transposed)
}

/// Whether a matrix of the graph is a multiple of this one, up to rounding: exporters fold scaled
/// heads, and casts to a smaller type.
pub(super) fn is_multiple(tensor: &Tensor, (info, bytes): &Initializer) -> bool {
    /// Smaller matrices may be proportional by chance.
    const FEWEST: usize = 8;
    let ([rows, columns], Some(dtype)) = (&*tensor.shape, info.dtype) else {
        return false;
    };
    let numel = rows * columns;
    if numel < FEWEST || bytes.len() != numel * dtype.size() {
        return false;
    }
    // Relative to each entry, and to the largest one: subnormal halves have fewer bits.
    let (rounding, floor) = match dtype {
        Dtype::F32 => (1e-5, 1e-7),
        Dtype::F16 => (1e-3, 1e-5),
        Dtype::Bf16 => (8e-3, 1e-7),
    };
    let own = |at: usize| read_element(&tensor.bytes, tensor.dtype, at);
    let held = |at: usize| read_element(bytes, dtype, at);
    let largest = (0..numel).max_by(|a, b| own(*a).abs().total_cmp(&own(*b).abs()));
    let largest = largest.unwrap_or(0);
    let flipped = |at: usize| (at % columns) * rows + at / columns;
    let proportional = |place: &dyn Fn(usize) -> usize| {
        let factor = held(place(largest)) / own(largest);
        let least = (factor * own(largest)).abs() * floor;
        let fits = |at| {
            let made = factor * own(at);
            (held(place(at)) - made).abs() <= made.abs() * rounding + least
        };
        factor.is_finite() && factor != 0.0 && (0..numel).all(fits)
    };
    (info.shape == [*rows, *columns] && proportional(&|at| at))
        || (info.shape == [*columns, *rows] && proportional(&flipped))
}

/// Whether two names are equal up to a prefix of one of them.
pub(super) fn is_named(a: &str, b: &str) -> bool {
    let ends = |long: &str, short: &str| {
        let before = long.strip_suffix(short);
        before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
    };
    ends(a, b) || ends(b, a)
}

pub(super) fn is_uniform(tensor: &Tensor) -> bool {
    let mut elements = tensor.bytes.chunks_exact(tensor.dtype.size());
    let first = elements.next();
    elements.all(|e| Some(e) == first)
}
