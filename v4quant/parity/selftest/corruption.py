"""What a corruption is, and how one finds the tensors that it is planted in."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from v4quant.checkpoint.reader import Checkpoint
from v4quant.names import TensorName, scale_name
from v4quant.parity.selftest.editor import Editor

# Matrices that most corruptions are planted in: those of the first routed expert, which a hash-routed first layer is
# sure to use, and an attention matrix.
EXPERT_W1 = "ffn.experts.w1"
EXPERT_W2 = "ffn.experts.w2"
EXPERT_W3 = "ffn.experts.w3"


def always(_checkpoint: Checkpoint) -> str:
    """Applies to every checkpoint."""
    return ""


@dataclass(frozen=True)
class Corruption:
    """A fault that conversions, uploads or edits really produce.

    Attributes:
        name: short, unique, "words-with-hyphens".
        what: one sentence: what goes wrong, and who reported it where somebody has.
        apply: plants it.
        applies: why this checkpoint cannot have it; "" if it can.
    """

    name: str
    what: str
    apply: Callable[[Editor], None]
    applies: Callable[[Checkpoint], str] = always


def find(checkpoint: Checkpoint, module: str, leaf: str = "weight", block: str = "layers") -> list[str]:
    """Names of a module's tensors in all blocks of a kind, by block and expert.

    Args:
        block: "layers", "mtp", or "" for tensors outside the blocks.
    """
    wanted = (block, module, leaf)
    found = [parts for parts in checkpoint.parsed.values() if (parts.block, parts.module, parts.leaf) == wanted]
    return [parts.name for parts in sorted(found, key=lambda parts: (parts.index, parts.expert))]


def first(checkpoint: Checkpoint, module: str, leaf: str = "weight", block: str = "layers") -> str:
    """Name of the first of them; one must be there."""
    return find(checkpoint, module, leaf, block)[0]


def of_block(checkpoint: Checkpoint, block: str, index: int) -> list[TensorName]:
    """All tensors of a block."""
    return [parts for parts in checkpoint.parsed.values() if (parts.block, parts.index) == (block, index)]


def experts_of(checkpoint: Checkpoint, layer: int) -> list[TensorName]:
    """All tensors of the routed experts of a layer, scales included."""
    return [parts for parts in of_block(checkpoint, "layers", layer) if parts.expert >= 0]


def needs(why: str, module: str, leaf: str = "weight", block: str = "layers") -> Callable[[Checkpoint], str]:
    """Applies where such a tensor is stored; `why` says what is missing elsewhere."""
    return lambda checkpoint: "" if find(checkpoint, module, leaf, block) else why


def needs_expert_scales(checkpoint: Checkpoint) -> str:
    """Applies where routed experts have block scales."""
    return "" if checkpoint.scheme.expert.block else "bf16 has no scales"


def needs_fp4(checkpoint: Checkpoint) -> str:
    """Applies where routed experts are stored in FP4."""
    return "" if checkpoint.scheme.expert.name == "fp4" else "no expert is stored in FP4"


def needs_layers(count: int) -> Callable[[Checkpoint], str]:
    """Applies to models of so many layers."""
    return lambda checkpoint: "" if checkpoint.config.num_hidden_layers >= count else f"fewer than {count} layers"


def change(editor: Editor, name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace a tensor by what an edit makes of it."""
    editor.write(name, edit(editor.read(name)))


def with_scale(checkpoint: Checkpoint, weight: str) -> list[str]:
    """A matrix's stored tensors: the weight, and its scale where it has one."""
    return [name for name in (weight, scale_name(weight)) if name in checkpoint.tensors]


def exchange(editor: Editor, one: str, other: str) -> None:
    """Exchange the values of two tensors of the same shape."""
    values = editor.read(one), editor.read(other)
    editor.write(one, values[1])
    editor.write(other, values[0])


def exchange_matrices(editor: Editor, one: str, other: str) -> None:
    """Exchange two matrices of the same shape, each with its scale."""
    pairs = zip(with_scale(editor.checkpoint, one), with_scale(editor.checkpoint, other), strict=True)
    for pair in pairs:
        exchange(editor, *pair)
