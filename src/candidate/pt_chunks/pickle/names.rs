//! The names that a pickle may contain. Every other name is refused; none is ever executed.

/// A name that may stand in a pickle, and what it means here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::candidate::pt_chunks) enum Name {
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
pub(in crate::candidate::pt_chunks) enum Element {
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
    pub(in crate::candidate::pt_chunks) fn size(self) -> u64 {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::F64 | Self::I64 => 8,
            Self::Integer | Self::Unused => 0,
        }
    }
}

impl Name {
    pub(in crate::candidate::pt_chunks) fn find(module: &str, name: &str) -> Option<Self> {
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

/// Builtins that stand for plain values.
const PLAIN_BUILTINS: [&str; 17] = [
    "set",
    "frozenset",
    "complex",
    "list",
    "tuple",
    "int",
    "long",
    "float",
    "bool",
    "str",
    "unicode",
    "object",
    "slice",
    "range",
    "xrange",
    "Ellipsis",
    "NotImplemented",
];

/// Whether a name stands for a plain value that writers put beside the data: a type, a date, a set. All
/// are alike here, and whatever is made of them is not made.
fn is_remark(module: &str, name: &str) -> bool {
    match module {
        "torch" | "torch.serialization" | "torch._utils" => is_torch_remark(module, name),
        "torch.nn.parameter" => matches!(name, "Parameter" | "Buffer"),
        "numpy" => name == "ndarray",
        "numpy.core.multiarray" | "numpy._core.multiarray" => name == "_reconstruct",
        "numpy.core.numeric" | "numpy._core.numeric" => name == "_frombuffer",
        BUILTINS_2 | BUILTINS => PLAIN_BUILTINS.contains(&name),
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

fn is_torch_remark(module: &str, name: &str) -> bool {
    match module {
        "torch" => {
            is_element_type(name)
                || name.starts_with("per_tensor_")
                || name.starts_with("per_channel_")
                || matches!(name, "device" | "Tensor" | "strided" | "sparse_coo")
        }
        "torch.serialization" => name == "_get_layout",
        _ => matches!(
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
