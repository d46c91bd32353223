"""Triton bodies of hyper_mix that find the mixes: project (split along columns) and gate (a tile of tokens).

The projection's partial sums are added in order by the gate, without atomics: bits do not change from run to run.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from v4quant.kernels._compile_case import TARGETS, TOKENS, CompileCase, Traffic
from v4quant.kernels._hyper_streams_triton import weighted_sum
from v4quant.kernels._rounding_triton import from_bf16_bits
from v4quant.kernels._target import capability, target_of

# Columns of a partial sum: decode of one token still fills 16 (Flash) or 28 (Pro) multiprocessors.
SPLIT = 1024
GATE_TOKENS = 32  # of one warp


@triton.jit
def _project_kernel(
    x_ptr,
    fn_ptr,
    part_ptr,
    square_ptr,
    T,
    K,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    split = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)  # [ROWS], of fn
    part = tl.zeros([TOKENS, ROWS], tl.float32)
    square = tl.zeros([TOKENS], tl.float32)
    for first in range(0, SPLIT, BLOCK):
        column = split * SPLIT + first + tl.arange(0, BLOCK)  # [BLOCK]
        inside = (column < K)[None, :]
        bits = tl.load(x_ptr + token[:, None] * K + column, mask=(token < T)[:, None] & inside, other=0)
        x = from_bf16_bits(bits)  # [TOKENS, BLOCK]
        fn = tl.load(fn_ptr + row[:, None].to(tl.int64) * K + column, mask=(row < N)[:, None] & inside, other=0.0)
        part = tl.dot(x, tl.trans(fn), part, input_precision=PRECISION)
        square += tl.sum(x * x, axis=1)
    offset = (split * T + token[:, None]) * N + row  # part [K / SPLIT, T, N]
    tl.store(part_ptr + offset, part, mask=(token < T)[:, None] & (row < N)[None, :])
    tl.store(square_ptr + split * T + token, square, mask=token < T)


@triton.jit
def _mix(part_ptr, base_ptr, scale_ptr, root, token, T, N: tl.constexpr, SPLITS, first, gate, COUNT: tl.constexpr):
    """Mixes `first` to `first + COUNT`, scaled and shifted: [TOKENS, COUNT]."""
    column = first + tl.arange(0, COUNT)  # [COUNT]
    mask = (token < T)[:, None]
    mix = tl.zeros_like(root)[:, None] + tl.zeros([1, COUNT], tl.float32)
    for split in range(SPLITS):
        mix += tl.load(part_ptr + (split * T + token[:, None]) * N + column, mask=mask, other=0.0)
    return mix * root[:, None] * tl.load(scale_ptr + gate) + tl.load(base_ptr + column)[None, :]


@triton.jit
def _gate_kernel(
    part_ptr,
    square_ptr,
    scale_ptr,
    base_ptr,
    pre_ptr,
    post_ptr,
    comb_ptr,
    T,
    K,
    SPLITS,
    norm_eps,
    eps,
    iterations,
    N: tl.constexpr,
    S: tl.constexpr,
    TOKENS: tl.constexpr,
    ONLY_PRE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    mask = token < T
    square = tl.zeros([TOKENS], tl.float32)
    for split in range(SPLITS):
        square += tl.load(square_ptr + split * T + token, mask=mask, other=0.0)
    root = tl.rsqrt(square / K + norm_eps)
    pre = tl.sigmoid(_mix(part_ptr, base_ptr, scale_ptr, root, token, T, N, SPLITS, 0, 0, S)) + eps  # [TOKENS, S]
    offset = token[:, None] * S + tl.arange(0, S)
    tl.store(pre_ptr + offset, pre, mask=mask[:, None])
    if not ONLY_PRE:
        post = 2.0 * tl.sigmoid(_mix(part_ptr, base_ptr, scale_ptr, root, token, T, N, SPLITS, S, 1, S))
        tl.store(post_ptr + offset, post, mask=mask[:, None])
        comb = _mix(part_ptr, base_ptr, scale_ptr, root, token, T, N, SPLITS, 2 * S, 2, S * S)
        comb = tl.reshape(comb, [TOKENS, S, S])
        comb = tl.exp(comb - tl.max(comb, axis=2, keep_dims=True))
        comb = comb / tl.sum(comb, axis=2, keep_dims=True) + eps
        comb = comb / (tl.sum(comb, axis=1, keep_dims=True) + eps)
        for _ in range(iterations - 1):
            comb = comb / (tl.sum(comb, axis=2, keep_dims=True) + eps)
            comb = comb / (tl.sum(comb, axis=1, keep_dims=True) + eps)
        offset = token[:, None] * (S * S) + tl.arange(0, S * S)
        tl.store(comb_ptr + offset, tl.reshape(comb, [TOKENS, S * S]), mask=mask[:, None])


@dataclass(frozen=True)
class ProjectLaunch:
    """Tile of tokens, rows of fn (padded) and columns a step, and how FP32 products are made."""

    tokens: int
    rows: int
    block: int
    precision: str
    num_warps: int
    num_stages: int


def plan(tokens: int, rows: int, target: str) -> ProjectLaunch:
    """Few tokens: small tiles; many: fn, which every tile reads again, is read less often.

    tf32x3 splits each FP32 weight into TF32 parts for the matrix units, which keeps about FP32's precision.
    """
    precision = "tf32x3" if capability(target) >= 80 else "ieee"
    tile, block = (16, 64) if tokens <= 1024 else (64, 32)
    if target.startswith("gfx"):
        block = 64  # 4 rows of fn in wide loads by the 64 lanes of its wavefronts
    if target == "interpreter":
        tile, block = 64, 512  # it takes its time by the operation, not by the element
    return ProjectLaunch(tile, max(16, triton.next_power_of_2(rows)), block, precision, num_warps=4, num_stages=3)


def launch_mix(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run hyper_mix; arguments are checked."""
    tokens, streams, _ = x.shape
    post = torch.empty(tokens, streams, dtype=torch.float32, device=x.device)
    comb = torch.empty(tokens, streams, streams, dtype=torch.float32, device=x.device)
    pre = _gates(x, fn, scale, base, norm_eps, eps, iterations, (post, comb))
    return weighted_sum(x, pre), post, comb


