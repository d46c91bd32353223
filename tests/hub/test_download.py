"""`v4quant download`: all or a part, continued, repaired, and never outside of its folder."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.conversion import write_small
from tests.hub.server import TOKEN, Fault, TestHub
from v4quant.checkpoint import output
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.cli.main import main
from v4quant.hub.origin import downloaded_from

REPO = "me/tiny"
SECOND = "model-00002-of-00004.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("download") / "tiny", mtp=True)


def run(out: Path, *options: str) -> int:
    return main(["download", REPO, "--local-dir", str(out), *options])


def run_json(out: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run(out, "--json", *options) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def partial_of(out: Path, oid: str) -> Path:
    """Where the second shard lies while it is fetched."""
    return out / ".v4quant" / f"{oid}-{hashlib.sha256(SECOND.encode()).hexdigest()[:8]}.partial"


def files_of(folder: Path) -> list[str]:
    return open_checkpoint(folder).files.names()


def assert_same_files(found: Path, expected: Path) -> None:
    names = files_of(expected)
    assert files_of(found) == names
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def test_every_file_arrives_and_is_checked(
    hub: TestHub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.store.add_folder(REPO, folder).refs["refs/heads/main"]
    out = tmp_path / "out"
    result = run_json(out, capsys)
    names = files_of(folder)
    assert {"files", "bytes", "verified"} <= result.keys()
    assert result["files"] == result["verified"] == result["fetched"] == len(names)
    assert result["bytes"] == sum((folder / name).stat().st_size for name in names)
    assert (result["repo"], result["commit"]) == (REPO, commit)
    assert_same_files(out, folder)
    origin = downloaded_from(out)
    assert origin is not None
    assert str(origin) == f"hf://{REPO}@{commit}"
    assert [path.name for path in (out / ".v4quant").iterdir()] == ["download.json"]


def test_a_second_run_reads_and_fetches_nothing(
    hub: TestHub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.store.add_folder(REPO, folder)
    out = tmp_path / "out"
    assert run(out) == 0
    hub.forget()
    result = run_json(out, capsys)
    assert (result["fetched"], result["verified"]) == (0, len(files_of(folder)))
    assert hub.asked("/(objects|resolve)/") == []


def test_a_corrupt_file_of_the_right_size_is_repaired(
    hub: TestHub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.store.add_folder(REPO, folder)
    out = tmp_path / "out"
    assert run(out) == 0
    for name in (SECOND, "config.json"):
        data = bytearray((out / name).read_bytes())
        data[len(data) // 2] ^= 1
        (out / name).write_bytes(data)
    (out / "README.md").unlink()
    result = run_json(out, capsys)
    assert result["repaired"] == ["config.json", SECOND]
    assert result["fetched"] == 3
    assert_same_files(out, folder)


def test_it_goes_on_in_the_middle_of_a_file(hub: TestHub, folder: Path, tmp_path: Path) -> None:
    hub.store.add_folder(REPO, folder)
    out, oid = tmp_path / "out", hub.store.repos[REPO].main[SECOND].oid
    hub.faults.append(Fault(f"/objects/{oid}", host="storage", cut=70_000))
    hub.faults.append(Fault(f"/objects/{oid}", host="storage", status=503, times=6))
    assert run(out) == 4
    assert not (out / SECOND).exists()
    assert partial_of(out, oid).stat().st_size == 70_000
    hub.forget()
    assert run(out) == 0
    assert [request.headers["range"] for request in hub.asked(f"/objects/{oid}")] == [
        f"bytes=70000-{(folder / SECOND).stat().st_size - 1}"
    ]
    assert_same_files(out, folder)


def test_a_damaged_rest_of_an_earlier_run_is_fetched_anew(hub: TestHub, folder: Path, tmp_path: Path) -> None:
    hub.store.add_folder(REPO, folder)
    out, oid = tmp_path / "out", hub.store.repos[REPO].main[SECOND].oid
    (out / ".v4quant").mkdir(parents=True)
    for size in (1_000, 10**7):
        partial_of(out, oid).write_bytes(b"x" * size)
        (out / SECOND).unlink(missing_ok=True)
        assert run(out) == 0
        assert (out / SECOND).read_bytes() == (folder / SECOND).read_bytes()


def test_one_wrong_byte_on_the_way_is_fetched_again(hub: TestHub, folder: Path, tmp_path: Path) -> None:
    hub.store.add_folder(REPO, folder)
    hub.faults.append(Fault("/objects/", host="storage", flip=99, times=2))
    hub.faults.append(Fault("/resolve/.*config.json", flip=9))
    assert run(tmp_path / "out") == 0
    assert_same_files(tmp_path / "out", folder)


def test_a_file_that_is_damaged_on_the_hub(
    hub: TestHub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = hub.store.add_folder(REPO, folder)
    path = hub.store.object_path(repo.main[SECOND].oid)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    out = tmp_path / "out"
    assert run(out) == 3
    errors = capsys.readouterr().err
    assert f"1 of {len(files_of(folder))} files" in errors
    assert f"{SECOND}: arrives with hash" in errors
    assert not (out / SECOND).exists()
    assert (out / "model-00001-of-00004.safetensors").exists()


def test_says_all_that_failed_and_keeps_the_rest(
    hub: TestHub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.store.add_folder(REPO, folder)
    hub.faults.append(Fault("/resolve/.*/(model-0000[13]|README)", status=403, times=99))
    assert run(tmp_path / "out") == 4
    errors = capsys.readouterr().err
    assert "3 of " in errors
    for name in ("model-00001", "model-00003", "README.md"):
        assert f"  {name}" in errors
    assert TOKEN not in errors
    assert (tmp_path / "out" / SECOND).exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--include", "*.json"], {"config.json", "model.safetensors.index.json", "inference/config.json"}),
        (["--include", "*.json", "--exclude", "inference/*"], {"config.json", "model.safetensors.index.json"}),
        (["--include", "*.safetensors", "--no-mtp"], {f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3)}),
        (["--include", "*.safetensors", "--layers", "1-9"], {f"model-0000{n}-of-00004.safetensors" for n in (1, 3, 4)}),
        (
            ["--include", "*.safetensors", "--layers", "0"],
            {f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)},
        ),
    ],
)
def test_only_what_is_asked(hub: TestHub, folder: Path, tmp_path: Path, options: list[str], expected: set[str]) -> None:
    hub.store.add_folder(REPO, folder)
    out = tmp_path / "out"
    assert run(out, *options) == 0
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {".v4quant/download.json"}
    assert {name for name in found if not name.startswith("generation")} - {"tokenizer_config.json"} >= expected
    assert {name for name in found if name.endswith("safetensors")} == {
        n for n in expected if n.endswith("safetensors")
    }


@pytest.mark.parametrize(
    "options", [["--include", "nothing"], ["--layers", "3-1"], ["--layers", "x"], ["--layers", "-1"], ["--layers", ""]]
)
def test_what_nobody_can_ask(hub: TestHub, folder: Path, tmp_path: Path, options: list[str]) -> None:
    hub.store.add_folder(REPO, folder)
    assert run(tmp_path / "out", *options) == 2
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_disk_that_is_too_small(
    hub: TestHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.store.add_folder(REPO, folder)
    needed = sum((folder / name).stat().st_size for name in files_of(folder))
    monkeypatch.setattr(output, "free_bytes", lambda _folder: needed - 1)
    assert run(tmp_path / "out") == 5
    assert "1 short" in capsys.readouterr().err
    assert hub.asked("/objects/") == []
    monkeypatch.setattr(output, "free_bytes", lambda _folder: needed)
    assert run(tmp_path / "out") == 0


def test_files_of_others_are_not_replaced(hub: TestHub, folder: Path, tmp_path: Path) -> None:
    hub.store.add_folder(REPO, folder)
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("mine")
    assert run(out) == 5
    assert (out / "config.json").read_text() == "mine"
    assert run(out, "--overwrite") == 0
    assert_same_files(out, folder)


def test_a_folder_that_another_tool_downloaded_is_taken_over(hub: TestHub, folder: Path, tmp_path: Path) -> None:
    hub.store.add_folder(REPO, folder)
    out = tmp_path / "out"
    hub.store.write_folder(hub.store.repos[REPO].main, out)
    hub.forget()
    assert run(out) == 0
    assert hub.asked("/objects/") == []


@pytest.mark.parametrize("link", ["inference", "config.json", ".v4quant"])
def test_links_lead_nowhere(hub: TestHub, folder: Path, tmp_path: Path, link: str) -> None:
    hub.store.add_folder(REPO, folder)
    out, outside = tmp_path / "out", tmp_path / "outside"
    out.mkdir()
    outside.mkdir()
    (out / link).symlink_to(outside / ("config.json" if link.endswith("json") else ""))
    assert run(out, "--overwrite") == 5
    assert list(outside.iterdir()) == []


def test_a_file_in_the_way(hub: TestHub, folder: Path, tmp_path: Path) -> None:
    hub.store.add_folder(REPO, folder)
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file") == 5
    (tmp_path / "out" / "config.json").mkdir(parents=True)
    assert run(tmp_path / "out") == 5


def test_files_of_one_content(hub: TestHub, folder: Path, tmp_path: Path) -> None:
    repo = hub.store.add_folder(REPO, folder)
    twins = {f"copies/{n}.safetensors": repo.main[SECOND] for n in range(8)}
    repo.add_commit("refs/heads/main", "twins", {**repo.main, **twins})
    assert run(tmp_path / "out") == 0
    for name in twins:
        assert (tmp_path / "out" / name).read_bytes() == (folder / SECOND).read_bytes()


def test_two_downloads_into_one_folder(hub: TestHub, folder: Path, tmp_path: Path) -> None:
    hub.store.add_folder(REPO, folder)
    out = tmp_path / "out"
    codes: list[int] = []

    def second(_request: object) -> None:
        codes.append(run(out))

    hub.faults.append(Fault("/objects/", host="storage", strike=second, skip=2))
    assert run(out) == 0
    assert codes == [5]


def test_an_older_commit_becomes_the_newer(hub: TestHub, folder: Path, tmp_path: Path) -> None:
    repo = hub.store.add_folder(REPO, folder)
    out = tmp_path / "out"
    assert run(out) == 0
    repo.add_commit("refs/heads/main", "new", {**repo.main, "README.md": hub.store.add_file(repo, "README.md", b"new")})
    hub.forget()
    assert run(out) == 0
    assert (out / "README.md").read_bytes() == b"new"
    assert len(hub.asked("/(objects|resolve)/")) == 1


def test_xet_storage_is_asked_through_huggingface_hub(
    hub: TestHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No server of ours speaks Xet: what huggingface_hub is asked for is what is tested."""
    repo = hub.store.add_folder(REPO, folder)
    listing = hub.store.repos[REPO].main
    entries = [blob.to_json(name) for name, blob in listing.items()]
    for entry in entries:
        if entry["path"] == SECOND:
            entry["xetHash"] = "a" * 64
    hub.faults.append(Fault("/tree/", status=200, body=json.dumps(entries).encode(), times=9))
    asked: list[dict[str, Any]] = []

    def fake_xet_get(**options: Any) -> None:
        asked.append(options)
        options["incomplete_path"].write_bytes(hub.store.content(repo.main[SECOND]))

    monkeypatch.setattr("v4quant.hub.fetch.is_xet_available", lambda: True)
    monkeypatch.setattr("v4quant.hub.fetch.xet_get", fake_xet_get)
    assert run(tmp_path / "out") == 0
    assert_same_files(tmp_path / "out", folder)
    (options,) = asked
    assert options["xet_file_data"].file_hash == "a" * 64
    assert options["xet_file_data"].refresh_route.startswith(f"{hub.url()}/api/models/{REPO}/xet-read-token/")
    assert options["expected_size"] == (folder / SECOND).stat().st_size
    assert hub.asked(f"/objects/{repo.main[SECOND].oid}") == []
    assert len(list((tmp_path / "out" / ".v4quant").iterdir())) == 1


