"""The small checkpoint is sound, has every kind of layer, and holds nothing but rows of the user's own tensors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.conversion import REFERENCES
from tests.parity.selftest.conftest import CONVERTED, RELEASES
from v4quant.checkpoint.reader import Checkpoint, open_checkpoint
from v4quant.config import CONFIG_NAME, V4Config
from v4quant.encodings import BASE_SCHEME, NATIVE_SCHEME
from v4quant.errors import CheckpointError, OutputError
from v4quant.model.transformer import Transformer
from v4quant.names import Role
from v4quant.parity.selftest.reduce import Reduction, plan_reduction, reduce_checkpoint, renumber_picks
from v4quant.testing.releases import synth_config
from v4quant.testing.synth import write_checkpoint


def read(checkpoint: Checkpoint, name: str) -> bytes:
    entry = checkpoint.tensors[name]
    return checkpoint.files.read(entry.file, entry.start, entry.stop)


def source_name(name: str, layers: tuple[int, ...]) -> str:
    """Where a tensor of the small checkpoint comes from."""
    first, *rest = name.split(".")
    return ".".join([first, str(layers[int(rest[0])]), *rest[1:]]) if first == "layers" else name


def assert_rows_of(small: Checkpoint, source: Checkpoint, layers: tuple[int, ...]) -> None:
    """Every tensor is the first rows of its source; a hash table has its picks modulo the experts."""
    for name, entry in small.tensors.items():
        origin = source_name(name, layers)
        assert entry.dtype == source.tensors[origin].dtype
        assert entry.shape[1:] == source.tensors[origin].shape[1:]
        found, expected = read(small, name), read(source, origin)[: entry.bytes]
        if small.parsed[name].role is Role.HASH_TABLE and found != expected:
            assert small.config.n_routed_experts < source.config.n_routed_experts
            tables = [
                torch.frombuffer(bytearray(data), dtype=torch.int64).view(entry.shape) for data in (found, expected)
            ]
            assert torch.equal(tables[0][:, 0], tables[1][:, 0] % small.config.n_routed_experts)
        else:
            assert found == expected, name


def check(source_folder: Path, out: Path) -> tuple[Reduction, Checkpoint]:
    source = open_checkpoint(source_folder)
    reduction = reduce_checkpoint(source, out)
    small = open_checkpoint(out)
    assert small.problems == []
    assert (small.scheme, small.foreign_files) == (source.scheme, [])
    assert_rows_of(small, source, reduction.layers)
    ratios = small.config.compress_ratios[: small.config.num_hidden_layers]
    assert set(ratios) == set(source.config.compress_ratios[: source.config.num_hidden_layers])
    assert 0 < small.config.num_hash_layers < small.config.num_hidden_layers
    assert [path.name for path in sorted(out.iterdir())] == sorted(
        {CONFIG_NAME, "model.safetensors.index.json", *(entry.file for entry in small.tensors.values())}
    )
    assert len({entry.file for entry in small.tensors.values()}) == len(ratios) + 2 + small.config.mtp_blocks
    for name, parts in small.parsed.items():
        if parts.role is Role.HASH_TABLE:
            table = torch.frombuffer(bytearray(read(small, name)), dtype=torch.int64).view(small.tensors[name].shape)
            assert bool(((table >= 0) & (table < small.config.n_routed_experts)).all())
            in_order = table.sort(dim=1).values
            assert bool((in_order[:, 1:] != in_order[:, :-1]).all()), "a token picks an expert twice"
    return reduction, small


@pytest.mark.parametrize("kind", [*RELEASES, *CONVERTED])
def test_every_form(kind: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    reduction, small = check(tiny(kind), tmp_path / "small")
    assert reduction.layers == (0, 2, 3)
    assert small.config.mtp_blocks == (0 if kind in ("flash-0731", "pro-0813") else 1)


@pytest.mark.parametrize("folder", REFERENCES, ids=lambda path: path.name)
def test_reference_checkpoints(folder: Path, tmp_path: Path) -> None:
    _, small = check(folder, tmp_path / "small")
    assert small.config.n_routed_experts == 8
    Transformer(small)  # can be run: tables hold experts that are there


def test_experts_and_vocabulary_are_cut(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_checkpoint(tiny("flash-base"))
    reduction = reduce_checkpoint(source, tmp_path / "small", max_experts=2, max_vocabulary=100)
    assert (reduction.experts, reduction.vocabulary) == (6, 100)  # four picks, and two experts to spare
    small = open_checkpoint(tmp_path / "small")
    assert small.problems == []
    assert_rows_of(small, source, reduction.layers)
    rows = {parts.role: small.tensors[name].shape[0] for name, parts in small.parsed.items()}
    for role in (Role.EMBEDDING, Role.HEAD, Role.HASH_TABLE, Role.MTP_EMBEDDING, Role.MTP_HEAD):
        assert rows[role] == 100
    assert rows[Role.ROUTER] == 6
    assert {parts.expert for parts in small.parsed.values()} == {-1, *range(6)}


def test_a_small_checkpoint_reduces_to_itself(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    reduce_checkpoint(open_checkpoint(tiny("flash")), tmp_path / "small")
    reduce_checkpoint(open_checkpoint(tmp_path / "small"), tmp_path / "again")
    for path in (tmp_path / "small").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("like", "layers", "mtp", "experts"),
    [
        ("flash", (0, 2, 3), 1, 8),
        ("pro", (0, 2, 3), 1, 8),
        ("flash-base", (0, 2, 3), 1, 8),
        ("pro-0813", (0, 2, 3), 0, 8),
    ],
)
def test_full_size_plans(like: str, layers: tuple[int, ...], mtp: int, experts: int) -> None:
    config_json, _ = synth_config(like)
    config = V4Config.from_json(config_json, "test")
    assert plan_reduction(config) == Reduction(layers, mtp, experts, 512)


@pytest.mark.parametrize(
    ("ratios", "hashed", "expected"),
    [
        ([4, 4, 4], 0, (0,)),
        ([4, 4, 4], 3, (0,)),
        ([0, 4, 0, 4], 1, (0, 1)),
        ([128, 0, 128, 0], 2, (0, 1, 2)),
        ([0, 0, 0, 128, 4], 3, (0, 3, 4)),
    ],
)
def test_the_first_layer_of_each_kind_is_kept(ratios: list[int], hashed: int, expected: tuple[int, ...]) -> None:
    words, _ = synth_config("flash", tiny=True)
    words |= {"compress_ratios": [*ratios, 0], "num_hidden_layers": len(ratios), "num_hash_layers": hashed}
    assert plan_reduction(V4Config.from_json(words, "test")).layers == expected


def test_picks_are_numbered_modulo_and_stay_distinct() -> None:
    table = torch.tensor([[0, 8, 16], [7, 15, 0], [3, 2, 1], [11, 4, 19]])
    expected = torch.tensor([[0, 1, 2], [7, 0, 1], [3, 2, 1], [3, 4, 5]])
    assert torch.equal(renumber_picks(table, 8), expected)
    exhausted = renumber_picks(torch.arange(24).view(8, 3) * 5, 3)
    assert torch.equal(exhausted.sort(dim=1).values, torch.arange(3).expand(8, 3))


def test_other_keys_of_the_config_stay(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    reduce_checkpoint(open_checkpoint(tiny("flash-0731")), tmp_path / "small", max_vocabulary=64)
    before: dict[str, Any] = json.loads((tiny("flash-0731") / CONFIG_NAME).read_text())
    after: dict[str, Any] = json.loads((tmp_path / "small" / CONFIG_NAME).read_text())
    changed = {key for key in before if before[key] != after.get(key)}
    dspark = {key for key in before if key.startswith("dspark_")}
    adapted = {"num_hidden_layers", "num_hash_layers", "compress_ratios", "num_nextn_predict_layers", "vocab_size"}
    assert dspark
    assert changed == dspark | adapted
    assert list(after) == [key for key in before if key not in dspark]


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    """Pieces of a tensor are read and written one after another."""
    pieces: list[int] = []
    config_json, scheme = synth_config("flash", tiny=True, layers=1, experts=4, mtp=False)
    config_json |= {"vocab_size": 40_000}
    write_checkpoint(tmp_path / "wide", config_json, scheme)
    source = open_checkpoint(tmp_path / "wide")
    reduce_checkpoint(
        source, tmp_path / "small", max_vocabulary=40_000, progress=lambda count, _file: pieces.append(count)
    )
    assert max(pieces) == 4 * 2**20 < source.tensors["embed.weight"].bytes
    assert sum(pieces) == open_checkpoint(tmp_path / "small").bytes


def test_a_damaged_source_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "damaged", *synth_config("flash", tiny=True, layers=1, experts=4, mtp=False))
    shard = sorted((tmp_path / "damaged").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        reduce_checkpoint(open_checkpoint(tmp_path / "damaged"), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_folder_with_something_in_it_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError):
        reduce_checkpoint(open_checkpoint(tiny("flash")), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
@pytest.mark.parametrize(("like", "scheme"), [("flash", NATIVE_SCHEME), ("flash-base", BASE_SCHEME)])
def test_full_size_layers(like: str, scheme: object, tmp_path: Path) -> None:
    config_json, written = synth_config(like, layers=4, experts=9)
    assert written == scheme
    write_checkpoint(tmp_path / "full", config_json | {"vocab_size": 4096}, written)
    _, small = check(tmp_path / "full", tmp_path / "small")
    assert small.config.n_routed_experts == 8
