"""What a block keeps of the tokens it has seen: pages of KV entries and indexer keys, the compressors' open windows.

Pages cover 256 tokens, as in serving engines: 256 window entries, 64 of CSA (and 64 indexer keys) or 2 of HCA. A page
belongs to one sequence, found by a block table; pages that leave the window are used again, so that a layer's window
cache holds what one chunk needs, however long its sequences grow.
"""

import torch

from v4quant.config import V4Config
from v4quant.kernels.compress_kv import CompressorState
from v4quant.kernels.sparse_attention import Picked
from v4quant.model.chunk import Chunk
from v4quant.model.operations import Codec, Operations

PAGE_TOKENS = 256


class PagedStore:
    """Entries of some sequences in pages from one pool, which grows as needed."""

    def __init__(self, codec: Codec, sequences: int, device: torch.device) -> None:
        self._codec = codec
        self._pages = codec.empty_pages(0, device)
        self._free: list[int] = []
        self._table = torch.full((sequences, 0), -1, dtype=torch.int32, device=device)
        self._reserved = [0] * sequences

    @property
    def bytes(self) -> int:
        """Memory of the pool."""
        return self._pages.nbytes

    def reserve(self, sequence: int, entries: int) -> None:
        """Make sure that a sequence has pages for its first `entries` entries."""
        wanted = -(-entries // self._codec.entries)
        if wanted > self._table.shape[1]:
            width = max(wanted, 2 * self._table.shape[1])
            self._table = torch.nn.functional.pad(self._table, (0, width - self._table.shape[1]), value=-1)
        for place in range(self._reserved[sequence], wanted):
            self._table[sequence, place] = self._take_page()
        self._reserved[sequence] = max(wanted, self._reserved[sequence])

    def release(self, sequence: int, before: int | None = None) -> None:
        """Give back the pages that hold only entries below `before`; all of the sequence's where it is None."""
        pages = (
            self._reserved[sequence] if before is None else min(before // self._codec.entries, self._reserved[sequence])
        )
        given = self._table[sequence, :pages]
        self._free += [page for page in given.tolist() if page >= 0]
        given.fill_(-1)
        if before is None:
            self._reserved[sequence] = 0

    def write(
        self, x: torch.Tensor, norm: torch.Tensor, cos_sin: torch.Tensor, sequences: torch.Tensor, entries: torch.Tensor
    ) -> None:
        """Normalise, rotate and store entries x [T, D], number `entries` [T] of `sequences` [T]; pages are reserved."""
        self._codec.write(x, norm, cos_sin, self._pages, self._slots(sequences, entries))

    def read(self, sequence: int, count: int) -> torch.Tensor:
        """The first entries of a sequence: [count, D]."""
        entries = torch.arange(count, dtype=torch.int32, device=self._table.device)
        return self._codec.read(self._pages, self._slots(torch.full_like(entries, sequence), entries))

    def picked(self, sequences: torch.Tensor, entries: torch.Tensor) -> Picked:
        """Entries [T, L] of sequences [T], -1 for none, as attention takes them."""
        return self._codec.picked(self._pages, self._slots(sequences[:, None], entries))

    def _slots(self, sequences: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        if not self._table.shape[1]:
            return torch.full_like(entries, -1)
        size = self._codec.entries
        page = self._table[sequences, (entries // size).clamp(min=0)]
        return torch.where((entries < 0) | (page < 0), -1, page * size + entries % size)

    def _take_page(self) -> int:
        if not self._free:
            have = len(self._pages)
            more = self._codec.empty_pages(max(have, 1), self._pages.device)
            self._free = list(range(have, have + len(more)))
            self._pages = torch.cat([self._pages, more])
        return self._free.pop()


class BlockCache:
    """The cache of one block for some sequences.

    Attributes:
        window: KV entries of the last tokens.
        compressed, keys: compressed KV entries, and CSA's indexer keys; None where the block has none.
        state, key_state: the compressors' open windows.
    """

    def __init__(
        self, config: V4Config, ratio: int, ops: Operations, sequences: int, device: torch.device | str = "cpu"
    ) -> None:
        """An empty cache.

        Args:
            config: of the model.
            ratio: the block's compression: 0, 4 or 128.
            ops: the arithmetic, which decides what entries look like.
            sequences: how many there are.
            device: where the pages shall lie.
        """
        place = torch.device(device)
        self._ratio, self._window = ratio, config.sliding_window
        self._lengths = dict.fromkeys(range(sequences), 0)
        self.window = PagedStore(ops.kv_codec(PAGE_TOKENS), sequences, place)
        self.compressed: PagedStore | None = None
        self.keys: PagedStore | None = None
        self.state: CompressorState | None = None
        self.key_state: CompressorState | None = None
        if ratio:
            self.compressed = PagedStore(ops.kv_codec(PAGE_TOKENS // ratio), sequences, place)
            self.state = CompressorState.empty(sequences, ratio, config.head_dim, place)
        if ratio == 4:
            self.keys = PagedStore(ops.key_codec(PAGE_TOKENS // ratio), sequences, place)
            self.key_state = CompressorState.empty(sequences, ratio, config.index_head_dim, place)

    def _stores(self) -> list[PagedStore]:
        return [store for store in (self.window, self.compressed, self.keys) if store is not None]

    @property
    def bytes(self) -> int:
        """Memory of all pages."""
        return sum(store.bytes for store in self._stores())

    def reserve(self, chunk: Chunk) -> None:
        """Make room for what a chunk will write.

        Raises:
            ValueError: if it does not continue where its sequences end.
        """
        for run in chunk.runs:
            have = self._lengths.get(run.sequence)
            if have != run.first:
                raise ValueError(f"sequence {run.sequence} goes on at {run.first}, but the cache ends at {have}")
        for run in chunk.runs:
            self._lengths[run.sequence] = run.end
            self.window.reserve(run.sequence, run.end)
            for store in (self.compressed, self.keys):
                if store is not None:
                    store.reserve(run.sequence, run.end // self._ratio)

    def trim(self, chunk: Chunk) -> None:
        """After a chunk: give back window pages that no later token looks at."""
        for run in chunk.runs:
            self.window.release(run.sequence, max(run.end - self._window + 1, 0))

    def reset(self, sequence: int) -> None:
        """Forget a sequence."""
        self._lengths[sequence] = 0
        for store in self._stores():
            store.release(sequence)
        for state in (self.state, self.key_state):
            if state is not None:
                state.reset_(sequence)
