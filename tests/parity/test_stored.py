"""Files of stored outputs: read as they were written, and refused for whatever is missing, wrong or damaged."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from tests.model.references import REFERENCES, Reference, named
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.config import V4Config
from v4quant.errors import CheckpointError, UsageError, V4QuantError
from v4quant.parity.stored import StoredOutputs

FLASH = named("tiny-flash")
CONFIG = open_checkpoint(FLASH.folder).config
LAYERS = range(CONFIG.num_hidden_layers)
CSA_LAYERS = [layer for layer in LAYERS if CONFIG.compress_ratios[layer] == 4]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tensors() -> Tensors:
    return safetensors.torch.load_file(FLASH.outputs)


def stored(
    folder: Path, tensors: Tensors, config: V4Config = CONFIG, metadata: dict[str, str] | None = None
) -> StoredOutputs:
    metadata = {"prefill": str(FLASH.prefill)} if metadata is None else metadata
    safetensors.torch.save_file(tensors, folder / "outputs.safetensors", metadata)
    return StoredOutputs(folder / "outputs.safetensors", config)


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.name)
def test_the_reference_outputs_are_read_as_they_are(reference: Reference) -> None:
    config = open_checkpoint(reference.folder).config
    outputs = StoredOutputs(reference.outputs, config)
    assert torch.equal(outputs.input_ids, reference.ids)
    assert outputs.prefill == reference.prefill
    assert outputs.has_mtp == reference.has("mtp_logits")
    for layer in range(config.num_hidden_layers):
        block = outputs.block(layer)
        assert torch.equal(block.streams, reference.tensor(f"layer{layer}.out"))
        assert torch.equal(block.router_indices, reference.tensor(f"layer{layer}.router_indices"))
        assert torch.equal(block.router_weights, reference.tensor(f"layer{layer}.router_weights"))
        assert block.router_indices.dtype == torch.int64
        assert (block.indexer_topk is None) == (config.compress_ratios[layer] != 4)
        if block.indexer_topk is not None:
            theirs = reference.tensor(f"layer{layer}.indexer_topk").tolist()
            entries = [[place - reference.prefill if place >= 0 else -1 for place in row] for row in theirs]
            assert block.indexer_topk.tolist() == entries
            assert 0 < max(map(max, entries)) < reference.prefill // 4


@pytest.mark.parametrize("name", ["logits", "mtp_logits"])
def test_columns(name: str) -> None:
    outputs, whole = StoredOutputs(FLASH.outputs, CONFIG), FLASH.tensor(name)
    for first, last in ((0, 512), (0, 1), (511, 512), (37, 300)):
        assert torch.equal(outputs.columns(name, first, last), whole[:, first:last])


def test_ids_of_32_bits(tensors: Tensors, tmp_path: Path) -> None:
    outputs = stored(tmp_path, tensors | {"input_ids": FLASH.ids.int()})
    assert outputs.input_ids.dtype == torch.int64
    assert torch.equal(outputs.input_ids, FLASH.ids)


def test_the_hash_is_of_the_whole_file(tensors: Tensors, tmp_path: Path) -> None:
    one = stored(tmp_path, tensors).sha256()
    tensors["logits"].view(torch.int32)[-1, -1] ^= 1
    assert stored(tmp_path, tensors).sha256() != one
    assert len(one) == 64


EVERY_NAME = [
    "input_ids",
    "logits",
    *(f"layer{layer}.{part}" for layer in LAYERS for part in ("out", "router_indices", "router_weights")),
    *(f"layer{layer}.indexer_topk" for layer in CSA_LAYERS),
]


@pytest.mark.parametrize("name", EVERY_NAME)
def test_a_tensor_that_is_missing(name: str, tensors: Tensors, tmp_path: Path) -> None:
    del tensors[name]
    with pytest.raises(CheckpointError, match=f"outputs.safetensors: has no tensor {name}"):
        stored(tmp_path, tensors)


def test_mtp_logits_may_be_missing(tensors: Tensors, tmp_path: Path) -> None:
    del tensors["mtp_logits"]
    assert not stored(tmp_path, tensors).has_mtp


def test_the_catalogue_of_names_is_whole(tensors: Tensors) -> None:
    assert {*EVERY_NAME, "mtp_logits"} == set(tensors)


@pytest.mark.parametrize("name", [*EVERY_NAME[1:], "mtp_logits"])
def test_a_tensor_of_another_dtype(name: str, tensors: Tensors, tmp_path: Path) -> None:
    other = torch.float32 if tensors[name].dtype != torch.float32 else torch.bfloat16
    with pytest.raises(UsageError, match=f"{name} is {'F32' if other == torch.float32 else 'BF16'}.*, expected"):
        stored(tmp_path, tensors | {name: tensors[name].to(other)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int16])
def test_ids_of_another_dtype(dtype: torch.dtype, tensors: Tensors, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"input_ids is .*, expected I64 or I32"):
        stored(tmp_path, tensors | {"input_ids": FLASH.ids.to(dtype)})


@pytest.mark.parametrize("name", [*EVERY_NAME[1:], "mtp_logits"])
@pytest.mark.parametrize("how", ["a row less", "a column less", "turned round", "flat"])
def test_a_tensor_of_another_shape(name: str, how: str, tensors: Tensors, tmp_path: Path) -> None:
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "a row less": lambda tensor: tensor[:-1],
        "a column less": lambda tensor: tensor[..., :-1],
        "turned round": lambda tensor: tensor.mT,
        "flat": lambda tensor: tensor.flatten(),
    }
    with pytest.raises(UsageError, match=rf"{name} is .*, expected .* by the config of the checkpoint"):
        stored(tmp_path, tensors | {name: changes[how](tensors[name]).contiguous()})


@pytest.mark.parametrize(
    "ids", [torch.tensor(3), torch.zeros(2, 3, dtype=torch.int64), FLASH.ids[:, None], FLASH.ids[None]]
)
def test_ids_of_another_shape(ids: torch.Tensor, tensors: Tensors, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"input_ids has shape \[.*\], expected one row of token ids"):
        stored(tmp_path, tensors | {"input_ids": ids.contiguous()}, metadata={})


def test_no_ids(tensors: Tensors, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="input_ids is empty"):
        stored(tmp_path, tensors | {"input_ids": FLASH.ids[:0]}, metadata={})


@pytest.mark.parametrize("prefill", ["", "0", "-1", "301", "1.5", " 3", "1e2", "three", "9" * 5000, "0x10", "None"])
def test_a_prefill_that_makes_no_sense(prefill: str, tensors: Tensors, tmp_path: Path) -> None:
    assert len(FLASH.ids) == 300
    with pytest.raises(CheckpointError, match=r"prefill is .*, expected 1 to its 300 tokens"):
        stored(tmp_path, tensors, metadata={"prefill": prefill})


def test_another_prefill_has_other_shapes(tensors: Tensors, tmp_path: Path) -> None:
    """Its picks and MTP logits are of the prefill alone."""
    for metadata in ({"prefill": "100"}, {}):
        with pytest.raises(UsageError, match="indexer_topk is I32"):
            stored(tmp_path, tensors, metadata=metadata)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["layer3.out", "layer1.router_weights", "logits", "mtp_logits"])
def test_numbers_that_are_none(name: str, number: float, tensors: Tensors, tmp_path: Path) -> None:
    tensors[name].view(-1)[-1] = number
    outputs = stored(tmp_path, tensors)
    what = name.partition(".")[0]
    with pytest.raises(CheckpointError, match=f"{what} holds NaN or infinity"):
        if name.endswith("logits"):
            outputs.columns(name, 0, 512)
        else:
            outputs.block(int(what[-1]))


@pytest.mark.parametrize("entry", [0, FLASH.prefill - 1, -2, FLASH.prefill + FLASH.prefill // 4, 2**31 - 1])
def test_picks_that_are_no_entries(entry: int, tensors: Tensors, tmp_path: Path) -> None:
    """Entries that are counted from 0, for one: they would all pass for none, and agree with anything."""
    tensors[f"layer{CSA_LAYERS[0]}.indexer_topk"][7, 0] = entry
    with pytest.raises(CheckpointError, match=rf"indexer_topk holds {entry}, expected -1 or {FLASH.prefill} to"):
        stored(tmp_path, tensors).block(CSA_LAYERS[0])


@pytest.mark.parametrize("expert", [-1, 16, 2**31 - 1])
def test_experts_that_the_model_does_not_have(expert: int, tensors: Tensors, tmp_path: Path) -> None:
    tensors["layer1.router_indices"][7, 0] = expert
    with pytest.raises(CheckpointError, match=rf"layer1\.router_indices holds {expert}, expected 0 to 15"):
        stored(tmp_path, tensors).block(1)


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), CheckpointError, "is truncated"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), CheckpointError, "header"),
        (lambda path: path.write_bytes(b""), CheckpointError, "has 0 bytes"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), CheckpointError, "has 4 bytes after"),
        (lambda path: path.write_text("{}"), CheckpointError, "has 2 bytes"),
        (lambda path: path.unlink(), UsageError, "no such file"),
        (lambda path: (path.unlink(), path.mkdir()), UsageError, "is a folder"),
    ],
)
def test_damaged_files(
    break_it: Callable[[Path], object], error: type[V4QuantError], message: str, tensors: Tensors, tmp_path: Path
) -> None:
    path = stored(tmp_path, tensors).path
    break_it(path)
    with pytest.raises(error, match=message):
        StoredOutputs(path, CONFIG)


def test_a_file_that_is_cut_while_it_is_read(tensors: Tensors, tmp_path: Path) -> None:
    outputs = stored(tmp_path, tensors)
    outputs.path.write_bytes(outputs.path.read_bytes()[:10_000])
    with pytest.raises(CheckpointError, match="is shorter than before"):
        outputs.columns("logits", 0, 512)
    with pytest.raises(CheckpointError, match="is shorter than before"):
        outputs.block(4)


def test_a_model_of_another_shape() -> None:
    for key, wrong in (("hidden_size", "layer0.out"), ("vocab_size", "logits"), ("index_topk", "indexer_topk")):
        with pytest.raises(UsageError, match=rf"{wrong} is .* by the config"):
            StoredOutputs(FLASH.outputs, replace(CONFIG, **{key: 2 * getattr(CONFIG, key)}))
    with pytest.raises(CheckpointError, match=r"has no tensor layer5\.out"):
        StoredOutputs(FLASH.outputs, replace(CONFIG, num_hidden_layers=6))
