"""Triton bodies of route and route_by_hash: one program for a tile of tokens."""

from typing import Any

import torch
import triton
import triton.language as tl

from v4quant.kernels._compile_case import TOKENS, CompileCase, Traffic, once

TILE = 2048  # logits of a program
HASH_TOKENS = 32


@triton.jit
def _score(x):
    """sqrt(log(1 + exp(x))) to a few ulps, with nothing but exp, products and rounded division."""
    half = tl.exp(tl.abs(x) * -0.5)
    e = half * half
    # log1p(e) = 2 artanh(e / (2 + e)); the argument is at most 1/3, where nine terms reach FP32.
    s = tl.math.div_rn(e, 2.0 + e)
    q = s * s
    series = 1 / 15 + q * (1 / 17)
    for term in tl.static_range(7):
        series = 1 / (13 - 2 * term) + q * series
    softplus = tl.maximum(x, 0.0) + 2.0 * (s * series)
    score = tl.where(x < -20.0, half, tl.math.sqrt_rn(softplus))
    return tl.where(x == x, score, x)


@triton.jit
def _rank(x):
    """int32 that orders as float32 x does; NaN above all, as in torch.sort. x is never -0: a score is not negative."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FC00000, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def _route_kernel(
    logit_ptr,
    bias_ptr,
    expert_ptr,
    weight_ptr,
    T,
    E,
    scale,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    lane = tl.arange(0, BLOCK)  # [BLOCK], experts
    mask = (token < T)[:, None] & (lane < E)[None, :]
    score = _score(tl.load(logit_ptr + token[:, None] * E + lane, mask=mask, other=0.0))  # [TOKENS, BLOCK]
    bias = tl.load(bias_ptr + lane, mask=lane < E, other=0.0)
    rank = tl.where((lane < E)[None, :], _rank(score + bias[None, :]), -2147483648)
    column = tl.arange(0, COLUMNS)[None, :]
    experts = tl.zeros([TOKENS, COLUMNS], tl.int32)
    weights = tl.zeros([TOKENS, COLUMNS], tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    for pick in tl.static_range(K):
        best = tl.max(rank, axis=1)[:, None]
        expert = tl.min(tl.where(rank == best, lane[None, :], BLOCK), axis=1)  # [TOKENS], the lowest of equals
        taken = lane[None, :] == expert[:, None]
        weight = tl.sum(tl.where(taken, score, 0.0), axis=1)
        rank = tl.where(taken, -2147483648, rank)
        experts = tl.where(column == pick, expert[:, None], experts)
        weights = tl.where(column == pick, weight[:, None], weights)
        total += weight
    weights = tl.math.div_rn(weights, tl.broadcast_to(total[:, None], [TOKENS, COLUMNS])) * scale
    offset = token[:, None] * K + column  # [TOKENS, COLUMNS]
    mask = (token < T)[:, None] & (column < K)
    tl.store(expert_ptr + offset, experts.to(tl.int64), mask=mask)
    tl.store(weight_ptr + offset, weights, mask=mask)


@triton.jit
def _route_by_hash_kernel(
    logit_ptr,
    token_id_ptr,
    table_ptr,
    expert_ptr,
    weight_ptr,
    T,
    E,
    V,
    scale,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (token < T)[:, None] & (column < K)
    token_id = tl.load(token_id_ptr + token, mask=token < T, other=-1)
    known = ((token_id >= 0) & (token_id < V))[:, None]
    expert = tl.load(table_ptr + token_id[:, None] * K + column, mask=mask & known, other=-1)  # [TOKENS, COLUMNS]
    # What is out of range reads nothing and shows as NaN.
    readable = mask & (expert >= 0) & (expert < E)
    logit = tl.load(logit_ptr + token[:, None] * E + expert, mask=readable, other=float("nan"))
    score = tl.where(column < K, _score(logit), 0.0)
    total = tl.broadcast_to(tl.sum(score, axis=1)[:, None], [TOKENS, COLUMNS])
    offset = token[:, None] * K + column
    tl.store(expert_ptr + offset, expert, mask=mask)
    tl.store(weight_ptr + offset, tl.math.div_rn(score, total) * scale, mask=mask)


def tokens_per_program(experts: int) -> int:
    """Tokens whose logits one program holds."""
    return max(1, TILE // int(triton.next_power_of_2(experts)))


def launch(logits: torch.Tensor, bias: torch.Tensor, k: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Run route; arguments are checked."""
    tokens, count = logits.shape
    experts, weights = _outputs(logits, k)
    if tokens:
        constants = _constants(count, k)
        kernel: Any = _route_kernel[(triton.cdiv(tokens, constants["TOKENS"]),)]
        kernel(logits, bias, experts, weights, tokens, count, scale, **constants, enable_fp_fusion=False)
    return experts, weights


def launch_by_hash(
    logits: torch.Tensor, token_ids: torch.Tensor, table: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run route_by_hash; arguments are checked."""
    tokens, count = logits.shape
    ids, k = table.shape
    experts, weights = _outputs(logits, k)
    if tokens:
        kernel: Any = _route_by_hash_kernel[(triton.cdiv(tokens, HASH_TOKENS),)]
        constants = {"K": k, "COLUMNS": triton.next_power_of_2(k), "TOKENS": HASH_TOKENS}
        sizes = (tokens, count, ids, scale)
        kernel(logits, token_ids, table, experts, weights, *sizes, **constants, enable_fp_fusion=False)
    return experts, weights


def _outputs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    experts = torch.empty(logits.shape[0], k, dtype=torch.int64, device=logits.device)
    return experts, torch.empty(experts.shape, dtype=torch.float32, device=logits.device)


def _constants(experts: int, k: int) -> dict[str, int]:
    return {
        "K": k,
        "COLUMNS": triton.next_power_of_2(k),
        "TOKENS": tokens_per_program(experts),
        "BLOCK": triton.next_power_of_2(experts),
    }


_OUT = {"expert_ptr": "*i64", "weight_ptr": "*fp32"}
_ODD = frozenset({"T", "V", "scale"})
_BY_SCORE = {
    "logit_ptr": "*fp32",
    "bias_ptr": "*fp32",
    **_OUT,
    "T": "i32",
    "E": "i32",
    "scale": "fp32",
    **dict.fromkeys(["K", "COLUMNS", "TOKENS", "BLOCK"], "constexpr"),
}
_BY_HASH = {
    "logit_ptr": "*fp32",
    "token_id_ptr": "*i64",
    "table_ptr": "*i64",
    **_OUT,
    "T": "i32",
    "E": "i32",
    "V": "i32",
    "scale": "fp32",
    **dict.fromkeys(["K", "COLUMNS", "TOKENS"], "constexpr"),
}


def _traffic(experts: int) -> Traffic:
    """Each program reads the bias; six picks a token."""
    moved, bias = TOKENS * (experts * 4 + 6 * (8 + 4)), experts * 4
    return Traffic(moved + TOKENS // tokens_per_program(experts) * bias, moved + bias)


COMPILE_CASES = [
    *(
        CompileCase(f"route {name}", _route_kernel, _BY_SCORE, _constants(experts, 6), _traffic(experts), _ODD)
        for name, experts in (("Flash", 256), ("Pro", 384))
    ),
    CompileCase(
        "route_by_hash",
        _route_by_hash_kernel,
        _BY_HASH,
        {"K": 6, "COLUMNS": 8, "TOKENS": HASH_TOKENS},
        once(TOKENS * (8 + 6 * (8 + 4 + 8 + 4))),  # token, six of its table's row, their logits, the results
        _ODD,
    ),
]
