"""Triton bodies of fp4_expert_gemm: gate and up with SwiGLU and the quantiser, down, and the sum back to tokens.

Programs find their tile by themselves from the experts' offsets: no table to build, and the grid depends on shapes
alone. No product is split along K: one token's six experts already make 192 tiles of down in Flash and 336 in Pro, more
than any GPU has multiprocessors, and gate and up must see all of K before the SwiGLU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from v4quant.kernels._compile_case import TARGETS, TOKENS, CompileCase, Traffic, once
from v4quant.kernels._gemm_launch import SCALE_BLOCK, GemmLaunch, expert_launch
from v4quant.kernels._gemm_triton import add_fp4_product, add_fp8_product, load_activations
from v4quant.kernels._rounding_triton import bf16_bits, e4m3_byte, e8m0_byte, from_bf16_bits, power_of_two
from v4quant.kernels._target import target_of
from v4quant.kernels.expert_order import ExpertOrder, tile_bound

_SUM_BLOCK = 1024


@triton.jit
def _find_tile(offset_ptr, tile, E, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a tile (E or more behind the last), the tile's first row and the expert's last."""
    index = tl.arange(0, EXPERTS)
    start = tl.load(offset_ptr + index, mask=index < E, other=0)
    stop = tl.load(offset_ptr + index + 1, mask=index < E, other=0)
    end = tl.cumsum((stop - start + BLOCK_M - 1) // BLOCK_M, axis=0)  # tiles of all experts up to this one, [EXPERTS]
    expert = tl.sum((end <= tile).to(tl.int32), axis=0)
    before = tl.max(tl.where(end <= tile, end, 0), axis=0)
    mine = index == expert
    first = tl.sum(tl.where(mine, start, 0), axis=0) + (tile - before) * BLOCK_M
    return expert, first, tl.sum(tl.where(mine, stop, 0), axis=0) - 1


@triton.jit
def _add_product(
    acc, w_ptr, scale_ptr, expert, column, k, K, N, x, x_scale,
    FP4: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PATH: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """acc + w x for one step of K and BLOCK_N columns from `column` on of one expert."""
    first = expert * N + column  # the experts' matrices lie one below the other
    if FP4:
        acc = add_fp4_product(acc, w_ptr, scale_ptr, first, k, K, x, x_scale, BLOCK_N, BLOCK_K, PATH, COMPUTE)
    else:
        block = scale_ptr + (first // 128) * (K // 128) + k // 128
        row = first.to(tl.int64) + tl.arange(0, BLOCK_N)
        acc = add_fp8_product(acc, w_ptr, block, row, k, K, x, x_scale, BLOCK_K, PATH)
    return acc


@triton.jit
def _gate_up_kernel(
    x_ptr, x_scale_ptr, token_ptr, weight_ptr, offset_ptr, w1_ptr, w1_scale_ptr, w3_ptr, w3_scale_ptr,
    h_ptr, h_scale_ptr, E, K, N, limit,
    FP4: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PATH: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    expert, first, last = _find_tile(offset_ptr, tl.program_id(1), E, EXPERTS, BLOCK_M)
    if expert >= E:
        return
    column = tl.program_id(0) * BLOCK_N
    row = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    readable = tl.minimum(row, last)
    token = tl.load(token_ptr + readable).to(tl.int64)
    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        x, scale = load_activations(x_ptr, x_scale_ptr, token, k, K, BLOCK_M, BLOCK_K, PATH, COMPUTE)
        gate = _add_product(
            gate, w1_ptr, w1_scale_ptr, expert, column, k, K, N, x, scale, FP4, BLOCK_N, BLOCK_K, PATH, COMPUTE
        )
        up = _add_product(
            up, w3_ptr, w3_scale_ptr, expert, column, k, K, N, x, scale, FP4, BLOCK_N, BLOCK_K, PATH, COMPUTE
        )
    gate = tl.minimum(from_bf16_bits(bf16_bits(gate)), limit)
    up = tl.minimum(tl.maximum(from_bf16_bits(bf16_bits(up)), -limit), limit)
    h = gate / (1 + tl.exp(-gate)) * up * tl.load(weight_ptr + readable)[None, :]
    h = from_bf16_bits(bf16_bits(h))  # [BLOCK_N, BLOCK_M]
    byte = e8m0_byte(tl.maximum(tl.max(tl.abs(h), axis=0), 1e-4), 1 / 448)  # [BLOCK_M]
    code = e4m3_byte(h / power_of_two(byte)[None, :])
    mask = row <= last
    row = row.to(tl.int64)
    tl.store(h_ptr + row[None, :] * N + (column + tl.arange(0, BLOCK_N))[:, None], code, mask=mask[None, :])
    tl.store(h_scale_ptr + row * (N // BLOCK_N) + tl.program_id(0), byte.to(tl.uint8), mask=mask)


@triton.jit
def _down_kernel(
    h_ptr, h_scale_ptr, offset_ptr, w2_ptr, w2_scale_ptr, y_ptr, E, K, N,
    FP4: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PATH: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    expert, first, last = _find_tile(offset_ptr, tl.program_id(1), E, EXPERTS, BLOCK_M)
    if expert >= E:
        return
    column = tl.program_id(0) * BLOCK_N
    row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
    readable = tl.minimum(row, last)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        h, scale = load_activations(h_ptr, h_scale_ptr, readable, k, K, BLOCK_M, BLOCK_K, PATH, COMPUTE)
        acc = _add_product(
            acc, w2_ptr, w2_scale_ptr, expert, column, k, K, N, h, scale, FP4, BLOCK_N, BLOCK_K, PATH, COMPUTE
        )
    offset = row[None, :] * N + (column + tl.arange(0, BLOCK_N))[:, None]
    tl.store(y_ptr + offset, bf16_bits(acc), mask=(row <= last)[None, :])


@triton.jit
def _sum_kernel(y_ptr, row_ptr, out_ptr, N, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(SLOTS):
        row = tl.load(row_ptr + token * SLOTS + slot).to(tl.int64)
        y = tl.load(y_ptr + row * N + column, mask=column < tl.where(row >= 0, N, 0), other=0)
        total += from_bf16_bits(y)
    tl.store(out_ptr + token * N + column, total, mask=column < N)


def constants(choice: GemmLaunch, experts: int, fp4: bool, interpreted: bool) -> dict[str, Any]:
    """Compile-time arguments of both products."""
    return {
        "FP4": fp4,
        "EXPERTS": triton.next_power_of_2(experts),
        "BLOCK_M": choice.block_tokens,
        "BLOCK_N": choice.block_columns,
        "BLOCK_K": choice.block_k,
        "PATH": choice.path,
        # Triton's interpreter multiplies BF16 wrongly; in FP32 the products are the same numbers.
        "COMPUTE": tl.float32 if interpreted else tl.bfloat16,
    }


def _as_taken(matrices: tuple[torch.Tensor, ...], choice: GemmLaunch) -> tuple[Any, ...]:
    """Weights and scales in the form that add_fp4_product takes them in."""
    if choice.path == "upcast":
        return tuple(matrix.view(torch.int32) for matrix in matrices)
    if choice.path == "scaled":
        block = [choice.block_columns, choice.block_k // 2]
        flat = [matrix.flatten(0, 1) for matrix in matrices]  # [E N, .]
        return tuple(
            TensorDescriptor.from_tensor(matrix, block) if number % 2 == 0 else matrix
            for number, matrix in enumerate(flat)
        )
    return matrices


def launch(
    codes: torch.Tensor,
    scale_e8m0: torch.Tensor,
    order: ExpertOrder,
    matrices: tuple[torch.Tensor, ...],
    limit: float,
    choice: GemmLaunch | None = None,
) -> torch.Tensor:
    """Run the kernels; arguments are checked.

    Args:
        matrices: w1, its scale, w3, its scale, w2, its scale, all as bytes, FP32 scales excepted.
        choice: tiles, instead of those of expert_launch.
    """
    tokens, hidden = codes.shape
    experts, width = matrices[0].shape[:2]
    fp4 = matrices[0].shape[2] != hidden
    target = target_of(codes.device)
    choice = choice or expert_launch(order.rows, experts, target, fp4)
    w1, w1_scale, w3, w3_scale, w2, w2_scale = _as_taken(matrices, choice)
    device = codes.device
    out = torch.empty(tokens, hidden, dtype=torch.float32, device=device)
    if order.rows == 0:
        return out.zero_()
    h = torch.empty(order.rows, width, dtype=torch.uint8, device=device)
    h_scale = torch.empty(order.rows, width // 128, dtype=torch.uint8, device=device)
    y = torch.empty(order.rows, hidden, dtype=torch.uint16, device=device)
    tiles = tile_bound(order.rows, experts, choice.block_tokens)
    options = constants(choice, experts, fp4, target == "interpreter")
    options |= {"num_warps": choice.num_warps, "num_stages": choice.num_stages, "enable_fp_fusion": False}
    kernel: Any = _gate_up_kernel[(width // choice.block_columns, tiles)]
    kernel(
        *(codes.view(torch.uint8), scale_e8m0, order.token, order.weight, order.offset),
        *(w1, w1_scale, w3, w3_scale, h, h_scale, experts, hidden, width, float(limit)),
        **options,
    )
    kernel = _down_kernel[(hidden // choice.block_columns, tiles)]
    kernel(h, h_scale, order.offset, w2, w2_scale, y, experts, width, hidden, **options)
    kernel = _sum_kernel[(tokens, triton.cdiv(hidden, _SUM_BLOCK))]
    kernel(y, order.row, out, hidden, SLOTS=order.row.shape[1], BLOCK=_SUM_BLOCK, enable_fp_fusion=False)
    return out


# Sizes that a case stands for: token-expert pairs, experts, hidden size and width.
_SIZES = {
    "Flash 1 token": (6, 256, 4096, 2048),
    "Flash 2,048 tokens": (12288, 256, 4096, 2048),
    "Pro 8,192 tokens": (49152, 384, 7168, 3072),
}
_KERNELS = {"gate_up": _gate_up_kernel, "down": _down_kernel}


def _signature(kernel: Any, constexprs: dict[str, Any]) -> dict[str, str]:
    """Triton types of a product's arguments; FP8 experts have the float32 scales of the Base releases."""
    kinds = {name: "*u8" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    kinds |= {"token_ptr": "*i32", "offset_ptr": "*i32", "weight_ptr": "*fp32", "y_ptr": "*u16", "limit": "fp32"}
    weight, scale = {
        "upcast": ("*i32", "*i32"),
        "scaled": (f"tensordesc<u8[{SCALE_BLOCK}, {SCALE_BLOCK // 2}]>", "*u8"),
    }.get(constexprs["PATH"], ("*u8", "*fp32"))
    for number in (1, 2, 3):
        kinds |= {f"w{number}_ptr": weight, f"w{number}_scale_ptr": scale}
    kinds |= dict.fromkeys(constexprs, "constexpr")
    return {name: kinds[name] for name in kernel.arg_names}


def _traffic(name: str, size: str, fp4: bool, choice: GemmLaunch) -> Traffic:
    """Of a product where experts share the pairs evenly: every tile reads its rows of both operands."""
    rows, experts, hidden, width = _SIZES[size]
    matrices, columns, depth = (2, width, hidden) if name == "gate_up" else (1, hidden, width)
    busy = min(experts, rows)
    tiles = busy * -(-rows // busy // choice.block_tokens)
    weight = matrices * (columns * (depth // 2 + depth // 32) if fp4 else columns * depth + columns * depth // 4096)
    row = depth + depth // 128
    if name == "gate_up":
        row += 4 + 4  # token and weight
    out = rows * (columns + columns // 128 if name == "gate_up" else columns * 2)
    offsets = 8 * experts  # an expert's first and last row
    programs = columns // choice.block_columns
    moved = tiles * (weight + programs * (choice.block_tokens * row + offsets)) + out
    return Traffic(moved, busy * weight + rows * row + offsets // 2 + out)


def _case(name: str, size: str, fp4: bool, target: str) -> CompileCase:
    rows, experts, *_ = _SIZES[size]
    choice = expert_launch(rows, experts, target, fp4)
    constexprs = constants(choice, experts, fp4, interpreted=False)
    return CompileCase(
        f"expert {name} {'fp4' if fp4 else 'fp8'} {choice.path} {size}",
        _KERNELS[name],
        _signature(_KERNELS[name], constexprs),
        constexprs,
        _traffic(name, size, fp4, choice),
        frozenset({"E", "limit"}),
        choice.num_warps,
        choice.num_stages,
        multiplies=True,
        weight="w_ptr",
        targets=(target,),
    )


_SUM_CASE = CompileCase(
    "expert sum",
    _sum_kernel,
    {"y_ptr": "*u16", "row_ptr": "*i32", "out_ptr": "*fp32", "N": "i32", "SLOTS": "constexpr", "BLOCK": "constexpr"},
    {"SLOTS": 6, "BLOCK": _SUM_BLOCK},
    once(TOKENS * (6 * (4 * 4096 // _SUM_BLOCK + 2 * 4096) + 4 * 4096)),
)
# Tiles of FP8 weights are the same for 2,048 tokens and for more, and those of FP4 where they end at 64 tokens.
_WEIGHTS = [(fp4, size) for fp4 in (True, False) for size in ("Flash 1 token", "Pro 8,192 tokens")]
COMPILE_CASES = [
    _SUM_CASE,
    *(_case(name, size, fp4, target) for target in TARGETS for fp4, size in _WEIGHTS for name in _KERNELS),
    *(_case(name, "Flash 2,048 tokens", True, target) for target in ("sm_90", "sm_100") for name in _KERNELS),
]
