"""`v4quant inspect`: the contract's keys, the table for people, exit codes, and every release at full size."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.sparse import write_sparse
from tests.test_inventory import CENSUS
from v4quant.cli.main import main
from v4quant.config import V4Config
from v4quant.inventory import parameters
from v4quant.testing.releases import synth_config

DATA = Path(__file__).parents[1] / "data"
SHARDS: dict[str, Any] = json.loads((DATA / "configs" / "shards.json").read_bytes())
KEYS = ["format", "release", "tensors", "bytes", "parameters", "by_dtype", "by_role", "problems"]
RELEASES = {
    "flash": ("DeepSeek-V4-Flash", "DeepSeek-V4-Flash"),
    "pro": ("DeepSeek-V4-Pro", "DeepSeek-V4-Pro"),
    "flash-0731": ("DeepSeek-V4-Flash (DSpark, 0731)", "DeepSeek-V4-Flash-0731"),
    "pro-0813": ("DeepSeek-V4-Pro (DSpark, 0813)", "DeepSeek-V4-Pro-0813"),
    "flash-base": ("DeepSeek-V4-Flash-Base", "DeepSeek-V4-Flash-Base"),
    "pro-base": ("DeepSeek-V4-Pro-Base", "DeepSeek-V4-Pro-Base"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Flash, all features, nothing but headers."""
    return write_sparse(tmp_path / "checkpoint", "flash", tiny=True)


def inspect_json(folder: Path, capsys: pytest.CaptureFixture[str], exit_code: int = 0) -> dict[str, Any]:
    assert main(["inspect", str(folder), "--json"]) == exit_code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# Every release at full size.


