"""Tokens that go through the model together: pieces of one or more sequences, one behind the other.

A prefill, a piece of a prefill and a decode step are the same thing here: tokens of a sequence that continue where its
cache ends. T tokens in all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from v4quant.config import V4Config
from v4quant.errors import UsageError

# 8 MiB of BF16 at 64 heads of 512 dims: memory of this size is used again, not asked of the system page by page.
_QUERIES_CPU = 128
_QUERIES_GPU = 4096


@dataclass(frozen=True)
class Run:
    """The tokens of one sequence in a chunk.

    Attributes:
        sequence: its number.
        rows: where they lie in the chunk.
        first: position of the first one in its sequence.
    """

    sequence: int
    rows: slice
    first: int

    @property
    def end(self) -> int:
        """Position behind the last one: the sequence's length once the chunk is done."""
        return self.first + int(self.rows.stop) - int(self.rows.start)


@dataclass(frozen=True)
class Chunk:
    """Tokens with their place.

    Attributes:
        input_ids: int64 [T].
        sequences: int32 [T].
        positions: int32 [T], counted from 0 in each sequence.
        runs: the same, by sequence.
    """

    input_ids: torch.Tensor
    sequences: torch.Tensor
    positions: torch.Tensor
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, pieces: Sequence[tuple[int, int, torch.Tensor]], device: torch.device | str = "cpu") -> "Chunk":
        """Build one.

        Args:
            pieces: for each sequence its number, the position of the piece's first token, and its ids, int64 [n].
            device: where the tensors shall lie.

        Raises:
            ValueError: if there is no piece, or one is empty or of the sequence of another.
        """
        numbers = [sequence for sequence, _, _ in pieces]
        if not pieces or len(set(numbers)) < len(pieces) or not all(len(ids) for _, _, ids in pieces):
            raise ValueError(f"pieces of sequences {numbers}, expected one or more, each of another and not empty")
        runs, row = [], 0
        for sequence, first, ids in pieces:
            runs.append(Run(sequence, slice(row, row + len(ids)), first))
            row += len(ids)
        sequences = [torch.full((run.rows.stop - run.rows.start,), run.sequence) for run in runs]
        positions = [torch.arange(run.first, run.end) for run in runs]
        return cls(
            torch.cat([ids for _, _, ids in pieces]).to(device),
            torch.cat(sequences).to(torch.int32).to(device),
            torch.cat(positions).to(torch.int32).to(device),
            tuple(runs),
        )


def query_pieces(queries: int, device: torch.device) -> Iterator[slice]:
    """Queries that are taken together where each has 64 heads of its own, however long the prompt is."""
    size = _QUERIES_CPU if device.type == "cpu" else _QUERIES_GPU
    return (slice(first, min(first + size, queries)) for first in range(0, queries, size))


def split(prompts: Sequence[torch.Tensor], sizes: Sequence[int]) -> Iterator[Chunk]:
    """Cut prompts into chunks: the first sizes[0] tokens of each, then the next sizes[1], and so on.

    Args:
        prompts: int64 [n] each.
        sizes: tokens a step; the last one is repeated until every prompt is through.

    Raises:
        ValueError: if a size is not positive.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes are {list(sizes)}, expected one or more positive numbers")
    longest, first, step = max(len(prompt) for prompt in prompts), 0, 0
    while first < longest:
        size = sizes[min(step, len(sizes) - 1)]
        pieces = [(number, first, prompt[first : first + size]) for number, prompt in enumerate(prompts)]
        yield Chunk.of([piece for piece in pieces if len(piece[2])], prompts[0].device)
        first, step = first + size, step + 1


def check_prompts(prompts: Sequence[torch.Tensor], config: V4Config, where: str) -> None:
    """Refuse token ids that the model does not have, and prompts that it cannot take.

    Raises:
        UsageError: if a prompt is empty, too long, or holds a wrong id.
    """
    if not prompts:
        raise UsageError(f"{where}: holds no prompt, expected one or more")
    for number, prompt in enumerate(prompts):
        name = f"{where}: prompt {number}" if len(prompts) > 1 else where
        if prompt.dtype != torch.int64 or prompt.dim() != 1:
            raise UsageError(f"{name}: token ids are {prompt.dtype} {list(prompt.shape)}, expected one row of int64")
        if not 0 < len(prompt) <= config.max_position_embeddings:
            raise UsageError(
                f"{name}: has {len(prompt):,} tokens, expected 1 to {config.max_position_embeddings:,} "
                "(max_position_embeddings of config.json)"
            )
        check_ids(prompt, config, name)


def check_ids(input_ids: torch.Tensor, config: V4Config, name: str) -> None:
    """Refuse token ids, int64 [T], that the model does not have; `name` says what they are.

    Raises:
        UsageError: if there is one.
    """
    wrong = ((input_ids < 0) | (input_ids >= config.vocab_size)).nonzero()
    if len(wrong):
        place = int(wrong[0])
        raise UsageError(
            f"{name}: token {place} is {int(input_ids[place])}, expected 0 to {config.vocab_size - 1} "
            "(vocab_size of config.json)",
            hint="Encode the text with this checkpoint's own tokenizer.",
        )
