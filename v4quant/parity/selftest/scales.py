"""Corruptions of block scales: lost exponents, bytes read as numbers, scales in another matrix's or block's place.

A scale is an E8M0 byte or, in the Base releases, a float32; see encodings.py.
"""

from collections.abc import Callable

import torch

from v4quant.checkpoint.reader import Checkpoint
from v4quant.encodings import Block
from v4quant.names import Role, scale_name
from v4quant.parity.selftest.corruption import (
    EXPERT_W1,
    EXPERT_W2,
    EXPERT_W3,
    Corruption,
    change,
    exchange,
    first,
    needs_expert_scales,
)
from v4quant.parity.selftest.editor import Editor

E8M0_BIAS = 127
E8M0_LARGEST = 254
E8M0_NAN = 255
# Codes of twice the E2M1 number, 6 where that is beyond 6: 0 0.5 1 1.5 2 3 4 6 -> 0 1 2 3 4 6 6 6.
_TWICE_E2M1 = torch.tensor([0, 2, 4, 5, 6, 7, 7, 7], dtype=torch.uint8)
_LARGEST_E4M3 = 448.0


def times_power_of_two(scale: torch.Tensor, exponent: int) -> torch.Tensor:
    """Scales of 2 ** exponent times the value, as they are stored."""
    if scale.dtype == torch.uint8:
        return (scale.int() + exponent).clamp(0, E8M0_LARGEST).to(torch.uint8)
    return scale * 2.0**exponent


def byte_as_number(scale: torch.Tensor) -> torch.Tensor:
    """The exponent byte taken for the value, 120 instead of 2 ** -7: in float32 as it is, in E8M0 the nearest power."""
    if scale.dtype == torch.uint8:
        return (E8M0_BIAS + scale.clamp(min=1).float().log2().round()).to(torch.uint8)
    return scale.log2().round() + E8M0_BIAS


def twice_in_fp4(codes: torch.Tensor) -> torch.Tensor:
    """Packed E2M1 codes of twice the numbers, saturated."""
    low, high = codes & 0xF, codes >> 4
    low, high = ((code & 8) | _TWICE_E2M1[(code & 7).long()] for code in (low, high))
    return low | (high << 4)


def twice_in_fp8(codes: torch.Tensor) -> torch.Tensor:
    """E4M3 codes of twice the numbers, saturated."""
    values = codes.view(torch.float8_e4m3fn).float() * 2
    return values.clamp(-_LARGEST_E4M3, _LARGEST_E4M3).to(torch.float8_e4m3fn).view(torch.uint8)


def _expert_scale(module: str) -> Callable[[Checkpoint], str]:
    return lambda checkpoint: scale_name(first(checkpoint, module))


def _in_scale(edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Editor], None]:
    """Change the scale of the first expert's w2."""
    return lambda editor: change(editor, _expert_scale(EXPERT_W2)(editor.checkpoint), edit)


def _in_one_block(edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Editor], None]:
    """Change one scale of the first expert's w2, the last."""

    def of_all(scale: torch.Tensor) -> torch.Tensor:
        scale[-1, -1] = edit(scale[-1, -1])
        return scale

    return _in_scale(of_all)


def _nan(scale: torch.Tensor) -> torch.Tensor:
    return torch.full_like(scale, E8M0_NAN if scale.dtype == torch.uint8 else torch.nan)


def _saturate(editor: Editor) -> None:
    weight = first(editor.checkpoint, EXPERT_W2)
    change(editor, weight, twice_in_fp4 if editor.checkpoint.scheme.expert.name == "fp4" else twice_in_fp8)
    change(editor, scale_name(weight), lambda scale: times_power_of_two(scale, -1))


def _number_every_scale(editor: Editor) -> None:
    for name in _e8m0_scales(editor.checkpoint):
        editor.write(name, editor.read(name).float(), "F32")


def _e8m0_scales(checkpoint: Checkpoint) -> list[str]:
    return [name for name, entry in checkpoint.tensors.items() if entry.dtype == "F8_E8M0"]


def _exchange_w1_w3(editor: Editor) -> None:
    exchange(editor, *(_expert_scale(module)(editor.checkpoint) for module in (EXPERT_W1, EXPERT_W3)))