def launch_collapse(
    x: torch.Tensor, fn: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, norm_eps: float, eps: float
) -> torch.Tensor:
    """Run hyper_collapse; arguments are checked."""
    return weighted_sum(x, _gates(x, fn, scale, base, norm_eps, eps, 1, None))


def _gates(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_eps: float,
    eps: float,
    iterations: int,
    post_and_comb: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """pre float32 [T, S]; post and comb are filled where given."""
    tokens, streams, dims = x.shape
    rows, columns = fn.shape[0], streams * dims
    splits = triton.cdiv(columns, SPLIT)
    part = torch.empty(splits, tokens, rows, dtype=torch.float32, device=x.device)
    square = torch.empty(splits, tokens, dtype=torch.float32, device=x.device)
    pre = torch.empty(tokens, streams, dtype=torch.float32, device=x.device)
    if not tokens:
        return pre
    how = plan(tokens, rows, target_of(x.device))
    project: Any = _project_kernel[(triton.cdiv(tokens, how.tokens), splits)]
    project(x.view(torch.uint16), fn, part, square, tokens, columns, N=rows, **_project_options(how))
    gate: Any = _gate_kernel[(triton.cdiv(tokens, GATE_TOKENS),)]
    gate(
        *(part, square, scale, base, pre, *(post_and_comb or (pre, pre))),
        *(tokens, columns, splits, norm_eps, eps, iterations),
        N=rows,
        S=streams,
        TOKENS=GATE_TOKENS,
        ONLY_PRE=post_and_comb is None,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return pre


def _project_options(how: ProjectLaunch) -> dict[str, Any]:
    options = {"num_warps": how.num_warps, "num_stages": how.num_stages, "enable_fp_fusion": False}
    return _project_constants(how) | options


def _project_constants(how: ProjectLaunch) -> dict[str, Any]:
    sizes = {"SPLIT": SPLIT, "TOKENS": how.tokens, "ROWS": how.rows, "BLOCK": how.block}
    return {**sizes, "PRECISION": how.precision}


_PROJECT = {
    "x_ptr": "*u16",
    "fn_ptr": "*fp32",
    "part_ptr": "*fp32",
    "square_ptr": "*fp32",
    "T": "i32",
    "K": "i32",
    **dict.fromkeys(["N", "SPLIT", "TOKENS", "ROWS", "BLOCK", "PRECISION"], "constexpr"),
}
_GATE = {
    **dict.fromkeys(["part_ptr", "square_ptr", "scale_ptr", "base_ptr", "pre_ptr", "post_ptr", "comb_ptr"], "*fp32"),
    "T": "i32",
    "K": "i32",
    "SPLITS": "i32",
    "norm_eps": "fp32",
    "eps": "fp32",
    "iterations": "i32",
    **dict.fromkeys(["N", "S", "TOKENS", "ONLY_PRE"], "constexpr"),
}
_GATE_ODD = frozenset({"T", "SPLITS", "norm_eps", "eps", "iterations"})


def _project_traffic(tokens: int, rows: int, how: ProjectLaunch) -> Traffic:
    """Of Flash's streams, 4 x 4096: tiles of tokens read fn again, and columns give partial sums."""
    columns = 4 * 4096
    x, fn, sums = tokens * columns * 2, rows * columns * 4, tokens * (rows + 1) * 4
    return Traffic(x + -(-tokens // how.tokens) * fn + columns // SPLIT * sums, x + fn + sums)


def _gate_traffic(rows: int, scales: int, gates: int) -> Traffic:
    """Partial sums of Flash's 16 splits in, `gates` numbers a token out; programs read scale and base."""
    tokens = TOKENS * (16 * (rows + 1) + gates) * 4
    shared = (scales + rows) * 4
    return Traffic(tokens + TOKENS // GATE_TOKENS * shared, tokens + shared)


def _project_case(tokens: int, rows: int, target: str) -> CompileCase:
    how = plan(tokens, rows, target)
    return CompileCase(
        f"hyper_mix project {rows} x {how.tokens}",
        _project_kernel,
        _PROJECT,
        {"N": rows, **_project_constants(how)},
        _project_traffic(tokens, rows, how),
        frozenset({"T"}),
        how.num_warps,
        how.num_stages,
        multiplies=True,
        # The rows of wgmma and tcgen05 are 64 tokens, which decode does not have.
        mma={"sm_90": "mma", "sm_100": "mma"} if how.tokens < 64 else {},
        weight="fn_ptr",
        targets=(target,),
    )


COMPILE_CASES = [
    *(_project_case(tokens, rows, target) for tokens in (1, 4096) for rows in (24, 4) for target in TARGETS),
    *(
        CompileCase(
            f"hyper_mix gate{' collapse' if only_pre else ''}",
            _gate_kernel,
            _GATE,
            {"N": rows, "S": 4, "TOKENS": GATE_TOKENS, "ONLY_PRE": only_pre},
            _gate_traffic(rows, scales, gates),
            _GATE_ODD,
            num_warps=1,
        )
        for only_pre, rows, scales, gates in ((False, 24, 3, 4 + 4 + 16), (True, 4, 1, 4))
    ),
]
