"""The rank files hold every element where DeepSeek's inference code looks for it.

An independent reading: names, axes and offsets are written out here from the published rules (`inference/convert.py`
and `model.py`), nothing of our own layout is used, and the files are read by the safetensors library.
"""

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import safetensors
import torch

from tests.checkpoint.conversion import rewrite, stored_torch
from tests.checkpoint.sharding import shard, write_wide
from v4quant.testing.releases import Like

Tensors = dict[str, torch.Tensor]
Values = npt.NDArray[np.float64]

BLOCK = r"(layers|mtp)\.\d+"
# Name -> the axis that the ranks share out.
AXES = [
    (r"embed\.weight", 0),
    (r"head\.weight", 0),
    (rf"{BLOCK}\.attn\.attn_sink", 0),
    (rf"{BLOCK}\.attn\.wq_b\.(weight|scale)", 0),
    (rf"{BLOCK}\.attn\.wo_a\.weight", 0),
    (rf"{BLOCK}\.attn\.wo_b\.(weight|scale)", 1),
    (r"layers\.\d+\.attn\.indexer\.wq_b\.(weight|scale)", 0),
    (r"layers\.\d+\.attn\.indexer\.weights_proj\.weight", 0),
    (r"mtp\.\d\.markov_head\.markov_w[12]\.weight", 0),
]
IN_NO_RANK = rf"{BLOCK}\.attn\.wo_a\.scale|mtp\.0\.(emb\.tok_emb|head)\.weight"
EXPERT = rf"{BLOCK}\.ffn\.experts\.(\d+)\.w[123]\.(weight|scale)"


def read(path: Path) -> Tensors:
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The stored bytes, in rows."""
    return tensor.reshape(len(tensor), -1).contiguous().view(torch.uint8)


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.dtype == wanted.dtype and found.shape == wanted.shape and torch.equal(bits(found), bits(wanted))


def axis_of(name: str) -> int | None:
    return next((axis for pattern, axis in AXES if re.fullmatch(pattern, name)), None)


def dequantised(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """wo_a as convert.py makes it: a float32 product, then BF16."""
    rows, columns = scale.shape
    blocks = weight.float().reshape(rows, 128, columns, 128) * scale.float()[:, None, :, None]
    return blocks.reshape(weight.shape).bfloat16()


def fp4_values(packed: torch.Tensor, scale: torch.Tensor) -> Values:
    """Values of an FP4 expert: low nibble first, one scale for 32 columns."""
    codes = packed.view(torch.uint8).numpy()
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    values = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    result: Values = values * np.repeat(scale.float().double().numpy(), 32, axis=1)
    return result


def fp8_values(codes: torch.Tensor, scale: torch.Tensor) -> Values:
    rows, columns = codes.shape
    wide = np.repeat(np.repeat(scale.float().double().numpy(), 128, axis=0), 128, axis=1)
    result: Values = codes.float().double().numpy() * wide[:rows, :columns]
    return result


def expected_in(rank: int, ranks: int, experts: int, source: Tensors) -> dict[str, torch.Tensor]:
    """What a rank's file must hold, but for the encoding of experts."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in source.items():
        if re.fullmatch(IN_NO_RANK, name):
            continue
        if match := re.fullmatch(EXPERT, name):
            each = experts // ranks
            if rank * each <= int(match[2]) < (rank + 1) * each:
                found[name] = tensor
            continue
        is_output_a = re.fullmatch(rf"{BLOCK}\.attn\.wo_a\.weight", name)
        whole = dequantised(tensor, source[name.replace(".weight", ".scale")]) if is_output_a else tensor
        axis = axis_of(name)
        if axis is not None:
            assert whole.shape[axis] % ranks == 0
            size = whole.shape[axis] // ranks
            view = whole.view(torch.uint8) if whole.element_size() == 1 else whole
            whole = view.narrow(axis, rank * size, size).contiguous().view(whole.dtype)
        found[name] = whole
    return found


@pytest.fixture(scope="module", params=[*Like])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide(tmp_path_factory.mktemp("layout") / request.param, request.param)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_element_is_where_the_loader_looks(source: Path, ranks: int, tmp_path: Path) -> None:
    shard(source, tmp_path / "out", ranks)
    whole = stored_torch(source)
    assert {path.name for path in (tmp_path / "out").glob("model*")} == {
        f"model{rank}-mp{ranks}.safetensors" for rank in range(ranks)
    }
    experts = 0
    for rank in range(ranks):
        found = read(tmp_path / "out" / f"model{rank}-mp{ranks}.safetensors")
        expected = expected_in(rank, ranks, 8, whole)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            if tensor.dtype == torch.int8:
                assert found[name].dtype == torch.float4_e2m1fn_x2, name
                assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
            else:
                assert same(found[name], tensor), name
            experts += bool(re.fullmatch(EXPERT, name))
    assert experts == sum(bool(re.fullmatch(EXPERT, name)) for name in whole)


