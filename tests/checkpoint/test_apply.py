"""Conversions between all formats: every value, dtype and byte of the output, read back by safetensors and decoded by
ml_dtypes or torch, never by the package."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoint.conversion import REFERENCES, Array, convert, plan_of, stored, stored_torch, write_small
from tests.formats import oracle
from v4quant.checkpoint import plan as plan_module
from v4quant.checkpoint import stream
from v4quant.checkpoint.apply import apply
from v4quant.checkpoint.certificate import CERTIFICATE_NAME, Verdict
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.encodings import SCHEMES, Encoding
from v4quant.formats import FORMATS
from v4quant.testing.asserts import assert_bitwise_equal, assert_same_checkpoint

SYNTHETIC = {"mtp": "flash", "dspark": "flash-0731", "base": "flash-base"}
BORN_NATIVE = ["mtp", "dspark"]
DTYPES = {"I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu", "F32": "float32", "BF16": "bfloat16"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A synthetic checkpoint in a format: made("dspark", "bf16"); each is converted once."""
    root = tmp_path_factory.mktemp("made")

    def get(name: str, stored_as: str) -> Path:
        own = "base" if name == "base" else "native"
        folder = root / name / stored_as
        if not folder.exists():
            if stored_as == own:
                write_small(folder, SYNTHETIC[name], mtp=True)
            else:
                convert(get(name, own), folder, stored_as)
        return folder

    return get


def values(tensors: dict[str, Array]) -> dict[str, Array]:
    """Decoded values of every weight, and every other tensor as it is; no block scales."""
    decoded: dict[str, Array] = {}
    for name, array in tensors.items():
        scale = tensors.get(f"{name.removesuffix('weight')}scale")
        if scale is not None and name.endswith(".weight"):
            decoded[name] = oracle.decode(array, scale)
        elif not name.endswith(".scale"):
            decoded[name] = array.astype(np.float64) if array.dtype == oracle.BF16 else array
    return decoded


def assert_holds(out: Path, source: Path, target: str) -> None:
    """The output is a sound checkpoint of this format with every value of the source, signs of zero included."""
    checkpoint = open_checkpoint(out)
    assert checkpoint.problems == []
    assert checkpoint.scheme == SCHEMES[target]
    ours, theirs = stored(out), stored(source)
    found, expected = values(ours), values(theirs)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_bitwise_equal(found[name], expected[name])
    for tensor in checkpoint.logical:
        if tensor.kind == "plain":
            assert_bitwise_equal(ours[tensor.name], theirs[tensor.name])
        else:
            assert_stored_as(ours, tensor.name, SCHEMES[target].encoding(tensor.kind))


def assert_stored_as(tensors: dict[str, Array], name: str, encoding: Encoding) -> None:
    assert tensors[name].dtype.name == DTYPES[encoding.weight_dtype]
    scale = tensors.get(f"{name.removesuffix('weight')}scale")
    assert (scale is None) == (encoding.block is None)
    if scale is not None:
        assert scale.dtype.name == DTYPES[encoding.scale_dtype]


def assert_verdicts(out: Path, source: Path) -> None:
    """What the certificate calls bit-identical has the same bytes; what it calls value-exact has others."""
    ours, theirs = stored(out), stored(source)
    for line in (out / CERTIFICATE_NAME).read_text().splitlines()[1:]:
        record = json.loads(line)
        name = record["tensor"]
        same = (
            name in theirs and ours[name].dtype == theirs[name].dtype and ours[name].tobytes() == theirs[name].tobytes()
        )
        if record["verdict"] == "bit_identical":
            assert same, name
        else:
            assert record["verdict"] == "value_exact"
            assert not same or ours[name].dtype == oracle.E4M3, name  # FP8 codes stay where only their scales change


DIRECTIONS = [("mtp", start, target) for start in FORMATS for target in FORMATS]
DIRECTIONS += [("dspark", "native", target) for target in FORMATS] + [("dspark", start, "native") for start in FORMATS]
# What was FP8 from birth is not on an FP4 grid; see test_rounding.
DIRECTIONS += [("base", start, target) for start in FORMATS for target in FORMATS if "native" not in (start, target)]


