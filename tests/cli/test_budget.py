"""`v4quant budget`: the contract's keys, what people read, sources, the plot, and wrong inputs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.budget.configs import MILLION, released
from tests.checkpoint.sparse import write_sparse
from v4quant.budget.kv_cache import kv_bytes, served_layout
from v4quant.budget.plot import draw, tokens
from v4quant.cli.budget import parse_tokens
from v4quant.cli.main import main
from v4quant.errors import UsageError

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
FLASH = CONFIGS / "flash.json"


def budget_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["budget", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refusal(capsys: pytest.CaptureFixture[str], exit_code: int, *arguments: object) -> str:
    assert main(["budget", *map(str, arguments)]) == exit_code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err


def test_the_contracts_keys(capsys: pytest.CaptureFixture[str]) -> None:
    found = budget_json(capsys, CONFIGS / "pro.json")
    assert (found["release"], found["format"], found["context"], found["batch"]) == (
        "DeepSeek-V4-Pro",
        "native",
        MILLION,
        1,
    )
    assert {"total", "active"} <= set(found["parameters"])
    assert (found["checkpoint_bytes"], found["kv_bytes"]) == (864_704_792_696, 5_280_404_480)
    assert found["kv_bytes_per_token"] == 5031.4375
    assert round(found["flops_per_token"] / 1e9, 1) == 303.2
    assert round(found["ratios"]["v3.2"]["kv_times_smaller"], 3) == 9.545
    assert 0.26 < found["ratios"]["v3.2"]["flops_share"] < 0.28
    assert round(100 * found["ratios"]["gqa8"]["kv_share"], 2) == 2.02
    assert "gpu" not in found


def test_the_table_that_people_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", str(FLASH), "--context", "128K", "--batch", "32", "--gpu", "h200", "--gpus", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "DeepSeek-V4-Flash, stored as native; 32 sequences of 131,072 tokens"
    rows = {line.split("  ")[0]: line.split() for line in lines}
    assert rows["this model"][-2:] == ["284,332,240,471", "13,270,101,591"]
    assert rows["all"][-1] == "240.74", "the last table's row of this name, V3.2's"
    assert rows["MTP blocks"][2:4] == ["3.59", "GB"]
    assert rows["DeepSeek-V3.2"][-3:] == ["6.30", "GB", "13.6"]
    assert "32 sequences" in rows
    assert "8 x h200: 150.75 GB each, 90 % of it for weights and caches" in lines
    assert sum(line.startswith("  native") for line in lines) == 2
    assert all(line == line.rstrip() for line in lines)


def test_a_checkpoint_tells_its_format_by_its_headers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sparse(tmp_path / "base", "flash-base", tiny=True)
    assert budget_json(capsys, folder)["format"] == "base"
    # The config alone leaves the scales open, and is taken for a Base release.
    assert budget_json(capsys, folder / "config.json")["format"] == "base"
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(FLASH, only / "config.json")
    assert budget_json(capsys, only) == budget_json(capsys, FLASH)


def test_a_checkpoint_with_problems_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sparse(tmp_path / "flash", "flash", tiny=True)
    (folder / "model-00003-of-00008.safetensors").unlink()
    message = refusal(capsys, 3, folder)
    assert "the first: " in message
    assert f"v4quant budget {folder}/config.json" in message
    assert budget_json(capsys, folder / "config.json")["format"] == "native"


@pytest.mark.parametrize(
    ("text", "expected"), [("4096", 4096), ("128K", 131_072), ("128k", 131_072), ("1M", MILLION), (" 1,000 ", 1000)]
)
def test_numbers_of_tokens(text: str, expected: int) -> None:
    assert parse_tokens(text) == expected
    assert parse_tokens(tokens(expected)) == expected


@pytest.mark.parametrize("text", ["", "1.5M", "1G", "-4", "many", "1e6", "M", "٣"])
def test_no_numbers_of_tokens(text: str) -> None:
    with pytest.raises(UsageError, match="expected a number of tokens"):
        parse_tokens(text)


def test_wrong_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in refusal(capsys, 3, tmp_path / "elsewhere")
    assert "has no config.json" in refusal(capsys, 3, tmp_path)
    assert "inference code" in refusal(capsys, 2, CONFIGS / "flash-inference.json")
    assert "DeepSeek-V4.1" in refusal(capsys, 2, CONFIGS / "v4.1-flash.json")
    assert "a context of 2,097,152 tokens" in refusal(capsys, 2, FLASH, "--context", "2M")
    assert "a context of 0 tokens" in refusal(capsys, 2, FLASH, "--context", "0")
    assert "--context is '1G'" in refusal(capsys, 2, FLASH, "--context", "1G")
    assert "expected one of: a100, h100" in refusal(capsys, 2, FLASH, "--gpu", "rtx4090")
    assert "--gpus says how many" in refusal(capsys, 2, FLASH, "--gpus", "8")
    assert "'--gpus'" in refusal(capsys, 2, FLASH, "--gpu", "h200", "--gpus", "0")
    assert "'x.gif', expected a name that ends in .png, .svg, .pdf" in refusal(capsys, 2, FLASH, "--plot", "x.gif")
    missing = tmp_path / "missing" / "x.png"
    assert "no such folder" in refusal(capsys, 5, FLASH, "--plot", missing)
    long = tmp_path / "long.json"
    long.write_text(" " * 2**21)
    assert "has more than 1,048,576 bytes" in refusal(capsys, 3, long)
    assert "cannot read: No such file" in refusal(capsys, 3, tmp_path / "config.json")
    shutil.copy(long, tmp_path / "config.json")
    assert "has 2,097,152 bytes" in refusal(capsys, 3, tmp_path)
    assert "is a file" in refusal(capsys, 3, Path(__file__))
    assert "File name too long" in refusal(capsys, 3, "a" * 300 + ".json")


def test_what_lies_beside_a_config_does_not_matter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a home folder, say: a checkpoint folder with a link out of it is refused."""
    shutil.copy(FLASH, tmp_path / "flash.json")
    (tmp_path / "link").symlink_to("/etc")
    assert budget_json(capsys, tmp_path / "flash.json")["release"] == "DeepSeek-V4-Flash"


