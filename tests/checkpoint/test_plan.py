"""Plans know everything from headers: what full-size conversions weigh, where each byte goes, what can round."""

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.conversion import convert, find, plan_of, rewrite, write_small
from v4quant.checkpoint.header import TensorEntry, read_header
from v4quant.checkpoint.layout import Packing, Shard, lay_out
from v4quant.checkpoint.plan import DEFAULT_WORKERS, Plan, make_plan
from v4quant.checkpoint.reader import Checkpoint, open_checkpoint
from v4quant.errors import CheckpointError, UsageError
from v4quant.formats import FORMATS
from v4quant.names import scale_name
from v4quant.testing.releases import synth_config
from v4quant.testing.synth import plan_synth


def sparse_release(folder: Path, like: str) -> Checkpoint:
    """A release at full size whose tensor data are holes in the files: true headers, sizes and index."""
    plan = plan_synth(*synth_config(like))
    folder.mkdir()
    for shard in plan.shards:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.file_bytes)
    for name, data in plan.side_files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return sparse_release(tmp_path_factory.mktemp("flash") / "native", "flash")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("small") / "native", mtp=True)


# Published, or computed from the released shapes: tensors and bytes of tensor data.
FLASH = {
    "native": (69_187, 159_609_485_896),
    "fp8": (69_187, 292_502_338_120),
    "bf16": (35_020, 581_975_531_080),
    # The Base release without the embedding and head of its MTP block's own.
    "base": (69_187, 294_673_469_000 - 2 * 129_280 * 4_096 * 2),
}
PRO = {
    "native": (145_116, 864_704_792_696),
    "fp8": (145_116, 1_602_033_600_632),
    "bf16": (73_164, 3_197_868_864_632),
}


def assert_weighs(plan: Plan, source_bytes: int, expected: tuple[int, int]) -> None:
    assert (plan.tensors, plan.bytes_written) == expected
    assert plan.bytes_read == source_bytes
    index = json.loads(plan.index_bytes)
    assert index["metadata"]["total_size"] == expected[1]
    assert len(index["weight_map"]) == expected[0]
    assert sum(shard.file_bytes - len(shard.header) for shard in plan.shards) == expected[1]
    assert 0 < plan.peak_memory_bytes(DEFAULT_WORKERS) < 2**30


@pytest.mark.parametrize("target", FLASH)
def test_what_flash_weighs(flash: Checkpoint, target: str) -> None:
    assert_weighs(make_plan(flash, FORMATS[target]), FLASH["native"][1], FLASH[target])


