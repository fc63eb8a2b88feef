//! An update in every container that may be sent.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use crate::archive::{torch_zip, zlib, zstd};
use crate::pickle::Pickle;

/// How a job names the only compression there is.
pub const ZSTD: &str = "zstd";

/// The entries of a tensor, as a stranger may say them.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The tensor's name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Indices into the flattened tensor, in any order.
    pub indices: Vec<i64>,
    /// As many values.
    pub values: Vec<f32>,
}

/// How values are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl Width {
    /// The value that is read back.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::F16 => f16::from_f32(value).to_f32(),
            Self::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }

    fn write(self, values: &[f32]) -> Vec<u8> {
        let write = |value: &f32| match self {
            Self::F32 => value.to_le_bytes().to_vec(),
            Self::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
            Self::Bf16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
        };
        values.iter().flat_map(write).collect()
    }
}

/// A way to write an update.
#[derive(Debug, Clone, Copy)]
pub struct Container {
    /// The format and its variety.
    pub kind: Kind,
    /// How the values are written.
    pub width: Width,
    /// Indices of 64 bits, where there is a choice.
    pub long: bool,
    /// `zstd`, as a job names it, or none.
    pub compression: Option<&'static str>,
    /// From and to, where there is a place for it.
    pub versions: (u64, u64),
}

/// Format, and variety of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `binary_v2`: a map from names.
    Map,
    /// `binary_v2`: a list of tensors.
    List,
    /// `safetensors`: indices and values.
    Pairs,
    /// `safetensors`: whole tensors.
    Dense,
    /// `pt_chunks`: tensors of indices and values.
    Chunks,
    /// Every other element of storages twice as long.
    Views,
    /// `pt_chunks`: packed, as bytes.
    Compact,
    /// `pt_chunks`: packed, as base64.
    CompactText,
}

impl Kind {
    /// One of each that can say any indices at all.
    pub const SPARSE: [Self; 7] = [
        Self::Map,
        Self::List,
        Self::Pairs,
        Self::Chunks,
        Self::Views,
        Self::Compact,
        Self::CompactText,
    ];

    fn widths(self) -> &'static [Width] {
        match self {
            Self::Map | Self::List | Self::Compact | Self::CompactText => &[Width::F32, Width::F16],
            Self::Pairs | Self::Dense | Self::Chunks | Self::Views => {
                &[Width::F32, Width::F16, Width::Bf16]
            }
        }
    }
}

impl Container {
    /// Every way to write values of this width, each also compressed.
    pub fn all(kinds: &[Kind], width: Width) -> Vec<Self> {
        let fit = kinds.iter().filter(|kind| kind.widths().contains(&width));
        let ways = fit.flat_map(|kind| {
            [(false, None), (true, Some(ZSTD))].map(|(long, compression)| Self {
                kind: *kind,
                width,
                long,
                compression,
                versions: (6, 7),
            })
        });
        ways.collect()
    }

