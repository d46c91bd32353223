"""Streaming: reads what it must and no more, says what is missing, and gives back its threads."""

import shutil
import threading
from pathlib import Path

import pytest
import torch

from tests.checkpoint.conversion import write_small
from tests.model.references import final_streams, named, streamed
from v4quant.checkpoint.header import build_header
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.errors import CheckpointError, UsageError
from v4quant.model.arithmetic import Arithmetic, Products
from v4quant.model.chunk import Chunk
from v4quant.model.expert_sources import _pool
from v4quant.model.mtp import runnable_mtp_blocks
from v4quant.model.streaming import StreamedModel, run_block
from v4quant.model.transformer import Transformer
from v4quant.testing.releases import synth_config
from v4quant.testing.synth import write_checkpoint

FLASH = named("tiny-flash")
both_products = pytest.mark.parametrize("products", list(Products))


def expert_bytes(layer: int) -> int:
    """Stored bytes of one routed expert of a layer."""
    tensors = open_checkpoint(FLASH.folder).tensors
    return sum(entry.bytes for name, entry in tensors.items() if name.startswith(f"layers.{layer}.ffn.experts.0."))


@both_products
def test_only_picked_experts_are_read_and_each_once(products: Products) -> None:
    with torch.inference_mode(), streamed(FLASH.folder, products) as model:
        schedule = model.schedule([FLASH.ids[:6]], [4, 1])
        streams = model.embed(schedule.input_ids)
        block = next(model.blocks(0, 1))
        before = model.reader.weights.bytes_read
        result = run_block(block, streams, schedule)
        picked = len(set(result.router_indices.flatten().tolist()))
        assert 0 < picked < model.config.n_routed_experts
        assert model.reader.weights.bytes_read - before == picked * expert_bytes(0)


@both_products
def test_threads_end(products: Products) -> None:
    before = threading.active_count()
    with torch.inference_mode(), streamed(FLASH.folder, products) as model:
        final_streams(model, model.schedule([FLASH.ids[:5]]))
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_abandoned_half_way() -> None:
    """A run that stops between layers, or within the experts, leaves nothing behind and another one can begin."""
    before = threading.active_count()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="stop"), streamed(FLASH.folder) as model:
        for _ in model.blocks(0, 5):
            raise RuntimeError("stop")
    assert threading.active_count() == before


def test_embedding_reads_only_rows_that_occur() -> None:
    with streamed(FLASH.folder) as model:
        ids = torch.tensor([7, 9, 7, 8, 500])
        streams = model.embed(ids)
        assert model.reader.weights.bytes_read == 4 * model.config.hidden_size * 2
        table = model.reader.weights.tensor("embed.weight")
    assert torch.equal(streams, table[ids][:, None].expand(-1, 4, -1))


def test_a_damaged_expert_is_named(tmp_path: Path) -> None:
    shutil.copytree(FLASH.folder, tmp_path / "copy")
    entry = open_checkpoint(tmp_path / "copy").tensors["layers.1.ffn.experts.3.w1.scale"]
    path = tmp_path / "copy" / entry.file
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[entry.start] = 255
    path.write_bytes(data)
    with torch.inference_mode(), streamed(tmp_path / "copy", Products.DECODED) as model:
        schedule = model.schedule([FLASH.ids])
        with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.experts\.3\.w1"):
            final_streams(model, schedule)


def test_a_missing_layer(tmp_path: Path) -> None:
    shutil.copytree(FLASH.folder, tmp_path / "copy")
    file = open_checkpoint(tmp_path / "copy").tensors["layers.4.attn.wq_a.weight"].file
    (tmp_path / "copy" / file).unlink()
    checkpoint = open_checkpoint(tmp_path / "copy")
    with pytest.raises(
        CheckpointError, match=r"num_hidden_layers 5, but 3 is stored[^$]*layers\.2\.hc_attn_fn: is missing"
    ):
        StreamedModel(checkpoint)


def test_experts_of_mixed_formats(tmp_path: Path) -> None:
    """One expert stored in BF16 among FP4 ones."""
    folder = write_small(tmp_path / "small")
    checkpoint = open_checkpoint(folder)
    name = "layers.0.ffn.experts.1.w1.weight"
    file = checkpoint.tensors[name].file
    tensors, data = [], {}
    for entry in (entry for entry in checkpoint.tensors.values() if entry.file == file):
        shape = (entry.shape[0], 2 * entry.shape[1]) if entry.name == name else entry.shape
        tensors.append((entry.name, "BF16" if entry.name == name else entry.dtype, shape))
        data[entry.name] = checkpoint.files.read(file, entry.start, entry.stop) * (4 if entry.name == name else 1)
    header, entries = build_header(tensors, file=file)
    (folder / file).write_bytes(header + b"".join(data[entry.name] for entry in entries))
    with pytest.raises(CheckpointError, match=r"experts\.1\.w1"):
        StreamedModel(open_checkpoint(folder))


def test_dspark_stages_are_not_run(tmp_path: Path) -> None:
    config_json, scheme = synth_config("flash-0731", tiny=True, layers=1, experts=2, mtp=True)
    write_checkpoint(tmp_path / "dspark", config_json, scheme, 0)
    checkpoint = open_checkpoint(tmp_path / "dspark")
    assert checkpoint.config.mtp_blocks == 3
    assert runnable_mtp_blocks(checkpoint.config) == 0
    with torch.inference_mode(), StreamedModel(checkpoint, Arithmetic()) as model:
        assert model.head().logits(final_streams(model, model.schedule([torch.tensor([1, 2, 3])]))).isfinite().all()


@pytest.mark.parametrize("name", ["layers.1.attn.attn_sink", "layers.2.ffn.gate.bias", "embed.weight", "head.weight"])
def test_nan_in_a_tensor_that_is_not_quantised(name: str, tmp_path: Path) -> None:
    """A NaN in a router's bias would leave every output finite."""
    shutil.copytree(FLASH.folder, tmp_path / "copy")
    entry = open_checkpoint(tmp_path / "copy").tensors[name]
    path = tmp_path / "copy" / entry.file
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[entry.start : entry.start + 4] = b"\xff" * 4
    path.write_bytes(data)
    with torch.inference_mode(), streamed(tmp_path / "copy", Products.DECODED) as model:
        schedule = model.schedule([torch.arange(3)])
        with pytest.raises(CheckpointError, match=f"{name}.*: NaN at"):
            model.head().logits(final_streams(model, schedule))


def test_threads_that_run_experts_have_their_share_of_cores() -> None:
    before = torch.get_num_threads()
    pool = _pool(2, 1)
    assert [pool.submit(torch.get_num_threads).result() for _ in range(4)] == [1] * 4
    pool.shutdown()
    assert torch.get_num_threads() == before


def test_ids_that_the_model_does_not_have() -> None:
    model = Transformer(open_checkpoint(FLASH.folder))
    for wrong in (-1, 512):
        with pytest.raises(UsageError, match=f"token 0 is {wrong}"):
            model.streams(Chunk.of([(0, 0, torch.tensor([wrong]))]), model.cache(1))
