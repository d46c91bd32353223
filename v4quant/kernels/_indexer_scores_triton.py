"""Triton body of indexer_scores: a program holds a tile of keys and goes through queries, all heads at a time."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from v4quant.kernels._compile_case import CompileCase, Traffic
from v4quant.kernels._operand_triton import INTERPRETED, operand
from v4quant.kernels._rounding_triton import bf16_bits, from_bf16_bits

KEYS = 128


@triton.jit
def _indexer_scores_kernel(
    q_ptr,
    key_ptr,
    weight_ptr,
    visible_ptr,
    out_ptr,
    T,
    N,
    H,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    FLOAT32: tl.constexpr,
):
    first_key = tl.program_id(0) * KEYS
    first_query = tl.program_id(1) * QUERIES
    key = first_key + tl.arange(0, KEYS)  # [KEYS]
    head = tl.arange(0, HEADS)
    dim = tl.arange(0, DIM)
    # Keys behind the last visible one may not be written yet: they stay unread.
    query = first_query + tl.arange(0, QUERIES)
    most = tl.max(tl.load(visible_ptr + query, mask=query < T, other=0))
    mask = (key < tl.minimum(most, N))[:, None]
    keys = operand(tl.load(key_ptr + key.to(tl.int64)[:, None] * DIM + dim, mask=mask, other=0), FLOAT32)
    for row in range(first_query, tl.minimum(first_query + QUERIES, T)):
        visible = tl.load(visible_ptr + row)
        target = out_ptr + tl.cast(row, tl.int64) * N + key
        if visible <= first_key:
            tl.store(target, tl.full([KEYS], 0xFF80, tl.uint16), mask=key < N)  # -inf
        else:
            at = tl.cast(row, tl.int64) * H + head  # [HEADS]
            q = tl.load(q_ptr + at[:, None] * DIM + dim, mask=(head < H)[:, None], other=0)
            weight = from_bf16_bits(tl.load(weight_ptr + at, mask=head < H, other=0))
            score = tl.dot(keys, tl.trans(operand(q, FLOAT32)), input_precision="ieee")  # [KEYS, HEADS]
            score = tl.maximum(from_bf16_bits(bf16_bits(score)), 0.0)
            weighted = from_bf16_bits(bf16_bits(score * weight[None, :]))
            bits = bf16_bits(tl.sum(weighted, axis=1))
            tl.store(target, tl.where(key < visible, bits, 0xFF80), mask=key < N)


@dataclass(frozen=True)
class Launch:
    """Queries of a program, heads of its tile (16 at least, for the matrix instructions), warps."""

    queries: int
    heads: int
    num_warps: int


def choose(queries: int, heads: int) -> Launch:
    """In decode a program for each query; in prefill tiles of keys are loaded once for 16 of them."""
    return Launch(1 if queries < 64 else 16, max(16, triton.next_power_of_2(heads)), 4)


def launch(q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Run the kernel; arguments are checked."""
    queries, heads, dim = q.shape
    out = torch.empty(queries, len(keys), dtype=torch.bfloat16, device=q.device)
    if out.numel():
        tile = choose(queries, heads)
        kernel: Any = _indexer_scores_kernel[(triton.cdiv(len(keys), KEYS), triton.cdiv(queries, tile.queries))]
        tensors = (q.view(torch.uint16), keys.view(torch.uint16), weights.view(torch.uint16), visible)
        constants = {**_constants(tile, dim), "FLOAT32": INTERPRETED}
        sizes = (queries, len(keys), heads)
        options = {"num_warps": tile.num_warps, "num_stages": 1, "enable_fp_fusion": False}
        kernel(*tensors, out.view(torch.uint16), *sizes, **constants, **options)
    return out


def _constants(tile: Launch, dim: int) -> dict[str, int]:
    return {"QUERIES": tile.queries, "KEYS": KEYS, "HEADS": tile.heads, "DIM": dim}


def _traffic(queries: int, entries: int, tile: Launch) -> Traffic:
    """Tiles of queries read all keys again, tiles of keys all queries; 64 heads of 128, everything visible."""
    query_tiles, key_tiles = -(-queries // tile.queries), -(-entries // KEYS)
    query_bytes = queries * (64 * (128 * 2 + 2) + 4)
    key_bytes, out_bytes = entries * 128 * 2, queries * entries * 2
    # What a program may see is read once for the tile and once for each query.
    moved = query_tiles * key_bytes + key_tiles * (query_bytes + queries * 4) + out_bytes
    return Traffic(moved, key_bytes + query_bytes + out_bytes)


def _case(name: str, queries: int, entries: int) -> CompileCase:
    tile = choose(queries, 64)
    constants = {**_constants(tile, 128), "FLOAT32": False}
    signature = {
        **dict.fromkeys(["q_ptr", "key_ptr", "weight_ptr"], "*u16"),
        "visible_ptr": "*i32",
        "out_ptr": "*u16",
        "T": "i32",
        "N": "i32",
        "H": "i32",
        **dict.fromkeys(constants, "constexpr"),
    }
    odd = frozenset({"T", "N"})
    return CompileCase(
        name,
        _indexer_scores_kernel,
        signature,
        constants,
        _traffic(queries, entries, tile),
        odd,
        tile.num_warps,
        multiplies=True,
        weight="key_ptr",
    )


# 64 heads of 128 in Flash and in Pro; a chunk of 1,024 tokens after 15,360 others, and one token after 1,048,575.
COMPILE_CASES = [_case("indexer_scores prefill", 1024, 4096), _case("indexer_scores decode", 1, 2**18)]
