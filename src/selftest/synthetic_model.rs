//! A model package with random weights and tokens, generated for benchmarks.

use std::collections::BTreeMap;
use std::path::Path;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use safetensors::tensor::TensorView;

use crate::model::build::{write, write_manifest, write_tensors};
use crate::model::manifest::{
    GraphFile, GraphLocation, Inputs, Manifest, Objective, Outputs, PackageError, ShardFile,
    TensorEntry,
};
use crate::model::onnx::synthetic::{Decoder, decoder};
use crate::model::tensor::Dtype;
use crate::protocol::message::V1;

/// About 100 million parameters.
pub const HUNDRED_MILLION: Decoder = Decoder {
    layers: 12,
    width: 768,
    heads: 12,
    vocabulary: 10_000,
    window: 128,
};

/// About 600 million parameters: more than 2 GB of weights.
pub const SIX_HUNDRED_MILLION: Decoder = Decoder {
    layers: 20,
    width: 1536,
    heads: 12,
    vocabulary: 10_000,
    window: 128,
};

/// Windows of held-out tokens.
const ROWS: usize = 8;

/// Writes the package to an empty directory; the bytes depend only on the model.
///
/// # Errors
/// When the directory cannot be written.
pub fn make(model: Decoder, out: &Path) -> Result<(), PackageError> {
    let mut random = StdRng::seed_from_u64(1);
    let (graph, weights) = decoder(model);
    let graph = write(&out.join("model.onnx"), &graph)?;
    let tensors = weights.into_iter().map(|(name, shape)| {
        let bytes = weight(&name, shape.iter().product(), &mut random);
        (name, shape, bytes)
    });
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = tensors.collect();
    let views = tensors.iter();
    let views = views.map(|(name, shape, bytes)| (&**name, Dtype::F32, &shape[..], &bytes[..]));
    let weights = write_tensors(&out.join("weights.safetensors"), views)?;
    let manifest = Manifest {
        v: V1,
        name: "synthetic".into(),
        version: 1,
        graph: GraphFile {
            file: graph.file,
            sha256: graph.sha256,
            external: None,
        },
        weights: Some(weights),
        inputs: Inputs {
            tokens: Some("tokens".into()),
            ..Inputs::default()
        },
        outputs: Outputs {
            logits: Some("logits".into()),
            ..Outputs::default()
        },
        objective: Objective::causal_lm(model.window),
        tensors: entries(&tensors),
        trainable: None,
        aliases: None,
        precision: Dtype::F32,
        shards: vec![shard(model, out, &mut random)?],
        canary: None,
    };
    write_manifest(out, &manifest)
}

/// Gains near 1 and everything else near 0, so that losses stay finite through all layers.
fn weight(name: &str, numel: usize, random: &mut StdRng) -> Vec<u8> {
    let gains = name.contains("norm") && name.ends_with("weight");
    let centre = f32::from(u8::from(gains));
    let values = (0..numel).map(|_| centre + random.random_range(-0.04_f32..=0.04));
    values.flat_map(f32::to_le_bytes).collect()
}

fn entries(tensors: &[(String, Vec<usize>, Vec<u8>)]) -> BTreeMap<String, TensorEntry> {
    let entry = |(name, shape, _): &(String, Vec<usize>, Vec<u8>)| {
        let place = GraphLocation {
            initializer: name.clone(),
            transposed: false,
        };
        let entry = TensorEntry {
            places: vec![place],
            shape: shape.clone(),
            dtype: Dtype::F32,
        };
        (name.clone(), entry)
    };
    tensors.iter().map(entry).collect()
}

fn shard(model: Decoder, out: &Path, random: &mut StdRng) -> Result<ShardFile, PackageError> {
    let length = model.window + 72;
    let highest = i32::try_from(model.vocabulary).unwrap_or(i32::MAX);
    let tokens: Vec<u8> = (0..ROWS * length)
        .flat_map(|_| random.random_range(0..highest).to_le_bytes())
        .collect();
    let view = TensorView::new(safetensors::Dtype::I32, vec![ROWS, length], &tokens);
    let bytes = view.and_then(|view| safetensors::serialize([("tokens", view)], None));
    let bytes = bytes.map_err(|e| PackageError(format!("tokens: {e}")))?;
    let digest = write(&out.join("shards/shard_000001.safetensors"), &bytes)?;
    Ok(ShardFile {
        id: 1,
        file: format!("shards/{}", digest.file),
        sha256: digest.sha256,
    })
}
