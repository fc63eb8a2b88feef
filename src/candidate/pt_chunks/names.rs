//! The names that a pickle may contain. Every other name is refused; none is ever executed.

/// A name that a pickle may contain, by its meaning here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Name {
    /// The type of a storage.
    Storage(Element),
    /// `_rebuild_tensor_v2`
    RebuildTensor,
    /// Wraps a tensor as a parameter.
    RebuildParameter,
    /// Calls another of these names and adds attributes.
    RebuildFromType,
    /// Creates an empty map.
    EmptyMap,
    /// Converts text to bytes.
    Encode,
    /// Copies bytes, or creates empty ones.
    Bytes,
    /// A shape, read as a tuple.
    Size,
    /// A numpy dtype.
    NumpyType,
    /// A numpy scalar.
    NumpyScalar,
    /// Metadata: neither the name nor what it creates matters to a candidate.
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
    /// An integer or boolean type that no part of a candidate may have.
    Integer,
    /// Any other type that no part of a candidate may have.
    Unused,
}

impl Element {
    /// Size in bytes.
    pub(super) fn size(self) -> u64 {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::F64 | Self::I64 => 8,
            Self::Integer | Self::Unused => 0,
        }
    }
}

impl Name {
    pub(super) fn find(module: &str, name: &str) -> Option<Self> {
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
    /// The element type of a torch storage class.
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

/// The module of Python's builtins, in protocol 2 and in later ones.
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

/// Whether a name stands for plain metadata that writers add to the data: a type, a date, a set. They
/// are all read as opaque values.
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

/// Whether it names a torch dtype: `float32`, `float8_e4m3fn`, `bool`.
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
