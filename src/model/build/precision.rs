//! By default, exporters turn a 16-bit checkpoint into a 32-bit graph. Every f16 and bf16 is
//! exactly an f32, so such a tensor is packaged as the f32 that the graph holds. Nothing is ever
//! rounded: a tensor that the graph holds in fewer bits, or with other values, is refused with that
//! reason.

use crate::model::checkpoint::Tensor;
use crate::model::compare::{Initializer, Layout, agrees, is_named, is_uniform};
use crate::model::manifest::PackageError;
use crate::model::onnx::{InitializerInfo, InputInfo};
use crate::model::tensor::{Dtype, Elem};
use crate::model::weights_file::widen;

/// Widens each 16-bit tensor that the graph holds in 32 bits.
///
/// # Errors
/// Names a tensor that the graph holds in both types.
pub(super) fn as_in_graph(
    checkpoint: Vec<Tensor>,
    held: &[Initializer],
    fed: &[InputInfo],
) -> Result<Vec<Tensor>, PackageError> {
    let fit = |tensor: Tensor| match tensor.dtype {
        Dtype::F32 => Ok(tensor),
        Dtype::F16 | Dtype::Bf16 => fit(tensor, held, fed),
    };
    checkpoint.into_iter().map(fit).collect()
}

fn fit(tensor: Tensor, held: &[Initializer], fed: &[InputInfo]) -> Result<Tensor, PackageError> {
    let in_type = |dtype: Dtype| {
        let holds = move |held: &&Initializer| held.0.dtype == Some(dtype);
        held.iter().filter(holds)
    };
    let exact = |held: &&Initializer| agrees(&tensor, held, Dtype::F32).is_some();
    let named = |held: &&Initializer| held.0.name == tensor.name;
    let mut own = in_type(tensor.dtype).filter(exact);
    let mut wide = in_type(Dtype::F32).filter(exact);
    let (own, wide) = if is_uniform(&tensor) {
        // Many tensors have such contents, so an initializer of this name takes precedence.
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
            tensor.dtype.stored(),
            own.name,
            wide.name
        ))),
        (None, Some(held)) => Ok(widened(&tensor, Some(held))),
        (None, None) if is_fed_as_f32(&tensor, fed) => Ok(widened(&tensor, None)),
        (Some(_) | None, None) => Ok(tensor),
    }
}

/// Widens a tensor, sharing the graph's bytes if they are the same.
fn widened(tensor: &Tensor, held: Option<&Initializer>) -> Tensor {
    let shared = held.filter(|held| agrees(tensor, held, Dtype::F32) == Some(Layout::AsIs));
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

/// Why the graph does not hold a tensor, if that is because of its type.
pub(super) fn reason(
    tensor: &Tensor,
    all: &[InitializerInfo],
    held: &[Initializer],
) -> Option<String> {
    let fits = |info: &InitializerInfo| {
        let flipped = matches!(*tensor.shape, [rows, columns] if info.shape == [columns, rows]);
        info.dtype != Some(tensor.dtype) && (info.shape == tensor.shape || flipped)
    };
    let named = all
        .iter()
        .find(|i| fits(i) && is_named(&i.name, &tensor.name));
    // Uniform contents match many initializers.
    let alike = |held: &&Initializer| {
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
    let ours = tensor.dtype.stored();
    Some(match info.dtype {
        None => format!(
            "{name} {what}, but not F32, F16 or BF16 in the graph, as a weight must be; export the model in one of these"
        ),
        Some(Dtype::F32) => format!(
            "{name} {what}, but F32 in the graph and {ours} in the checkpoint, and its values are not those of the checkpoint; \
             export the model after its weights were rounded (load the checkpoint, then export), or give the checkpoint in F32"
        ),
        Some(dtype @ (Dtype::F16 | Dtype::Bf16)) => {
            let theirs = dtype.stored();
            format!(
                "{name} {what}, but {theirs} in the graph and {ours} in the checkpoint, which would have to be rounded; \
                 give the checkpoint in {theirs}, or export the model in {ours}"
            )
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::weights::round_to;
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
    fn held(name: &str, dtype: Dtype, rounded: Dtype, values: &[f32]) -> Initializer {
        let values: Vec<f32> = values.iter().map(|v| round_to(rounded, *v)).collect();
        let Tensor {
            name, shape, bytes, ..
        } = tensor(name, dtype, &values);
        let dtype = Some(dtype);
        (InitializerInfo { name, shape, dtype }, bytes)
    }

    fn flipped(name: &str, rounded: Dtype) -> Initializer {
        let mut flipped = held(name, Dtype::F32, rounded, &FLIPPED.map(|at| VALUES[at]));
        flipped.0.shape.reverse();
        flipped
    }

    fn fitted(tensor: &Tensor, held: &[Initializer]) -> Tensor {
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
                    theirs.stored(),
                    ours.stored()
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
