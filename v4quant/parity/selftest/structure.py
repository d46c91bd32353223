"""Corruptions of what is there: tensors, blocks and files lost, doubled, misnamed, cut short or not in the index."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from v4quant.checkpoint.index import INDEX_NAME
from v4quant.checkpoint.reader import Checkpoint
from v4quant.names import Role, block_prefix, scale_name
from v4quant.parity.selftest.corruption import (
    EXPERT_W2,
    Corruption,
    first,
    needs,
    needs_expert_scales,
    needs_layers,
    of_block,
)
from v4quant.parity.selftest.editor import Editor

_LOST_BYTES = 100
# A second split of the same checkpoint, as an earlier upload leaves it behind.
_OTHER_SHARD = "model-00099-of-00099.safetensors"


def _largest_shard(checkpoint: Checkpoint) -> str:
    return max(checkpoint.header_sha256, key=checkpoint.files.size)


def _shard_of(checkpoint: Checkpoint, layer: int) -> str:
    return checkpoint.tensors[block_prefix("layers", layer) + "attn_norm.weight"].file


def _damaged(damage: Callable[[Path], None]) -> Callable[[Editor], None]:
    """Damage the largest shard."""
    return lambda editor: editor.damage_file(_largest_shard(editor.checkpoint), damage)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - _LOST_BYTES)


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(_LOST_BYTES))


def _zero_tail(path: Path) -> None:
    """The last quarter was never written: a file of the right size all the same."""
    size = path.stat().st_size
    os.truncate(path, size - size // 4)
    os.truncate(path, size)


def _flip_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size * 3 // 4)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def _other_shards_bytes(editor: Editor) -> None:
    origin = editor.checkpoint.files.path(_shard_of(editor.checkpoint, 0))
    editor.damage_file(_shard_of(editor.checkpoint, 1), lambda path: _copy_over(origin, path))


def _copy_over(origin: Path, path: Path) -> None:
    path.unlink()
    shutil.copyfile(origin, path)


def _tensor_lost(editor: Editor) -> None:
    editor.remove(first(editor.checkpoint, "attn.q_norm"))


def _scale_lost(editor: Editor) -> None:
    editor.remove(scale_name(first(editor.checkpoint, EXPERT_W2)))


def _named_by_another_tool(editor: Editor) -> None:
    editor.rename(first(editor.checkpoint, "attn.q_norm"), "model.layers.0.self_attn.q_a_norm.weight")


def _hc_stored_as_bf16(editor: Editor) -> None:
    for name, parts in editor.checkpoint.parsed.items():
        if parts.role is Role.HYPER_CONNECTIONS:
            editor.write(name, editor.read(name).bfloat16(), "BF16")


def _block_lost(block: str, index: int, editor: Editor) -> None:
    for parts in of_block(editor.checkpoint, block, index):
        editor.remove(parts.name)


def _mtp_lost(editor: Editor) -> None:
    _block_lost("mtp", 0, editor)


def _mtp_lost_everywhere(editor: Editor) -> None:
    _mtp_lost(editor)
    editor.config["compress_ratios"] = editor.config["compress_ratios"][: editor.config["num_hidden_layers"]]
    editor.config["num_nextn_predict_layers"] = 0


def _last_layer_lost(editor: Editor) -> None:
    _block_lost("layers", editor.checkpoint.config.num_hidden_layers - 1, editor)


def _last_layer_lost_everywhere(editor: Editor) -> None:
    _last_layer_lost(editor)
    layers = editor.config["num_hidden_layers"] - 1
    editor.config["num_hidden_layers"] = layers
    editor.config["num_hash_layers"] = min(editor.config["num_hash_layers"], layers)
    del editor.config["compress_ratios"][layers]


def _mtp_lost_index_stale(editor: Editor) -> None:
    _mtp_lost(editor)
    editor.leave_index_stale()


def _index_too_small(editor: Editor) -> None:
    def edit(index: dict[str, Any]) -> None:
        index["metadata"]["total_size"] //= 2

    editor.edit_index(edit)


def _index_lists_more(editor: Editor) -> None:
    """A scale where there is none, or where every scale is there, a bias."""
    weight = first(editor.checkpoint, "attn.wo_a")
    name = scale_name(weight) if editor.checkpoint.scheme.dense.block is None else weight.replace("weight", "bias")
    file = editor.checkpoint.tensors[weight].file
    editor.edit_index(lambda index: index["weight_map"].update({name: file}))


def _index_lists_less(editor: Editor) -> None:
    name = first(editor.checkpoint, EXPERT_W2)
    editor.edit_index(lambda index: index["weight_map"].pop(name))


def _index_of_another_split(editor: Editor) -> None:
    file = _shard_of(editor.checkpoint, 0)

    def edit(index: dict[str, Any]) -> None:
        files = index["weight_map"]
        files.update({name: _OTHER_SHARD for name in files if files[name] == file})

    editor.edit_index(edit)


CORRUPTIONS = (
    Corruption(
        "shard-truncated", "A shard lost its last bytes: a download or a disk that ended early.", _damaged(_truncate)
    ),
    Corruption("shard-trailing-bytes", "A shard goes on after its last tensor.", _damaged(_append)),
    Corruption(
        "shard-zero-tail",
        "A quarter of a shard was never written; its size is right, and downloads report success (hfhub#3643).",
        _damaged(_zero_tail),
    ),
    Corruption("shard-bit-flipped", "One bit of a shard's data is flipped.", _damaged(_flip_bit)),
    Corruption(
        "shard-lost",
        "A shard was never written or uploaded, though the index names it (verl#4227, sglang#32279).",
        lambda editor: editor.remove_file(_largest_shard(editor.checkpoint)),
    ),
    Corruption(
        "shard-of-another-layer",
        "A shard holds the bytes of another one, as after a retried upload under the wrong name.",
        _other_shards_bytes,
        needs_layers(2),
    ),
    Corruption(
        "shard-stored-twice",
        "A shard of an earlier split lies beside the new ones, so its tensors are stored twice.",
        lambda editor: editor.copy_file(_shard_of(editor.checkpoint, 0), _OTHER_SHARD),
    ),
    Corruption(
        "index-lost",
        "The index is missing beside several shards.",
        lambda editor: editor.remove_file(INDEX_NAME),
    ),
    Corruption(
        "index-total-size-stale",
        "The index's total_size was copied from before a conversion, and is trusted (rtp-llm#1303).",
        _index_too_small,
    ),
    Corruption(
        "index-lists-more",
        "The index lists a tensor that no shard holds (vllm#57108: 43 scales of wo_a; it loads in silence).",
        _index_lists_more,
    ),
    Corruption("index-lists-less", "The index does not list a tensor that is stored.", _index_lists_less),
    Corruption(
        "index-of-another-split",
        "The index puts a layer into a shard that is not there; the layer lies in another (sglang#32279).",
        _index_of_another_split,
    ),
    Corruption(
        "tensor-lost",
        "A tensor was dropped from shard and index by a name filter (mlx-vlm#2277: the model answers a comma).",
        _tensor_lost,
    ),
    Corruption(
        "scale-lost",
        "An expert's scale was dropped from shard and index (abliterix#93: a cast without scale, 3361x off).",
        _scale_lost,
        needs_expert_scales,
    ),
    Corruption(
        "tensor-renamed",
        "A tensor is stored under the name that transformers gives it; loaders of released names miss it.",
        _named_by_another_tool,
    ),
    Corruption(
        "hc-stored-bf16",
        "The hyper-connections are stored as BF16 (mlx-vlm#2139).",
        _hc_stored_as_bf16,
    ),
    Corruption(
        "mtp-lost",
        "The MTP block was dropped; the config still announces it (llm-compressor#2735, transformers#46127).",
        _mtp_lost,
        needs("no MTP block that can be run", "e_proj", block="mtp"),
    ),
    Corruption(
        "mtp-lost-config-adapted",
        "The MTP block was dropped from shards, index and config alike; no accuracy evaluation sees it.",
        _mtp_lost_everywhere,
        needs("no MTP block that can be run", "e_proj", block="mtp"),
    ),
    Corruption(
        "mtp-lost-index-stale",
        "The MTP block was dropped; index and config still list it (mlx-vlm#1827).",
        _mtp_lost_index_stale,
        needs("no MTP block that can be run", "e_proj", block="mtp"),
    ),
    Corruption(
        "last-layer-lost",
        "The last layer was never written, in the index neither; the config still counts it.",
        _last_layer_lost,
        needs_layers(2),
    ),
    Corruption(
        "last-layer-lost-config-adapted",
        "The last layer is missing from shards, index and config alike: a model one layer shorter that runs.",
        _last_layer_lost_everywhere,
        needs_layers(2),
    ),
)
