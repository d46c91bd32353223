"""Conversion from the Hub, to the Hub, or both: the same bytes, little disk, and on after a failure."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.hub.conftest import Chain
from tests.hub.server import TOKEN, Fault, TestHub
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.cli.main import main
from v4quant.errors import OutputError
from v4quant.hub.origin import converted_from
from v4quant.hub.uploads import UploadedShard, Uploads

SOURCE, REPO = "me/source", "me/fp8"
INDEX = "model.safetensors.index.json"


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_converted(out: Path, chain: Chain) -> None:
    """The folder holds what the local conversion holds, and where it came from."""
    found, expected = files_below(out), files_below(chain.fp8)
    del found["v4quant.source.json"], expected["v4quant.source.json"]
    assert found == expected


def assert_staged(hub: TestHub, out: Path, chain: Chain) -> str:
    """The branch holds the whole conversion, the folder all but the shards; returns the branch."""
    repo = hub.store.repos[REPO]
    (ref,) = [ref for ref in repo.refs if "v4quant-" in ref]
    tree = repo.commits[repo.refs[ref]].tree
    expected = open_checkpoint(chain.fp8).files.names()
    assert set(tree) == {*expected, ".gitattributes"} - {"README.md"}
    for name in set(expected) - {"v4quant.source.json", "README.md"}:
        assert hub.store.content(tree[name]) == (chain.fp8 / name).read_bytes(), name
    left = {name for name in files_below(out) if name != "v4quant.uploads.jsonl"}
    assert left == {name for name in expected if not name.endswith(".safetensors")}
    assert set(repo.main) == {".gitattributes"}
    return ref.removeprefix("refs/heads/")


def convert(out: Path, *options: str, source: str = SOURCE) -> int:
    return main(["convert", source, str(out), "--to", "fp8", *options])


def result_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_from_the_hub(hub: TestHub, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit = hub.store.add_folder(SOURCE, chain.source).refs["refs/heads/main"]
    out = tmp_path / "out"
    assert convert(out, "--json") == 0
    result = result_of(capsys)
    assert (result["repo"], result["commit"]) == (SOURCE, commit)
    assert_converted(out, chain)
    assert str(converted_from(out)) == f"hf://{SOURCE}@{commit}"
    fetched = [request.headers["range"] for request in hub.asked("/objects/", host="storage")]
    assert len(fetched) == len(set(zip(fetched, [r.path for r in hub.asked("/objects/", host="storage")], strict=True)))


def test_dry_run_reads_headers_and_says_what_it_takes(
    hub: TestHub, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.store.add_folder(SOURCE, chain.source)
    out = tmp_path / "out"
    assert convert(out, "--dry-run", "--json") == 0
    whole = result_of(capsys)
    assert convert(out, "--dry-run", "--push", REPO, "--json") == 0
    pushed = result_of(capsys)
    assert not out.exists()
    assert REPO not in hub.store.repos
    assert 0 < whole["spool_bytes"] == pushed["spool_bytes"]
    assert pushed["disk_bytes"] < whole["disk_bytes"]
    assert whole["bytes_fetched"] < 20_000


@contextmanager
def measured(folder: Path) -> Iterator[list[int]]:
    """Watch how many bytes the files below a folder take; the largest sum is appended at the end."""
    found: list[int] = []
    largest, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not ended.is_set():
            try:
                total = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
            except OSError:  # a file went while it was looked at
                continue
            largest = max(largest, total)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()
        found.append(largest)


@pytest.mark.parametrize("push", [[], ["--push", REPO]], ids=["kept", "pushed"])
def test_the_disk_that_it_takes_is_what_dry_run_said(
    hub: TestHub, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str], push: list[str]
) -> None:
    hub.store.add_folder(SOURCE, chain.source)
    out = tmp_path / "out"
    assert convert(out, *push, "--max-shard-size", "300KB", "--dry-run", "--json") == 0
    said = result_of(capsys)["disk_bytes"]
    with measured(out) as found:
        assert convert(out, *push, "--max-shard-size", "300KB") == 0
    # Blocks of 4 kB, the journal, and folders come on top.
    assert 0.3 * said < found[0] < 1.05 * said + 200_000


def test_to_the_hub_shard_by_shard(
    hub: TestHub, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.store.add_folder(SOURCE, chain.source)
    out = tmp_path / "out"
    assert convert(out, "--push", REPO, "--private", "--json") == 0
    branch = assert_staged(hub, out, chain)
    assert result_of(capsys)["pushed_to"] == f"hf://{REPO}@{branch}"
    assert hub.store.repos[REPO].private
    assert open_checkpoint_remote(f"hf://{REPO}@{branch}")


def open_checkpoint_remote(source: str) -> bool:
    return main(["inspect", source]) == 0 and main(["verify", source]) == 0


def test_a_local_source_can_be_pushed_as_it_is_converted(hub: TestHub, chain: Chain, tmp_path: Path) -> None:
    assert convert(tmp_path / "out", "--push", REPO, source=str(chain.source)) == 0
    repo = hub.store.repos[REPO]
    (ref,) = [ref for ref in repo.refs if "v4quant-" in ref]
    assert INDEX in repo.commits[repo.refs[ref]].tree


def test_parity_and_push_of_what_lies_on_the_branch(
    hub: TestHub, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.store.add_folder(SOURCE, chain.source).refs["refs/heads/main"]
    out, report = tmp_path / "out", tmp_path / "report"
    assert convert(out, "--push", REPO) == 0
    branch = assert_staged(hub, out, chain)
    # The report of the local conversion is of the same bytes.
    assert main(["push", str(out), REPO, "--parity", str(chain.report), "--dry-run"]) == 0
    assert main(["parity", f"hf://{REPO}@{branch}", "--against", f"hf://{SOURCE}", "--report", str(report)]) == 0
    uploads = len(hub.asked("/upload/", "PUT"))
    capsys.readouterr()
    assert main(["push", str(out), REPO, "--parity", str(report / "parity.json"), "--json"]) == 0
    assert result_of(capsys)["refusals"] == []
    assert len(hub.asked("/upload/", "PUT")) == uploads + 2  # the pictures
    repo = hub.store.repos[REPO]
    assert [ref for ref in repo.refs if "v4quant-" in ref] == []
    for name in open_checkpoint(chain.fp8).files.names():
        if name not in ("README.md", "v4quant.source.json"):
            assert hub.store.content(repo.main[name]) == (chain.fp8 / name).read_bytes(), name
    assert main(["verify", REPO, "--against", f"hf://{SOURCE}@{commit}"]) == 0
    # Once published, the same command finds nothing to do.
    uploads, commits = len(hub.asked("/upload/", "PUT")), len(repo.commits)
    assert main(["push", str(out), REPO, "--parity", str(report / "parity.json")]) == 0
    assert (len(hub.asked("/upload/", "PUT")), len(repo.commits)) == (uploads, commits)
    # Nor is it taken for published where the shards are no longer.
    shards = {name: blob for name, blob in repo.main.items() if not name.endswith("00002-of-00004.safetensors")}
    repo.add_commit("refs/heads/main", "lost", shards)
    assert main(["push", str(out), REPO, "--parity", str(report / "parity.json")]) == 1


def edit_uploads(out: Path, key: str, value: object) -> None:
    path = out / "v4quant.uploads.jsonl"
    first, second, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, json.dumps(json.loads(second) | {key: value}), *rest]) + "\n")


@pytest.mark.parametrize("fault", ["hash", "lines", "certificate", "gone", "other repo"])
def test_the_gate_for_what_lies_on_the_branch(
    hub: TestHub, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    hub.store.add_folder(SOURCE, chain.source)
    out = tmp_path / "out"
    assert convert(out, "--push", REPO) == 0
    repo = hub.store.repos[REPO]
    (ref,) = [ref for ref in repo.refs if "v4quant-" in ref]
    tree = repo.commits[repo.refs[ref]].tree
    target = REPO
    if fault == "hash":
        edit_uploads(out, "sha256", "0" * 64)
    elif fault == "lines":
        edit_uploads(out, "lines_sha256", "0" * 64)
    elif fault == "certificate":
        path = out / "v4quant.certificate.jsonl"
        path.write_text(path.read_text().replace('"value_exact"', '"bit_identical"'))
    elif fault == "gone":
        name = "model-00002-of-00004.safetensors"
        repo.add_commit(ref, "lost", {n: b for n, b in tree.items() if n != name})
    else:
        target = "me/other"
    capsys.readouterr()
    assert main(["push", str(out), target, "--parity", str(chain.report)]) == 1
    assert "error: " in capsys.readouterr().err
    assert set(repo.main) == {".gitattributes"}
    assert "me/other" not in hub.store.repos


FAULTS = [
    Fault("/objects/", host="storage", status=503, skip=9, times=99),
    Fault("/objects/", host="storage", status=403, skip=9, times=99),
    Fault("/upload/", "PUT", host="storage", status=403, skip=1, times=99),
    Fault("/commit/v4quant-", "POST", status=500, skip=2, times=99),
    Fault("/commit/v4quant-", "POST", status=403, skip=4, times=99),
    Fault("/branch/", "POST", status=403, times=99),
    Fault("/api/repos/create", "POST", status=403, times=99),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.path} {fault.status} after {fault.skip}")
def test_goes_on_where_it_failed(
    hub: TestHub, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: Fault
) -> None:
    hub.store.add_folder(SOURCE, chain.source)
    out = tmp_path / "out"
    hub.faults.append(fault)
    assert convert(out, "--push", REPO) == 4
    errors = capsys.readouterr().err
    assert "error: " in errors
    assert TOKEN not in errors
    stored = set(hub.store.repos[REPO].lfs) if REPO in hub.store.repos else set()
    hub.forget()
    assert convert(out, "--push", REPO) == 0
    assert_staged(hub, out, chain)
    assert not {request.path.split("/")[-2] for request in hub.asked("/upload/", "PUT")} & stored
    assert not (out / ".v4quant").exists()


def test_an_unfinished_run_keeps_its_commit_while_main_moves(hub: TestHub, chain: Chain, tmp_path: Path) -> None:
    repo = hub.store.add_folder(SOURCE, chain.source)
    commit, out = repo.refs["refs/heads/main"], tmp_path / "out"
    hub.faults.append(Fault("/objects/", host="storage", status=403, skip=9, times=99))
    assert convert(out) == 4
    repo.add_commit("refs/heads/main", "other config", {**repo.main, "config.json": repo.main["README.md"]})
    hub.forget()
    assert convert(out) == 0
    assert_converted(out, chain)
    origin = converted_from(out)
    assert origin is not None
    assert (origin.commit, origin.revision) == (commit, None)


def test_a_source_shard_that_is_damaged_on_the_hub(
    hub: TestHub, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = hub.store.add_folder(SOURCE, chain.source)
    path = hub.store.object_path(repo.main["model-00003-of-00004.safetensors"].oid)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert convert(tmp_path / "out") == 3
    assert "model-00003-of-00004.safetensors: arrives with hash" in capsys.readouterr().err


def test_what_the_disk_gives_back_is_compared_before_it_is_uploaded(
    hub: TestHub, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.store.add_folder(SOURCE, chain.source)
    out = tmp_path / "out"
    # Killed, as it were, between a finished shard and its upload; meanwhile the disk loses a bit.
    hub.faults.append(Fault("/preupload/", "POST", status=403, skip=1, times=99))
    assert convert(out, "--push", REPO) == 4
    shard = min(out.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(data)
    hub.forget()
    assert convert(out, "--push", REPO) == 5
    assert "does not have the bytes that were written" in capsys.readouterr().err


def test_a_shard_is_removed_only_after_it_was_noted(
    hub: TestHub, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.add_folder(SOURCE, chain.source)
    out = tmp_path / "out"

    def refuse(_uploads: Uploads, shard: UploadedShard) -> None:
        raise OutputError(f"{shard.shard}: no space left")

    with monkeypatch.context() as patched:
        patched.setattr(Uploads, "add", refuse)
        assert convert(out, "--push", REPO) == 5
    assert (out / "model-00001-of-00004.safetensors").exists()
    before = len(hub.asked("/upload/", "PUT"))
    assert before == 1
    assert convert(out, "--push", REPO) == 0
    assert len(hub.asked("/upload/", "PUT")) == 4
    assert_staged(hub, out, chain)


def test_the_source_of_a_download_is_noted(hub: TestHub, chain: Chain, tmp_path: Path) -> None:
    commit = hub.store.add_folder(SOURCE, chain.source).refs["refs/heads/main"]
    assert main(["download", SOURCE, "--local-dir", str(tmp_path / "source")]) == 0
    assert convert(tmp_path / "out", source=str(tmp_path / "source")) == 0
    assert str(converted_from(tmp_path / "out")) == f"hf://{SOURCE}@{commit}"


def test_usage(hub: TestHub, chain: Chain, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert convert(out, "--private", source=str(chain.source)) == 2
    assert convert(out, "--push", "nowhere", source=str(chain.source)) == 2
    assert convert(out, source="hf://me/none") == 4
    assert not out.exists()
    shutil.copytree(chain.fp8, out)
    hub.store.add_folder(SOURCE, chain.source)
    assert convert(out) == 5
