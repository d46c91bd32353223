"""Corruptions of places: values that are all there, in other rows, columns, halves or tensors than they belong to."""

from collections.abc import Callable

import torch

from v4quant.checkpoint.reader import Checkpoint
from v4quant.names import in_block, of_expert
from v4quant.parity.selftest.corruption import (
    EXPERT_W1,
    EXPERT_W2,
    EXPERT_W3,
    Corruption,
    change,
    exchange,
    exchange_matrices,
    experts_of,
    find,
    first,
    needs,
    needs_layers,
    with_scale,
)
from v4quant.parity.selftest.editor import Editor

_NO_MTP = "no MTP block that can be run"
_NO_TABLE = "no layer is hash-routed"
_NO_COMPRESSOR = "no layer has a compressor"
_OVERLAPPING_RATIO = 4


def unpack(codes: torch.Tensor) -> torch.Tensor:
    """One E2M1 code a byte: [rows, bytes] -> [rows, 2 bytes], even columns from low nibbles."""
    return torch.stack([codes & 0xF, codes >> 4], dim=-1).flatten(-2)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """The reverse of unpack."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def _swap_first_rows(stored: torch.Tensor) -> torch.Tensor:
    return stored[[1, 0, *range(2, len(stored))]]


def _rows_swapped(editor: Editor) -> None:
    """Rows of FP4 codes have scales of their own, which go with them; in other forms both rows share a block's."""
    weight = first(editor.checkpoint, EXPERT_W2)
    own_scale = editor.checkpoint.scheme.expert.name == "fp4"
    for name in with_scale(editor.checkpoint, weight) if own_scale else [weight]:
        change(editor, name, _swap_first_rows)


def _columns_shifted(editor: Editor) -> None:
    weight = first(editor.checkpoint, EXPERT_W2)
    if editor.checkpoint.scheme.expert.name == "fp4":
        change(editor, weight, lambda codes: pack(unpack(codes).roll(1, 1)))
    else:
        change(editor, weight, lambda codes: codes.roll(1, 1))


def _shifted(module: str, leaf: str = "weight", block: str = "layers") -> Callable[[Editor], None]:
    """Move the rows of a tensor one down, the last to the top."""
    return lambda editor: change(editor, first(editor.checkpoint, module, leaf, block), lambda rows: rows.roll(1, 0))


def _head_is_embedding(editor: Editor) -> None:
    editor.write("head.weight", editor.read("embed.weight"))


def _transpose_comb(editor: Editor) -> None:
    """Rows after pre and post are the square matrix that mixes streams, row by row."""
    streams = editor.checkpoint.config.hc_mult

    def transposed(rows: torch.Tensor) -> torch.Tensor:
        comb = rows[2 * streams :].reshape(streams, streams, -1).transpose(0, 1)
        return torch.cat([rows[: 2 * streams], comb.reshape(rows[2 * streams :].shape)])

    for leaf in ("hc_attn_fn", "hc_attn_base"):
        change(editor, first(editor.checkpoint, "", leaf), transposed)


def _exchanged(one: str, other: str, block: str = "layers") -> Callable[[Editor], None]:
    """Exchange the matrices of two modules of the first block that has them, each with its scale."""
    return lambda editor: exchange_matrices(
        editor, first(editor.checkpoint, one, block=block), first(editor.checkpoint, other, block=block)
    )


def _overlapping_compressor(checkpoint: Checkpoint) -> str:
    """Prefix of the first compressor with a set of weights for the own window and one for that before; "" if none."""
    ratios = checkpoint.config.compress_ratios
    for name in find(checkpoint, "attn.compressor", "ape"):
        if ratios[checkpoint.parsed[name].index] == _OVERLAPPING_RATIO:
            return name.removesuffix("ape")
    return ""