def _take_larger(editor: Editor) -> None:
    one, other = (_expert_scale(module)(editor.checkpoint) for module in (EXPERT_W1, EXPERT_W3))
    larger = torch.maximum(editor.read(one), editor.read(other))
    editor.write(one, larger)
    editor.write(other, larger)


def _grid(checkpoint: Checkpoint, rows: int, columns: int) -> str:
    """Name of the first attention scale, else of any, with at least so many rows and columns of 128x128 blocks."""
    found = [
        (parts.role is not Role.ATTENTION, parts.index, name)
        for name, parts in checkpoint.parsed.items()
        if parts.is_scale
        and parts.block == "layers"
        and _block_of(checkpoint, parts.role) == (128, 128)
        and all(size >= least for size, least in zip(checkpoint.tensors[name].shape, (rows, columns), strict=True))
    ]
    return min(found)[2] if found else ""


def _block_of(checkpoint: Checkpoint, role: Role) -> Block | None:
    scheme = checkpoint.scheme
    return (scheme.expert if role is Role.ROUTED_EXPERTS else scheme.dense).block


def _needs_grid(rows: int, columns: int) -> Callable[[Checkpoint], str]:
    def applies(checkpoint: Checkpoint) -> str:
        if checkpoint.scheme.dense.block is None:
            return "bf16 has no scales"
        return "" if _grid(checkpoint, rows, columns) else f"no FP8 matrix of {rows} x {columns} blocks"

    return applies


def _transpose(editor: Editor) -> None:
    change(editor, _grid(editor.checkpoint, 2, 2), lambda scale: scale.t().reshape(scale.shape))


def _shift_rows(editor: Editor) -> None:
    change(editor, _grid(editor.checkpoint, 2, 1), lambda scale: scale.roll(1, 0))


CORRUPTIONS = (
    Corruption(
        "scale-exponent-off",
        "All scales of one expert matrix are off by one exponent, so its values are doubled.",
        _in_scale(lambda scale: times_power_of_two(scale, 1)),
        needs_expert_scales,
    ),
    Corruption(
        "scale-block-halved",
        "One block's scale was rounded down instead of up, by one exponent; its codes were made for the larger one.",
        _in_one_block(lambda scale: times_power_of_two(scale, -1)),
        needs_expert_scales,
    ),
    Corruption(
        "scale-saturated",
        "A quantiser rounded scales down instead of up, and the largest values of each block saturate (mlxcel#1772).",
        _saturate,
        needs_expert_scales,
    ),
    Corruption(
        "scale-byte-as-number",
        "A scale's exponent byte was read as a number: 2^-7 became 120 (vllm#43416, about 1e40 off, no error).",
        _in_scale(byte_as_number),
        needs_expert_scales,
    ),
    Corruption(
        "scales-stored-as-numbers",
        "Every E8M0 scale was cast to float32 as if its byte were its value, so headers look like a Base release's.",
        _number_every_scale,
        lambda checkpoint: "" if _e8m0_scales(checkpoint) else "no scale is stored as E8M0",
    ),
    Corruption(
        "scale-nan",
        "One scale is NaN (E8M0 byte 255), which decoders read as NaN, infinity or 2^128.",
        _in_one_block(_nan),
        needs_expert_scales,
    ),
    Corruption(
        "scale-transposed",
        "The block scales of an FP8 matrix were written in the order of the transposed matrix.",
        _transpose,
        _needs_grid(2, 2),
    ),
    Corruption(
        "scale-rows-shifted",
        "The block scales of an FP8 matrix lie one row of blocks too low, as after slicing weight and scale apart.",
        _shift_rows,
        _needs_grid(2, 1),
    ),
    Corruption(
        "scales-w1-w3-exchanged",
        "The scales of an expert's w1 and w3 were exchanged, the codes were not.",
        _exchange_w1_w3,
        needs_expert_scales,
    ),
    Corruption(
        "scales-w1-w3-larger",
        "A loader that fuses w1 and w3 kept the larger scale of both (vllm#54974; 69 % of pairs differ in NVFP4).",
        _take_larger,
        needs_expert_scales,
    ),
)
