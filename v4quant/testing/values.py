"""Values of synthetic tensors: they look like trained, quantised weights, and are made at memory speed.

Every tensor has its own random stream, keyed by seed and name, so the bytes depend neither on threads nor on how a
tensor is cut into pieces. Only raw 64-bit words and exact arithmetic are used, never a library's distributions or
logarithms, so they depend neither on the numpy version nor on the machine.

Large matrices go through tables of 65,536 entries: 16 random bits choose two bytes whose codes were drawn from the
wanted distribution. Weights have a standard deviation near 1 / sqrt(inputs), so activations of a forward pass stay
near 1.
"""

import hashlib
import math
from collections.abc import Iterator
from functools import cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from v4quant.config import V4Config
from v4quant.inventory import StoredTensor
from v4quant.names import Role, parse_name
from v4quant.numerics import bf16, e2m1, e4m3
from v4quant.numerics.e8m0 import E8M0_BIAS

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float64]
_Scalar = TypeVar("_Scalar", bound=np.generic)

# A piece fits a core's cache; a multiple of 128, so that a piece uses up whole random words for values and for peaks.
PIECE_BYTES = 256 * 2**10
TABLE_ENTRIES = 2**16

# Standard deviation of the stored codes, in units of the block scale. Scales are rounded up to a power of two, so the
# largest of a block lies in (3, 6] for E2M1 and (224, 448] for E4M3: about 2.5 deviations of 32 values, 4 of 16,384.
FP4_CODE_STD = 1.75
FP8_CODE_STD = 80.0

BLOCK = 128  # rows and columns of an FP8 block
FP4_GROUP = 32  # columns under one FP4 scale, 16 bytes
ZERO_BLOCK_ODDS = 64  # one 128x128 block in so many is all zeros
ZERO_GROUP_ODDS = 1024  # one FP4 group in so many is all zeros
# Scale bytes that DeepSeek's quantisers give an all-zero block, from their floors on its largest magnitude:
# FP4 6 * 2^-126, so 2^-126; FP8 1e-4, so 2^ceil(log2(1e-4 / 448)) = 2^-22.
FP4_ZERO_SCALE_E8M0 = 1
FP8_ZERO_SCALE_E8M0 = 105
# Exponents within a 128x128 block, by weight of 256, around the block's own: a spread of at most 2^6.
WITHIN_BLOCK = np.repeat(np.arange(-3, 4, dtype=np.int16), [1, 6, 60, 120, 60, 8, 1])
BETWEEN_BLOCKS = np.array([-1, 0, 0, 1], np.int16)


