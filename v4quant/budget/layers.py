"""Kinds of attention layers: the compression ratio of a layer decides what it caches and what it computes."""

from collections import Counter
from enum import StrEnum

from v4quant.config import V4Config

CSA_RATIO, HCA_RATIO = 4, 128


class LayerKind(StrEnum):
    """What a layer attends to besides its sliding window.

    SWA: nothing. CSA: the top-k of entries that stand for 4 tokens each. HCA: all entries that stand for 128 each.
    """

    SWA = "swa"
    CSA = "csa"
    HCA = "hca"


_BY_RATIO = {0: LayerKind.SWA, CSA_RATIO: LayerKind.CSA, HCA_RATIO: LayerKind.HCA}


def layers_by_kind(config: V4Config) -> dict[LayerKind, int]:
    """Layers of each kind, MTP blocks left out; a kind that the model lacks counts 0."""
    counts = Counter(config.compress_ratios[: config.num_hidden_layers])
    return {kind: counts[ratio] for ratio, kind in _BY_RATIO.items()}