@pytest.mark.parametrize(("name", "start", "target"), DIRECTIONS)
def test_every_direction_keeps_every_value(
    made: Callable[[str, str], Path], tmp_path: Path, name: str, start: str, target: str
) -> None:
    source, out = made(name, start), tmp_path / "out"
    report = convert(source, out, target)
    assert report.verdicts[Verdict.ROUNDED] == 0
    assert sum(report.verdicts.values()) == len(stored(out))
    assert_holds(out, source, target)
    assert_verdicts(out, source)
    assert not [path.name for path in out.iterdir() if "partial" in path.name or "journal" in path.name]
    if start == target:
        assert report.verdicts.keys() == {Verdict.BIT_IDENTICAL}


@pytest.mark.parametrize(
    ("folder", "target"),
    [
        (folder, target)
        for folder in REFERENCES
        for target in FORMATS
        if (folder.name, target) != ("tiny-base", "native")
    ],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)
def test_reference_checkpoints_keep_every_value(folder: Path, tmp_path: Path, target: str) -> None:
    report = convert(folder, tmp_path / "out", target)
    assert report.verdicts[Verdict.ROUNDED] == 0
    assert_holds(tmp_path / "out", folder, target)


@pytest.mark.parametrize("chain", [["fp8"], ["bf16"], ["base"], ["fp8", "bf16"], ["fp8", "base"]], ids="-".join)
@pytest.mark.parametrize("name", BORN_NATIVE)
def test_the_way_back_is_byte_identical(
    made: Callable[[str, str], Path], tmp_path: Path, name: str, chain: list[str]
) -> None:
    """In every file: weights, index, config.json, inference/config.json and the rest; the certificate is new."""
    original = made(name, "native")
    folder = original
    for step, target in enumerate([*chain, "native"]):
        out = tmp_path / f"{step} {target}"
        convert(folder, out, target, like=original if target == "native" else None)
        folder = out
    (folder / CERTIFICATE_NAME).unlink()
    assert_same_checkpoint(folder, original)


