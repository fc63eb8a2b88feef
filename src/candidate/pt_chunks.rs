//! Format `pt_chunks`: what `torch.save` makes of `{"old_version", "new_version", "chunks": [...]}`, a
//! zip of stored entries. A chunk is `{name, indices, values, shape}` with tensors of one dimension,
//! or compact, `{name, k, data}`, data being [`packed`](super::packed) bytes or their base64. The
//! [`pickle`] in it is read, never executed.

mod pickle;

use std::collections::HashMap;

use half::{bf16, f16};
use rawzip::{CompressionMethod, ZipArchive, ZipSliceArchive};

use super::packed::{Packed, Unpacker};
use super::{Gathered, MOST_DIMENSIONS, Versions, malformed, shorten, too_large};
use crate::failure::Failure;
use pickle::{Element, Id, Pickle, Problem, Tensor, Value};

/// What a file may have whatever the model: the pickle's frame, a few remarks.
const OF_THE_WHOLE: u64 = 1000;
/// Steps of the pickle, and entries of the archive, for each tensor of the model: a chunk takes about
/// sixty and two, and a tensor may come in several.
const STEPS: u64 = 1000;
const ENTRIES: u64 = 32;
/// Fields of a chunk. One chunk can be said many times, and is searched each time.
const MOST_FIELDS: usize = 64;

/// Reads the container.
///
/// # Errors
/// The first thing that is wrong.
pub(super) fn decode(bytes: &[u8], gathered: &mut Gathered<'_>) -> Result<(), Failure> {
    let tensors = gathered.names().count() as u64;
    let zip = ZipArchive::from_slice(bytes).map_err(no_zip)?;
    let archive = Archive::read(&zip, OF_THE_WHOLE + ENTRIES * tensors)?;
    if archive
        .get("byteorder")
        .is_some_and(|order| order != b"little")
    {
        return Err(malformed("a file of a big-endian machine"));
    }
    let Some(pickle) = archive.get("data.pkl") else {
        return Err(malformed("a zip without data.pkl, so not of torch.save"));
    };
    let steps = OF_THE_WHOLE + STEPS * tensors;
    let pickle = pickle::read(pickle, steps).map_err(|problem| match problem {
        Problem::Malformed(what) => malformed(what),
        Problem::TooLong => too_large(format!(
            "a pickle of more than {steps} steps, for a model of {tensors} tensors"
        )),
    })?;
    let mut reader = Reader {
        archive,
        pickle,
        unpacker: Unpacker::default(),
    };
    reader.read(gathered)
}

/// The stored entries of a torch archive, by their names below its folder.
struct Archive<'a>(HashMap<&'a [u8], &'a [u8]>);

impl<'a> Archive<'a> {
    fn read(zip: &'a ZipSliceArchive<&[u8]>, most: u64) -> Result<Self, Failure> {
        let (mut found, mut entries) = (HashMap::new(), zip.entries());
        while let Some(entry) = entries.next_entry().map_err(no_zip)? {
            if found.len() as u64 == most {
                return Err(too_large(format!("a zip of more than {most} entries")));
            }
            if entry.compression_method() != CompressionMethod::STORE {
                return Err(malformed(
                    "a zip with compressed entries, so not of torch.save",
                ));
            }
            let path = entry.file_path().as_bytes();
            let name = path.iter().position(|b| *b == b'/').map_or(0, |at| at + 1);
            let data = zip.get_entry(entry.wayfinder()).map_err(no_zip)?.data();
            if found
                .insert(path.get(name..).unwrap_or(path), data)
                .is_some()
            {
                let path = shorten(&String::from_utf8_lossy(path));
                return Err(malformed(format!("a zip with two entries {path}")));
            }
        }
        Ok(Self(found))
    }

    fn get(&self, name: &str) -> Option<&'a [u8]> {
        self.0.get(name.as_bytes()).copied()
    }
}

fn no_zip(error: rawzip::Error) -> Failure {
    malformed(format!("not a zip archive: {error}"))
}

struct Reader<'a> {
    archive: Archive<'a>,
    pickle: Pickle<'a>,
    unpacker: Unpacker,
}

/// Keys and values of a map.
type Fields = [(Id, Id)];

