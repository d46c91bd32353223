"""How a weight matrix is stored: the dtype of its codes, the dtype and block of its scales, and the shapes of both.

`shape` is always the logical one, [out, in]; `storage_shape` is what the header says. A `Scheme` names the two
encodings of a whole checkpoint: one for routed experts, one for every other quantised matrix.
"""

from dataclasses import dataclass
from typing import NamedTuple

Shape = tuple[int, ...]


class Block(NamedTuple):
    """The weights that share one scale: `rows` output rows by `columns` input columns."""

    rows: int
    columns: int


@dataclass(frozen=True)
class Encoding:
    """One way to store a weight matrix.

    Attributes:
        name: as printed, for example "fp4".
        weight_dtype: header dtype of the codes.
        scale_dtype: header dtype of the block scales; "" where there are none.
        block: weights under one scale; None where there are no scales.
        values_a_byte: 2 where two FP4 codes share a byte (even column in the low nibble), else 1.
    """

    name: str
    weight_dtype: str
    scale_dtype: str = ""
    block: Block | None = None
    values_a_byte: int = 1

    def storage_shape(self, shape: Shape) -> Shape:
        """Header shape of the codes of a logical [out, in] matrix.

        Raises:
            ValueError: if the rows do not fill whole bytes or, for one-row blocks, whole blocks.
        """
        rows, columns = shape
        if self.block is not None and self.block.rows == 1 and columns % self.block.columns:
            raise ValueError(f"{self.name} needs rows of a multiple of {self.block.columns} columns, found {columns}")
        return (rows, columns // self.values_a_byte)

    def scale_shape(self, shape: Shape) -> Shape:
        """Header shape of the scales of a logical [out, in] matrix; edge blocks count as whole ones."""
        assert self.block is not None, f"{self.name} has no scales"
        rows, columns = shape
        return (-(-rows // self.block.rows), -(-columns // self.block.columns))

    def logical_shape(self, storage_shape: Shape) -> Shape:
        """Logical [out, in] of codes with this header shape."""
        rows, columns = storage_shape
        return (rows, columns * self.values_a_byte)


# facts: DeepSeek-V4 stores routed experts as two E2M1 codes a byte with an E8M0 scale for 32 inputs of a row, and
# every other quantised matrix as E4M3 with an E8M0 scale for 128x128 weights. The Base releases hold F32 scales.
FP4 = Encoding("fp4", "I8", "F8_E8M0", Block(1, 32), values_a_byte=2)
FP8 = Encoding("fp8", "F8_E4M3", "F8_E8M0", Block(128, 128))
FP8_F32_SCALE = Encoding("fp8-f32-scale", "F8_E4M3", "F32", Block(128, 128))
BF16 = Encoding("bf16", "BF16")


@dataclass(frozen=True)
class Scheme:
    """The encodings of one checkpoint: routed experts, and every other matrix that a release quantises."""

    name: str
    expert: Encoding
    dense: Encoding

    def encoding(self, kind: str) -> Encoding:
        """The encoding of an "expert" or a "dense" matrix (inventory.LogicalTensor.kind)."""
        return {"expert": self.expert, "dense": self.dense}[kind]


NATIVE_SCHEME = Scheme("native", expert=FP4, dense=FP8)
FP8_SCHEME = Scheme("fp8", expert=FP8, dense=FP8)
BASE_SCHEME = Scheme("base", expert=FP8_F32_SCALE, dense=FP8_F32_SCALE)
BF16_SCHEME = Scheme("bf16", expert=BF16, dense=BF16)
SCHEMES: dict[str, Scheme] = {s.name: s for s in (NATIVE_SCHEME, FP8_SCHEME, BASE_SCHEME, BF16_SCHEME)}
