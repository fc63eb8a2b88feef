//! Exporters make a graph in 32 bits of a checkpoint in 16 unless they are told otherwise. Every f16
//! and bf16 is an f32, so such a tensor has its place, as the f32 that the graph holds. Nothing is
//! ever rounded: what the graph has in fewer bits, or with other values, is refused with that reason.

use bytes::Bytes;

use super::super::weights::{read_element, round_to};
use super::Tensor;
use super::place::is_uniform;
use crate::model::checkpoint::{stored_type, widen};
use crate::model::manifest::PackageError;
use crate::model::onnx::{InitializerInfo, InputInfo};
use crate::model::tensor::Dtype;
use crate::model::tensor::Elem;

pub(in crate::model) type Held = (InitializerInfo, Bytes);

/// Gives each 16-bit tensor the type in which the graph holds it.
///
/// # Errors
/// Names the tensor that the graph holds in both.
pub(super) fn as_in_graph(
    checkpoint: Vec<Tensor>,
    held: &[Held],
    fed: &[InputInfo],
) -> Result<Vec<Tensor>, PackageError> {
    let fit = |tensor: Tensor| match tensor.dtype {
        Dtype::F32 => Ok(tensor),
        Dtype::F16 | Dtype::Bf16 => fit(tensor, held, fed),
    };
    checkpoint.into_iter().map(fit).collect()
}

fn fit(tensor: Tensor, held: &[Held], fed: &[InputInfo]) -> Result<Tensor, PackageError> {
    let in_type = |dtype: Dtype| {
        let holds = move |held: &&Held| held.0.dtype == Some(dtype);
        held.iter().filter(holds)
    };
    let exact = |held: &&Held| agrees(&tensor, held, Dtype::F32).is_some();
    let named = |held: &&Held| held.0.name == tensor.name;
    let mut own = in_type(tensor.dtype).filter(exact);
    let mut wide = in_type(Dtype::F32).filter(exact);
    let (own, wide) = if is_uniform(&tensor) {
        // Many tensors hold such contents; the one of this name says more than all others.
        match (own.clone().find(named), wide.clone().find(named)) {
            (None, None) => match own.next() {
                Some(own) => (Some(own), None),
                None => (None, wide.next()),
            },
            by_name => by_name,
        }
    } else {
        (own.next(), wide.next())
    };
    match (own, wide) {
        (Some((own, _)), Some((wide, _))) => Err(PackageError(format!(
            "{} is in the graph twice, as {} ({}) and as F32 ({}), and would be patched in one type \
             only; export the model in one type (PyTorch: model.float())",
            tensor.name,
            stored_type(tensor.dtype),
            own.name,
            wide.name
        ))),
        (None, Some(held)) => Ok(widened(&tensor, Some(held))),
        (None, None) if is_fed_as_f32(&tensor, fed) => Ok(widened(&tensor, None)),
        (Some(_) | None, None) => Ok(tensor),
    }
}

/// Widens a tensor; where the graph holds the same bytes already, it shares them.
fn widened(tensor: &Tensor, held: Option<&Held>) -> Tensor {
    let shared = held.filter(|held| agrees(tensor, held, Dtype::F32) == Some(Order::AsIs));
    Tensor {
        name: tensor.name.clone(),
        shape: tensor.shape.clone(),
        dtype: Dtype::F32,
        bytes: shared.map_or_else(
            || widen(&tensor.bytes, tensor.dtype).into(),
            |(_, bytes)| bytes.clone(),
        ),
    }
}

fn is_fed_as_f32(tensor: &Tensor, fed: &[InputInfo]) -> bool {
    let shape = || tensor.shape.iter().copied().map(Some);
    fed.iter().any(|input| {
        input.name == tensor.name
            && input.elem == Some(Elem::F32)
            && input.shape.iter().copied().eq(shape())
    })
}

/// How an initializer holds a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::model) enum Order {
    AsIs,
    Transposed,
}

/// Whether an initializer holds the tensor's values once both are rounded to this type, and how.
pub(in crate::model) fn agrees(
    tensor: &Tensor,
    (info, bytes): &Held,
    rounded: Dtype,
) -> Option<Order> {
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
        return Some(Order::AsIs);
    }
    let [rows, columns] = *tensor.shape.as_slice() else {
        return None;
    };
    let flipped = |at: usize| (at % rows) * columns + at / rows;
    let is_flipped = info.shape == [columns, rows] && (0..numel).all(|at| equal(at, flipped(at)));
    is_flipped.then_some(Order::Transposed)
}