impl<'a> Reader<'a> {
    fn read(&mut self, gathered: &mut Gathered<'_>) -> Result<(), Failure> {
        let pickle = &self.pickle;
        let Value::Map(root) = pickle.get(pickle.root) else {
            return Err(malformed("the pickle is no map"));
        };
        gathered.versions = versions(pickle, root)?;
        let Some(Value::List(chunks)) = pickle.entry(root, "chunks").map_err(malformed)? else {
            return Err(malformed("the pickle has no list of chunks"));
        };
        for chunk in chunks {
            let Value::Map(fields) = pickle.get(*chunk) else {
                return Err(malformed("a chunk is no map"));
            };
            if fields.len() > MOST_FIELDS {
                return Err(malformed(format!("a chunk of {} fields", fields.len())));
            }
            let Some(Value::Text(name)) = pickle.entry(fields, "name").map_err(malformed)? else {
                return Err(malformed("a chunk has no name"));
            };
            let read = Chunk {
                name,
                fields,
                pickle,
            };
            if read.entry("indices")?.is_some() {
                read.add_tensors(&self.archive, gathered)?;
            } else {
                read.add_packed(&mut self.unpacker, gathered)?;
            }
        }
        Ok(())
    }
}

/// Where the file says it leads, if it says so in two natural numbers.
fn versions(pickle: &Pickle<'_>, root: &Fields) -> Result<Option<Versions>, Failure> {
    let version = |key| {
        let entry = pickle.entry(root, key).map_err(malformed)?;
        let Some(Value::Int(version)) = entry else {
            return Ok(None);
        };
        Ok(u64::try_from(*version).ok())
    };
    let (old, new) = (version("old_version")?, version("new_version")?);
    Ok(old.zip(new).map(|(old, new)| Versions { old, new }))
}

/// One chunk.
struct Chunk<'r, 'a> {
    name: &'a str,
    fields: &'r Fields,
    pickle: &'r Pickle<'a>,
}

