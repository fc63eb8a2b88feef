//! The part of pickle in which `torch.save` writes plain containers and tensors. Nothing is executed:
//! a name that stands for code must be one of those in [`Name`], and to "call" it makes a value here.
//! Texts and bytes stay in the pickle; memory grows with the steps, which are limited.

use std::collections::HashMap;

use super::super::MOST_DIMENSIONS;

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
    /// A truth value, a float: nothing that a candidate needs.
    Other,
    Int(i64),
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
    /// An ordered map, made empty.
    OrderedMap,
    /// Bytes out of text.
    Encode,
    /// Bytes out of nothing.
    NoBytes,
    /// A tuple.
    Size,
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
    /// One that no part of a candidate has.
    Unused,
}

impl Element {
    /// Bytes of one.
    pub(super) fn size(self) -> u64 {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::F64 | Self::I64 => 8,
            Self::Unused => 0,
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
            b'q' | b'r' | 0x94 | b'h' | b'j' => self.remember_or_recall(operation)?,
            b']' | b')' | 0x85..=0x87 | b't' | b'a' | b'e' => self.build_list(operation)?,
            b'}' | b's' | b'u' => self.build_map(operation)?,
            b'c' | 0x93 => self.name(operation)?,
            b'Q' => self.persistent()?,
            b'R' => self.call()?,
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
            0x88 | 0x89 => Value::Other,
            b'G' => {
                self.take(8)?;
                Value::Other
            }
            b'K' => Value::Int(self.take_array::<1>()?[0].into()),
            b'M' => Value::Int(u16::from_le_bytes(self.take_array()?).into()),
            b'J' => Value::Int(i32::from_le_bytes(self.take_array()?).into()),
            0x8a => self.long()?,
            b'X' => Value::Text(self.text::<4>()?),
            0x8c => Value::Text(self.text::<1>()?),
            0x8d => Value::Text(self.text::<8>()?),
            b'B' => Value::Bytes(self.counted::<4>()?),
            b'C' => Value::Bytes(self.counted::<1>()?),
            0x8e => Value::Bytes(self.counted::<8>()?),
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

    /// Little endian, two's complement, in as many bytes as needed.
    fn long(&mut self) -> Result<Value<'a>, Problem> {
        let bytes = self.counted::<1>()?;
        let negative = bytes.last().is_some_and(|last| last & 0x80 != 0);
        let mut whole = [if negative { 0xff } else { 0 }; 8];
        match whole.get_mut(..bytes.len()) {
            Some(part) => part.copy_from_slice(bytes),
            None => return malformed("a number of more than 64 bits"),
        }
        Ok(Value::Int(i64::from_le_bytes(whole)))
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
        Some(items.iter().take(6).map(|id| self.get(*id)).collect())
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
        let Value::List(list) = self.top()? else {
            return malformed("the pickle appends to what is no list");
        };
        list.extend(items);
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
        let Value::Map(map) = self.top()? else {
            return malformed("the pickle sets a key of what is no map");
        };
        map.extend(pairs.iter().map(|[key, value]| (*key, *value)));
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
        // Behind them are flags and hooks.
        let made = match (name, arguments.as_slice()) {
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
            (Name::OrderedMap, []) => Value::Map(Vec::new()),
            (Name::NoBytes, []) => Value::Bytes(&[]),
            (Name::Encode, [Value::Text(text), Value::Text("latin1" | "latin-1")]) => {
                Value::Latin1(text)
            }
            (Name::Size, [Value::Tuple(shape)]) if shape.len() <= MOST_DIMENSIONS => {
                Value::Tuple(shape.clone())
            }
            _ => {
                return malformed(format!(
                    "the pickle calls {name:?} in another way than torch"
                ));
            }
        };
        self.push(made)
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

    /// Attributes of a map, which are of no use here.
    fn set_state(&mut self) -> Result<(), Problem> {
        self.pop()?;
        let Value::Map(_) = self.top()? else {
            return malformed("the pickle sets the state of what is no map");
        };
        Ok(())
    }
}

impl Name {
    fn find(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("collections", "OrderedDict") => Self::OrderedMap,
            ("_codecs", "encode") => Self::Encode,
            ("__builtin__" | "builtins", "bytes") => Self::NoBytes,
            ("torch", "Size") => Self::Size,
            ("torch", "HalfStorage") => Self::Storage(Element::F16),
            ("torch", "BFloat16Storage") => Self::Storage(Element::Bf16),
            ("torch", "FloatStorage") => Self::Storage(Element::F32),
            ("torch", "DoubleStorage") => Self::Storage(Element::F64),
            ("torch", "IntStorage") => Self::Storage(Element::I32),
            ("torch", "LongStorage") => Self::Storage(Element::I64),
            (
                "torch",
                "BoolStorage"
                | "ByteStorage"
                | "CharStorage"
                | "ShortStorage"
                | "ComplexFloatStorage"
                | "ComplexDoubleStorage",
            ) => Self::Storage(Element::Unused),
            _ => return None,
        })
    }
}