def test_a_plot_is_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "flash.png"
    assert budget_json(capsys, FLASH, "--plot", file)["plot"] == str(file)
    assert file.read_bytes()[:4] == b"\x89PNG"
    assert "exists already" in refusal(capsys, 5, FLASH, "--plot", file)
    assert main(["budget", str(FLASH), "--plot", str(file), "--overwrite"]) == 0
    assert f"wrote {file}" in capsys.readouterr().out


def test_what_the_plot_shows() -> None:
    config = released("flash")
    figure = draw(config, "DeepSeek-V4-Flash", 100_000)
    assert isinstance(figure, Figure)
    left, right = figure.axes
    curves = {str(line.get_label()): np.asarray(line.get_xydata()) for line in left.lines[:-1]}
    assert list(curves) == ["DeepSeek-V4-Flash", "DeepSeek-V3.2", "GQA-8, BF16, 43 layers"]
    own = {int(x): int(y) for x, y in curves["DeepSeek-V4-Flash"]}
    assert own == {n: kv_bytes(config, n, served_layout(config)) for n in own}
    assert {1024, 100_000, MILLION} <= set(own)
    assert [list(np.asarray(line.get_xdata())) for line in (left.lines[-1], right.lines[-1])] == [
        [100_000, 100_000]
    ] * 2
    work = [np.asarray(line.get_xydata())[-1][1] for line in right.lines[:3]]
    assert work == sorted(work)
    assert [round(value / 1e9) for value in work[:2]] == [140, 1158]


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\n"
        "from v4quant.cli.main import main\n"
        f"assert main(['budget', {str(FLASH)!r}, '--json']) == 0\n"
        "heavy = {'numpy', 'torch', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