impl<'a> Chunk<'_, 'a> {
    fn wrong(&self, what: impl std::fmt::Display) -> Failure {
        malformed(format!("{}: {what}", shorten(self.name)))
    }

    fn entry(&self, key: &str) -> Result<Option<&Value<'a>>, Failure> {
        self.pickle
            .entry(self.fields, key)
            .map_err(|why| self.wrong(why))
    }

    /// None where it is not said.
    fn shape(&self) -> Result<Option<Vec<u64>>, Failure> {
        let shape = match self.entry("shape")? {
            Some(Value::Tuple(shape) | Value::List(shape)) => shape,
            None | Some(Value::None) => return Ok(None),
            Some(_) => return Err(self.wrong("shape is no tuple")),
        };
        let number = |id: &Id| {
            let Value::Int(number) = self.pickle.get(*id) else {
                return None;
            };
            u64::try_from(*number).ok()
        };
        let shape: Option<Vec<u64>> = shape.iter().take(MOST_DIMENSIONS).map(number).collect();
        shape
            .map(Some)
            .ok_or_else(|| self.wrong("shape holds what is no size"))
    }

    fn add_tensors(
        &self,
        archive: &Archive<'a>,
        gathered: &mut Gathered<'_>,
    ) -> Result<(), Failure> {
        let indices = self.view("indices", archive)?;
        let values = self.view("values", archive)?;
        if indices.length != values.length {
            let (k, other) = (indices.length, values.length);
            return Err(self.wrong(format!("{k} indices for {other} values")));
        }
        let shape = self.shape()?;
        let tensor = gathered.declare(self.name, shape.as_deref(), indices.length)?;
        match indices.element {
            Element::I32 => {
                let indices = indices.elements(|b| i64::from(i32::from_le_bytes(b)));
                self.add_values(tensor, indices, &values, gathered)
            }
            Element::I64 => {
                let indices = indices.elements(i64::from_le_bytes);
                self.add_values(tensor, indices, &values, gathered)
            }
            Element::F16 | Element::Bf16 | Element::F32 | Element::F64 | Element::Unused => {
                Err(self.wrong("indices are neither int32 nor int64"))
            }
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the contract: values are cast to f32"
    )]
    fn add_values(
        &self,
        tensor: usize,
        indices: impl ExactSizeIterator<Item = i64> + Clone,
        values: &View<'a>,
        gathered: &mut Gathered<'_>,
    ) -> Result<(), Failure> {
        let name = self.name;
        match values.element {
            Element::F32 => {
                gathered.add(name, tensor, indices, values.elements(f32::from_le_bytes))
            }
            Element::F16 => {
                let values = values.elements(|b| f16::from_le_bytes(b).to_f32());
                gathered.add(name, tensor, indices, values)
            }
            Element::Bf16 => {
                let values = values.elements(|b| bf16::from_le_bytes(b).to_f32());
                gathered.add(name, tensor, indices, values)
            }
            Element::F64 => {
                let values = values.elements(|b| f64::from_le_bytes(b) as f32);
                gathered.add(name, tensor, indices, values)
            }
            Element::I32 | Element::I64 | Element::Unused => {
                Err(self.wrong("values are no floats"))
            }
        }
    }

    fn view(&self, field: &str, archive: &Archive<'a>) -> Result<View<'a>, Failure> {
        let wrong = |what: &str| self.wrong(format!("{field}: {what}"));
        let Some(Value::Tensor(tensor)) = self.entry(field)? else {
            return Err(wrong("no tensor"));
        };
        if tensor.dimensions != 1 {
            return Err(wrong("must have one dimension"));
        }
        // A stranger's, and torch's are numbers.
        let key = shorten(tensor.storage.key);
        let stored = archive.get(&format!("data/{key}"));
        let stored = stored.ok_or_else(|| wrong("its storage is not in the archive"))?;
        View::of(tensor, stored).ok_or_else(|| wrong("reaches beyond its storage"))
    }

    fn add_packed(
        &self,
        unpacker: &mut Unpacker,
        gathered: &mut Gathered<'_>,
    ) -> Result<(), Failure> {
        let k = match self.entry("k")? {
            Some(Value::Int(k)) => u64::try_from(*k),
            Some(_) | None => return Err(self.wrong("neither indices nor k")),
        };
        let k = k.map_err(|_| self.wrong("k is negative"))?;
        let shape = self.shape()?;
        let tensor = gathered.declare(self.name, shape.as_deref(), k)?;
        let packed = match self.entry("data")? {
            Some(Value::Bytes(data)) => Packed::Bytes(data),
            Some(Value::Latin1(text)) => Packed::Latin1(text),
            Some(Value::Text(text)) => Packed::Base64(text.as_bytes()),
            Some(_) | None => return Err(self.wrong("data is missing")),
        };
        unpacker.unpack(gathered, self.name, tensor, k, packed)
    }
}

/// Elements that are known to be where a tensor says.
struct View<'a> {
    element: Element,
    /// From the first element on.
    bytes: &'a [u8],
    stride: usize,
    length: u64,
}

impl<'a> View<'a> {
    fn of(tensor: &Tensor<'_>, stored: &'a [u8]) -> Option<Self> {
        let Tensor {
            storage,
            offset,
            length,
            stride,
            ..
        } = *tensor;
        let size = storage.element.size();
        let last = length
            .saturating_sub(1)
            .checked_mul(stride)?
            .checked_add(offset)?;
        let inside = last < storage.elements || length == 0;
        let first = usize::try_from(offset.checked_mul(size)?).ok()?;
        let present = storage.elements.checked_mul(size)? <= stored.len() as u64;
        (inside && present).then_some(Self {
            element: storage.element,
            bytes: stored.get(first..)?,
            stride: usize::try_from(stride.checked_mul(size)?).ok()?,
            length,
        })
    }

    /// The compiler makes a loop of its own for each type.
    fn elements<const N: usize, T>(
        &self,
        read: impl Fn([u8; N]) -> T + Copy,
    ) -> impl ExactSizeIterator<Item = T> + Clone {
        let (bytes, stride) = (self.bytes, self.stride);
        // As many as the tensor of a model has at most: it was declared.
        let length = u32::try_from(self.length).unwrap_or(u32::MAX);
        (0..length).map(move |index| {
            let at = index as usize * stride;
            let element = bytes.get(at..).and_then(|rest| rest.first_chunk());
            read(element.copied().unwrap_or([0; N]))
        })
    }
}