@pytest.mark.parametrize(
    ("like", "target", "source_bytes", "expected"),
    [
        ("pro", "fp8", PRO["native"][1], PRO["fp8"]),
        pytest.param("pro", "bf16", PRO["native"][1], PRO["bf16"], marks=pytest.mark.slow),
        pytest.param("pro", "native", PRO["native"][1], PRO["native"], marks=pytest.mark.slow),
        # With its two BF16 tensors more, which no other release has.
        pytest.param(
            "flash-base",
            "native",
            294_673_469_000,
            (69_189, FLASH["native"][1] + 2 * 129_280 * 4_096 * 2),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_other_releases_weigh(
    tmp_path: Path, like: str, target: str, source_bytes: int, expected: tuple[int, int]
) -> None:
    checkpoint = sparse_release(tmp_path / like, like)
    assert_weighs(make_plan(checkpoint, FORMATS[target]), source_bytes, expected)


def test_flash_by_action_and_risk(flash: Checkpoint) -> None:
    plan = make_plan(flash, FORMATS["fp8"])
    assert Counter(operation.action for operation in plan) == {"fp4 -> fp8": 33_792, "copy": 69_187 - 2 * 33_792 - 375}
    risks = Counter(operation.risk for operation in plan if operation.risk)
    assert risks == {"if the scales of one 128x128 block spread by more than 2^14": 33_792}
    assert all(".ffn.experts." in operation.name for operation in plan if operation.risk)
    to_bf16 = make_plan(flash, FORMATS["bf16"])
    assert Counter(o.action for o in to_bf16) == {"fp4 -> bf16": 33_792, "fp8 -> bf16": 375, "copy": 853}
    assert not any(operation.risk for operation in to_bf16)


def test_released_shards_stay_one_block_a_file(flash: Checkpoint) -> None:
    plan = make_plan(flash, FORMATS["native"])
    assert {s.name: s.file_bytes for s in plan.shards} == plan_synth(*synth_config("flash")).report.files


@pytest.mark.parametrize(("source", "target"), [(s, t) for s in FORMATS for t in FORMATS])
def test_risk_of_each_direction(small: Path, tmp_path: Path, source: str, target: str) -> None:
    stored_as = small if source == "native" else tmp_path / source
    if source != "native":
        convert(small, stored_as, source)
    plan = plan_of(stored_as, target)
    risky = Counter("expert" if ".experts." in o.name else "dense" for o in plan if o.risk)
    quantised = Counter("expert" if ".experts." in o.name else "dense" for o in plan if o.source_encoding is not None)
    both, experts, nothing = quantised, Counter(expert=quantised["expert"]), Counter[str]()
    expected = {
        "native": {"fp8": experts, "base": experts},
        "fp8": {"native": experts},
        "base": {"native": both, "fp8": both, "bf16": both},
        "bf16": {"native": both, "fp8": both, "base": both},
    }
    assert risky == expected[source].get(target, nothing)
    if source == target:
        assert {operation.action for operation in plan} == {"copy"}


def header_entries(shard: Shard) -> dict[str, TensorEntry]:
    return read_header(shard.name, shard.file_bytes, lambda start, stop: shard.header[start:stop])[1]


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 300_000, 1])
def test_every_tensor_has_one_place(small: Path, target: str, max_shard_bytes: int) -> None:
    plan = plan_of(small, target, max_shard_bytes=max_shard_bytes)
    targets = [entry for operation in plan for entry in operation.target]
    assert sorted(entry.name for entry in targets) == sorted(name for s in plan.shards for name in s.entries)
    assert len({entry.name for entry in targets}) == len(targets) == plan.tensors
    sources = [entry.name for operation in plan for entry in operation.source]
    assert Counter(sources) == Counter(open_checkpoint(small).tensors.keys())
    weight_map = json.loads(plan.index_bytes)["weight_map"]
    assert weight_map == {entry.name: entry.file for entry in targets}
    for shard in plan.shards:
        assert header_entries(shard) == shard.entries
        assert {e.name for o in plan.operations[shard.name] for e in o.target} == set(shard.entries)


@pytest.mark.parametrize("max_shard_bytes", [300_000, 100_000, 1])
def test_shards_are_split_but_never_a_weight_from_its_scale(small: Path, max_shard_bytes: int) -> None:
    whole, split = plan_of(small, "fp8"), plan_of(small, "fp8", max_shard_bytes=max_shard_bytes)
    assert len(split.shards) > len(whole.shards)
    assert split.bytes_written == whole.bytes_written
    count = len(split.shards)
    assert [s.name for s in split.shards] == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    for shard in split.shards:
        units = split.operations[shard.name]
        assert shard.file_bytes - len(shard.header) <= max_shard_bytes or len(units) == 1
        for name in shard.entries:
            if name.endswith(".scale"):
                assert f"{name.removesuffix('scale')}weight" in shard.entries


@pytest.mark.parametrize("max_shard_bytes", [10**9, 300_000, 100_000, 1])
def test_full_files(small: Path, max_shard_bytes: int) -> None:
    """Files hold the units of the layer packing in the same order, and none could take the first unit of the next."""
    layers = plan_of(small, "fp8")
    full = plan_of(small, "fp8", max_shard_bytes=max_shard_bytes, packing=Packing.FULL)
    assert [operation.name for operation in full] == [operation.name for operation in layers]
    assert full.bytes_written == layers.bytes_written
    for shard, following in itertools.pairwise(full.shards):
        payload = shard.file_bytes - len(shard.header)
        units = full.operations[shard.name]
        assert payload <= max_shard_bytes or len(units) == 1
        assert payload + full.operations[following.name][0].bytes_written > max_shard_bytes
    assert len(full.shards) == 1 if max_shard_bytes == 10**9 else len(full.shards) > 1
    assert full.shards[0].name == f"model-00001-of-{len(full.shards):05d}.safetensors"


def test_one_file(small: Path) -> None:
    layers, one = plan_of(small, "fp8"), plan_of(small, "fp8", max_shard_bytes=1, packing=Packing.ONE)
    assert [shard.name for shard in one.shards] == ["model.safetensors"]
    assert [operation.name for operation in one] == [operation.name for operation in layers]
    assert set(json.loads(one.index_bytes)["weight_map"].values()) == {"model.safetensors"}


@pytest.mark.parametrize("packing", Packing)
def test_nothing_is_packed_into_nothing(packing: Packing) -> None:
    assert lay_out([], 100, packing) == []


def test_disk_bytes_are_those_of_all_files(small: Path, tmp_path: Path) -> None:
    """But the certificate, counted as 400 bytes a tensor, and the rewritten inference/config.json, as it was."""
    for target in FORMATS:
        plan = plan_of(small, target)
        report = convert(small, tmp_path / target, target)
        written = sum(path.stat().st_size for path in (tmp_path / target).rglob("*") if path.is_file())
        certificate = report.certificate.stat().st_size
        assert abs((plan.disk_bytes - 400 * plan.tensors) - (written - certificate)) < 100
        assert 0.5 < certificate / (400 * plan.tensors) < 1.5


def test_side_files_are_chosen(small: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    convert(small, source, "native")  # leaves a certificate behind
    taken = ["LICENSE", "tokenizer.json", "encoding/v4.py", "inference/kernel/a.py", "assets/x.png", "model.json"]
    left = ["pytorch_model.bin", "a.pt", "b.pth", "c.pkl", "d.ckpt", "e.gguf", "f.h5", "g.msgpack", "h.partial"]
    left += ["inference/weights.bin", "inference/extra.safetensors", ".git/config", ".hidden"]
    for name in taken + left:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    plan = plan_of(source, "fp8")
    assert plan.side_files == sorted([*taken, "README.md", "generation_config.json", "inference/config.json"])


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def test_the_digest_knows_source_options_and_original(small: Path, tmp_path: Path) -> None:
    plan = plan_of(small, "fp8")
    assert plan_of(small, "fp8").digest == plan.digest
    other_weights = write_small(tmp_path / "other", mtp=True, experts=3)
    edited = write_small(tmp_path / "edited", mtp=True)
    config = json.loads((edited / "config.json").read_text())
    (edited / "config.json").write_text(json.dumps(config | {"rope_theta": 20_000}))
    with_file = write_small(tmp_path / "with file", mtp=True)
    (with_file / "LICENSE").write_text("MIT")
    fp8 = tmp_path / "fp8"
    convert(small, fp8, "fp8")
    others = [
        plan_of(small, "bf16"),
        plan_of(small, "fp8", max_shard_bytes=300_000),
        plan_of(small, "fp8", packing=Packing.FULL),
        plan_of(small, "fp8", packing=Packing.ONE),
        plan_of(other_weights, "fp8"),
        plan_of(edited, "fp8"),
        plan_of(with_file, "fp8"),
        plan_of(fp8, "native"),
        plan_of(fp8, "native", like=small),
    ]
    digests = {plan.digest, *(other.digest for other in others)}
    assert len(digests) == len(others) + 1
    touch(small / "config.json")  # when a file was written is the journal's business
    assert plan_of(small, "fp8").digest == plan.digest


def drop_a_tensor(folder: Path) -> None:
    path, entry = find(folder, "layers.0.attn.wq_a.scale")
    rewrite(path, lambda tensors: tensors.pop(entry.name))


def test_nothing_is_planned_on_a_broken_checkpoint(tmp_path: Path) -> None:
    broken = write_small(tmp_path / "broken")
    drop_a_tensor(broken)
    with pytest.raises(CheckpointError, match=r"layers\.0\.attn\.wq_a\.scale"):
        plan_of(broken, "fp8")
    sound = write_small(tmp_path / "sound")
    convert(sound, tmp_path / "fp8", "fp8")
    with pytest.raises(CheckpointError, match=r"layers\.0\.attn\.wq_a\.scale"):
        plan_of(tmp_path / "fp8", "native", like=broken)


def of_another_format(original: Path, folder: Path) -> None:
    convert(original, folder, "bf16")


def of_another_size(_original: Path, folder: Path) -> None:
    write_small(folder, experts=3)


def of_another_shape(_original: Path, folder: Path) -> None:
    write_small(folder, like="pro")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (of_another_format, "is stored as bf16, expected native"),
        (of_another_size, r"is another model: layers\.0\.ffn\.experts\.2"),
        (of_another_shape, "is another model"),
    ],
)
def test_like_must_be_an_original_of_the_target(tmp_path: Path, make: Callable[[Path, Path], None], says: str) -> None:
    original = write_small(tmp_path / "native")
    convert(original, tmp_path / "fp8", "fp8")
    make(original, tmp_path / "like")
    with pytest.raises(UsageError, match=says) as caught:
        plan_of(tmp_path / "fp8", "native", like=tmp_path / "like")
    assert caught.value.hint


def test_like_is_read_for_weights_that_are_cast_alone(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "fp8", "fp8")
    plan = plan_of(tmp_path / "fp8", "native", like=small)
    assert plan.like is not None
    for operation in plan:
        if operation.is_copy:
            assert operation.like is None
        else:
            assert operation.like == plan.like.tensors[scale_name(operation.name)]
