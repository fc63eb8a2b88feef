//! Format `pt_chunks`: what `torch.save` makes of `{"old_version", "new_version", "chunks": [...]}`, a
//! zip of stored entries. A chunk is `{name, indices, values, shape}` with tensors of one dimension,
//! or compact, `{name, k, data}`, data being [`packed`](super::packed) bytes or their base64. The
//! [`pickle`] in it is read, never executed.

mod names;
mod pickle;
mod value;

use std::collections::HashMap;

use rawzip::{CompressionMethod, ZipArchive, ZipSliceArchive};

use super::keys::Keys;
use super::packed::{Packed, Unpacker};
use super::update_builder::UpdateBuilder;
use super::{
    MOST_DIMENSIONS, Versions, bf16_from, f16_from, i32_from, malformed, not_a, shorten, too_large,
};
use crate::protocol::failure::Failure;
use crate::util::file_type::Looks;
use names::Element;
use pickle::Problem;
use value::{Id, Pickle, Tensor, Value};

/// Allowance of steps and entries for any model: the pickle's frame and some metadata.
const OF_THE_WHOLE: u64 = 1000;
/// Steps of the pickle and entries of the archive allowed per tensor of the model. A chunk takes about
/// sixty steps and two entries, and a tensor may come in several chunks.
const STEPS: u64 = 1000;
const ENTRIES: u64 = 32;
/// The keys of the outer map.
const FIELDS: [&str; 3] = ["old_version", "new_version", "chunks"];
/// Fields of a chunk. A pickle can list one chunk many times, and each costs a search.
const MOST_FIELDS: usize = 64;

/// Reads the container.
///
/// # Errors
/// The first problem found.
pub(super) fn decode(bytes: &[u8], builder: &mut UpdateBuilder<'_>) -> Result<(), Failure> {
    let tensors = builder.names().count() as u64;
    let zip =
        ZipArchive::from_slice(bytes).map_err(|error| match Looks::of(bytes) == Looks::Zip {
            true => no_zip(error),
            false => not_a("a zip archive", bytes),
        })?;
    let archive = Archive::read(&zip, OF_THE_WHOLE + ENTRIES * tensors)?;
    let order = archive.get("byteorder");
    if order.is_some_and(|order| order != b"little") {
        return Err(malformed("a file from a big-endian machine"));
    }
    let Some(pickle) = archive.get("data.pkl") else {
        return Err(malformed("a zip without data.pkl, so not from torch.save"));
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
    reader.read(builder)
}

/// The stored entries of a torch archive, by name relative to its folder.
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
                    "a zip with compressed entries, so not from torch.save",
                ));
            }
            let path = entry.file_path().as_bytes();
            let name = path.iter().position(|b| *b == b'/').map_or(0, |at| at + 1);
            let data = zip.get_entry(entry.wayfinder()).map_err(no_zip)?.data();
            let name = path.get(name..).unwrap_or(path);
            if found.insert(name, data).is_some() {
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
    fn read(&mut self, builder: &mut UpdateBuilder<'_>) -> Result<(), Failure> {
        let pickle = &self.pickle;
        let root = pickle.get(pickle.root);
        let Value::Map(root) = root else {
            let what = root.what();
            return Err(malformed(format!("the pickle is {what}, not a map")));
        };
        builder.versions = versions(pickle, root)?;
        builder.keys = pickle.keys(root).collect();
        let chunks = chunks(pickle, root, builder)?;
        let weights = chunks.iter().filter(|chunk| !chunk.is_foreign(builder));
        let names: Vec<&str> = weights.map(|chunk| chunk.name).collect();
        builder.rename(names.iter().copied());
        let mut beside = pickle.keys(root).filter(|key| !FIELDS.contains(key));
        if let Some(name) = beside.find(|key| builder.knows(key)) {
            let name = shorten(name);
            return Err(malformed(format!(
                "{name}: is next to the chunks, not in one of them"
            )));
        }
        for chunk in &chunks {
            chunk.add(&self.archive, &mut self.unpacker, builder)?;
        }
        Ok(())
    }
}

