//! The part of pickle in which `torch.save` writes plain containers and tensors. Nothing is executed:
//! a name that stands for code must be one of those in [`Name`], and to "call" it makes a value here,
//! mostly one of which nothing is known. Texts and bytes stay in the pickle; memory grows with the
//! steps, which are limited.

use std::collections::HashMap;

use super::super::{MOST_DIMENSIONS, natural};

/// Of the arguments of a call so many are looked at: a tuple can be said many times.
const MOST_ARGUMENTS: usize = 6;

/// Why a pickle cannot be read.
pub(super) enum Problem {
    /// It is no pickle, or holds more than containers and tensors.
    Malformed(String),
    /// It takes more steps than it may.
    TooLong,
}

/// Where a value is.
pub(super) type Id = u32;

/// A value.
#[derive(Debug)]
pub(super) enum Value<'a> {
    None,
    /// Anything that a candidate does not need.
    Other,
    Int(i64),
    Float(f64),
    Text(&'a str),
    Bytes(&'a [u8]),
    /// Bytes, one for each character: how protocol 2 writes them.
    Latin1(&'a str),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Map(Vec<(Id, Id)>),
    Name(Name),
    Storage(Storage<'a>),
    Tensor(Tensor<'a>),
    /// What elements of an array of numpy are: a letter for the kind, and their bytes.
    NumpyType(&'a str),
}

impl Value<'_> {
    /// The natural number that it is, if it is one.
    pub(super) fn natural(&self) -> Option<u64> {
        if let Self::Float(number) = self {
            return natural(*number);
        }
        let Self::Int(number) = self else { return None };
        u64::try_from(*number).ok()
    }

    /// What it is, in words.
    pub(super) fn what(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Int(_) | Self::Float(_) => "a number",
            Self::Text(_) => "text",
            Self::Bytes(_) | Self::Latin1(_) => "bytes",
            Self::Tuple(_) => "a tuple",
            Self::List(_) => "a list",
            Self::Map(_) => "a map",
            Self::Tensor(_) => "a tensor",
            Self::Other | Self::Name(_) | Self::Storage(_) | Self::NumpyType(_) => "something else",
        }
    }
}

/// A name that may stand in a pickle, and what it means here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Name {
    /// A storage of this element type.
    Storage(Element),
    /// Makes a tensor.
    RebuildTensor,
    /// A tensor with a flag.
    RebuildParameter,
    /// A tensor made by another of these, with attributes.
    RebuildFromType,
    /// A map, made empty.
    EmptyMap,
    /// Bytes out of text.
    Encode,
    /// Bytes out of nothing, or of bytes.
    Bytes,
    /// A tuple.
    Size,
    /// A type of numpy's.
    NumpyType,
    /// A single value of such a type.
    NumpyScalar,
    /// Something of which a candidate needs nothing, and whatever is made of it.
    Remark,
}

/// The type of a storage's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Element {
    F16,
    Bf16,
    F32,
    F64,
    I32,
    I64,
    /// A whole number or a truth value that no part of a candidate has.
    Integer,
    /// Any other that no part of a candidate has.
    Unused,
}

impl Element {
    /// Bytes of one.
    pub(super) fn size(self) -> u64 {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::F64 | Self::I64 => 8,
            Self::Integer | Self::Unused => 0,
        }
    }
}

/// Elements in an entry of the archive.
#[derive(Debug, Clone, Copy)]
pub(super) struct Storage<'a> {
    pub(super) element: Element,
    pub(super) key: &'a str,
    /// As declared.
    pub(super) elements: u64,
}

/// A view of a storage. Of tensors with more than one dimension only the number of them is kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tensor<'a> {
    pub(super) storage: Storage<'a>,
    pub(super) offset: u64,
    pub(super) dimensions: usize,
    pub(super) length: u64,
    pub(super) stride: u64,
}

/// Everything a pickle holds, and the value that it stands for.
pub(super) struct Pickle<'a> {
    values: Vec<Value<'a>>,
    pub(super) root: Id,
}

