//! Parsing held-out data: a safetensors file with tokens, or with a tensor for each input of the
//! graph.

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use crate::util::file_type;

use crate::model::manifest::{Objective, PackageError};
use crate::model::plan::{Column, Data, Shard};
use crate::model::tensor::Elem;

/// Parses a shard for the objective.
///
/// # Errors
/// Names the file, the tensor and what is wrong with it.
pub(super) fn parse_shard(
    id: u64,
    file: &str,
    bytes: &[u8],
    objective: Objective,
) -> Result<Shard, PackageError> {
    let broken = |problem: String| PackageError(format!("{file}: {problem}"));
    let tensors = SafeTensors::deserialize(bytes).map_err(|e| {
        broken(format!(
            "not safetensors: {}: {e}",
            file_type::describe(bytes)
        ))
    })?;
    let data = match objective {
        Objective::CausalLm { .. } => {
            let view = tensors
                .tensor("tokens")
                .map_err(|_| broken("has no tensor \"tokens\"".into()))?;
            tokens(&view).map_err(broken)?
        }
        Objective::GraphLoss {} => examples(&tensors).map_err(broken)?,
    };
    Ok(Shard { id, data })
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "a foreign enum: no other type holds tokens"
)]
fn tokens(view: &TensorView<'_>) -> Result<Data, String> {
    let row_length = match view.shape() {
        [n] | [_, n] => *n,
        shape => {
            return Err(format!(
                "\"tokens\" has shape {shape:?}, [n] or [rows, n] is needed"
            ));
        }
    };
    let tokens: Result<Vec<i32>, _> = match view.dtype() {
        safetensors::Dtype::I32 => {
            let tokens = view.data().as_chunks().0.iter();
            Ok(tokens.map(|b| i32::from_le_bytes(*b)).collect())
        }
        safetensors::Dtype::I64 => {
            let tokens = view.data().as_chunks().0.iter();
            tokens
                .map(|b| i32::try_from(i64::from_le_bytes(*b)))
                .collect()
        }
        dtype => {
            return Err(format!("\"tokens\" is {dtype:?}, I32 or I64 is needed"));
        }
    };
    let tokens = tokens.map_err(|_| "a token does not fit 32 bits".to_owned())?;
    Ok(Data::Tokens { row_length, tokens })
}

fn examples(tensors: &SafeTensors<'_>) -> Result<Data, String> {
    let mut columns = Vec::new();
    for (name, view) in tensors.iter() {
        let Some((rows, shape)) = view.shape().split_first() else {
            return Err(format!("{name} is a scalar, [rows, ...] is needed"));
        };
        let elem = Elem::of_stored(view.dtype())
            .ok_or_else(|| format!("{name} is {:?}, which no input takes", view.dtype()))?;
        let column = Column {
            name: name.to_owned(),
            elem,
            shape: shape.to_vec(),
            bytes: view.data().to_vec(),
        };
        if *rows == 0 || column.rows() != *rows {
            return Err(format!("{name} has no rows or empty ones"));
        }
        columns.push(column);
    }
    columns.sort_by(|a, b| a.name.cmp(&b.name));
    let Some(first) = columns.first() else {
        return Err("holds no tensors".into());
    };
    match columns.iter().find(|c| c.rows() != first.rows()) {
        Some(other) => Err(format!(
            "{} has {} rows and {} has {}",
            first.name,
            first.rows(),
            other.name,
            other.rows()
        )),
        None => Ok(Data::Examples(columns)),
    }
}
