"""The types that weights can have, and how closely two engines agree in each."""

from enum import Enum


class Precision(Enum):
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def stored(self) -> str:
        """As safetensors calls it."""
        return {Precision.FLOAT32: "F32", Precision.FLOAT16: "F16", Precision.BFLOAT16: "BF16"}[self]

    @property
    def tolerance(self) -> float:
        """How far a loss of the package may be from torch's. 16 bits are rounded after different operations in each."""
        return {Precision.FLOAT32: 2e-6, Precision.FLOAT16: 2e-3, Precision.BFLOAT16: 2e-2}[self]

    @property
    def canary_tolerance(self) -> float:
        """How far a worker's baseline may be from torch's loss: other devices add up in another order."""
        return {Precision.FLOAT32: 1e-3, Precision.FLOAT16: 2e-2, Precision.BFLOAT16: 1e-1}[self]
