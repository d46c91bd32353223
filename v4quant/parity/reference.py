"""What a candidate is compared with: a reference that runs alongside, or outputs of one that were stored before."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from v4quant.model.block import Block
from v4quant.model.mtp import runnable_mtp_blocks
from v4quant.model.streaming import BlockResult, StreamedModel
from v4quant.parity.execution import executed_by, require_executed, require_finite
from v4quant.parity.logits import Collapsed, logit_pieces
from v4quant.parity.runs import Chunking, Noise, Runs
from v4quant.parity.stored import StoredOutputs


@dataclass(frozen=True)
class Expected:
    """What the reference made of a block.

    Attributes:
        result: None where it is not known.
        noise: of the reference's own runs; None where there are none.
    """

    result: BlockResult | None
    noise: Noise | None


@dataclass(frozen=True)
class Pieces:
    """Logits of all runs, piece by piece, and which of them to compare: found and expected.

    Attributes:
        pieces: float32 [T, some] of every run.
        found: the candidate against the reference.
        isolated: the candidate's head, fed the reference's streams; None where they are not known.
        noise: each variant against its plain run, in the order of Runs.variants.
    """

    pieces: Iterator[list[torch.Tensor]]
    found: tuple[int, int]
    isolated: tuple[int, int] | None
    noise: tuple[tuple[int, int], ...]


class Reference(Protocol):
    """What the candidate is compared with."""

    has_noise: bool
    """Whether its own runs say how much is noise; if not, the candidate's do."""

    has_mtp: bool
    """Whether it has an MTP block that can be run, or logits of one."""

    mtp_blocks: int
    """MTP blocks or DSpark stages that it is known to have."""

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read so far."""

    def begin(self, chunking: Chunking, embedding: torch.Tensor) -> torch.Tensor:
        """Streams before layer 0, [T, S, d]; the candidate's own are `embedding`."""

    def layer(self, index: int) -> Expected:
        """Go through the next layer."""

    def enter_mtp(self, rows: torch.Tensor, chunking: Chunking, last: torch.Tensor) -> None:
        """Go on with an MTP block's input; see Runs.enter_mtp."""

    def mtp(self) -> Expected:
        """Go through the MTP block."""

    def logits(self, candidate: Runs, last: torch.Tensor, mtp: int | None) -> Pieces:
        """Logits of both sides, of the model's head or an MTP block's; `last` are the reference's streams before it."""


class Alongside:
    """A reference that runs alongside, with the runs that show its noise."""

    has_noise = True

    def __init__(self, model: StreamedModel) -> None:
        self.has_mtp = runnable_mtp_blocks(model.config) > 0
        self.mtp_blocks = model.config.mtp_blocks
        self._model = model
        self._blocks = model.blocks(0, model.config.num_hidden_layers)
        self._runs: Runs | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read so far."""
        return self._model.bytes_read

    @property
    def _going(self) -> Runs:
        assert self._runs is not None, "begin comes first"
        return self._runs

    def begin(self, chunking: Chunking, embedding: torch.Tensor) -> torch.Tensor:
        """Its own embedding."""
        del embedding
        self._runs = Runs(self._model, chunking, with_noise=True)
        return self._runs.plain.streams

    def layer(self, index: int) -> Expected:
        """Run the next layer."""
        return self._run(next(self._blocks), f"layer {index}")

    def enter_mtp(self, rows: torch.Tensor, chunking: Chunking, last: torch.Tensor) -> None:
        """With its own weights."""
        self._going.enter_mtp(rows, chunking, last)

    def mtp(self) -> Expected:
        """Run the MTP block."""
        return self._run(self._model.mtp_block(0), "mtp 0")

    def _run(self, block: Block, name: str) -> Expected:
        runs = self._going
        answers = runs.take(block, runs.plain.streams)
        counts = runs.counted.take()
        require_executed(executed_by(counts, self._model.config, block.ratio, runs.plain.schedule), name)
        require_finite(answers.own.streams, name)
        return Expected(answers.own, answers.noise)

    def collapsed(self, mtp: int | None) -> list[Collapsed]:
        """What its runs bring to the vocabulary matrix."""
        return self._going.collapsed(mtp)

    def logits(self, candidate: Runs, last: torch.Tensor, mtp: int | None) -> Pieces:
        """Both vocabulary matrices in step."""
        runs = [*self.collapsed(mtp), *candidate.collapsed(mtp, last)]
        return Pieces(logit_pieces(runs), (3, 0), (4, 0), ((1, 0), (2, 0)))


class Stored:
    """A reference whose outputs were stored; it has no weights, and tells nothing of its noise."""

    has_noise = False
    bytes_read = 0

    def __init__(self, outputs: StoredOutputs) -> None:
        self.has_mtp = outputs.has_mtp
        self.mtp_blocks = int(outputs.has_mtp)
        self._outputs = outputs

    def begin(self, chunking: Chunking, embedding: torch.Tensor) -> torch.Tensor:
        """The candidate's embedding: none is stored."""
        del chunking
        return embedding

    def layer(self, index: int) -> Expected:
        """What was stored of it."""
        return Expected(self._outputs.block(index), None)

    def enter_mtp(self, rows: torch.Tensor, chunking: Chunking, last: torch.Tensor) -> None:
        """Nothing to do."""

    def mtp(self) -> Expected:
        """Of an MTP block only logits are stored."""
        return Expected(None, None)

    def logits(self, candidate: Runs, last: torch.Tensor, mtp: int | None) -> Pieces:
        """The candidate's, and those of the file."""
        del last
        name = "logits" if mtp is None else "mtp_logits"

        def pieces() -> Iterator[list[torch.Tensor]]:
            first = 0
            for ours in logit_pieces(candidate.collapsed(mtp)):
                width = ours[0].shape[1]
                yield [*ours, self._outputs.columns(name, first, first + width)]
                first += width

        return Pieces(pieces(), (0, 3), None, ((1, 0), (2, 0)))