impl<'a> Pickle<'a> {
    pub(super) fn get(&self, id: Id) -> &Value<'a> {
        self.values.get(id as usize).unwrap_or(&Value::Other)
    }

    /// The keys of a map that are text.
    pub(super) fn keys(&self, map: &[(Id, Id)]) -> impl Iterator<Item = &'a str> {
        map.iter().filter_map(|(key, _)| {
            let Value::Text(text) = self.get(*key) else {
                return None;
            };
            Some(*text)
        })
    }

    /// What a map has under a key; an error where it has two.
    pub(super) fn entry(&self, map: &[(Id, Id)], key: &str) -> Result<Option<&Value<'a>>, String> {
        let is_key = |id: Id| matches!(self.get(id), Value::Text(text) if *text == key);
        let mut found = map.iter().filter(|(k, _)| is_key(*k));
        let first = found.next().map(|(_, value)| self.get(*value));
        match found.next() {
            None => Ok(first),
            Some(_) => Err(format!("{key} is given twice")),
        }
    }
}

/// Reads a pickle in at most so many steps.
pub(super) fn read(bytes: &[u8], most_steps: u64) -> Result<Pickle<'_>, Problem> {
    let mut machine = Machine {
        rest: bytes,
        values: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    for _ in 0..most_steps {
        if machine.step()? {
            let root = machine.pop()?;
            let values = machine.values;
            return Ok(Pickle { values, root });
        }
    }
    Err(Problem::TooLong)
}

/// Little endian, two's complement, in as many bytes as needed.
fn long(bytes: &[u8]) -> Value<'static> {
    let negative = bytes.last().is_some_and(|last| last & 0x80 != 0);
    let mut whole = [if negative { 0xff } else { 0 }; 8];
    match whole.get_mut(..bytes.len()) {
        Some(part) => {
            part.copy_from_slice(bytes);
            Value::Int(i64::from_le_bytes(whole))
        }
        // Larger than anything that a candidate counts.
        None => Value::Other,
    }
}

fn malformed<T>(what: impl Into<String>) -> Result<T, Problem> {
    Err(Problem::Malformed(what.into()))
}