def _windows_exchanged(editor: Editor) -> None:
    prefix = _overlapping_compressor(editor.checkpoint)
    for matrix in ("wkv.weight", "wgate.weight"):
        change(editor, prefix + matrix, lambda rows: rows.roll(len(rows) // 2, 0))
    change(editor, f"{prefix}ape", lambda ape: ape.roll(ape.shape[1] // 2, 1))


def _needs_groups(checkpoint: Checkpoint) -> str:
    config, block = checkpoint.config, checkpoint.scheme.dense.block
    if config.o_groups < 2:
        return "wo_a has one group"
    return "scales of wo_a span groups" if block and config.o_lora_rank % block.rows else ""


def _rotate_groups(editor: Editor) -> None:
    groups = editor.checkpoint.config.o_groups
    for name in with_scale(editor.checkpoint, first(editor.checkpoint, "attn.wo_a")):
        change(editor, name, lambda rows: rows.roll(len(rows) // groups, 0))


def _needs_one_block_of_rotated_rows(checkpoint: Checkpoint) -> str:
    config, block = checkpoint.config, checkpoint.scheme.dense.block
    if (
        block is None
        or (config.head_dim - config.qk_rope_head_dim) // block.rows == (config.head_dim - 1) // block.rows
    ):
        return ""
    return "the rotated rows of wkv span blocks of scales"


def _halves_for_pairs(editor: Editor) -> None:
    rotated = editor.checkpoint.config.qk_rope_head_dim

    def reordered(rows: torch.Tensor) -> torch.Tensor:
        kept, pairs = rows[:-rotated], rows[-rotated:]
        return torch.cat([kept, pairs[0::2], pairs[1::2]])

    change(editor, first(editor.checkpoint, "attn.wkv"), reordered)


def _experts_exchanged(editor: Editor) -> None:
    for module in (EXPERT_W1, EXPERT_W2, EXPERT_W3):
        one, other = find(editor.checkpoint, module)[:2]
        exchange_matrices(editor, one, other)


def _experts_rotated(editor: Editor) -> None:
    """Every expert takes the next one's place."""
    experts = editor.checkpoint.config.n_routed_experts
    names = {parts.name: of_expert(parts, (parts.expert + 1) % experts) for parts in experts_of(editor.checkpoint, 0)}
    values = {name: editor.read(origin) for name, origin in names.items()}
    for name, stored in values.items():
        editor.write(name, stored)


def _expert_duplicated(editor: Editor) -> None:
    for parts in experts_of(editor.checkpoint, 0):
        if parts.expert == 1:
            editor.write(parts.name, editor.read(of_expert(parts, 0)))


def _layers_experts_exchanged(editor: Editor) -> None:
    for parts in experts_of(editor.checkpoint, 0):
        exchange(editor, parts.name, in_block(parts, 1))


def _needs_equal_norms(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    return "" if config.q_lora_rank == config.head_dim else "q_norm and kv_norm differ in size"


CORRUPTIONS = (
    Corruption("rows-swapped", "Two rows of an expert matrix changed places.", _rows_swapped),
    Corruption("columns-shifted", "The columns of an expert matrix lie one too far right.", _columns_shifted),
    Corruption(
        "ape-shifted",
        "A compressor's table of positions is off by one row.",
        _shifted("attn.compressor", "ape"),
        needs(_NO_COMPRESSOR, "attn.compressor", "ape"),
    ),
    Corruption(
        "embedding-shifted",
        "The embedding is off by one row, as after a padding token was put in front.",
        _shifted("embed", block=""),
    ),
    Corruption("head-shifted", "The head is off by one row.", _shifted("head", block="")),
    Corruption(
        "head-is-embedding",
        "The embedding was stored as the head, by a tool that ties the two; V4 has a head of its own.",
        _head_is_embedding,
    ),
    Corruption(
        "tid2eid-shifted",
        "The table of hash routing is off by one token.",
        _shifted("ffn.gate", "tid2eid"),
        needs(_NO_TABLE, "ffn.gate", "tid2eid"),
    ),
    Corruption(
        "attn-sink-rotated",
        "The attention sinks belong to the next head each, as when they are not split by head (tokenspeed#254).",
        _shifted("attn", "attn_sink"),
    ),
    Corruption("hc-comb-transposed", "The matrix that mixes the residual streams is transposed.", _transpose_comb),
    Corruption(
        "compressor-wkv-wgate-exchanged",
        "A compressor's wkv and wgate were exchanged; loaders fuse the two, so their order matters.",
        _exchanged("attn.compressor.wkv", "attn.compressor.wgate"),
        needs(_NO_COMPRESSOR, "attn.compressor.wkv"),
    ),
    Corruption(
        "compressor-windows-exchanged",
        "A compressor's weights for a token's own window and for the one before were exchanged.",
        _windows_exchanged,
        lambda checkpoint: "" if _overlapping_compressor(checkpoint) else "no layer has compression ratio 4",
    ),
    Corruption(
        "wo-a-groups-rotated",
        "The groups of wo_a lie one too far, as after a wrong slice for tensor parallelism (exo#1996).",
        _rotate_groups,
        _needs_groups,
    ),
    Corruption(
        "wkv-rope-order",
        "The rotated rows of wkv stand in halves instead of pairs, as other models' RoPE has them.",
        _halves_for_pairs,
        _needs_one_block_of_rotated_rows,
    ),
    Corruption(
        "w1-w3-exchanged",
        "An expert's gate (w1) and up projection (w3) were exchanged; they have one shape and are fused by loaders.",
        _exchanged(EXPERT_W1, EXPERT_W3),
    ),
    Corruption(
        "shared-w1-w3-exchanged",
        "The shared expert's w1 and w3 were exchanged.",
        _exchanged("ffn.shared_experts.w1", "ffn.shared_experts.w3"),
    ),
    Corruption("experts-exchanged", "Two experts of a layer were exchanged.", _experts_exchanged),
    Corruption(
        "experts-rotated",
        "The expert ids of a layer are permuted: every expert stands in the place of the next.",
        _experts_rotated,
    ),
    Corruption(
        "expert-duplicated",
        "One expert was written over another, as by a multi-rank save that kept rank 0's (canada-quant).",
        _expert_duplicated,
    ),
    Corruption(
        "layers-experts-exchanged",
        "The experts of two layers were exchanged: a layer counter off by one.",
        _layers_experts_exchanged,
        needs_layers(2),
    ),
    Corruption(
        "attn-ffn-norms-exchanged",
        "The two norms of a layer were exchanged, as by a wrong table of names.",
        _exchanged("attn_norm", "ffn_norm"),
    ),
    Corruption(
        "q-kv-norms-exchanged",
        "q_norm and kv_norm were exchanged.",
        _exchanged("attn.q_norm", "attn.kv_norm"),
        _needs_equal_norms,
    ),
    Corruption(
        "mtp-projections-exchanged",
        "The MTP block's projections of embedding and hidden state were exchanged; only its acceptance rate shows it.",
        _exchanged("e_proj", "h_proj", "mtp"),
        needs(_NO_MTP, "e_proj", block="mtp"),
    ),
)
