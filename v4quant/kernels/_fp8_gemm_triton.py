"""Triton bodies of fp8_gemm: one program for a tile of weight rows and tokens, transposed (see _gemm_launch.py).

Few tokens make few tiles: then several programs share the K of a tile, and another kernel adds their sums, in order
and without atomics, so that bits do not change from run to run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from v4quant.kernels._compile_case import TARGETS, CompileCase, Traffic, once
from v4quant.kernels._gemm_launch import SCALE_BLOCK, GemmLaunch, fp8_gemm_launch
from v4quant.kernels._gemm_triton import add_fp8_product, add_scaled_fp8_product, load_activations
from v4quant.kernels._rounding_triton import bf16_bits
from v4quant.kernels._target import target_of

# Tiles of tokens that are worked on side by side with the same weights, so that these are read from L2 and not again.
_GROUP = 8
_ADD_BLOCK = 512


@triton.jit
def _fp8_gemm_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, out_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PATH: tl.constexpr, GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    tl.static_assert(128 % BLOCK_N == 0, "a tile lies in one block of weight scales")
    tiles = tl.cdiv(M, BLOCK_M)
    number = tl.program_id(0)
    group = number // (GROUP * tl.cdiv(N, BLOCK_N)) * GROUP  # its first tile of tokens
    members = tl.minimum(tiles - group, GROUP)
    inside = number - group * tl.cdiv(N, BLOCK_N)
    token = (group + inside % members).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    first = inside // members * BLOCK_N
    column = first.to(tl.int64) + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # Rows beyond the end read the last one again: cheaper than masks in the loop, and what comes of it is not stored.
    readable, row = tl.minimum(token, M - 1), tl.minimum(column, N - 1)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    start, stop = 0, K
    if SPLITS > 1:
        share = tl.cdiv(K // BLOCK_K, SPLITS) * BLOCK_K
        start = tl.program_id(1) * share
        stop = tl.minimum(start + share, K)
        out_ptr += tl.program_id(1).to(tl.int64) * M * N
    for k in range(start, stop, BLOCK_K):
        x, scale = load_activations(x_ptr, x_scale_ptr, readable, k, K, BLOCK_M, BLOCK_K, PATH, tl.float32)
        w_scale = w_scale_ptr + (first // 128) * (K // 128) + k // 128
        if PATH == "scaled":
            acc = add_scaled_fp8_product(acc, w_ptr, w_scale, first, k, x, scale, BLOCK_N, BLOCK_K)
        else:
            acc = add_fp8_product(acc, w_ptr, w_scale, row, k, K, x, scale, BLOCK_K, PATH)
    mask = (token < M)[None, :] & (column < N)[:, None]
    tl.store(out_ptr + token[None, :] * N + column[:, None], bf16_bits(acc) if SPLITS == 1 else acc, mask=mask)


@triton.jit
def _add_splits_kernel(part_ptr, out_ptr, COUNT, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offset < COUNT
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(part_ptr + split * tl.cast(COUNT, tl.int64) + offset, mask=mask, other=0.0)
    tl.store(out_ptr + offset, bf16_bits(total), mask=mask)


def constants(choice: GemmLaunch) -> dict[str, Any]:
    """Compile-time arguments."""
    return {
        "BLOCK_M": choice.block_tokens,
        "BLOCK_N": choice.block_columns,
        "BLOCK_K": choice.block_k,
        "PATH": choice.path,
        "GROUP": _GROUP,
        "SPLITS": choice.splits,
    }


def launch(
    codes: torch.Tensor,
    scale_e8m0: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    choice: GemmLaunch | None = None,
) -> torch.Tensor:
    """Run the kernel; arguments are checked.

    Args:
        choice: tiles, instead of those of fp8_gemm_launch.
    """
    (tokens, depth), columns = codes.shape, weight.shape[0]
    out = torch.empty(tokens, columns, dtype=torch.bfloat16, device=codes.device)
    if out.numel() == 0:
        return out
    e8m0 = weight_scale.dtype == torch.uint8
    choice = choice or fp8_gemm_launch(tokens, columns, depth, target_of(codes.device), e8m0)
    codes_of_weight: Any = weight.view(torch.uint8)
    if choice.path == "scaled":
        codes_of_weight = TensorDescriptor.from_tensor(codes_of_weight, [choice.block_columns, choice.block_k])
    sums = out.view(torch.uint16)
    if choice.splits > 1:
        sums = torch.empty(choice.splits, tokens, columns, dtype=torch.float32, device=codes.device)
    grid = triton.cdiv(tokens, choice.block_tokens) * triton.cdiv(columns, choice.block_columns)
    kernel: Any = _fp8_gemm_kernel[(grid, choice.splits)]
    kernel(
        *(codes.view(torch.uint8), scale_e8m0, codes_of_weight, weight_scale, sums),
        *(tokens, columns, depth),
        **constants(choice),
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
        enable_fp_fusion=False,
    )
    if choice.splits > 1:
        kernel = _add_splits_kernel[(triton.cdiv(out.numel(), _ADD_BLOCK),)]
        kernel(sums, out.view(torch.uint16), out.numel(), SPLITS=choice.splits, BLOCK=_ADD_BLOCK)
    return out


_SIGNATURE: dict[str, str] = (
    dict.fromkeys(["x_ptr", "x_scale_ptr", "w_ptr", "w_scale_ptr"], "*u8")
    | {"out_ptr": "*u16"}
    | dict.fromkeys(["M", "N", "K"], "i32")
    | dict.fromkeys(["BLOCK_M", "BLOCK_N", "BLOCK_K", "PATH", "GROUP", "SPLITS"], "constexpr")
)
# Tokens, columns, depth, and scales: E8M0, or float32 in Base releases.
_SIZES = {
    "Flash wkv, 1 token": (1, 512, 4096, "*u8"),
    "Flash wq_b, 64 tokens": (64, 32768, 1024, "*u8"),
    "Pro wq_b, 8,192 tokens": (8192, 65536, 1536, "*u8"),
    "Pro-Base wo_b, 8,192 tokens": (8192, 7168, 16384, "*fp32"),
}


def _traffic(tokens: int, columns: int, depth: int, scale_bytes: int, choice: GemmLaunch) -> Traffic:
    """Every tile reads its rows of both operands; splits write their sums."""
    across, along = -(-columns // choice.block_columns), -(-tokens // choice.block_tokens)
    blocks = depth // SCALE_BLOCK
    x, w, out = depth + blocks, depth, tokens * columns
    tile = choice.block_tokens * x + choice.block_columns * w + blocks * scale_bytes
    written = out * (2 if choice.splits == 1 else 4 * choice.splits)
    least = tokens * x + columns * w + -(-columns // SCALE_BLOCK) * blocks * scale_bytes + 2 * out
    return Traffic(across * along * tile + written, least)


def _case(name: str, target: str) -> CompileCase:
    tokens, columns, depth, scale = _SIZES[name]
    choice = fp8_gemm_launch(tokens, columns, depth, target, scale == "*u8")
    signature = _SIGNATURE | {"w_scale_ptr": scale}
    if choice.path == "scaled":
        signature |= {"w_ptr": f"tensordesc<u8[{choice.block_columns}, {choice.block_k}]>"}
    if choice.splits > 1:
        signature |= {"out_ptr": "*fp32"}
    return CompileCase(
        f"fp8_gemm {choice.path} {name}",
        _fp8_gemm_kernel,
        signature,
        constants(choice),
        _traffic(tokens, columns, depth, 1 if scale == "*u8" else 4, choice),
        frozenset({"M"}),
        choice.num_warps,
        choice.num_stages,
        multiplies=True,
        weight="w_ptr",
        targets=(target,),
    )


_ADD_CASE = CompileCase(
    "fp8_gemm add 8 splits",
    _add_splits_kernel,
    {"part_ptr": "*fp32", "out_ptr": "*u16", "COUNT": "i32", "SPLITS": "constexpr", "BLOCK": "constexpr"},
    {"SPLITS": 8, "BLOCK": _ADD_BLOCK},
    once(1536 * (8 * 4 + 2)),  # Pro's wq_a for one token
)
COMPILE_CASES = [_ADD_CASE, *(_case(name, target) for target in TARGETS for name in _SIZES)]