/// The stack machine that a pickle is written for, without its power to call.
struct Machine<'a> {
    rest: &'a [u8],
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    /// One operation; true at the end.
    fn step(&mut self) -> Result<bool, Problem> {
        let [operation] = self.take_array()?;
        match operation {
            b'.' => return Ok(true),
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_mark()?),
            b'q' | b'r' | 0x94 | b'h' | b'j' => self.remember_or_recall(operation)?,
            b']' | b')' | 0x85..=0x87 | b't' | b'a' | b'e' => self.build_list(operation)?,
            b'}' | b's' | b'u' => self.build_map(operation)?,
            b'c' | 0x93 => self.name(operation)?,
            b'Q' => self.persistent()?,
            b'R' | 0x81 => self.call()?,
            0x90 | 0x91 => self.build_set(operation)?,
            b'b' => self.set_state()?,
            _ => {
                let value = self.plain(operation)?;
                self.push(value)?;
            }
        }
        Ok(false)
    }

    /// A value that stands in the pickle as it is.
    fn plain(&mut self, operation: u8) -> Result<Value<'a>, Problem> {
        Ok(match operation {
            b'N' => Value::None,
            // Truth values, and a set, which is filled later.
            0x88 | 0x89 | 0x8f => Value::Other,
            b'G' => Value::Float(f64::from_be_bytes(self.take_array()?)),
            b'K' => Value::Int(self.take_array::<1>()?[0].into()),
            b'M' => Value::Int(u16::from_le_bytes(self.take_array()?).into()),
            b'J' => Value::Int(i32::from_le_bytes(self.take_array()?).into()),
            0x8a => long(self.counted::<1>()?),
            0x8b => long(self.counted::<4>()?),
            b'X' => Value::Text(self.text::<4>()?),
            0x8c => Value::Text(self.text::<1>()?),
            0x8d => Value::Text(self.text::<8>()?),
            b'B' => Value::Bytes(self.counted::<4>()?),
            b'C' => Value::Bytes(self.counted::<1>()?),
            0x8e | 0x96 => Value::Bytes(self.counted::<8>()?),
            other => {
                return malformed(format!(
                    "the pickle has an operation (0x{other:02x}) that is not read"
                ));
            }
        })
    }

    fn take(&mut self, bytes: usize) -> Result<&'a [u8], Problem> {
        let Some((taken, rest)) = self.rest.split_at_checked(bytes) else {
            return malformed("the pickle ends early");
        };
        self.rest = rest;
        Ok(taken)
    }

    fn take_array<const N: usize>(&mut self) -> Result<[u8; N], Problem> {
        let taken = self.take(N)?;
        <[u8; N]>::try_from(taken).or_else(|_| malformed("the pickle ends early"))
    }

    /// Bytes behind their number, which is written in N bytes.
    fn counted<const N: usize>(&mut self) -> Result<&'a [u8], Problem> {
        let mut length = [0; 8];
        length[..N].copy_from_slice(&self.take_array::<N>()?);
        // More than can be addressed is more than there is.
        let length = usize::try_from(u64::from_le_bytes(length)).unwrap_or(usize::MAX);
        self.take(length)
    }

    fn text<const N: usize>(&mut self) -> Result<&'a str, Problem> {
        let bytes = self.counted::<N>()?;
        std::str::from_utf8(bytes).or_else(|_| malformed("text that is not UTF-8"))
    }

    fn line(&mut self) -> Result<&'a str, Problem> {
        let end = self.rest.iter().take(1000).position(|b| *b == b'\n');
        let Some(end) = end else {
            return malformed("a name without an end");
        };
        let line = self.take(end)?;
        self.take(1)?;
        std::str::from_utf8(line).or_else(|_| malformed("text that is not UTF-8"))
    }

    fn push(&mut self, value: Value<'a>) -> Result<(), Problem> {
        let Ok(id) = Id::try_from(self.values.len()) else {
            return Err(Problem::TooLong);
        };
        self.values.push(value);
        self.stack.push(id);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id, Problem> {
        let lowest = self.marks.last().copied().unwrap_or(0);
        match self.stack.pop() {
            Some(id) if self.stack.len() >= lowest => Ok(id),
            Some(_) | None => malformed("the pickle takes a value that is not there"),
        }
    }

    /// What was pushed since the last mark.
    fn pop_mark(&mut self) -> Result<Vec<Id>, Problem> {
        match self.marks.pop() {
            Some(mark) if mark <= self.stack.len() => Ok(self.stack.split_off(mark)),
            Some(_) | None => malformed("the pickle takes a mark that is not there"),
        }
    }

    fn top(&mut self) -> Result<&mut Value<'a>, Problem> {
        let top = self.stack.last().copied();
        match top.and_then(|id| self.values.get_mut(id as usize)) {
            Some(value) => Ok(value),
            None => malformed("the pickle takes a value that is not there"),
        }
    }

    fn get(&self, id: Id) -> &Value<'a> {
        self.values.get(id as usize).unwrap_or(&Value::Other)
    }

    /// The first values of a tuple: of longer ones nobody needs the rest, and a pickle can say a long
    /// one many times.
    fn first_of(&self, tuple: Id) -> Option<Vec<&Value<'a>>> {
        let Value::Tuple(items) = self.get(tuple) else {
            return None;
        };
        Some(
            items
                .iter()
                .take(MOST_ARGUMENTS)
                .map(|id| self.get(*id))
                .collect(),
        )
    }

    fn remember_or_recall(&mut self, operation: u8) -> Result<(), Problem> {
        let recalls = matches!(operation, b'h' | b'j');
        let key = match operation {
            b'q' | b'h' => self.take_array::<1>()?[0].into(),
            b'r' | b'j' => u32::from_le_bytes(self.take_array()?),
            // Memoize: under the next number.
            _ => u32::try_from(self.memo.len()).unwrap_or(u32::MAX),
        };
        let id = match recalls {
            true => self.memo.get(&key).copied(),
            false => self.stack.last().copied(),
        };
        let Some(id) = id else {
            return malformed("the pickle recalls what it has not remembered");
        };
        match recalls {
            true => self.stack.push(id),
            false => drop(self.memo.insert(key, id)),
        }
        Ok(())
    }

    fn build_list(&mut self, operation: u8) -> Result<(), Problem> {
        let items = match operation {
            b']' => return self.push(Value::List(Vec::new())),
            b')' => Vec::new(),
            0x85..=0x87 => {
                let mut items = Vec::new();
                for _ in 0x85..=operation {
                    items.push(self.pop()?);
                }
                items.reverse();
                items
            }
            b'a' => vec![self.pop()?],
            _ => self.pop_mark()?,
        };
        if !matches!(operation, b'a' | b'e') {
            return self.push(Value::Tuple(items));
        }
        let top = self.top()?;
        if let Value::List(list) = top {
            list.extend(items);
        } else if !matches!(top, Value::Other) {
            return malformed("the pickle appends to what is no list");
        }
        Ok(())
    }

    /// Sets are remarks: only that there is one is kept.
    fn build_set(&mut self, operation: u8) -> Result<(), Problem> {
        drop(self.pop_mark()?);
        if operation == 0x91 {
            return self.push(Value::Other);
        }
        let Value::Other = self.top()? else {
            return malformed("the pickle adds to what is no set");
        };
        Ok(())
    }

    fn build_map(&mut self, operation: u8) -> Result<(), Problem> {
        let items = match operation {
            b'}' => return self.push(Value::Map(Vec::new())),
            b's' => {
                let value = self.pop()?;
                vec![self.pop()?, value]
            }
            _ => self.pop_mark()?,
        };
        let (pairs, []) = items.as_chunks::<2>() else {
            return malformed("the pickle sets a key without a value");
        };
        let top = self.top()?;
        if let Value::Map(map) = top {
            map.extend(pairs.iter().map(|[key, value]| (*key, *value)));
        } else if !matches!(top, Value::Other) {
            return malformed("the pickle sets a key of what is no map");
        }
        Ok(())
    }

    fn name(&mut self, operation: u8) -> Result<(), Problem> {
        let (module, name) = if operation == b'c' {
            (self.line()?, self.line()?)
        } else {
            let (name, module) = (self.pop()?, self.pop()?);
            match (self.get(module), self.get(name)) {
                (Value::Text(module), Value::Text(name)) => (*module, *name),
                _ => return malformed("a name that is no text"),
            }
        };
        let Some(known) = Name::find(module, name) else {
            let (module, name) = (super::shorten(module), super::shorten(name));
            return malformed(format!(
                "the pickle names {module}.{name}, which is neither a tensor nor a plain container; nothing in it is executed"
            ));
        };
        self.push(Value::Name(known))
    }

    /// `('storage', TYPE, KEY, DEVICE, ELEMENTS)`
    fn persistent(&mut self) -> Result<(), Problem> {
        let described = self.pop()?;
        let Some(
            [
                Value::Text("storage"),
                Value::Name(Name::Storage(element)),
                Value::Text(key),
                Value::Text(_),
                Value::Int(elements),
            ],
        ) = self.first_of(described).as_deref()
        else {
            return malformed("a storage that is described in another way than torch's");
        };
        let Ok(elements) = u64::try_from(*elements) else {
            return malformed("a storage of less than no elements");
        };
        let (element, key) = (*element, *key);
        self.push(Value::Storage(Storage {
            element,
            key,
            elements,
        }))
    }

    fn call(&mut self) -> Result<(), Problem> {
        let (tuple, callee) = (self.pop()?, self.pop()?);
        let (Some(arguments), Value::Name(name)) = (self.first_of(tuple), self.get(callee)) else {
            return malformed("the pickle calls what is no name");
        };
        let made = self.make(*name, &arguments)?;
        self.push(made)
    }

    /// What a name stands for, made of its first arguments; behind them are flags and hooks.
    fn make(&self, name: Name, arguments: &[&Value<'a>]) -> Result<Value<'a>, Problem> {
        Ok(match (name, arguments) {
            (
                Name::RebuildTensor,
                [
                    Value::Storage(storage),
                    Value::Int(offset),
                    Value::Tuple(shape),
                    Value::Tuple(strides),
                    ..,
                ],
            ) => Value::Tensor(self.tensor(*storage, *offset, shape, strides)?),
            (Name::RebuildParameter, [Value::Tensor(tensor), ..]) => Value::Tensor(*tensor),
            (Name::RebuildFromType, [Value::Name(name), _, Value::Tuple(inner), ..])
                if *name != Name::RebuildFromType =>
            {
                let inner = inner.iter().take(MOST_ARGUMENTS);
                let inner: Vec<_> = inner.map(|id| self.get(*id)).collect();
                return self.make(*name, &inner);
            }
            // Perhaps with what makes values that are not there.
            (Name::EmptyMap, [] | [Value::Name(_) | Value::None]) => Value::Map(Vec::new()),
            (Name::Bytes, []) => Value::Bytes(&[]),
            (Name::Bytes, [Value::Bytes(bytes)]) => Value::Bytes(bytes),
            (Name::Bytes, [Value::Latin1(text)])
            | (Name::Encode, [Value::Text(text), Value::Text("latin1" | "latin-1")]) => {
                Value::Latin1(text)
            }
            (Name::Size, [Value::Tuple(shape)]) if shape.len() <= MOST_DIMENSIONS => {
                Value::Tuple(shape.clone())
            }
            (Name::NumpyType, [Value::Text(kind), ..]) => Value::NumpyType(kind),
            (Name::NumpyScalar, [Value::NumpyType(kind), data]) => numpy_scalar(kind, data),
            (Name::Remark | Name::Size | Name::NumpyScalar, _) => Value::Other,
            _ => {
                return malformed(format!(
                    "the pickle calls {name:?} in another way than torch"
                ));
            }
        })
    }

    fn tensor(
        &self,
        storage: Storage<'a>,
        offset: i64,
        shape: &[Id],
        strides: &[Id],
    ) -> Result<Tensor<'a>, Problem> {
        let natural = |id: Option<&Id>| match id.map(|id| self.get(*id)) {
            None => Some(1),
            Some(Value::Int(number)) => u64::try_from(*number).ok(),
            Some(_) => None,
        };
        let numbers = (
            u64::try_from(offset).ok(),
            natural(shape.first()),
            natural(strides.first()),
        );
        let (Some(offset), Some(length), Some(stride)) = numbers else {
            return malformed("a tensor with a negative offset, size or stride");
        };
        Ok(Tensor {
            storage,
            offset,
            dimensions: shape.len(),
            length,
            stride,
        })
    }

    /// Attributes, which are of no use here.
    fn set_state(&mut self) -> Result<(), Problem> {
        self.pop()?;
        let (Value::Map(_) | Value::Other | Value::NumpyType(_)) = self.top()? else {
            return malformed("the pickle sets the state of what has none");
        };
        Ok(())
    }
}

