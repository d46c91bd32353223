"""Triton body of sparse_attention: one program for a query and a block of its heads; keys stay on the chip."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from v4quant.kernels._compile_case import TARGETS, CompileCase, Traffic
from v4quant.kernels._kv_cache_triton import gather_fp8
from v4quant.kernels._operand_triton import INTERPRETED, operand
from v4quant.kernels._rounding_triton import bf16_bits
from v4quant.kernels._target import capability, target_of
from v4quant.kernels.kv_layout import PageLayout, kv_layout
from v4quant.kernels.sparse_attention import Picked


@triton.jit
def _gather(
    byte_ptr, wide_ptr, index, ENTRIES: tl.constexpr, PAGE_BYTES: tl.constexpr, SCALES: tl.constexpr, D: tl.constexpr
):
    """BF16 bits of picked entries [N, D], zeros for none; dense where pages have no ENTRIES."""
    if ENTRIES:
        return gather_fp8(byte_ptr, wide_ptr, index, ENTRIES, PAGE_BYTES, SCALES, D)
    offset = index.to(tl.int64)[:, None] * D + tl.arange(0, D)
    return tl.load(wide_ptr + offset, mask=(index >= 0)[:, None], other=0)


@triton.jit
def _attend(
    state,
    q,
    byte_ptr,
    wide_ptr,
    index_ptr,
    L,
    SCALE: tl.constexpr,
    ENTRIES: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    SCALES: tl.constexpr,
    N: tl.constexpr,
    FLOAT32: tl.constexpr,
):
    """Continue an online softmax over a list of L indices."""
    best, total, out = state  # [HEADS], [HEADS], [HEADS, D]
    for start in range(0, L, N):
        column = start + tl.arange(0, N)
        index = tl.load(index_ptr + column, mask=column < L, other=-1)  # [N]
        bits = _gather(byte_ptr, wide_ptr, index, ENTRIES, PAGE_BYTES, SCALES, q.shape[1])
        keys = operand(bits, FLOAT32)  # [N, D]
        score = tl.dot(q, tl.trans(keys), input_precision="ieee") * SCALE  # [HEADS, N]
        score = tl.where(index[None, :] >= 0, score, -float("inf"))
        larger = tl.maximum(best, tl.max(score, axis=1))
        shift = tl.where(larger == -float("inf"), 0.0, larger)  # nothing picked yet: keep exp(-inf) = 0
        weight = tl.exp(score - shift[:, None])
        decay = tl.exp(best - shift)
        total = total * decay + tl.sum(weight, axis=1)
        weight = operand(bf16_bits(weight), FLOAT32)
        out = tl.dot(weight, keys, out * decay[:, None], input_precision="ieee")
        best = larger
    return best, total, out


@triton.jit
def _sparse_attention_kernel(
    q_ptr,
    sink_ptr,
    out_ptr,
    byte1_ptr,
    wide1_ptr,
    index1_ptr,
    byte2_ptr,
    wide2_ptr,
    index2_ptr,
    H,
    L1,
    L2,
    SCALE: tl.constexpr,
    ENTRIES1: tl.constexpr,
    PAGE_BYTES1: tl.constexpr,
    ENTRIES2: tl.constexpr,
    PAGE_BYTES2: tl.constexpr,
    SCALES: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    FLOAT32: tl.constexpr,
):
    # Programs of one query follow each other, so that they find its keys in the cache.
    blocks = tl.cdiv(H, HEADS)
    query = (tl.program_id(0) // blocks).to(tl.int64)
    head = tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS)
    mask = head < H
    offset = (query * H + head)[:, None] * D + tl.arange(0, D)  # [HEADS, D]
    q = operand(tl.load(q_ptr + offset, mask=mask[:, None], other=0), FLOAT32)
    best = tl.full([HEADS], -float("inf"), tl.float32)
    state = best, tl.zeros([HEADS], tl.float32), tl.zeros([HEADS, D], tl.float32)
    index1_ptr += query * L1
    index2_ptr += query * L2
    state = _attend(state, q, byte1_ptr, wide1_ptr, index1_ptr, L1, SCALE, ENTRIES1, PAGE_BYTES1, SCALES, N, FLOAT32)
    state = _attend(state, q, byte2_ptr, wide2_ptr, index2_ptr, L2, SCALE, ENTRIES2, PAGE_BYTES2, SCALES, N, FLOAT32)
    best, total, out = state
    sink = tl.load(sink_ptr + head, mask=mask, other=0.0)
    total += tl.exp(sink - tl.where(best == -float("inf"), 0.0, best))
    # Nothing picked and a sink of -inf: 0 / 0.
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + offset, bf16_bits(out), mask=mask[:, None])


@dataclass(frozen=True)
class Launch:
    """Tile of a program: heads (16 at least, for the matrix instructions), keys a step, warps."""

    heads: int
    keys: int
    num_warps: int


def choose(target: str) -> Launch:
    """Tile for a target of _target.py: the reference's 64 keys where they fit into shared memory; more heads spill."""
    if target.startswith("gfx"):
        return Launch(16, 32, 4)  # 64 KiB of shared memory; four wavefronts of 64 lanes spill nothing
    # sm_86, sm_89 and sm_120 give a block 99 KiB.
    small = capability(target) % 10 > 3 or capability(target) >= 120
    return Launch(16, 32 if small else 64, 8)


