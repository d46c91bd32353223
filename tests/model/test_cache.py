"""Pages: growth, reuse, block tables, and what a long sequence keeps."""

import pytest
import torch

from tests.model.references import named
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.model.arithmetic import Arithmetic
from v4quant.model.cache import BlockCache, PagedStore
from v4quant.model.chunk import Chunk
from v4quant.model.operations import operations

CONFIG = open_checkpoint(named("tiny-flash").folder).config
OPS = operations(CONFIG, Arithmetic())
CPU = torch.device("cpu")


def entries(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, CONFIG.head_dim, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def write(store: PagedStore, sequence: int, first: int, x: torch.Tensor) -> None:
    store.reserve(sequence, first + len(x))
    cos_sin = torch.cat([torch.ones(len(x), 32), torch.zeros(len(x), 32)], 1)  # no rotation
    numbers = torch.arange(first, first + len(x), dtype=torch.int32)
    norm = torch.ones(CONFIG.head_dim, dtype=torch.bfloat16)
    store.write(x, norm, cos_sin, torch.full_like(numbers, sequence), numbers)


def test_entries_of_two_sequences_stay_apart() -> None:
    store = PagedStore(OPS.kv_codec(4), 2, CPU)
    alone = PagedStore(OPS.kv_codec(64), 1, CPU)
    write(alone, 0, 0, entries(11, 1))
    for first in range(0, 11, 3):  # pieces that end within pages, another sequence in between
        write(store, 0, first, entries(11, 1)[first : first + 3])
        write(store, 1, first, entries(11, 2)[first : first + 3])
    assert torch.equal(store.read(0, 11), alone.read(0, 11))
    assert not torch.equal(store.read(1, 11), store.read(0, 11))


def test_released_pages_are_used_again() -> None:
    store = PagedStore(OPS.kv_codec(4), 2, CPU)
    write(store, 0, 0, entries(16, 1))
    bytes_before = store.bytes
    store.release(0)
    write(store, 1, 0, entries(16, 2))
    assert store.bytes == bytes_before
    assert (
        store.picked(torch.tensor([0], dtype=torch.int32), torch.tensor([[3]], dtype=torch.int32)).indices.item() == -1
    )


def test_pages_behind_the_window_are_given_back() -> None:
    store = PagedStore(OPS.kv_codec(4), 1, CPU)
    for first in range(0, 400, 4):
        write(store, 0, first, entries(4, first))
        store.release(0, max(first + 4 - 8, 0))
    kept = store.picked(torch.zeros(1, dtype=torch.int32), torch.arange(400, dtype=torch.int32)[None]).indices[0]
    assert (kept >= 0).nonzero()[:, 0].tolist() == list(range(392, 400))
    assert store.bytes <= 4 * OPS.kv_codec(4).empty_pages(1, CPU).nbytes


def test_the_window_of_a_long_sequence_stays_small() -> None:
    cache = BlockCache(CONFIG, 0, OPS, 1)
    for first in range(0, 5000, 100):
        chunk = Chunk.of([(0, first, torch.zeros(100, dtype=torch.int64))])
        cache.reserve(chunk)
        cache.trim(chunk)
    assert cache.bytes <= 4 * OPS.kv_codec(256).empty_pages(1, CPU).nbytes


def test_what_the_next_token_looks_at_is_kept() -> None:
    cache = BlockCache(CONFIG, 0, OPS, 1)
    for first in range(0, 1000, 50):
        chunk = Chunk.of([(0, first, torch.zeros(50, dtype=torch.int64))])
        cache.reserve(chunk)
        cache.trim(chunk)
        seen = torch.arange(max(first + 50 - CONFIG.sliding_window + 1, 0), first + 50, dtype=torch.int32)[None]
        assert bool((cache.window.picked(torch.zeros(1, dtype=torch.int32), seen).indices >= 0).all()), first


def test_bytes_of_the_production_layout() -> None:
    """584 bytes a KV entry and 68 a key at the released sizes, padded pages as serving engines have them."""
    from v4quant.kernels.kv_layout import key_layout, kv_layout

    assert [kv_layout(size).page_bytes for size in (256, 64, 2)] == [149_760, 37_440, 1_728]
    assert key_layout(64).page_bytes == 4_352


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([(0, 5, 2)], "sequence 0 goes on at 5, but the cache ends at 3"),
        ([(0, 2, 2)], "sequence 0 goes on at 2, but the cache ends at 3"),
        ([(2, 0, 2)], "sequence 2 goes on at 0, but the cache ends at None"),
        ([(-1, 0, 2)], "sequence -1 goes on"),
        ([(0, 3, 1), (0, 4, 1)], "each of another and not empty"),
        ([(0, 3, 0)], "each of another and not empty"),
        ([], "expected one or more"),
    ],
)
def test_chunks_that_do_not_go_on(pieces: list[tuple[int, int, int]], message: str) -> None:
    cache = BlockCache(CONFIG, 4, OPS, 2)
    cache.reserve(Chunk.of([(0, 0, torch.zeros(3, dtype=torch.int64))]))
    with pytest.raises(ValueError, match=message):
        cache.reserve(Chunk.of([(number, first, torch.zeros(count).long()) for number, first, count in pieces]))
    cache.reset(0)
    cache.reserve(Chunk.of([(0, 0, torch.zeros(3, dtype=torch.int64))]))