/// A single value of numpy's, if it is a number. It is written in the order of the machine, which is
/// the file's.
fn numpy_scalar<'a>(kind: &str, data: &Value<'_>) -> Value<'a> {
    const MOST: usize = 8;
    let mut bytes = Vec::new();
    if let Value::Bytes(data) = data {
        bytes.extend(data.iter().take(MOST + 1));
    } else if let Value::Latin1(text) = data {
        let data = text.chars().take(MOST + 1);
        bytes.extend(data.map(|c| u8::try_from(c).unwrap_or_default()));
    }
    if bytes.is_empty() || bytes.len() > MOST {
        return Value::Other;
    }
    let mut whole = [0; MOST];
    whole[..bytes.len()].copy_from_slice(&bytes);
    match kind {
        "i1" | "i2" | "i4" | "i8" => long(&bytes),
        "u1" | "u2" | "u4" | "u8" => {
            let number = i64::try_from(u64::from_le_bytes(whole));
            number.map_or(Value::Other, Value::Int)
        }
        "f8" => Value::Float(f64::from_le_bytes(whole)),
        _ => Value::Other,
    }
}

impl Name {
    fn find(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => {
                Self::RebuildParameter
            }
            ("torch._tensor", "_rebuild_from_type_v2") => Self::RebuildFromType,
            ("collections", "OrderedDict" | "defaultdict") | (BUILTINS_2 | BUILTINS, "dict") => {
                Self::EmptyMap
            }
            ("_codecs", "encode") => Self::Encode,
            (BUILTINS_2 | BUILTINS, "bytes" | "bytearray") => Self::Bytes,
            ("torch", "Size") => Self::Size,
            ("numpy", "dtype") => Self::NumpyType,
            ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar") => Self::NumpyScalar,
            ("torch", name) if name.ends_with("Storage") => Self::Storage(Element::find(name)?),
            ("torch.storage", "UntypedStorage") => Self::Storage(Element::Unused),
            _ if is_remark(module, name) => Self::Remark,
            _ => return None,
        })
    }
}

