"""Corruptions of values: lost signs and nibbles, flipped bits, and tables that went through too small a dtype."""

from collections.abc import Callable

import torch

from v4quant.checkpoint.reader import Checkpoint
from v4quant.names import Role
from v4quant.parity.selftest.corruption import (
    EXPERT_W1,
    EXPERT_W2,
    Corruption,
    change,
    experts_of,
    find,
    first,
    needs,
    needs_fp4,
)
from v4quant.parity.selftest.editor import Editor

_NO_TABLE = "no layer is hash-routed"
_NO_BIAS = "no router has a bias"
_NO_COMPRESSOR = "no layer has a compressor"
_NO_INDEXER = "no layer has an indexer"
# Codes of the nearest of 0, 1, 2, 4 to each E2M1 number: 0 0.5 1 1.5 2 3 4 6 -> 0 0 1 2 2 4 4 4.
_COARSE_E2M1 = torch.tensor([0, 0, 2, 4, 4, 6, 6, 6], dtype=torch.uint8)
_FP8_BLOCK = 128
_LARGEST_E4M3 = 448.0
# The first id that BF16 cannot hold is 257: it has eight bits.
_BF16_EXACT = 256


def lose_signs(codes: torch.Tensor, dtype: str) -> torch.Tensor:
    """Stored codes of the absolute values."""
    return codes.abs() if dtype == "BF16" else codes & {"I8": 0x77, "F8_E4M3": 0x7F}[dtype]


def lose_negative_zeros(codes: torch.Tensor, dtype: str) -> torch.Tensor:
    """Stored codes with +0 for -0."""
    if dtype == "BF16":
        return torch.where(codes == 0, torch.zeros_like(codes), codes)
    if dtype == "F8_E4M3":
        return torch.where(codes == 0x80, 0, codes)
    low, high = codes & 0x0F, codes & 0xF0
    return torch.where(low == 0x08, 0, low) | torch.where(high == 0x80, 0, high)


def swap_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Packed FP4 codes, odd columns in the low nibble."""
    return (codes << 4) | (codes >> 4)


def coarsen_fp4(codes: torch.Tensor) -> torch.Tensor:
    """Packed FP4 codes of the nearest of 0, 1, 2, 4 and their negatives."""
    low, high = (code & 8 | _COARSE_E2M1[(code & 7).long()] for code in (codes & 0xF, codes >> 4))
    return low | (high << 4)


def through_bf16(table: torch.Tensor) -> torch.Tensor:
    """float32 values rounded to BF16, in float32."""
    return table.bfloat16().float()


def through_fp8(matrix: torch.Tensor) -> torch.Tensor:
    """A BF16 matrix quantised to E4M3 in 128x128 blocks and back, as a quantiser does that takes every matrix."""
    values = matrix.float()
    for rows in torch.split(values, _FP8_BLOCK):
        for block in torch.split(rows, _FP8_BLOCK, dim=1):  # a view: written to in place
            scale = torch.exp2((block.abs().max().clamp(min=1e-4) / _LARGEST_E4M3).log2().ceil())
            block.copy_((block / scale).to(torch.float8_e4m3fn).float() * scale)
    return values.bfloat16()


def ids_through_bf16(table: torch.Tensor, experts: int) -> torch.Tensor:
    """What BF16 does to the ids of a model with 384 experts, done to a table of fewer.

    BF16 holds every id to 256 and of those above only the even ones. So that this shows with any number of experts, the
    upper half of the ids is moved above 256 for the cast. What would leave the table stays at its end.
    """
    offset = max(_BF16_EXACT - experts // 2, 0)
    return ((table + offset).bfloat16().long() - offset).clamp(max=experts - 1)


def _signs_lost(editor: Editor) -> None:
    name = first(editor.checkpoint, EXPERT_W1)
    change(editor, name, lambda codes: lose_signs(codes, editor.checkpoint.tensors[name].dtype))


def _weight_with_negative_zero(checkpoint: Checkpoint) -> str:
    """Name of the first routed expert's matrix that holds a -0; "" if none does."""
    reader = Editor(checkpoint)
    for name in find(checkpoint, EXPERT_W1) + find(checkpoint, EXPERT_W2):
        codes = reader.read(name)
        bits = codes.view(torch.uint8)
        if not torch.equal(lose_negative_zeros(codes, checkpoint.tensors[name].dtype).view(torch.uint8), bits):
            return name
    return ""


def _negative_zeros_lost(editor: Editor) -> None:
    name = _weight_with_negative_zero(editor.checkpoint)
    change(editor, name, lambda codes: lose_negative_zeros(codes, editor.checkpoint.tensors[name].dtype))


def _flip_code(codes: torch.Tensor) -> torch.Tensor:
    codes[-1, -1] ^= 0x20  # the odd column's: 0 becomes 1, 0.5 becomes 1.5
    return codes


def _coarsen_layer(editor: Editor) -> None:
    for parts in experts_of(editor.checkpoint, 0):
        if not parts.is_scale:
            change(editor, parts.name, coarsen_fp4)


def _flip_norm_bit(gain: torch.Tensor) -> torch.Tensor:
    gain.view(torch.int16)[-1] ^= 1
    return gain


def _put_nan(gain: torch.Tensor) -> torch.Tensor:
    gain[-1] = torch.nan
    return gain


