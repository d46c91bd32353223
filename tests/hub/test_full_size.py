"""Repositories of full size: true headers and index, and holes where a test will never look."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.sparse import write_sparse
from tests.hub.repos import MAIN, large
from tests.hub.server import TestHub
from v4quant.cli.main import main

REPO = "me/full-size"


def add_sparse(hub: TestHub, like: str, folder: Path) -> int:
    """Publish a release's sparse copy under made-up hashes; returns its bytes."""
    folder.mkdir()
    write_sparse(folder, like)
    repo = hub.store.add_folder(REPO, folder, names=[p.name for p in folder.glob("*.json")])
    tree = dict(repo.main)
    for path in folder.glob("*.safetensors"):
        oid = hashlib.sha256(path.name.encode()).hexdigest()
        tree[path.name] = large(oid, path.stat().st_size)
        path.rename(hub.store.object_path(oid))
        repo.lfs.add(oid)
    repo.add_commit(MAIN, "shards", tree)
    return sum(blob.size for blob in tree.values())


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_inspect_of_flash_reads_a_ten_thousandth(
    hub: TestHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    total = add_sparse(hub, "flash", tmp_path / "flash")
    assert total > 150_000_000_000
    found = run_json(capsys, "inspect", REPO)
    assert found["release"] == "DeepSeek-V4-Flash"
    assert found["problems"] == []
    assert found["bytes_fetched"] < 2e-4 * total
    assert hub.sent() < 2e-4 * total + 100_000  # listing and redirects
    assert len(hub.requests) < 4 * 49


@pytest.mark.slow
def test_pro_converts_with_less_than_100_gb_of_disk(
    hub: TestHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    total = add_sparse(hub, "pro", tmp_path / "pro")
    plan = run_json(capsys, "convert", REPO, str(tmp_path / "out"), "--to", "fp8", "--push", "me/pro-fp8", "--dry-run")
    assert plan["bytes_written"] > 1_500_000_000_000
    assert plan["disk_bytes"] < 100_000_000_000
    assert plan["bytes_fetched"] < 2e-4 * total