impl Element {
    /// The type of what a storage of torch's holds.
    fn find(storage: &str) -> Option<Self> {
        Some(match storage {
            "HalfStorage" => Self::F16,
            "BFloat16Storage" => Self::Bf16,
            "FloatStorage" => Self::F32,
            "DoubleStorage" => Self::F64,
            "IntStorage" => Self::I32,
            "LongStorage" => Self::I64,
            "BoolStorage" | "ByteStorage" | "CharStorage" | "ShortStorage" => Self::Integer,
            "ComplexFloatStorage"
            | "ComplexDoubleStorage"
            | "QInt8Storage"
            | "QUInt8Storage"
            | "QInt32Storage"
            | "QUInt4x2Storage"
            | "QUInt2x4Storage" => Self::Unused,
            _ => return None,
        })
    }
}

/// Python's own names, as protocol 2 and the later ones call the module.
const BUILTINS_2: &str = "__builtin__";
const BUILTINS: &str = "builtins";

/// Whether a name stands for a plain value that writers put beside the data: a type, a date, a set. All
/// are alike here, and whatever is made of them is not made.
fn is_remark(module: &str, name: &str) -> bool {
    match module {
        "torch" => {
            is_element_type(name)
                || name.starts_with("per_tensor_")
                || name.starts_with("per_channel_")
                || matches!(name, "device" | "Tensor" | "strided" | "sparse_coo")
        }
        "torch.serialization" => name == "_get_layout",
        "torch._utils" => matches!(
            name,
            "torch.contiguous_format"
                | "torch.preserve_format"
                | "torch.channels_last"
                | "torch.channels_last_3d"
                | "_rebuild_tensor_v3"
                | "_rebuild_sparse_tensor"
                | "_rebuild_nested_tensor"
                | "_rebuild_meta_tensor_no_storage"
                | "_rebuild_qtensor"
        ),
        "torch.nn.parameter" => matches!(name, "Parameter" | "Buffer"),
        "numpy" => name == "ndarray",
        "numpy.core.multiarray" | "numpy._core.multiarray" => name == "_reconstruct",
        "numpy.core.numeric" | "numpy._core.numeric" => name == "_frombuffer",
        BUILTINS_2 | BUILTINS => matches!(
            name,
            "set"
                | "frozenset"
                | "complex"
                | "list"
                | "tuple"
                | "int"
                | "long"
                | "float"
                | "bool"
                | "str"
                | "unicode"
                | "object"
                | "slice"
                | "range"
                | "xrange"
                | "Ellipsis"
                | "NotImplemented"
        ),
        "collections" => matches!(name, "deque" | "Counter"),
        "datetime" => matches!(
            name,
            "datetime" | "date" | "time" | "timedelta" | "timezone"
        ),
        "decimal" => name == "Decimal",
        "fractions" => name == "Fraction",
        "uuid" => matches!(name, "UUID" | "SafeUUID"),
        "pathlib" | "pathlib._local" => matches!(
            name,
            "PosixPath" | "WindowsPath" | "PurePosixPath" | "PureWindowsPath"
        ),
        "types" => name == "SimpleNamespace",
        "argparse" => name == "Namespace",
        _ => false,
    }
}

/// Whether torch calls a type of elements so: `float32`, `float8_e4m3fn`, `bool`.
fn is_element_type(name: &str) -> bool {
    const KINDS: [&str; 8] = [
        "float", "bfloat", "int", "uint", "complex", "qint", "quint", "bits",
    ];
    let numbered = |kind| {
        let rest: Option<&str> = name.strip_prefix(kind);
        rest.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    name == "bool" || KINDS.into_iter().any(numbered)
}