def launch(q: torch.Tensor, sink: torch.Tensor, picked: Sequence[Picked]) -> torch.Tensor:
    """Run the kernel; arguments are checked."""
    queries, heads, dim = q.shape
    out = torch.empty_like(q)
    if not queries:
        return out
    tile = choose(target_of(q.device))
    first, second = picked[0], picked[-1]
    kernel: Any = _sparse_attention_kernel[(queries * triton.cdiv(heads, tile.heads),)]
    kernel(
        q.view(torch.uint16),
        sink,
        out.view(torch.uint16),
        first.entries.view(torch.uint8),
        first.entries.view(torch.uint16),
        first.indices,
        second.entries.view(torch.uint8),
        second.entries.view(torch.uint16),
        second.indices,
        heads,
        first.indices.shape[1],
        second.indices.shape[1] if len(picked) == 2 else 0,
        **_constants(dim, first.layout, second.layout, tile),
        FLOAT32=INTERPRETED,
        num_warps=tile.num_warps,
        num_stages=1,
    )
    return out


def _constants(dim: int, first: PageLayout | None, second: PageLayout | None, tile: Launch) -> dict[str, Any]:
    return {
        "SCALE": dim**-0.5,
        "ENTRIES1": first.entries if first else 0,
        "PAGE_BYTES1": first.page_bytes if first else 0,
        "ENTRIES2": second.entries if second else 0,
        "PAGE_BYTES2": second.page_bytes if second else 0,
        "SCALES": first.scale_bytes if first else 0,
        "D": dim,
        "HEADS": tile.heads,
        "N": tile.keys,
    }


def _traffic(first: PageLayout | None, tile: Launch) -> Traffic:
    """A chunk of 1,024 queries of 64 heads after 15,360 others: 128 window and 512 of 4,096 compressed entries each.

    Every block of heads of every query gathers its entries again, from caches but for the first time.
    """
    queries, heads, picks, entries = 1024, 64, 128 + 512, 128 + 1024 + 4096
    entry_bytes = first.data_bytes + 7 if first else 512 * 2
    rest = queries * heads * 512 * (2 + 2)
    blocks = queries * heads // tile.heads
    moved = rest + blocks * (picks * (4 + entry_bytes) + tile.heads * 4)
    return Traffic(moved, rest + queries * picks * 4 + entries * entry_bytes + heads * 4)


def _case(name: str, first: PageLayout | None, second: PageLayout | None, target: str) -> CompileCase:
    pointers = {"q_ptr": "*u16", "sink_ptr": "*fp32", "out_ptr": "*u16"}
    for number in (1, 2):
        pointers |= {f"byte{number}_ptr": "*u8", f"wide{number}_ptr": "*u16", f"index{number}_ptr": "*i32"}
    tile = choose(target)
    constants = {**_constants(512, first, second, tile), "FLOAT32": False}
    return CompileCase(
        name,
        _sparse_attention_kernel,
        {**pointers, **dict.fromkeys(["H", "L1", "L2"], "i32"), **dict.fromkeys(constants, "constexpr")},
        constants,
        _traffic(first, tile),
        frozenset({"L1", "L2"}),
        num_warps=tile.num_warps,
        multiplies=True,
        # The rows of wgmma and tcgen05 are 64 heads, whose 512-wide results do not fit into registers.
        mma={"sm_90": "mma", "sm_100": "mma"},
        targets=(target,),
    )


# The launch does not depend on the number of heads, 64 in Flash and 128 in Pro.
COMPILE_CASES = [
    _case(name, first, second, target)
    for target in TARGETS
    for name, first, second in (
        ("sparse_attention dense", None, None),
        ("sparse_attention pages", kv_layout(256), kv_layout(2)),
    )
]