@pytest.mark.parametrize("like", RELEASES)
def test_census_of_a_full_size_release(like: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The published tensor counts, bytes and dtypes; the files have the released sizes."""
    release, repository = RELEASES[like]
    scheme = "base" if like.endswith("-base") else "native"
    count, total, by_dtype = CENSUS[like.removesuffix("-base"), scheme]
    write_sparse(tmp_path, like)
    found = inspect_json(tmp_path, capsys)
    assert (found["format"], found["release"], found["problems"]) == (scheme, release, [])
    assert (found["tensors"], found["bytes"]) == (count, total)
    assert {dtype: (of["tensors"], of["bytes"]) for dtype, of in found["by_dtype"].items()} == by_dtype
    for key in ("tensors", "bytes"):
        assert sum(of[key] for of in found["by_role"].values()) == found[key]
    config = V4Config.from_json(synth_config(like)[0], like)
    own = 2 * config.vocab_size * config.hidden_size if scheme == "base" else 0  # embedding and head of the MTP block
    assert found["parameters"] == parameters(config) + own
    assert SHARDS[repository]["total_size"] == total
    assert SHARDS[repository]["tensors"] == count
    if scheme == "native":
        sizes = {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
        assert sizes == {name: size for name, (size, _, _) in SHARDS[repository]["files"].items()}


# JSON.


def test_json_is_one_object_of_the_contracts_keys(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert list(found) == KEYS
    assert all(set(of) == {"tensors", "bytes"} for of in found["by_dtype"].values())
    assert all({"tensors", "bytes"} <= set(of) for of in found["by_role"].values())
    assert printed.err == f"next: v4quant convert {folder} OUT --to fp8 --dry-run\n"


def test_roles_and_parameters(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect_json(folder, capsys)
    config = V4Config.load((folder / "config.json").read_bytes(), "config.json")
    experts = 5 * 8 * 3
    assert found["by_role"]["routed_experts"] == {
        "tensors": 2 * experts,
        "bytes": experts * 256 * 256 * 17 // 32,  # half a byte a weight, and a byte for 32 of them
        "parameters": experts * 256 * 256,
    }
    assert found["by_role"]["hash_table"]["parameters"] == 0
    assert {"embedding", "head", "indexer", "compressor", "mtp.routed_experts", "mtp.attention"} <= set(
        found["by_role"]
    )
    assert found["parameters"] == parameters(config)


def test_problems_are_listed_one_by_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(re.sub(r'    "layers\.3\.[^\n]*experts[^\n]*\n', "", text))
    assert main(["inspect", str(folder), "--json"]) == 3
    printed = capsys.readouterr()
    problems = json.loads(printed.out)["problems"]
    assert len(problems) == 2 * 3 * (8 + 1)
    assert all("but the index does not list it" in problem for problem in problems)
    assert printed.err.startswith(f"error: {folder}: {len(problems)} problems\nhint: ")


# Text.


def test_the_table_that_people_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = inspect_json(folder, capsys)
    assert lines[0] == "DeepSeek-V4 (custom dimensions), stored as native (8 shards)"
    assert lines[1].startswith(f"{found['tensors']} tensors, {found['bytes']:,} bytes (")
    assert lines[1].endswith(f", {found['parameters']:,} parameters")
    assert lines[3].split() == ["role", "tensors", "bytes", "parameters", "bits/weight"]
    rows = [line.split() for line in lines[4 : 4 + len(found["by_role"])]]
    assert {name: [int(cell.replace(",", "")) for cell in cells[:3]] for name, *cells in rows} == {
        role: list(of.values()) for role, of in found["by_role"].items()
    }
    assert [int(row[2].replace(",", "")) for row in rows] == sorted(
        (of["bytes"] for of in found["by_role"].values()), reverse=True
    )
    bits = {name: cells[-1] for name, *cells in rows}
    assert (bits["routed_experts"], bits["embedding"], bits["hash_table"]) == ("4.25", "16.00", "-")
    assert len({len(line) for line in lines[3 : 4 + len(rows)]}) == 1, "columns are aligned"
    assert lines[4 + len(rows) + 1].split() == ["dtype", "tensors", "bytes"]
    assert lines[-1] == "no problems: config, index and headers agree"


def test_problems_for_people_are_grouped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_routed_experts": 9, "expert_dtype": "fp8"}))
    index = folder / "model.safetensors.index.json"
    index.write_text(re.sub(r'    "layers\.3\.[^\n]*experts[^\n]*\n', "", index.read_text()))
    assert main(["inspect", str(folder)]) == 3
    out = capsys.readouterr().out
    text = out[out.index("56 problems:") :].splitlines()
    assert text[1].startswith("  config.json: says expert_dtype fp8, but the tensors are stored as fp4 experts")
    assert text[2].startswith("  config.json: says n_routed_experts 9, but 8 is stored (layers.0.ffn.gate.weight [8, ")
    alike = {text[i]: text[i + 1] for i in (3, 5, 7, 9)}
    where = "is stored in model-00005-of-00008.safetensors, but the index does not list it"
    assert alike == {
        f"  layers.3.ffn.experts.0.w1.scale: {where}": "    ... and 23 alike",
        f"  layers.3.ffn.experts.0.w1.weight: {where}": "    ... and 23 alike",
        f"  layers.3.ffn.shared_experts.w1.scale: {where}": "    ... and 2 alike",
        f"  layers.3.ffn.shared_experts.w1.weight: {where}": "    ... and 2 alike",
    }
    assert len(text) == 11


def test_many_kinds_of_problems_are_cut_with_a_count(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = list(index["weight_map"])
    index["weight_map"] = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["inspect", str(folder)]) == 3
    out = capsys.readouterr().out
    assert f"\n{len(names)} problems:\n" in out
    shown = out[out.index(" problems:") :]
    alike = sum(map(int, re.findall(r"\.\.\. and (\d+) alike", shown)))
    (others,) = re.findall(r"\.\.\. and (\d+) others \(all of them: --json\)\n$", shown)
    assert shown.count("but the index does not list it") + alike + int(others) == len(names)


def test_one_problem_is_one_problem(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors.index.json").unlink()
    assert main(["inspect", str(folder)]) == 3
    printed = capsys.readouterr()
    assert "\n1 problem:\n  model.safetensors.index.json: is missing" in printed.out
    assert printed.err.startswith(f"error: {folder}: 1 problem\n")


def test_files_that_are_no_part_of_it_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "outputs.safetensors").write_bytes(bytes([2, 0, 0, 0, 0, 0, 0, 0]) + b"{}")
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "\nno part of the checkpoint (no V4 tensor, in no index): outputs.safetensors\n" in out


def test_hostile_names_steer_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tensor whose name clears the screen, forges a line and ends in a lone surrogate."""
    header = {"\x1b[2J\nerror: forged\r\u202e\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (folder / "model-00001-of-00009.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(header, "model-00001-of-00009.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for more in ([], ["--json"]):
        assert main(["inspect", str(folder), *more]) == 3
        printed = capsys.readouterr()
        for text_out in (printed.out, printed.err):
            assert all(character.isprintable() or character == "\n" for character in text_out)
            assert "\nerror: forged" not in text_out
    assert "forged" in printed.out


# What it costs.


def test_nothing_heavy_is_imported(folder: Path) -> None:
    code = (
        "import sys\n"
        "from v4quant.cli.main import main\n"
        f"assert main(['inspect', {str(folder)!r}, '--json']) == 0\n"
        "heavy = {'numpy', 'torch', 'numba', 'llvmlite', 'safetensors', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_no_tensor_data_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read ends where the header does."""
    ends = {path: 8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors")}
    preadv = os.preadv
    read: set[Path] = set()

    def watch(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        read.add(path)
        assert offset + sum(map(len, buffers)) <= ends.get(path, path.stat().st_size)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", watch)
    assert main(["inspect", str(folder)]) == 0
    assert read >= set(ends)
