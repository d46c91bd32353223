"""All broken inputs of the catalogue: right exit code, one clear message, no traceback, nothing that looks whole."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from tests.checkpoint.conversion import write_small
from tests.cli.broken_inputs import CASES, CONFIGS, EXPERT, INDEXES, NAN_BYTE, NAN_F32, TENSORS, Case, poke
from v4quant.checkpoint import plan
from v4quant.checkpoint.index import INDEX_NAME
from v4quant.cli.main import main
from v4quant.config import CONFIG_NAME

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound checkpoint of each format that a case begins with."""
    folder = tmp_path_factory.mktemp("sound")
    forms = {"native": write_small(folder / "native"), "base": write_small(folder / "base", "flash-base")}
    forms["bf16"] = folder / "bf16"
    assert main(["convert", str(forms["native"]), str(forms["bf16"]), "--to", "bf16"]) == 0
    return forms


@pytest.fixture
def folder(case: Case, sound: dict[str, Path], tmp_path: Path) -> Path:
    """The case's broken checkpoint."""
    shutil.copytree(sound[case.form], tmp_path / "checkpoint")
    case.break_it(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def assert_one_clear_message(printed: str) -> str:
    """One error, one hint, no traceback, no control characters; gives the message."""
    assert printed.startswith("error: ")
    message, *hint = printed.removesuffix("\n").split("\nhint: ")
    assert len(hint) <= 1
    assert printed.count("error: ") == 1 + printed.count("\\nerror: ")
    assert not any(line.startswith("error: ") for line in printed.splitlines()[1:])
    assert "Traceback" not in printed
    assert all(character.isprintable() or character == "\n" for character in printed)
    # After the first line come only the problems, indented.
    assert all(line.startswith("  ") for line in message.splitlines()[1:])
    return message


def fingerprint(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.parent.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@every_case
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_inspect(more: list[str], case: Case, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    exit_code = case.exit_code if case.inspect is None else case.inspect
    assert main(["inspect", str(folder), *more]) == exit_code
    printed = capsys.readouterr()
    if exit_code == 0:
        assert printed.err.startswith("next: ")
        return
    message = assert_one_clear_message(printed.err)
    if printed.out:
        assert exit_code == 3, "a checkpoint is described, with its problems"
        assert " problem" in message
        assert all(character.isprintable() or character == "\n" for character in printed.out)
    if more and printed.out:
        assert case.names in "\n".join(json.loads(printed.out)["problems"])
    else:
        assert case.names in message + printed.out


@every_case
def test_convert(case: Case, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    before, out = fingerprint(folder), tmp_path / "elsewhere" / "out"
    assert main(["convert", str(folder), str(out), "--to", "bf16", "--json"]) == case.exit_code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert case.names in assert_one_clear_message(printed.err)
    if out.exists():
        # Shards that were finished before the fault was found are kept, and taken for no checkpoint.
        assert case.inspect == 0, "faults in headers are found before anything is written"
        assert not {CONFIG_NAME, INDEX_NAME} & {path.name for path in out.iterdir()}
        assert not list(out.glob("*.partial"))
        assert main(["inspect", str(out)]) == 3
        assert "is an unfinished conversion" in capsys.readouterr().err
        shutil.rmtree(out)
    assert fingerprint(folder) == before, "the source is as it was, and nothing else was left"


@pytest.mark.parametrize("case", [case for case in CASES if case.inspect != 0], ids=lambda case: case.name)
@pytest.mark.parametrize("more", [["--tp", "1"], ["--explain"]], ids=["shard", "explain"])
def test_shard(more: list[str], case: Case, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What headers and config show is found before anything is written."""
    capsys.readouterr()
    assert main(["shard", str(folder), str(tmp_path / "out"), *more, "--json"]) == case.exit_code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert case.names in assert_one_clear_message(printed.err)
    assert not (tmp_path / "out").exists()


IN_THE_SECOND_BAND = [
    Case("a scale of FP4", poke(f"{EXPERT}.scale", 200 * 8 + 5, NAN_BYTE), 3, f"{EXPERT}.scale[200, 5] is"),
    Case("a scale of FP8", poke(f"{EXPERT}.scale", 3 * 4, NAN_F32), 3, f"{EXPERT}.scale[1, 1] is", form="base"),
    Case("a weight", poke(f"{EXPERT}.weight", 200 * 256 + 9, NAN_BYTE), 3, f"{EXPERT}.weight[200, 9] is", form="base"),
]


@pytest.mark.parametrize("case", IN_THE_SECOND_BAND, ids=lambda case: case.name)
def test_coordinates_count_from_the_first_row_of_the_tensor(
    case: Case, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever band of rows the number was found in."""
    monkeypatch.setattr(plan, "CHUNK_BYTES", 1)
    assert plan.chunk_rows((256, 256)) == 128
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "bf16"]) == 3
    assert case.names in capsys.readouterr().err


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.inspect == 0 and "inference" not in case.names], ids=lambda case: case.name
)
def test_dry_run_trusts_headers(case: Case, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert case.exit_code == 3
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "bf16", "--dry-run"]) == 0
    assert capsys.readouterr().err == "next: run it without --dry-run\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", [*CONFIGS[:3], *TENSORS[:2], *INDEXES[-3:]], ids=lambda case: case.name)
def test_like_is_read_as_carefully(
    case: Case, folder: Path, sound: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(sound["bf16"]), str(tmp_path / "out"), "--to", "native", "--like", str(folder)]
    assert main([*command, "--json"]) == case.exit_code
    assert case.names in assert_one_clear_message(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["loop", "loop/inside"])
def test_an_output_folder_that_is_a_link_to_itself(
    out: str, sound: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert main(["convert", str(sound["native"]), str(tmp_path / out), "--to", "bf16", "--json"]) == 5
    assert str(tmp_path / out) in assert_one_clear_message(capsys.readouterr().err)


def test_the_sound_checkpoints_are_sound(sound: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """What is refused is refused for what was done to it."""
    for form, path in sound.items():
        assert main(["inspect", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["format"] == form


def test_there_are_many_and_each_is_another() -> None:
    assert len(CASES) >= 100
    assert len({case.name for case in CASES}) == len(CASES)