def _in_first(
    edit: Callable[[torch.Tensor], torch.Tensor], module: str, leaf: str = "weight"
) -> Callable[[Editor], None]:
    """Change the first tensor of a module."""
    return lambda editor: change(editor, first(editor.checkpoint, module, leaf), edit)


def _in_all(roles: set[Role]) -> Callable[[Editor], None]:
    """Take float32 tables of these roles through BF16, in every block and outside."""

    def apply(editor: Editor) -> None:
        for name, parts in editor.checkpoint.parsed.items():
            if parts.role in roles and not parts.is_quantised and editor.checkpoint.tensors[name].dtype == "F32":
                change(editor, name, through_bf16)

    return apply


def _ids_through_bf16(editor: Editor) -> None:
    experts = editor.checkpoint.config.n_routed_experts
    for name in find(editor.checkpoint, "ffn.gate", "tid2eid"):
        change(editor, name, lambda table: ids_through_bf16(table, experts))


def _id_out_of_range(editor: Editor) -> None:
    experts = editor.checkpoint.config.n_routed_experts
    change(
        editor,
        first(editor.checkpoint, "ffn.gate", "tid2eid"),
        lambda table: torch.where(table == experts - 1, experts, table),
    )


CORRUPTIONS = (
    Corruption(
        "nibbles-swapped",
        "The two FP4 codes of each byte of an expert matrix changed places: packing conventions differ between tools.",
        _in_first(swap_nibbles, EXPERT_W1),
        needs_fp4,
    ),
    Corruption(
        "fp4-code-flipped",
        "One bit of one FP4 code of one expert is flipped.",
        _in_first(_flip_code, EXPERT_W2),
        needs_fp4,
    ),
    Corruption(
        "fp4-coarse-grid",
        "All experts of a layer were rounded to 0, 1, 2, 4 and their negatives, half of the FP4 grid.",
        _coarsen_layer,
        needs_fp4,
    ),
    Corruption(
        "negative-zeros-lost",
        "Every -0 of an expert matrix became +0, as in DeepSeek's own convert.py (11 % of packed bytes in one repack).",
        _negative_zeros_lost,
        lambda checkpoint: "" if _weight_with_negative_zero(checkpoint) else "no expert holds a -0",
    ),
    Corruption(
        "signs-lost",
        "An expert matrix lost its signs, as after a shift of int8 that should have been one of uint8 (canada-quant).",
        _signs_lost,
    ),
    Corruption(
        "norm-bit-flipped",
        "The lowest bit of one gain of one norm is flipped: a disk or memory error.",
        _in_first(_flip_norm_bit, "ffn_norm"),
    ),
    Corruption("norm-nan", "One gain of a norm is NaN.", _in_first(_put_nan, "ffn_norm")),
    Corruption(
        "norm-ones",
        "A norm that the loader did not find was filled with ones (TensorRT-LLM#16437).",
        _in_first(torch.ones_like, "attn.kv_norm"),
    ),
    Corruption(
        "fp32-tables-bf16",
        "Every FP32 table went through BF16 (transformers#46167 downcasts 417 tensors on saving); the dtype is kept.",
        _in_all({Role.ATTENTION, Role.HYPER_CONNECTIONS, Role.ROUTER, Role.COMPRESSOR, Role.INDEXER}),
    ),
    Corruption(
        "hc-bf16",
        "The hyper-connections went through BF16 (Automodel#2143: error 1.2e-2 instead of 1.4e-6); the dtype is kept.",
        _in_all({Role.HYPER_CONNECTIONS}),
    ),
    Corruption(
        "router-bias-bf16",
        "The router's bias, which decides close calls between experts, went through BF16.",
        _in_all({Role.ROUTER}),
        needs(_NO_BIAS, "ffn.gate", "bias"),
    ),
    Corruption(
        "router-bias-zero",
        "The router's bias was not found and filled with zeros.",
        _in_first(torch.zeros_like, "ffn.gate", "bias"),
        needs(_NO_BIAS, "ffn.gate", "bias"),
    ),
    Corruption(
        "gate-fp8",
        "A quantiser that takes every matrix took the router's gate to FP8 and back (Megatron-LM#5308).",
        _in_first(through_fp8, "ffn.gate"),
    ),
    Corruption(
        "compressor-fp8",
        "A quantiser that takes every matrix took a compressor to FP8 and back (auto-round#1776).",
        _in_first(through_fp8, "attn.compressor.wkv"),
        needs(_NO_COMPRESSOR, "attn.compressor.wkv"),
    ),
    Corruption(
        "attn-sink-zero",
        "The attention sinks were lost and filled with zeros (atlas#341: heads zeroed).",
        _in_first(torch.zeros_like, "attn", "attn_sink"),
    ),
    Corruption(
        "indexer-signs-lost",
        "The indexer's head weights lost their signs, so it picks other entries.",
        _in_first(torch.abs, "attn.indexer.weights_proj"),
        needs(_NO_INDEXER, "attn.indexer.weights_proj"),
    ),
    Corruption(
        "tid2eid-bf16",
        "The table of hash routing went through BF16, so odd expert ids in its upper part shift and tokens are "
        "misrouted in silence (verl-ascend-recipe#126).",
        _ids_through_bf16,
        needs(_NO_TABLE, "ffn.gate", "tid2eid"),
    ),
    Corruption(
        "tid2eid-out-of-range",
        "The last expert id of the hash table became one too high, as BF16 makes 384 of 383.",
        _id_out_of_range,
        needs(_NO_TABLE, "ffn.gate", "tid2eid"),
    ),
)