@pytest.mark.parametrize("middle", ["fp8", "bf16"])
@pytest.mark.parametrize("folder", REFERENCES, ids=lambda folder: folder.name)
def test_reference_checkpoints_come_back(folder: Path, tmp_path: Path, middle: str) -> None:
    """Every tensor and config.json; the split into files is that of the releases, which these do not have."""
    own = open_checkpoint(folder).scheme.name
    convert(folder, tmp_path / "there", middle)
    convert(tmp_path / "there", tmp_path / "back", own, like=folder)
    found, expected = stored(tmp_path / "back"), stored(folder)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_bitwise_equal(found[name].view(np.uint8), expected[name].view(np.uint8))
    if own == "native":
        assert (tmp_path / "back/config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("name", [*BORN_NATIVE, "base"])
def test_torch_decodes_the_same_values(made: Callable[[str, str], Path], name: str) -> None:
    """FP8 by torch's own dtypes, in float32, against the BF16 output; FP4 by its table."""
    bf16 = stored_torch(made(name, "bf16"))
    fp4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    formats = ["fp8", "base"] if name == "base" else ["native", "fp8", "base"]
    for stored_as in formats:
        tensors = stored_torch(made(name, stored_as))
        weights = [n for n in tensors if f"{n.removesuffix('weight')}scale" in tensors and n.endswith(".weight")]
        assert len(weights) > 20
        for weight in weights:
            codes, scale = tensors[weight], tensors[f"{weight.removesuffix('weight')}scale"].to(torch.float32)
            if codes.dtype == torch.int8:
                byte = codes.view(torch.uint8).int()
                found = fp4[torch.stack([byte & 15, byte >> 4], dim=-1).flatten(1)]
                spread = scale.repeat_interleave(32, dim=1)
            else:
                found = codes.to(torch.float32)
                spread = scale.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
            found = found * spread[: found.shape[0], : found.shape[1]]
            assert torch.equal(found.view(torch.int32), bf16[weight].to(torch.float32).view(torch.int32)), weight


@pytest.mark.parametrize("name", [*BORN_NATIVE, "base"])
def test_what_is_often_lost_is_there(made: Callable[[str, str], Path], name: str) -> None:
    """MTP and DSpark blocks, the hash router's table, FP32 tables, the Base releases' MTP embedding and head."""
    own = "base" if name == "base" else "native"
    source = stored(made(name, own))
    kept = {
        "mtp": ["mtp.0.e_proj.weight", "mtp.0.hc_head_fn", "mtp.0.ffn.experts.1.w2.weight"],
        "dspark": ["mtp.0.main_proj.weight", "mtp.2.markov_head.markov_w1.weight", "mtp.2.ffn.experts.1.w2.weight"],
        "base": ["mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"],
    }[name]
    kept += ["layers.0.ffn.gate.tid2eid", "layers.0.attn.attn_sink", "layers.0.hc_attn_scale"]
    assert set(kept) <= source.keys()
    for target in FORMATS:
        if (name, target) != ("base", "native"):
            tensors = stored(made(name, target))
            assert set(kept) <= tensors.keys()
            assert tensors["layers.0.ffn.gate.tid2eid"].dtype == np.int64
            assert tensors["layers.0.attn.attn_sink"].dtype == np.float32


def test_bands_and_pieces_give_the_same_bytes(
    made: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every weight in bands of 128 rows, every other tensor in pieces of a few bytes."""
    for module in (plan_module, stream):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1000)
    original, counted = made("mtp", "native"), []
    for target in ("fp8", "bf16", "base"):
        convert(original, tmp_path / target, target, progress=lambda _done: lambda count, _shard: counted.append(count))
        assert_same_checkpoint(tmp_path / target, made("mtp", target))
    assert 0 < max(counted) < 128 * 1024
    convert(tmp_path / "bf16", tmp_path / "native", "native", like=original)
    (tmp_path / "native" / CERTIFICATE_NAME).unlink()
    assert_same_checkpoint(tmp_path / "native", original)


def test_workers_change_nothing(made: Callable[[str, str], Path], tmp_path: Path) -> None:
    for workers in (1, 4):
        convert(made("mtp", "native"), tmp_path / str(workers), "fp8", workers=workers)
    assert_same_checkpoint(tmp_path / "1", tmp_path / "4")


def test_progress_counts_every_source_byte(made: Callable[[str, str], Path], tmp_path: Path) -> None:
    plan, counted = plan_of(made("mtp", "native"), "fp8"), Counter[str]()

    def advance(count: int, shard: str) -> None:
        counted[shard] += count

    def begin(done: int) -> Callable[[int, str], None]:
        assert done == 0
        return advance

    apply(plan, tmp_path / "out", progress=begin)
    expected = {name: sum(o.bytes_read for o in operations) for name, operations in plan.operations.items()}
    assert counted == expected


def test_side_files_travel_and_pickles_do_not(tmp_path: Path) -> None:
    source, out = write_small(tmp_path / "source"), tmp_path / "out"
    files = {
        "LICENSE": b"MIT\r\n\xff\x00",
        "tokenizer.json": bytes(range(256)) * 20_000,  # more than one piece
        "encoding/encoding_dsv4.py": b"print('never run')",
        "inference/kernel/deep/a.py": b"",
    }
    for name, data in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    for name in ("pytorch_model.bin", "inference/cache.pkl", ".cache/x"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"x")
    convert(source, out, "bf16")
    for name in [*files, "README.md", "generation_config.json"]:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    weights = {path.name for path in out.glob("model*")}
    listed = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - weights
    own = {"README.md", "generation_config.json", "inference/config.json", "config.json", CERTIFICATE_NAME}
    assert listed == set(files) | own
    was, now = (json.loads((folder / "inference/config.json").read_text()) for folder in (source, out))
    assert now == {key: value for key, value in was.items() if key != "expert_dtype"} | {"dtype": "bf16"}
    assert list(now) == [key for key in was if key != "expert_dtype"]


@pytest.mark.parametrize("text", [b"[]", b"{", b'{"a": NaN}', b'"x"'])
def test_a_damaged_inference_config_is_named(tmp_path: Path, text: bytes) -> None:
    source = write_small(tmp_path / "source")
    (source / "inference/config.json").write_bytes(text)
    with pytest.raises(Exception, match=r"inference/config\.json") as caught:
        convert(source, tmp_path / "out", "fp8")
    assert getattr(caught.value, "exit_code", None) == 3
    assert not (tmp_path / "out/config.json").exists()
