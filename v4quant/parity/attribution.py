"""Name what makes a checkpoint different: block by block, one module at a time taken from the reference.

A block of the candidate is fed the reference's streams, and run again with one module's weights from the reference:
the module whose exchange leaves the smallest error is the one to look at. Modules with equal weights are not exchanged:
they cannot be it. Which tensors differ is told by comparing their stored values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace

import torch

from v4quant.checkpoint.verify_report import Mismatch
from v4quant.model.block import Block
from v4quant.model.streaming import Lane, Schedule, StreamedModel, run_lanes
from v4quant.model.weights import BlockWeights
from v4quant.names import block_prefix
from v4quant.parity.evidence import config_differences
from v4quant.parity.figures import compare_streams, token_errors
from v4quant.parity.lockstep import BlockOutcome, Outcome
from v4quant.parity.verdict import KL_MEAN, Judgement, block_figures, block_limits, resolution_of

# Share of a block's error that a module's exchange has to take away to be named.
_EXPLAINS = 0.5
EXPERTS, CONFIG = "experts", "config.json"
_PROJECTIONS = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "sink")


def _attention(own: BlockWeights, other: BlockWeights, names: tuple[str, ...]) -> BlockWeights:
    parts = {name: getattr(other.attention, name) for name in names}
    return replace(own, attention=replace(own.attention, **parts))


def _norms(own: BlockWeights, other: BlockWeights) -> BlockWeights:
    own = _attention(own, other, ("q_norm", "kv_norm"))
    return replace(own, attention_norm=other.attention_norm, ffn_norm=other.ffn_norm)


# Module -> a block's own weights with that module's from another.
_EXCHANGES: dict[str, Callable[[BlockWeights, BlockWeights], BlockWeights]] = {
    "attention projections": lambda own, other: _attention(own, other, _PROJECTIONS),
    "compressor": lambda own, other: _attention(own, other, ("compressor",)),
    "indexer": lambda own, other: _attention(own, other, ("indexer",)),
    "router": lambda own, other: replace(own, router=other.router),
    "hyper-connections": lambda own, other: replace(own, attention_mix=other.attention_mix, ffn_mix=other.ffn_mix),
    "norms": _norms,
    EXPERTS: lambda own, other: replace(own, shared_expert=other.shared_expert),  # and the source of routed ones
}


@dataclass(frozen=True)
class Exchange:
    """What one module's exchange leaves.

    Attributes:
        module: from the reference.
        error: relative error that is left.
        explains: share of the block's error that went away.
    """

    module: str
    error: float
    explains: float


@dataclass(frozen=True)
class BlockAttribution:
    """Why a block of the candidate differs.

    Attributes:
        block: "layers.3" or "mtp.0".
        error: its isolated relative error.
        exchanges: what explains most comes first; modules with equal weights are left out.
        tensors: whose stored values differ.
    """

    block: str
    error: float
    exchanges: list[Exchange]
    tensors: list[Mismatch]


@dataclass(frozen=True)
class Blame:
    """What to look at first.

    Attributes:
        layer: number of the first departing layer; None outside the layers.
        module: "experts", "attention projections", ..., "embedding", "head", "mtp"; None where nothing tells.
    """

    layer: int | None
    module: str | None


def blame(outcome: Outcome, judgement: Judgement, blocks: Sequence[BlockAttribution]) -> Blame:
    """Name the first part of the model that departs."""
    if any(departure.where == "embedding" for departure in judgement.departures):
        return Blame(None, "embedding")
    if outcome.mtp_missing:
        return Blame(None, "mtp")
    departing = judgement.departing_blocks(outcome)
    head = outcome.logits.isolated if outcome.logits else None
    if not departing and head is not None and head.kl.mean > KL_MEAN:
        return Blame(None, "head")
    if not departing and not blocks:
        return Blame(None, None)
    first = departing[0] if departing else blocks[0].block.replace("layers.", "layer ").replace("mtp.", "mtp ")
    if first.startswith("mtp"):
        return Blame(None, "mtp")
    layer = int(first.split()[1])
    if blocks:
        best = blocks[0].exchanges[0]
        return Blame(layer, best.module if best.explains >= _EXPLAINS else None)
    # Without the reference's weights nothing can be exchanged; picks alone tell who picked.
    figures = {departure.figure for departure in judgement.departures if departure.where == first}
    if figures <= {"1 - indexer_overlap"}:
        return Blame(layer, "indexer")
    return Blame(layer, "router" if figures <= {"1 - expert_agreement", "swapped_mass"} else None)


class Suspects:
    """Keeps the reference's streams before blocks that depart, for a closer look at the end.

    The first three and the worst: they are what a reader wants explained, and memory stays bounded.
    """

    _FIRST = 3

    def __init__(self, tokens: int) -> None:
        """For a run of so many tokens beside its reference."""
        self._tokens = tokens
        self._seen: list[BlockOutcome] = []
        self._kept: dict[str, tuple[float, torch.Tensor]] = {}

    def watch(self, block: BlockOutcome, before: torch.Tensor) -> None:
        """See a block's outcome, and the reference's streams before it."""
        self._seen.append(block)
        if block.isolated is None or block.isolated.streams.bit_equal == 1.0:
            return
        limits = block_limits(self._seen, self._tokens, resolution_of("reference"))
        times = max(value / limits[figure] for figure, value in block_figures(block.isolated).items())
        self._kept[block.name] = times, before
        worst = max(self._kept, key=lambda name: self._kept[name][0])
        first = [name for name, (far, _) in self._kept.items() if far > 1][: self._FIRST]
        self._kept = {name: kept for name, kept in self._kept.items() if name in first or name == worst}

    def chosen(self, departing: list[str]) -> dict[str, torch.Tensor]:
        """The first departing block that was kept, and the worst, with the streams before them."""
        if not self._kept:
            return {}
        worst = max(self._kept, key=lambda name: self._kept[name][0])
        first = next((name for name in self._kept if name in departing), worst)
        return {name: self._kept[name][1] for name in dict.fromkeys((first, worst))}


@torch.inference_mode()
def attribute(
    name: str,
    streams: torch.Tensor,
    schedule: Schedule,
    candidate: StreamedModel,
    reference: StreamedModel,
    differences: Callable[[str], list[Mismatch]],
) -> BlockAttribution:
    """Exchange the modules of a block one by one.

    Args:
        name: of the block, "layer 3" or "mtp 0".
        streams: the reference's before it, [T, S, d].
        schedule: of the tokens.
        candidate: a sharded one is put together here: what its ranks hold tells what is wrong with it.
        differences: tensors whose values differ, of those whose name begins with this.
    """
    kind, index = ("mtp" if name.startswith("mtp") else "layers"), int(name.split()[1])
    own, other = (_block(model, kind, index) for model in (candidate, reference))
    differing = [module for module in _EXCHANGES if module == EXPERTS or not _alike(own, other, module)]
    changed = {module: _EXCHANGES[module](own.weights, other.weights) for module in differing}
    mine = [own, *(own.with_weights(weights, own.experts) for module, weights in changed.items() if module != EXPERTS)]
    names = [module for module in changed if module != EXPERTS]
    if config_differences(candidate.config, reference.config):
        mine.append(other.with_weights(own.weights, own.experts))
        names.append(CONFIG)
    theirs = [other, own.with_weights(changed[EXPERTS], other.experts)]
    found = [result.streams for result in run_lanes([Lane(block, streams, schedule) for block in mine])]
    expected, exchanged = (result.streams for result in run_lanes([Lane(block, streams, schedule) for block in theirs]))
    error = _relative(found[0], expected)
    left = dict(zip([*names, EXPERTS], [_relative(one, expected) for one in [*found[1:], exchanged]], strict=True))
    exchanges = [Exchange(module, rest, _explained(error, rest)) for module, rest in left.items()]
    exchanges.sort(key=lambda exchange: exchange.error)
    prefix = block_prefix(kind, index)
    return BlockAttribution(prefix.removesuffix("."), error, exchanges, differences(prefix))


def _block(model: StreamedModel, kind: str, index: int) -> Block:
    return model.mtp_block(index) if kind == "mtp" else next(model.blocks(index, index + 1))


def _alike(own: Block, other: Block, module: str) -> bool:
    """True if a module's weights are equal: exchanging them changes nothing."""
    exchanged = _tensors(_EXCHANGES[module](own.weights, other.weights))
    return all(torch.equal(tensor, exchanged[name]) for name, tensor in _tensors(own.weights).items())


def _tensors(weights: object, prefix: str = "") -> Mapping[str, torch.Tensor]:
    """Every tensor in nested weights, by its place."""
    found: dict[str, torch.Tensor] = {}
    assert is_dataclass(weights)
    for item in fields(weights):
        value = getattr(weights, item.name)
        if isinstance(value, torch.Tensor):
            found[f"{prefix}{item.name}"] = value
        elif is_dataclass(value):
            found |= _tensors(value, f"{prefix}{item.name}.")
    return found


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return compare_streams(found, expected, token_errors(found, expected)).rel_err


def _explained(error: float, left: float) -> float:
    """Share of an error that went away; of an infinite one all, if what is left is finite."""
    return 0.0 if error in (0, left) else 1 - left / error
