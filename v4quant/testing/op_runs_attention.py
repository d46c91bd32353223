"""Runs of the ops of attention: queries, caches and their readers, compressor, indexer, sparse attention."""

from collections.abc import Callable
from typing import Any

import torch

from v4quant.kernels.act_quant_fp4 import act_round_fp4_torch
from v4quant.kernels.compress_kv import (
    CompressorState,
    compress_kv,
    compress_kv_torch,
    compressor_append_,
    compressor_append_torch_,
    window_ends,
)
from v4quant.kernels.indexer_key_cache import (
    indexer_key_read_fp4,
    indexer_key_read_fp4_torch,
    indexer_key_write_fp4,
    indexer_key_write_fp4_torch,
)
from v4quant.kernels.indexer_scores import indexer_scores, indexer_scores_torch, visible_entries
from v4quant.kernels.kv_cache import kv_read_fp8, kv_read_fp8_torch, kv_write_fp8, kv_write_fp8_torch
from v4quant.kernels.kv_layout import PageLayout, key_layout, kv_layout
from v4quant.kernels.query_norm import query_norm_, query_norm_torch_
from v4quant.kernels.rope import rope_, rope_torch_
from v4quant.kernels.rope_frequencies import rope_frequencies, rope_table
from v4quant.kernels.sparse_attention import Picked, sparse_attention, sparse_attention_torch
from v4quant.kernels.top_k import top_k, top_k_torch
from v4quant.testing.op_run import OpRun, Sizes, bf16, bits, nearly_all_bits, normal, run_of, within
from v4quant.testing.quantized import Device

WINDOW = 128