def test_xet_that_fails(
    hub: TestHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.store.add_folder(REPO, folder)
    entries = [blob.to_json(name) | {"xetHash": "a" * 64} for name, blob in hub.store.repos[REPO].main.items()]
    hub.faults.append(Fault("/tree/", status=200, body=json.dumps(entries).encode(), times=9))

    def fail(**_options: Any) -> None:
        raise RuntimeError(f"Data processing error: CAS service error for {TOKEN}")

    monkeypatch.setattr("v4quant.hub.fetch.is_xet_available", lambda: True)
    monkeypatch.setattr("v4quant.hub.fetch.xet_get", fail)
    assert run(tmp_path / "out") == 4
    errors = capsys.readouterr().err
    assert f"{SECOND}: the transfer fails: Data processing error" in errors.replace(f"{REPO}@", "")
    assert TOKEN not in errors


def test_a_partial_file_of_a_finished_run_is_gone(hub: TestHub, folder: Path, tmp_path: Path) -> None:
    hub.store.add_folder(REPO, folder)
    (tmp_path / "out" / ".v4quant").mkdir(parents=True)
    (tmp_path / "out" / ".v4quant" / f"{'0' * 64}.partial").write_bytes(b"of an older commit")
    assert run(tmp_path / "out") == 0
    assert len(list((tmp_path / "out" / ".v4quant").iterdir())) == 1