/// The list of chunks.
fn chunks<'r, 'a>(
    pickle: &'r Pickle<'a>,
    root: &'r Fields,
    builder: &UpdateBuilder<'_>,
) -> Result<Vec<Chunk<'r, 'a>>, Failure> {
    let said = pickle.entry(root, "chunks").map_err(malformed)?;
    let listed = match said {
        Some(Value::List(chunks) | Value::Tuple(chunks)) => chunks,
        None | Some(Value::None) => {
            let keys = &builder.keys;
            return Err(malformed(format!(
                "the pickle has no list of chunks; it has the keys {keys}"
            )));
        }
        Some(other) => {
            let what = other.what();
            return Err(malformed(format!("chunks is {what}, not a list of chunks")));
        }
    };
    let mut chunks = Vec::new();
    for chunk in listed {
        // A pickle can list one chunk many times, and every name is looked up.
        if chunks.len() as u64 == builder.most_pieces {
            let most = builder.most_pieces;
            return Err(too_large(format!("more than {most} chunks")));
        }
        chunks.push(Chunk::of(pickle, *chunk)?);
    }
    Ok(chunks)
}

/// The versions of the file, if both are natural numbers.
fn versions(pickle: &Pickle<'_>, root: &Fields) -> Result<Option<Versions>, Failure> {
    let version = |key| {
        let entry = pickle.entry(root, key).map_err(malformed)?;
        Ok::<_, Failure>(entry.and_then(Value::natural))
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

impl<'r, 'a> Chunk<'r, 'a> {
    fn of(pickle: &'r Pickle<'a>, chunk: Id) -> Result<Self, Failure> {
        let chunk = pickle.get(chunk);
        let Value::Map(fields) = chunk else {
            let what = chunk.what();
            return Err(malformed(format!("a chunk is {what}, not a map")));
        };
        if fields.len() > MOST_FIELDS {
            return Err(malformed(format!("a chunk of {} fields", fields.len())));
        }
        let name = pickle.entry(fields, "name").map_err(malformed)?;
        let Some(Value::Text(name)) = name else {
            let keys: Keys = pickle.keys(fields).collect();
            return Err(malformed(format!(
                "a chunk has no name; it has the keys {keys}"
            )));
        };
        Ok(Self {
            name,
            fields,
            pickle,
        })
    }

    fn wrong(&self, what: impl std::fmt::Display) -> Failure {
        malformed(format!("{}: {what}", shorten(self.name)))
    }

    /// The failure for a field of the wrong type.
    fn refuse(&self, field: &str, said: Option<&Value<'a>>, wanted: &str) -> Failure {
        let keys: Keys = self.pickle.keys(self.fields).collect();
        self.wrong(match said {
            None => format!("{field} is missing; it has the keys {keys}"),
            Some(said) => format!("{field} is {}, not {wanted}", said.what()),
        })
    }

    /// The value of a field. Python's `None` counts as absent.
    fn entry(&self, key: &str) -> Result<Option<&'r Value<'a>>, Failure> {
        let entry = self.pickle.entry(self.fields, key);
        let entry = entry.map_err(|why| self.wrong(why))?;
        Ok(entry.filter(|said| !matches!(said, Value::None)))
    }

    /// Whether it matches no tensor of the model and has values that cannot be weights.
    fn is_foreign(&self, builder: &UpdateBuilder<'_>) -> bool {
        let Ok(Some(Value::Tensor(values))) = self.entry("values") else {
            return false;
        };
        let element = values.storage.element;
        matches!(element, Element::I32 | Element::I64 | Element::Integer)
            && !builder.may_mean(self.name)
    }

    fn add(
        &self,
        archive: &Archive<'a>,
        unpacker: &mut Unpacker,
        builder: &mut UpdateBuilder<'_>,
    ) -> Result<(), Failure> {
        if self.is_foreign(builder) {
            builder.pass_over(self.name);
            return Ok(());
        }
        if !builder.knows(self.name) {
            return Err(UpdateBuilder::unknown(self.name));
        }
        let has = |field| Ok::<_, Failure>(self.entry(field)?.is_some());
        let of_tensors = has("indices")? || has("values")?;
        if of_tensors && has("data")? {
            return Err(self.wrong("has data beside indices and values"));
        }
        match of_tensors {
            true => self.add_tensors(archive, builder),
            false => self.add_packed(unpacker, builder),
        }
    }

    /// The declared shape, if there is one.
    fn shape(&self) -> Result<Option<Vec<u64>>, Failure> {
        let said = self.entry("shape")?;
        let shape = match said {
            None => return Ok(None),
            Some(Value::Tuple(shape) | Value::List(shape)) if shape.len() <= MOST_DIMENSIONS => {
                shape
            }
            Some(Value::Tuple(_) | Value::List(_)) => {
                let most = MOST_DIMENSIONS;
                return Err(self.wrong(format!("a shape of more than {most} dimensions")));
            }
            other => return Err(self.refuse("shape", other, "a tuple of sizes")),
        };
        let size = |id: &Id| self.pickle.get(*id).natural();
        let shape: Option<Vec<u64>> = shape.iter().map(size).collect();
        let shape = shape.ok_or_else(|| self.wrong("shape holds what is no size"))?;
        Ok(Some(shape))
    }

    fn add_tensors(
        &self,
        archive: &Archive<'a>,
        builder: &mut UpdateBuilder<'_>,
    ) -> Result<(), Failure> {
        let indices = self.view("indices", archive)?;
        let values = self.view("values", archive)?;
        if indices.length != values.length {
            let (k, other) = (indices.length, values.length);
            return Err(self.wrong(format!("{k} indices for {other} values")));
        }
        let shape = self.shape()?;
        let tensor = builder.declare(self.name, shape.as_deref(), indices.length)?;
        match indices.element {
            Element::I32 => self.add_values(tensor, indices.elements(i32_from), &values, builder),
            Element::I64 => {
                let indices = indices.elements(i64::from_le_bytes);
                self.add_values(tensor, indices, &values, builder)
            }
            Element::F16
            | Element::Bf16
            | Element::F32
            | Element::F64
            | Element::Integer
            | Element::Unused => Err(self.wrong("indices are neither int32 nor int64")),
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
        builder: &mut UpdateBuilder<'_>,
    ) -> Result<(), Failure> {
        let name = self.name;
        match values.element {
            Element::F32 => builder.add(name, tensor, indices, values.elements(f32::from_le_bytes)),
            Element::F16 => builder.add(name, tensor, indices, values.elements(f16_from)),
            Element::Bf16 => builder.add(name, tensor, indices, values.elements(bf16_from)),
            Element::F64 => {
                let values = values.elements(|b| f64::from_le_bytes(b) as f32);
                builder.add(name, tensor, indices, values)
            }
            Element::I32 | Element::I64 | Element::Integer | Element::Unused => {
                Err(self.wrong("values are no floats"))
            }
        }
    }

    fn view(&self, field: &str, archive: &Archive<'a>) -> Result<View<'a>, Failure> {
        let wrong = |what: &str| self.wrong(format!("{field}: {what}"));
        let said = self.entry(field)?;
        let Some(Value::Tensor(tensor)) = said else {
            return Err(self.refuse(field, said, "a tensor"));
        };
        if tensor.dimensions != 1 {
            return Err(wrong("must have one dimension"));
        }
        // Untrusted text; torch itself writes numbers.
        let key = shorten(tensor.storage.key);
        let stored = archive.get(&format!("data/{key}"));
        let stored = stored.ok_or_else(|| wrong("its storage is not in the archive"))?;
        View::of(tensor, stored).ok_or_else(|| wrong("reaches beyond its storage"))
    }

    fn add_packed(
        &self,
        unpacker: &mut Unpacker,
        builder: &mut UpdateBuilder<'_>,
    ) -> Result<(), Failure> {
        let (k, data) = (self.entry("k")?, self.entry("data")?);
        if k.is_none() && data.is_none() {
            let keys: Keys = self.pickle.keys(self.fields).collect();
            return Err(self.wrong(format!("neither indices nor k; it has the keys {keys}")));
        }
        let Some(count) = k.and_then(Value::natural) else {
            return Err(self.refuse("k", k, "a natural one"));
        };
        let shape = self.shape()?;
        let tensor = builder.declare(self.name, shape.as_deref(), count)?;
        let packed = match data {
            Some(Value::Bytes(data)) => Packed::Bytes(data),
            Some(Value::Latin1(text)) => Packed::Latin1(text),
            Some(Value::Text(text)) => Packed::Base64(text.as_bytes()),
            other => return Err(self.refuse("data", other, "bytes")),
        };
        unpacker.unpack(builder, self.name, tensor, count, packed)
    }
}

/// The elements of a tensor, checked to lie within its storage.
struct View<'a> {
    element: Element,
    /// Starts at the first element.
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
        let last = length.saturating_sub(1).checked_mul(stride)?;
        let last = last.checked_add(offset)?;
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

    /// Generic, so that the compiler specialises the loop for each type.
    fn elements<const N: usize, T>(
        &self,
        read: impl Fn([u8; N]) -> T + Copy,
    ) -> impl ExactSizeIterator<Item = T> + Clone {
        let (bytes, stride) = (self.bytes, self.stride);
        // `declare` bounds it by the size of a tensor of the model.
        let length = u32::try_from(self.length).unwrap_or(u32::MAX);
        (0..length).map(move |index| {
            let at = index as usize * stride;
            let element = bytes.get(at..).and_then(|rest| rest.first_chunk());
            read(element.copied().unwrap_or([0; N]))
        })
    }
}