/// Whether a matrix of the graph is this one times a number, but for rounding: what exporters fold of a
/// scaled head, or cast to a smaller type.
pub(super) fn is_multiple(tensor: &Tensor, (info, bytes): &Held) -> bool {
    /// Fewer entries may be proportional by chance.
    const FEWEST: usize = 8;
    let ([rows, columns], Some(dtype)) = (&*tensor.shape, info.dtype) else {
        return false;
    };
    let numel = rows * columns;
    if numel < FEWEST || bytes.len() != numel * dtype.size() {
        return false;
    }
    // Of each entry, and of the largest one: small halves have fewer bits.
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

/// Why a tensor has no place, if that is because of its type.
pub(super) fn reason(tensor: &Tensor, all: &[InitializerInfo], held: &[Held]) -> Option<String> {
    let fits = |info: &InitializerInfo| {
        let flipped = matches!(*tensor.shape, [rows, columns] if info.shape == [columns, rows]);
        info.dtype != Some(tensor.dtype) && (info.shape == tensor.shape || flipped)
    };
    let named = all
        .iter()
        .find(|i| fits(i) && is_named(&i.name, &tensor.name));
    // What has one value throughout is like many others.
    let alike = |held: &&Held| {
        if is_uniform(tensor) {
            return false;
        }
        let narrower = held.0.dtype.filter(|_| tensor.dtype == Dtype::F32);
        fits(&held.0) && agrees(tensor, held, narrower.unwrap_or(tensor.dtype)).is_some()
    };
    let (info, what) = match named {
        Some(info) => (info, "is of this name and shape"),
        None => (&held.iter().find(alike)?.0, "holds it, but for its type"),
    };
    let name = &info.name;
    let ours = stored_type(tensor.dtype);
    Some(match info.dtype {
        None => format!(
            "{name} {what}, but not F32, F16 or BF16 in the graph, as a weight must be; export the model in one of these"
        ),
        Some(Dtype::F32) => format!(
            "{name} {what}, but F32 in the graph and {ours} in the checkpoint, and its values are not those of the checkpoint; \
             export the model after its weights were rounded (load the checkpoint, then export), or give the checkpoint in F32"
        ),
        Some(dtype @ (Dtype::F16 | Dtype::Bf16)) => {
            let theirs = stored_type(dtype);
            format!(
                "{name} {what}, but {theirs} in the graph and {ours} in the checkpoint, which would have to be rounded; \
                 give the checkpoint in {theirs}, or export the model in {ours}"
            )
        }
    })
}

/// Whether two names are equal but for what a wrapper puts before one of them.
pub(in crate::model) fn is_named(a: &str, b: &str) -> bool {
    let ends = |long: &str, short: &str| {
        let before = long.strip_suffix(short);
        before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
    };
    ends(a, b) || ends(b, a)
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    const VALUES: [f32; 6] = [0.1, -2.5, 3.0e-7, 65_000.0, 0.333, 7.0];
    const FLIPPED: [usize; 6] = [0, 3, 1, 4, 2, 5];

    fn tensor(name: &str, dtype: Dtype, values: &[f32]) -> Tensor {
        let bytes = values.iter().flat_map(|value| match dtype {
            Dtype::F32 => value.to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
            Dtype::Bf16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
        });
        Tensor {
            name: name.into(),
            shape: vec![2, 3],
            dtype,
            bytes: bytes.collect(),
        }
    }

    /// An initializer with these values, rounded to `rounded` first.
    fn held(name: &str, dtype: Dtype, rounded: Dtype, values: &[f32]) -> Held {
        let values: Vec<f32> = values.iter().map(|v| round_to(rounded, *v)).collect();
        let Tensor {
            name, shape, bytes, ..
        } = tensor(name, dtype, &values);
        let dtype = Some(dtype);
        (InitializerInfo { name, shape, dtype }, bytes)
    }

    fn flipped(name: &str, rounded: Dtype) -> Held {
        let mut flipped = held(name, Dtype::F32, rounded, &FLIPPED.map(|at| VALUES[at]));
        flipped.0.shape.reverse();
        flipped
    }

    fn fitted(tensor: &Tensor, held: &[Held]) -> Tensor {
        as_in_graph(vec![tensor.clone()], held, &[])
            .unwrap()
            .remove(0)
    }

    #[test]
    fn a_16_bit_tensor_has_the_type_in_which_the_graph_holds_it() {
        for dtype in [Dtype::F16, Dtype::Bf16] {
            let narrow = tensor("w", dtype, &VALUES);
            let wide = tensor("w", Dtype::F32, &VALUES.map(|v| round_to(dtype, v)));
            let other = held("other", Dtype::F32, dtype, &[1.0; 6]);
            let as_is = held("val_7", Dtype::F32, dtype, &VALUES);
            let fit = fitted(&narrow, &[other.clone(), as_is.clone()]);
            assert_eq!(fit, wide);
            assert_eq!(fit.bytes.as_ptr(), as_is.1.as_ptr(), "copied");
            assert_eq!(fitted(&narrow, &[flipped("val_7", dtype)]), wide);
            let own = held("w", dtype, dtype, &VALUES);
            assert_eq!(fitted(&narrow, std::slice::from_ref(&own)), narrow);
            // As it was before it was rounded: nothing holds it.
            assert_eq!(
                fitted(&narrow, &[held("w", Dtype::F32, Dtype::F32, &VALUES)]),
                narrow
            );
            assert_eq!(fitted(&wide, std::slice::from_ref(&own)), wide);
            let twice = as_in_graph(vec![narrow], &[own, as_is], &[]).unwrap_err().0;
            assert!(
                twice.contains("w is in the graph twice") && twice.contains("val_7"),
                "{twice}"
            );
        }
    }

    #[test]
    fn of_equal_contents_the_name_tells_the_type() {
        let norm = tensor("norm", Dtype::F16, &[1.0; 6]);
        let of_another = held("other", Dtype::F16, Dtype::F16, &[1.0; 6]);
        let own = held("norm", Dtype::F32, Dtype::F32, &[1.0; 6]);
        assert_eq!(
            fitted(&norm, &[of_another.clone(), own.clone()]).dtype,
            Dtype::F32
        );
        assert_eq!(fitted(&norm, &[of_another]), norm);
        let nameless = held("val_1", Dtype::F32, Dtype::F32, &[1.0; 6]);
        assert_eq!(fitted(&norm, &[nameless]).dtype, Dtype::F32);
    }

    #[test]
    fn a_weight_that_is_fed_has_the_type_of_its_input() {
        let narrow = tensor("w", Dtype::F16, &VALUES);
        for (elem, shape, expected) in [
            (Some(Elem::F32), [Some(2), Some(3)], Dtype::F32),
            (Some(Elem::F16), [Some(2), Some(3)], Dtype::F16),
            (Some(Elem::F32), [Some(3), Some(2)], Dtype::F16),
        ] {
            let name = "w".to_owned();
            let fed = [InputInfo {
                name,
                elem,
                shape: shape.to_vec(),
            }];
            let fit = as_in_graph(vec![narrow.clone()], &[], &fed).unwrap();
            assert_eq!(fit[0].dtype, expected);
        }
    }

    #[test]
    fn every_pair_of_types_is_placed_or_refused_for_its_type() {
        let types = [Dtype::F32, Dtype::F16, Dtype::Bf16];
        for (ours, theirs) in types.iter().flat_map(|a| types.map(|b| (*a, b))) {
            let narrow = tensor("w", ours, &VALUES);
            for (name, said) in [("m.w", "is of this name and shape"), ("val_1", "holds it")] {
                let graph = [held(name, theirs, Dtype::F32, &VALUES)];
                let why = reason(&narrow, &[graph[0].0.clone()], &graph);
                if ours == theirs {
                    assert_eq!(why, None);
                    continue;
                }
                let types = format!(
                    "but {} in the graph and {} in the checkpoint",
                    stored_type(theirs),
                    stored_type(ours)
                );
                // Two kinds of 16 bits have nothing in common but the name.
                let nameless = why.is_none() && name == "val_1" && ours != Dtype::F32;
                let why = why.unwrap_or_default();
                assert!(
                    nameless || (why.contains(said) && why.contains(&types)),
                    "{why}"
                );
            }
        }
        let double = InitializerInfo {
            name: "w".into(),
            shape: vec![3, 2],
            dtype: None,
        };
        let why = reason(&tensor("w", Dtype::F32, &VALUES), &[double], &[]).unwrap();
        assert!(why.contains("not F32, F16 or BF16 in the graph"), "{why}");
    }
}