class Values:
    """The values of one synthetic checkpoint.

    Args:
        config: the model.
        seed: the same seed gives the same bytes.
    """

    def __init__(self, config: V4Config, seed: int) -> None:
        self._experts = config.n_routed_experts
        self._seed = seed

    def pieces(self, tensor: StoredTensor, weight: StoredTensor) -> Iterator[Bytes]:
        """Make the bytes of a tensor, piece by piece.

        Args:
            tensor: the tensor.
            weight: the matrix that a block scale belongs to; for every other tensor the tensor itself.

        Yields:
            uint8 [bytes], together as many as the tensor has.
        """
        if tensor is not weight:
            yield _as_bytes(self._scales(tensor, weight))
        elif tensor.dtype == "I8":
            yield from self._fp4_codes(tensor)
        elif tensor.dtype == "F8_E4M3":
            yield from self._fp8_codes(tensor)
        elif tensor.dtype == "BF16" and len(tensor.shape) == 2:
            is_embedding = tensor.role in (Role.EMBEDDING, Role.MTP_EMBEDDING)
            table = bf16_table(1.0 if is_embedding else 1 / math.sqrt(tensor.shape[1]))
            yield from looked_up(table, self._stream(tensor, "values"), tensor.bytes)
        elif tensor.dtype == "BF16":
            yield _as_bytes(bf16.encode(1 + 0.1 * normal(self._stream(tensor, "values"), tensor.shape)))  # norm gains
        elif tensor.dtype == "F32":
            yield _as_bytes(self._f32_table(tensor))
        else:
            assert tensor.dtype == "I64", f"{tensor.name}: no values for {tensor.dtype}"
            yield _as_bytes(self._expert_ids(tensor))

    def _stream(self, tensor: StoredTensor, purpose: str) -> np.random.SFC64:
        return stream(self._seed, tensor.name, purpose)

    def _fp4_codes(self, weight: StoredTensor) -> Iterator[Bytes]:
        """Two E2M1 codes a byte; every 32 values that share a scale hold a 4 or 6, or are all zeros."""
        peaks = self._stream(weight, "peaks")
        zeros = np.flatnonzero(self._zeros(weight))
        first = 0
        for piece in looked_up(fp4_table(), self._stream(weight, "values"), weight.bytes):
            groups = piece.size * 2 // FP4_GROUP
            draws = _words(peaks, -(-groups // 8)).view(np.uint8)[:groups]
            # A group is eight words: three bits say which of them becomes a peak, five which peak it becomes.
            piece.view(np.uint16)[8 * np.arange(groups) + (draws & 7)] = fp4_peaks()[draws >> 3]
            _clear(piece.reshape(groups, -1), zeros - first, keep=0x88)
            first += groups
            yield piece

    def _fp8_codes(self, weight: StoredTensor) -> Iterator[Bytes]:
        """E4M3 codes, never NaN; some 128x128 blocks are all zeros."""
        zeros = np.flatnonzero(np.repeat(self._zeros(weight), BLOCK, axis=0)[: weight.shape[0]])
        first = 0
        for piece in looked_up(fp8_table(), self._stream(weight, "values"), weight.bytes):
            if zeros.size:
                segments = piece.reshape(-1, BLOCK)
                _clear(segments, zeros - first, keep=0x80)
                first += len(segments)
            yield piece

    def _zeros(self, weight: StoredTensor) -> npt.NDArray[np.bool_]:
        """Which scales stand for zeros only: [out, in / 32] for FP4, [out / 128, in / 128] for FP8."""
        rows, columns = weight.shape
        grid = (-(-rows // BLOCK), -(-columns // BLOCK))
        draws = _words(self._stream(weight, "zero blocks"), math.prod(grid)).reshape(grid)
        blocks: npt.NDArray[np.bool_] = draws % ZERO_BLOCK_ODDS == 0
        if weight.dtype == "F8_E4M3":
            # Blocks that the row length does not fill do not lie at multiples of 128 bytes; such odd shapes do without.
            return blocks if columns % BLOCK == 0 else np.zeros_like(blocks)
        groups = columns // FP4_GROUP
        zeros = _expand(blocks, (rows, groups))
        singles = _words(self._stream(weight, "zero groups"), 1 + zeros.size // ZERO_GROUP_ODDS) % zeros.size
        zeros.flat[singles.astype(np.int64)] = True
        return zeros

    def _scales(self, scale: StoredTensor, weight: StoredTensor) -> npt.NDArray[np.generic]:
        """Block scales: uint8 E8M0 or float32 powers of two, in the shape of the header."""
        random = self._stream(scale, "values")
        grid = (-(-weight.shape[0] // BLOCK), -(-weight.shape[1] // BLOCK))
        offsets = BETWEEN_BLOCKS[_words(random, math.prod(grid)).reshape(grid) % 4]
        code_std, zero = FP8_CODE_STD * _rms(BETWEEN_BLOCKS), FP8_ZERO_SCALE_E8M0
        if weight.dtype == "I8":
            code_std = FP4_CODE_STD * _rms(BETWEEN_BLOCKS) * _rms(WITHIN_BLOCK)
            zero = FP4_ZERO_SCALE_E8M0
            draws = _words(random, -(-math.prod(scale.shape) // 8)).view(np.uint8)[: math.prod(scale.shape)]
            offsets = _expand(offsets, scale.shape) + WITHIN_BLOCK[draws].reshape(scale.shape)
        middle = E8M0_BIAS - round(math.log2(code_std * math.sqrt(weight.shape[1])))
        scale_e8m0 = np.where(self._zeros(weight), zero, middle + offsets)
        if scale.dtype == "F8_E8M0":
            return scale_e8m0.astype(np.uint8)
        powers: npt.NDArray[np.float32] = np.ldexp(np.float32(1), scale_e8m0 - E8M0_BIAS)
        return powers

    def _f32_table(self, tensor: StoredTensor) -> npt.NDArray[np.float32]:
        """Hyper-connections, attention sinks, position tables, router bias: as they must be for sane mixing."""
        parsed = parse_name(tensor.name)
        assert parsed is not None, f"{tensor.name} comes from the inventory"
        kind = parsed.leaf.rpartition("_")[2]  # hc_attn_fn, hc_head_fn, hc_ffn_fn: "fn"
        means = {"scale": 0.5}
        stds = {"fn": 1 / math.sqrt(tensor.shape[-1]), "scale": 0.1, "bias": 0.05}
        values = normal(self._stream(tensor, "values"), tensor.shape)
        return (means.get(kind, 0.0) + stds.get(kind, 0.5) * values).astype(np.float32)

    def _expert_ids(self, table: StoredTensor) -> npt.NDArray[np.int64]:
        """The experts of each token, [vocab, top k], distinct in a row: a progression modulo the number of experts."""
        vocab, top_k = table.shape
        words = _words(self._stream(table, "values"), 2 * vocab).reshape(2, vocab, 1)
        start = (words[0] % self._experts).astype(np.int64)
        step = (words[1] % (self._experts // top_k)).astype(np.int64) + 1  # top_k steps stay below one turn
        ids: npt.NDArray[np.int64] = (start + step * np.arange(top_k)) % self._experts
        return ids


def stream(seed: int, name: str, purpose: str) -> np.random.SFC64:
    """Random words that depend on nothing but the arguments."""
    digest = hashlib.sha256(f"{seed}\0{name}\0{purpose}".encode()).digest()
    return np.random.SFC64(np.frombuffer(digest, np.uint32))


def _words(random: np.random.SFC64, count: int) -> npt.NDArray[np.uint64]:
    return np.asarray(random.random_raw(count), np.uint64)


def normal(random: np.random.SFC64, shape: tuple[int, ...]) -> Floats:
    """Nearly Gaussian numbers of mean 0 and deviation 1, within 4.9: sums of eight 16-bit uniforms, scaled exactly."""
    words = _words(random, 2 * math.prod(shape)).view(np.uint16).reshape(*shape, 8)
    deviations: npt.NDArray[np.int64] = words.sum(axis=-1, dtype=np.int64) - 4 * 0xFFFF
    return deviations / math.sqrt(8 * (2.0**32 - 1) / 12)


def looked_up(table: Words, random: np.random.SFC64, size: int) -> Iterator[Bytes]:
    """Draw `size` bytes, two at a time, from a table, piece by piece."""
    for start in range(0, size, PIECE_BYTES):
        count = min(PIECE_BYTES, size - start)
        indices = _words(random, -(-count // 8)).view(np.uint16)
        # "wrap" spares the copy that bounds checking costs: every 16-bit index is within the table.
        yield table.take(indices, mode="wrap").view(np.uint8)[:count]


@cache
def fp4_table() -> Words:
    """Four E2M1 codes an entry, drawn from a Gaussian; about half of the zeros are -0."""
    values = normal(stream(0, "fp4 table", ""), (4 * TABLE_ENTRIES,)) * FP4_CODE_STD
    return e2m1.pack(e2m1.encode(values)).view(np.uint16)


@cache
def fp4_peaks() -> Words:
    """Table entries that hold a 4 or a 6 of either sign: magnitude codes 6 and 7."""
    table = fp4_table()
    has_peak: npt.NDArray[np.bool_] = (table & (table >> 1) & 0x2222) != 0  # bits 1 and 2 of a code are both set
    peaks = table[has_peak][:16]
    return np.concatenate([peaks, peaks ^ 0x8888])  # with their negatives: no bias


@cache
def fp8_table() -> Words:
    """Two E4M3 codes an entry, drawn from a Gaussian with a few outliers; none is NaN."""
    values = normal(stream(0, "fp8 table", ""), (2 * TABLE_ENTRIES,)) * FP8_CODE_STD
    values[::4096] *= 3
    return e4m3.encode(values).view(np.uint16)


@cache
def bf16_table(std: float) -> Words:
    """BF16 numbers drawn from a Gaussian of this deviation, with a few outliers and both zeros."""
    values = normal(stream(0, "bf16 table", ""), (TABLE_ENTRIES,)) * std
    values[::1024] *= 6
    values[:2] = 0.0, -0.0
    return bf16.encode(values)


def _expand(blocks: npt.NDArray[_Scalar], shape: tuple[int, ...]) -> npt.NDArray[_Scalar]:
    """From a value a 128x128 block to a value an FP4 group: [out / 128, in / 128] -> [out, in / 32]."""
    return np.repeat(np.repeat(blocks, BLOCK, axis=0), BLOCK // FP4_GROUP, axis=1)[: shape[0], : shape[1]]


def _clear(units: Bytes, zeros: npt.NDArray[np.int64], keep: int) -> None:
    """Turn the given rows into zeros that keep their signs; numbers outside are those of other pieces."""
    here = zeros[np.searchsorted(zeros, 0) : np.searchsorted(zeros, len(units))]
    units[here] &= np.uint8(keep)


def _rms(exponents: npt.NDArray[np.int16]) -> float:
    """Root mean square of 2^exponent: what scales of these exponents do to the deviation of the weights."""
    return math.sqrt(np.mean(np.ldexp(1.0, 2 * exponents)))


def _as_bytes(values: npt.NDArray[np.generic]) -> Bytes:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