def test_the_rules_meet_every_kind_of_tensor(source: Path) -> None:
    """A pattern that matches nothing would prove nothing."""
    names = stored_torch(source)
    like = source.name
    for pattern, _ in AXES:
        is_met = any(re.fullmatch(pattern, name) for name in names)
        assert is_met == ("markov" not in pattern or like in ("flash-0731", "pro-0813")), pattern
    assert ("mtp.0.emb.tok_emb.weight" in names) == like.endswith("base")


@pytest.mark.parametrize("ranks", [2, 8])
def test_experts_as_fp8(source: Path, ranks: int, tmp_path: Path) -> None:
    """FP4 becomes FP8 with a scale for 128x128, every value the same; what is FP8 already stays."""
    shard(source, tmp_path / "out", ranks, fp8_experts=True)
    whole, cast = stored_torch(source), 0
    for rank in range(ranks):
        found = read(tmp_path / "out" / f"model{rank}-mp{ranks}.safetensors")
        expected = expected_in(rank, ranks, 8, whole)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            if tensor.dtype != torch.int8:
                is_scale_of_cast = bool(re.fullmatch(EXPERT, name)) and not source.name.endswith("base")
                assert is_scale_of_cast or same(found[name], tensor), name
                continue
            scale = found[name.replace("weight", "scale")]
            assert (found[name].dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float8_e8m0fnu)
            assert scale.shape == (tensor.shape[0] // 128, 2 * tensor.shape[1] // 128)
            wanted = fp4_values(tensor, whole[name.replace("weight", "scale")])
            assert np.array_equal(fp8_values(found[name], scale), wanted), name
            cast += 1
    assert cast == (0 if source.name.endswith("base") else sum(t.dtype == torch.int8 for t in whole.values()))


def test_headers_of_the_rank_files(tmp_path: Path) -> None:
    """F4 with its logical shape; all else as the library would write it."""
    source = write_wide(tmp_path / "source")
    shard(source, tmp_path / "out", 2)
    data = (tmp_path / "out" / "model1-mp2.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["layers.0.ffn.experts.7.w1.weight"]["dtype"] == "F4"
    assert header["layers.0.ffn.experts.7.w1.weight"]["shape"] == [256, 256]
    assert header["layers.0.attn.wo_a.weight"]["dtype"] == "BF16"
    assert header["layers.0.attn.wo_a.weight"]["shape"] == [512, 128]
    assert "layers.0.ffn.experts.3.w1.weight" not in header
    metadata = header.pop("__metadata__")
    assert (metadata["v4quant.rank"], metadata["v4quant.ranks"]) == ("1", "2")
    for entry in header.values():  # aligned to their elements, as loaders map them
        size = {"F32": 4, "BF16": 2, "I64": 8}.get(entry["dtype"], 1)
        assert entry["data_offsets"][0] % size == 0


def test_markov_tables_under_their_other_name_get_the_name_that_is_loaded(tmp_path: Path) -> None:
    source = write_wide(tmp_path / "source", "flash-0731")
    last = sorted(source.glob("*.safetensors"))[-1]
    other = {"markov_w1": "embed", "markov_w2": "head"}
    prefix = "mtp.2.markov_head"

    def rename(tensors: dict[str, Any]) -> None:
        for released, own in other.items():
            tensors[f"{prefix}.{own}.weight"] = tensors.pop(f"{prefix}.{released}.weight")

    wanted = {name: tensor.clone() for name, tensor in stored_torch(source).items()}  # not mapped to what is rewritten
    rewrite(last, rename)
    index = source / "model.safetensors.index.json"
    text = index.read_text()
    for released, own in other.items():
        text = text.replace(f"{prefix}.{released}.weight", f"{prefix}.{own}.weight")
    index.write_text(text)
    shard(source, tmp_path / "out", 2)
    found = read(tmp_path / "out" / "model1-mp2.safetensors")
    for released in other:
        name = f"{prefix}.{released}.weight"
        assert same(found[name], wanted[name][256:])


def test_what_the_inference_code_needs_lies_beside_the_ranks(tmp_path: Path) -> None:
    source = write_wide(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    shard(source, tmp_path / "fp4", 2)
    shard(source, tmp_path / "fp8", 2, fp8_experts=True)
    for out in (tmp_path / "fp4", tmp_path / "fp8"):
        assert (out / "tokenizer.json").read_text() == "{}"
        assert (out / "encoding" / "encoding.py").exists()
        assert not (out / "config.json").exists()
        assert not (out / "model.safetensors.index.json").exists()
    original = json.loads((source / "inference" / "config.json").read_text())
    assert json.loads((tmp_path / "fp4" / "inference" / "config.json").read_text()) == original
    assert original.pop("expert_dtype") == "fp4"  # that code takes experts for FP8 where the key is missing
    assert json.loads((tmp_path / "fp8" / "inference" / "config.json").read_text()) == original