def _run_query_norm(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    q = normal(device, tokens, sizes.heads, 512)
    same = q.clone()
    # A mean in another order of summation moves a whole head by one BF16 number.
    return OpRun(lambda: query_norm_(q, 1e-6), lambda: query_norm_torch_(same, 1e-6), (nearly_all_bits,), 2 * q.nbytes)


def _run_rope(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    x = normal(device, tokens, sizes.heads, 512)
    same, table = x.clone(), _angles(sizes, tokens, device)
    rotated = tokens * sizes.heads * 64 * (2 + 2)
    return OpRun(lambda: rope_(x, table), lambda: rope_torch_(same, table), (bits,), rotated + table.nbytes)


def _run_kv_write(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    return _write(kv_write_fp8, kv_write_fp8_torch, kv_layout(256), 512, sizes, tokens, device)


def _run_kv_read(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    pages, slots = _written(kv_write_fp8_torch, kv_layout(256), 512, sizes, tokens, device)
    arguments = (pages, slots, kv_layout(256), 512)
    moved = tokens * (4 + 584 + 512 * 2)
    return OpRun(lambda: kv_read_fp8(*arguments), lambda: kv_read_fp8_torch(*arguments), (bits,), moved)


def _run_key_write(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    return _write(indexer_key_write_fp4, indexer_key_write_fp4_torch, key_layout(64), 128, sizes, tokens, device)


def _run_key_read(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    pages, slots = _written(indexer_key_write_fp4_torch, key_layout(64), 128, sizes, tokens, device)
    arguments = (pages, slots, key_layout(64), 128)
    moved = tokens * (4 + 68 + 128 * 2)
    return OpRun(
        lambda: indexer_key_read_fp4(*arguments), lambda: indexer_key_read_fp4_torch(*arguments), (bits,), moved
    )


def _run_compress_kv_4(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    return _compress(4, sizes, tokens, device)


def _run_compress_kv_128(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    return _compress(128, sizes, tokens, device)


def _run_compressor_append(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    """A decode step: every token belongs to a sequence of its own."""
    kv, score, ape = _compressor_inputs(4, tokens, device)
    sequences = torch.arange(tokens, dtype=torch.int32, device=device)
    positions = (sequences * 37 + sizes.context).to(torch.int32)
    states = [CompressorState.empty(tokens, 4, 512, device) for _ in range(2)]

    def appended(op: Callable[..., None], state: CompressorState) -> tuple[torch.Tensor, torch.Tensor]:
        op(kv, score, ape, state, sequences, positions)
        return state.kv, state.score

    return OpRun(
        lambda: appended(compressor_append_, states[0]),
        lambda: appended(compressor_append_torch_, states[1]),
        (bits, bits),
        2 * kv.nbytes + 2 * score.nbytes + ape.nbytes + 8 * tokens,
    )


def _run_indexer_scores(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    heads, entries = sizes.index_heads, (sizes.context + tokens) // 4
    q = act_round_fp4_torch(normal(device, tokens * heads, 128)).view(tokens, heads, 128)
    keys = act_round_fp4_torch(normal(device, entries, 128, seed=6))
    arguments = (q, keys, normal(device, tokens, heads, seed=7), _visible(sizes, tokens, device))
    return run_of(
        indexer_scores,
        indexer_scores_torch,
        arguments,
        _scores_close,
        result_bytes=tokens * entries * 2,
        flops=2 * tokens * entries * heads * 128,
    )


def _run_top_k(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    scores = normal(device, tokens, (sizes.context + tokens) // 4)
    arguments = (scores, _visible(sizes, tokens, device), sizes.picks)

    def same_scores(found: torch.Tensor, expected: torch.Tensor) -> None:
        """Of equal scores the reference takes others."""
        assert bool((found < scores.shape[1]).all()), "picks an entry that is none"
        bits(*(scores.gather(1, picks.clamp(min=0).long()) for picks in (found, expected)))
        bits(found < 0, expected < 0)

    return run_of(top_k, top_k_torch, arguments, same_scores, result_bytes=tokens * sizes.picks * 4)


def _run_attention_dense(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    window, compressed = normal(device, tokens + WINDOW, 512, seed=6), normal(device, _entries(sizes), 512, seed=7)
    return _attend(sizes, tokens, device, Picked(window, _window(tokens, device)), compressed, None)


def _run_attention_pages(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    window, _ = _written(kv_write_fp8_torch, kv_layout(256), 512, sizes, tokens + WINDOW, device)
    compressed, _ = _written(kv_write_fp8_torch, kv_layout(64), 512, sizes, _entries(sizes), device)
    first = Picked(window, _window(tokens, device), kv_layout(256))
    return _attend(sizes, tokens, device, first, compressed, kv_layout(64))


def _attend(
    sizes: Sizes, tokens: int, device: Device, window: Picked, entries: torch.Tensor, layout: PageLayout | None
) -> OpRun:
    random = torch.Generator(device).manual_seed(8)
    indices = torch.randint(
        0, _entries(sizes), (tokens, sizes.picks), generator=random, dtype=torch.int32, device=device
    )
    indices[:, ::9] = -1
    q, sink = normal(device, tokens, sizes.heads, 512), normal(device, sizes.heads, seed=9).float()
    arguments = (q, sink, window, Picked(entries, indices, layout))
    gathered = min(tokens * (WINDOW + sizes.picks), tokens + WINDOW + _entries(sizes))
    return OpRun(
        lambda: sparse_attention(*arguments),
        lambda: sparse_attention_torch(*arguments),
        # Weights round to BF16 apart in about one of 1,000, and results that are nearly zero show it.
        (within(4e-3),),
        2 * q.nbytes + tokens * (WINDOW + sizes.picks) * 4 + gathered * (583 if layout else 1024),
        4 * tokens * sizes.heads * (WINDOW + sizes.picks) * 512,
    )


def _entries(sizes: Sizes) -> int:
    return sizes.context // 4


def _window(tokens: int, device: Device) -> torch.Tensor:
    """The last 128 entries of each token: int32 [T, 128]."""
    first = torch.arange(1, tokens + 1, dtype=torch.int32, device=device)[:, None]
    return first + torch.arange(WINDOW, dtype=torch.int32, device=device)


def _visible(sizes: Sizes, tokens: int, device: Device) -> torch.Tensor:
    return visible_entries(sizes.context + torch.arange(tokens, device=device), 4)


def _angles(sizes: Sizes, tokens: int, device: Device) -> torch.Tensor:
    return rope_table(sizes.context + torch.arange(tokens), rope_frequencies(64, 10000.0)).to(device)


def _token(dim: int, sizes: Sizes, tokens: int, device: Device) -> dict[str, Any]:
    """What the cache writers take of tokens."""
    weight = normal(device, dim, seed=6).float()
    return {
        "x": normal(device, tokens, dim),
        "weight": weight,
        "eps": 1e-6,
        "cos_sin": _angles(sizes, tokens, device),
        "slots": torch.arange(tokens - 1, -1, -1, dtype=torch.int32, device=device),
    }


def _write(
    op: Callable[..., None],
    reference: Callable[..., None],
    layout: PageLayout,
    dim: int,
    sizes: Sizes,
    tokens: int,
    device: Device,
) -> OpRun:
    token = _token(dim, sizes, tokens, device)
    pages, same = layout.empty_pages(tokens, device), layout.empty_pages(tokens, device)

    def written(write: Callable[..., None], target: torch.Tensor) -> torch.Tensor:
        write(**token, pages=target, layout=layout)
        return target

    read = sum(value.nbytes for value in token.values() if isinstance(value, torch.Tensor))
    entry = layout.data_bytes + layout.scale_bytes
    return OpRun(
        lambda: written(op, pages), lambda: written(reference, same), (nearly_all_bits,), read + tokens * entry
    )


def _written(
    write: Callable[..., None], layout: PageLayout, dim: int, sizes: Sizes, tokens: int, device: Device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of so many entries, and their slots."""
    token = _token(dim, sizes, tokens, device)
    pages = layout.empty_pages(tokens, device)
    write(**token, pages=pages, layout=layout)
    return pages, token["slots"]


def _compressor_inputs(ratio: int, tokens: int, device: Device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = 1024 if ratio == 4 else 512
    kv, score = (normal(device, tokens, width, seed=seed).float() for seed in (5, 6))
    return kv, score, normal(device, ratio, width, seed=7).float()


def _compress(ratio: int, sizes: Sizes, tokens: int, device: Device) -> OpRun:
    """The entries of a prefill that begins in the middle of a window."""
    kv, score, ape = _compressor_inputs(ratio, tokens, device)
    positions = torch.arange(sizes.context + ratio - 1, sizes.context + ratio - 1 + tokens, device=device)
    ends = window_ends(positions, ratio)
    sequences = torch.zeros(tokens, dtype=torch.int32, device=device)
    state = CompressorState.empty(1, ratio, 512, device)
    arguments = (kv, score, ape, state, sequences, positions.to(torch.int32), ends)
    return run_of(compress_kv, compress_kv_torch, arguments, bf16, result_bytes=len(ends) * 512 * 2)


def _scores_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Require the same entries to be visible, and their scores to be close."""
    assert torch.equal(found.isfinite(), expected.isfinite())
    torch.testing.assert_close(found, expected, rtol=2.0**-7, atol=1e-3)


ATTENTION_RUNS = {
    "query_norm": _run_query_norm,
    "rope": _run_rope,
    "kv_write_fp8": _run_kv_write,
    "kv_read_fp8": _run_kv_read,
    "indexer_key_write_fp4": _run_key_write,
    "indexer_key_read_fp4": _run_key_read,
    "compress_kv 4": _run_compress_kv_4,
    "compress_kv 128": _run_compress_kv_128,
    "compressor_append": _run_compressor_append,
    "indexer_scores": _run_indexer_scores,
    "top_k": _run_top_k,
    "sparse_attention dense": _run_attention_dense,
    "sparse_attention pages": _run_attention_pages,
}
