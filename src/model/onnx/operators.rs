//! What operators do with the values of their inputs.

use super::proto::{BOOL, INT64};

/// Inputs that determine shapes, sizes, iteration counts or axes, for operators of ONNX and of ONNX
/// Runtime. Nearly all of them are integers, so a weight that is cast to an integer counts as well,
/// whatever reads it: no gradient passes such a Cast.
pub(super) const SHAPE_INPUTS: [(&str, &[usize]); 54] = [
    ("AffineGrid", &[1]),
    ("BeamSearch", &[1, 2, 3, 4]),
    ("BlackmanWindow", &[0]),
    ("CenterCropPad", &[1]),
    ("Col2Im", &[1, 2]),
    ("Compress", &[1]),
    ("ConstantOfShape", &[0]),
    ("ConvTransposeWithDynamicPads", &[2]),
    ("CropAndResize", &[3]),
    ("CumProd", &[1]),
    ("CumSum", &[1]),
    ("DFT", &[1, 2]),
    ("Expand", &[1]),
    ("ExpandDims", &[1]),
    ("GreedySearch", &[1, 2]),
    ("GroupQueryAttention", &[5, 6]),
    ("HammingWindow", &[0]),
    ("HannWindow", &[0]),
    ("Loop", &[0, 1]),
    ("MaxUnpool", &[2]),
    ("MelWeightMatrix", &[0, 1]),
    ("NonMaxSuppression", &[2, 3, 4]),
    ("NonZero", &[0]),
    ("OneHot", &[1]),
    ("Pad", &[1, 3]),
    ("Range", &[0, 1, 2]),
    ("ReduceL1", &[1]),
    ("ReduceL2", &[1]),
    ("ReduceLogSum", &[1]),
    ("ReduceLogSumExp", &[1]),
    ("ReduceMax", &[1]),
    ("ReduceMean", &[1]),
    ("ReduceMin", &[1]),
    ("ReduceProd", &[1]),
    ("ReduceSum", &[1]),
    ("ReduceSumSquare", &[1]),
    ("RelativePositionBias", &[1, 2]),
    ("Reshape", &[1]),
    ("Resize", &[1, 2, 3]),
    ("STFT", &[1, 3]),
    ("Sampling", &[1, 2]),
    ("SequenceAt", &[1]),
    ("SequenceErase", &[1]),
    ("SequenceInsert", &[2]),
    ("Slice", &[1, 2, 3, 4]),
    ("Split", &[1]),
    ("SplitToSequence", &[1]),
    ("Squeeze", &[1]),
    ("Tile", &[1, 2]),
    ("TopK", &[1]),
    ("Unique", &[0]),
    ("Unsqueeze", &[1]),
    ("Upsample", &[1]),
    ("WhisperBeamSearch", &[1, 2, 3, 4]),
];

/// Operators whose outputs hold only values of their first input.
pub(super) const PASS_THROUGH: [&str; 12] = [
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
    "Cast",
];

/// The element types of an operator's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Made {
    /// That of an input.
    Like(usize),
    /// Always this one.
    Always(i32),
    /// What its attribute says.
    Cast,
    /// Values of the first input, and where they were.
    Found,
}

/// What an operator makes, if that is known here. Those that make integers of any input, and those
/// that keep integers as they are, suffice: what is not known may be floating point.
pub(super) fn made_type(op: &str) -> Option<Made> {
    Some(match op {
        "Cast" => Made::Cast,
        "TopK" | "Unique" => Made::Found,
        "ArgMax" | "ArgMin" | "NonZero" | "SequenceLength" | "Shape" | "Size" => {
            Made::Always(INT64)
        }
        "And" | "Equal" | "Greater" | "GreaterOrEqual" | "IsInf" | "IsNaN" | "Less"
        | "LessOrEqual" | "Not" | "Or" | "Xor" => Made::Always(BOOL),
        "Where" => Made::Like(1),
        "OneHot" => Made::Like(2),
        "Abs" | "Add" | "BitShift" | "BitwiseAnd" | "BitwiseNot" | "BitwiseOr" | "BitwiseXor"
        | "Clip" | "Compress" | "Concat" | "CumSum" | "Div" | "Expand" | "Flatten" | "Gather"
        | "GatherElements" | "GatherND" | "Identity" | "Max" | "MemcpyFromHost"
        | "MemcpyToHost" | "Min" | "Mod" | "Mul" | "Neg" | "Pad" | "Pow" | "Range"
        | "ReduceMax" | "ReduceMin" | "ReduceProd" | "ReduceSum" | "Reshape"
        | "ReverseSequence" | "ScatterElements" | "ScatterND" | "Sign" | "Slice" | "Split"
        | "Squeeze" | "Sub" | "Sum" | "Tile" | "Transpose" | "Trilu" | "Unsqueeze" => Made::Like(0),
        _ => return None,
    })
}