    /// The format, as a job names it.
    pub fn format(self) -> &'static str {
        match self.kind {
            Kind::Map | Kind::List => "binary_v2",
            Kind::Pairs | Kind::Dense => "safetensors",
            Kind::Chunks | Kind::Views | Kind::Compact | Kind::CompactText => "pt_chunks",
        }
    }

    /// The candidate's bytes.
    pub fn write(self, update: &[Entry]) -> Vec<u8> {
        let bytes = match self.kind {
            Kind::Map => {
                let entries = update.iter().map(|e| (e.name.clone(), self.packed_json(e)));
                let entries: serde_json::Map<_, _> = entries.collect();
                serde_json::to_vec(&entries).expect("JSON")
            }
            Kind::List => {
                let entries = update.iter().map(|e| {
                    let mut entry = self.packed_json(e);
                    entry["name"] = json!(e.name);
                    entry
                });
                serde_json::to_vec(&entries.collect::<Vec<_>>()).expect("JSON")
            }
            Kind::Pairs | Kind::Dense => self.safetensors(update),
            Kind::Chunks | Kind::Views | Kind::Compact | Kind::CompactText => {
                self.pt_chunks(update)
            }
        };
        match self.compression {
            None => bytes,
            Some(_) => zstd(&bytes),
        }
    }

    fn packed_json(self, entry: &Entry) -> serde_json::Value {
        let packed = BASE64.encode(self.packed(entry));
        json!({"shape": entry.shape, "k": entry.indices.len(), "data": packed})
    }

    fn packed(self, entry: &Entry) -> Vec<u8> {
        let mut plain = self.width.write(&entry.values);
        plain.extend(short(&entry.indices));
        zlib(&plain)
    }

    fn safetensors(self, update: &[Entry]) -> Vec<u8> {
        let values = match self.width {
            Width::F32 => Dtype::F32,
            Width::F16 => Dtype::F16,
            Width::Bf16 => Dtype::BF16,
        };
        let indices = if self.long { Dtype::I64 } else { Dtype::I32 };
        let mut tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
        for entry in update {
            let (name, bytes) = (&entry.name, self.width.write(&entry.values));
            if self.kind == Kind::Dense {
                tensors.insert(name.clone(), (values, entry.shape.clone(), bytes));
                continue;
            }
            let k = vec![entry.indices.len()];
            let at = match self.long {
                true => long(&entry.indices),
                false => short(&entry.indices),
            };
            tensors.insert(format!("{name}::indices"), (indices, k.clone(), at));
            tensors.insert(format!("{name}::values"), (values, k, bytes));
        }
        let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
            let view = TensorView::new(*dtype, shape.clone(), bytes).expect("as many bytes");
            (name, view)
        });
        let metadata = [("made_by".to_owned(), "a test".to_owned())];
        safetensors::serialize(views, Some(metadata.into())).expect("tensors")
    }

    fn pt_chunks(self, update: &[Entry]) -> Vec<u8> {
        let (mut pickle, mut storages) = (Pickle::new(), Vec::new());
        pickle.op(b"}(");
        let (old, new) = self.versions;
        for (key, version) in [("old_version", old), ("new_version", new)] {
            pickle.text(key);
            pickle.number(i64::try_from(version).expect("a small number"));
        }
        pickle.text("chunks");
        pickle.op(b"](");
        for entry in update {
            pickle.op(b"}(");
            pickle.text("name");
            pickle.text(&entry.name);
            pickle.text("shape");
            pickle.op(b"(");
            for size in &entry.shape {
                pickle.number(i64::try_from(*size).expect("a small tensor"));
            }
            pickle.op(b"t");
            match self.kind {
                Kind::Chunks | Kind::Views => self.tensors(entry, &mut pickle, &mut storages),
                Kind::Compact
                | Kind::CompactText
                | Kind::Map
                | Kind::List
                | Kind::Pairs
                | Kind::Dense => self.compact(entry, &mut pickle),
            }
            pickle.op(b"u");
        }
        pickle.op(b"eu.");
        torch_zip(pickle.0, storages)
    }

    fn compact(self, entry: &Entry, pickle: &mut Pickle) {
        pickle.text("k");
        pickle.number(i64::try_from(entry.indices.len()).expect("a small tensor"));
        pickle.text("data");
        let packed = self.packed(entry);
        if self.kind == Kind::CompactText {
            pickle.text(&BASE64.encode(packed));
            return;
        }
        // Bytes, as protocol 2 has to write them.
        pickle.op(b"c_codecs\nencode\n");
        pickle.text(&packed.iter().copied().map(char::from).collect::<String>());
        pickle.text("latin1");
        pickle.op(&[0x86, b'R']);
    }

    fn tensors(self, entry: &Entry, pickle: &mut Pickle, storages: &mut Vec<Vec<u8>>) {
        let (index, indices, size) = match self.long {
            true => ("Long", long(&entry.indices), 8),
            false => ("Int", short(&entry.indices), 4),
        };
        let (value, width) = match self.width {
            Width::F32 => ("Float", 4),
            Width::F16 => ("Half", 2),
            Width::Bf16 => ("BFloat16", 2),
        };
        let values = self.width.write(&entry.values);
        let k = i64::try_from(entry.indices.len()).expect("a small tensor");
        let stride = if self.kind == Kind::Views { 2 } else { 1 };
        for (field, storage, bytes, size) in [
            ("indices", index, indices, size),
            ("values", value, values, width),
        ] {
            pickle.text(field);
            pickle.tensor(storage, storages.len(), stride * k, k, stride);
            let spread = |element: &[u8]| {
                let mut spread = element.to_vec();
                spread.resize(
                    element.len() * usize::try_from(stride).expect("1 or 2"),
                    0xff,
                );
                spread
            };
            storages.push(bytes.chunks(size).flat_map(spread).collect());
        }
    }
}

fn short(indices: &[i64]) -> Vec<u8> {
    let short = |i: &i64| i32::try_from(*i).expect("a small index").to_le_bytes();
    indices.iter().flat_map(short).collect()
}

fn long(indices: &[i64]) -> Vec<u8> {
    indices.iter().flat_map(|i| i.to_le_bytes()).collect()
}
