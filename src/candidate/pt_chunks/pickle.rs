//! Reads the subset of pickle in which `torch.save` writes plain containers and tensors. Nothing is
//! executed: a callable must be one of [`Name`], and calling it only creates a [`Value`], usually an
//! opaque one. Text and bytes borrow from the pickle, and memory grows with the steps, which are
//! limited.

use std::collections::HashMap;

use super::names::Name;
use super::value::{Id, Pickle, Storage, Tensor, Value, long, numpy_scalar};
use super::{MOST_DIMENSIONS, shorten};

/// Arguments of a call that are examined. A pickle can reuse one long tuple many times.
const MOST_ARGUMENTS: usize = 6;

/// Why a pickle cannot be read.
pub(super) enum Problem {
    /// It is not a pickle, or holds more than containers and tensors.
    Malformed(String),
    /// It exceeds the step limit.
    TooLong,
}

/// Reads a pickle in at most `most_steps` steps.
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

fn utf8(bytes: &[u8]) -> Result<&str, Problem> {
    std::str::from_utf8(bytes).or_else(|_| malformed("text that is not UTF-8"))
}

/// The stack machine that executes a pickle, without the ability to call anything.
struct Machine<'a> {
    rest: &'a [u8],
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    /// Executes one operation; true at the end.
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

    /// A literal value.
    fn plain(&mut self, operation: u8) -> Result<Value<'a>, Problem> {
        Ok(match operation {
            b'N' => Value::None,
            // Booleans, and a set, whose items follow.
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

    /// Bytes prefixed by their length, which takes N bytes.
    fn counted<const N: usize>(&mut self) -> Result<&'a [u8], Problem> {
        let mut length = [0; 8];
        length[..N].copy_from_slice(&self.take_array::<N>()?);
        // A length beyond the address space exceeds the pickle in any case.
        let length = usize::try_from(u64::from_le_bytes(length)).unwrap_or(usize::MAX);
        self.take(length)
    }

    fn text<const N: usize>(&mut self) -> Result<&'a str, Problem> {
        utf8(self.counted::<N>()?)
    }

    fn line(&mut self) -> Result<&'a str, Problem> {
        let end = self.rest.iter().take(1000).position(|b| *b == b'\n');
        let Some(end) = end else {
            return malformed("a name without an end");
        };
        let line = self.take(end)?;
        self.take(1)?;
        utf8(line)
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

    /// The first values of a tuple. No call needs more, and a pickle can reuse a long tuple many times.
    fn first_of(&self, tuple: Id) -> Option<Vec<&Value<'a>>> {
        let Value::Tuple(items) = self.get(tuple) else {
            return None;
        };
        Some(self.arguments(items))
    }

    fn arguments(&self, items: &[Id]) -> Vec<&Value<'a>> {
        let items = items.iter().take(MOST_ARGUMENTS);
        items.map(|id| self.get(*id)).collect()
    }

    fn remember_or_recall(&mut self, operation: u8) -> Result<(), Problem> {
        let recalls = matches!(operation, b'h' | b'j');
        let key = match operation {
            b'q' | b'h' => self.take_array::<1>()?[0].into(),
            b'r' | b'j' => u32::from_le_bytes(self.take_array()?),
            // MEMOIZE stores under the next number.
            _ => u32::try_from(self.memo.len()).unwrap_or(u32::MAX),
        };
        let id = match recalls {
            true => self.memo.get(&key).copied(),
            false => self.stack.last().copied(),
        };
        let Some(id) = id else {
            return malformed("the pickle reads a memo entry that it never stored");
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
            return malformed("the pickle appends to something other than a list");
        }
        Ok(())
    }

    /// Sets are metadata, so their items are dropped.
    fn build_set(&mut self, operation: u8) -> Result<(), Problem> {
        drop(self.pop_mark()?);
        if operation == 0x91 {
            return self.push(Value::Other);
        }
        let Value::Other = self.top()? else {
            return malformed("the pickle adds to something other than a set");
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
            return malformed("the pickle sets a key of something other than a map");
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
                _ => return malformed("a name that is not text"),
            }
        };
        let Some(known) = Name::find(module, name) else {
            let (module, name) = (shorten(module), shorten(name));
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
            return malformed("a storage that is not described as torch describes it");
        };
        let Ok(elements) = u64::try_from(*elements) else {
            return malformed("a storage with a negative number of elements");
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
            return malformed("the pickle calls something other than a name");
        };
        let made = self.make(*name, &arguments)?;
        self.push(made)
    }

    /// The value that a call makes of its first arguments. Flags and hooks follow them.
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
                return self.make(*name, &self.arguments(inner));
            }
            // A `defaultdict` also names its factory.
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
                    "the pickle calls {name:?} with arguments that torch does not use"
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

    /// Drops attributes, which no candidate needs.
    fn set_state(&mut self) -> Result<(), Problem> {
        self.pop()?;
        let (Value::Map(_) | Value::Other | Value::NumpyType(_)) = self.top()? else {
            return malformed("the pickle sets the state of a value that has none");
        };
        Ok(())
    }
}
