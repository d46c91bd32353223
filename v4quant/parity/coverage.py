"""What a run exercised: every path of the model, how often it fired, and what it would take where it did not.

A path that never fired proves nothing about the weights behind it: silence is no proof.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from v4quant.config import V4Config
from v4quant.model.mtp import runnable_mtp_blocks
from v4quant.parity.execution import CSA, HCA, Executed, total
from v4quant.parity.lockstep import BlockOutcome, Outcome
from v4quant.parity.prompts import Prompts
from v4quant.parity.verdict import blocks_of


@dataclass(frozen=True)
class Path:
    """A path of the model.

    Attributes:
        path: what it is.
        fired: how often, in `unit`.
        of: how often at most in this run; 0 where it has no meaning.
        unit: what is counted.
        needs: what it takes for it to fire.
    """

    path: str
    fired: int
    of: int
    unit: str
    needs: str


@dataclass(frozen=True)
class ExpertsSeen:
    """Experts of a layer that some token went to, of those that it has."""

    layer: int
    seen: int
    of: int


@dataclass(frozen=True)
class Coverage:
    """What a run exercised.

    Attributes:
        tokens, prompts, decode_steps: of the plain run.
        paths: every path that the model has.
        experts: layer by layer.
        executed: counts of all blocks, MTP included, and what the config says they have to be.
    """

    tokens: int
    prompts: int
    decode_steps: int
    paths: list[Path]
    experts: list[ExpertsSeen]
    executed: list[Executed]

    @property
    def silent(self) -> list[str]:
        """Paths that never fired."""
        return [path.path for path in self.paths if not path.fired]


def coverage_of(outcome: Outcome, config: V4Config, prompts: Prompts) -> Coverage:
    """Count what a run exercised."""
    positions = torch.cat([torch.arange(len(ids)) for ids in prompts.ids])
    decode_steps = sum(max(len(ids) - prompts.sizes[0], 0) for ids in prompts.ids)
    experts = [
        ExpertsSeen(number, layer.experts_seen, config.n_routed_experts) for number, layer in enumerate(outcome.layers)
    ]
    return Coverage(
        tokens=len(positions),
        prompts=len(prompts.ids),
        decode_steps=decode_steps,
        paths=[*_attention_paths(config, positions), *_other_paths(config, prompts, outcome, decode_steps)],
        experts=experts,
        executed=total([block.executed for block in blocks_of(outcome)]),
    )


def _attention_paths(config: V4Config, positions: torch.Tensor) -> Iterator[Path]:
    """Paths that depend on how far into its prompt a token stands."""
    tokens, window, ratios = len(positions), config.sliding_window, config.compress_ratios
    slides = int((positions >= window).sum())
    yield Path("window slides", slides, tokens, "tokens", f"a prompt longer than sliding_window = {window}")
    if CSA in ratios:
        sees = int((positions + 1 >= CSA).sum())
        yield Path("CSA entries attended to", sees, tokens, "tokens", f"a prompt of {CSA} tokens or more")
        cuts = int(((positions + 1) // CSA > config.index_topk).sum())
        needs = f"a prompt longer than {CSA} x index_topk = {CSA * config.index_topk}, or a smaller --index-topk"
        yield Path("indexer has to choose", cuts, tokens, "tokens", needs)
    if HCA in ratios:
        sees = int((positions + 1 >= HCA).sum())
        yield Path("HCA entries attended to", sees, tokens, "tokens", f"a prompt of {HCA} tokens or more")


def _other_paths(config: V4Config, prompts: Prompts, outcome: Outcome, decode_steps: int) -> Iterator[Path]:
    layers, hashed = config.num_hidden_layers, config.num_hash_layers
    seen = len(torch.unique(torch.cat(prompts.ids)))
    if hashed:
        yield Path("hash-routed layers", _ran(outcome.layers[:hashed]), hashed, "layers", "any token")
        yield Path("rows of the hash table", seen, config.vocab_size, "token ids", "more different tokens")
    if layers > hashed:
        yield Path("score-routed layers", _ran(outcome.layers[hashed:]), layers - hashed, "layers", "any token")
    clamped = sum(block.clamped for block in blocks_of(outcome))
    yield Path("swiglu_limit cuts off", clamped, 0, "values", "activations beyond the limit; only the weights decide")
    yield Path("decode steps", decode_steps, 0, "tokens", "--prefill below the tokens of the longest prompt")
    if runnable_mtp_blocks(config):
        ran = outcome.mtp_logits.found.tokens if outcome.mtp_logits else 0
        yield Path("MTP block 0", ran, len(torch.cat(prompts.ids)), "tokens", "a prefill of two tokens or more")
    for block in range(1 if not config.is_dspark else 0, config.mtp_blocks):
        what = f"DSpark stage {block}" if config.is_dspark else f"MTP block {block}"
        yield Path(what, 0, 0, "tokens", "code for it: v4quant runs MTP block 0 of the preview and Base releases")


def _ran(layers: Sequence[BlockOutcome]) -> int:
    """Layers whose experts took tokens."""
    return sum(layer.experts_seen > 0 for layer in layers)
