"""`v4quant push`: only what passed, all of it at once, and again where it stopped."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.conversion import convert, edit, write_small
from tests.hub.conftest import Chain
from tests.hub.server import READER, TOKEN, Fault, Request, TestHub
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.cli.main import main

REPO = "me/fp8"
SECOND = "model-00002-of-00004.safetensors"
MADE = {"README.md", "v4quant.bytes.png", "v4quant.errors.png", "v4quant.parity.json"}


def push(chain: Chain, *options: str, folder: Path | None = None) -> int:
    return main(["push", str(folder or chain.fp8), REPO, "--parity", str(chain.report), *options])


def result_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def is_untouched(hub: TestHub) -> bool:
    """True if nobody sees anything of a push on main."""
    return REPO not in hub.store.repos or set(hub.store.repos[REPO].main) == {".gitattributes"}


def assert_published(hub: TestHub, folder: Path, ref: str = "refs/heads/main") -> None:
    """The branch holds the folder, and what push makes, and no branch is left over."""
    repo = hub.store.repos[REPO]
    tree = repo.commits[repo.refs[ref]].tree
    names = set(open_checkpoint(folder).files.names())
    assert set(tree) == names | MADE | {".gitattributes"}
    for name in names - {"README.md"}:
        assert hub.store.content(tree[name]) == (folder / name).read_bytes(), name
    assert [name for name in repo.refs if "v4quant-" in name] == []


def test_publishes_all_in_one_commit(hub: TestHub, chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(chain, "--json") == 0
    result = result_of(capsys)
    repo = hub.store.repos[REPO]
    assert {"repo", "commit", "files", "bytes"} <= result.keys()
    assert result["commit"] == repo.refs["refs/heads/main"]
    assert result["files"] == len(repo.main) - 1
    assert result["bytes"] == sum(blob.size for name, blob in repo.main.items() if name != ".gitattributes")
    assert_published(hub, chain.fp8)
    commit = repo.commits[result["commit"]]
    assert commit.parent is not None
    assert set(repo.commits[commit.parent].tree) == {".gitattributes"}
    assert not repo.private


def test_shards_go_before_config_and_index(hub: TestHub, chain: Chain) -> None:
    assert push(chain) == 0
    commits = hub.asked("/commit/", "POST")
    sent = [[json.loads(line)["value"].get("path", "") for line in request.body.splitlines()] for request in commits]
    order = [name for names in sent[:-1] for name in names if name]
    assert set(order[-2:]) == {"config.json", "model.safetensors.index.json"}
    assert all(name.endswith(".safetensors") for name in order[:4])
    assert commits[-1].path.endswith("/commit/main")


def test_large_files_go_in_parts(hub: TestHub, chain: Chain) -> None:
    hub.multipart_bytes = 100_000
    hub.faults.append(Fault("/upload/.*/2$", "PUT", host="storage", status=500))
    assert push(chain) == 0
    assert_published(hub, chain.fp8)
    assert len(hub.asked("/upload/.*/[2-9]$", "PUT")) > 3


def test_the_token_goes_to_the_endpoint_alone(hub: TestHub, chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(chain) == 0
    assert {request.authorization for request in hub.asked("", host="storage")} == {None}
    said = capsys.readouterr()
    tree = hub.store.repos[REPO].main
    for text in (said.out, said.err, *(hub.store.content(blob).decode("latin-1") for blob in tree.values())):
        assert TOKEN not in text


def test_the_card(hub: TestHub, chain: Chain, tmp_path: Path) -> None:
    assert push(chain) == 0
    tree = hub.store.repos[REPO].main
    card = hub.store.content(tree["README.md"]).decode()
    head, body = card.removeprefix("---\n").split("---\n", 1)
    for line in ("license: mit", "base_model: me/source", "base_model_relation: quantized", "- v4quant", "- fp8"):
        assert line in head
    assert "- zh" in head
    commit = "c" * 40
    assert f"v4quant verify {REPO} --against hf://me/source@{commit}" in body
    assert f"me/source/tree/{commit}" in body
    assert "converted by v4quant" in body.lower()
    assert "| routed experts |" in body
    assert "| value exact |" in body
    assert "## Parity: identical" in body
    assert "NOT VERIFIED" not in card
    for picture in ("v4quant.bytes.png", "v4quant.errors.png"):
        assert f"]({picture})" in body
        assert hub.store.content(tree[picture]).startswith(b"\x89PNG")
    report = hub.store.content(tree["v4quant.parity.json"]).decode()
    assert json.loads(report)["verdict"] == "identical"
    assert str(tmp_path.parent.parent) not in card + report


def test_dry_run_shows_card_and_files_and_sends_nothing(
    hub: TestHub, chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(chain, "--dry-run", "--json") == 0
    planned = result_of(capsys)
    assert hub.requests == []
    assert planned["card"].startswith("---\n")
    assert push(chain, "--json") == 0
    done = result_of(capsys)
    assert (planned["files"], planned["bytes"]) == (done["files"], done["bytes"])
    assert {row["name"] for row in planned["file_sizes"]} == set(hub.store.repos[REPO].main) - {".gitattributes"}


def flip(folder: Path) -> None:
    edit(folder, "layers.0.attn.wq_a.weight", lambda rows: rows[3].__setitem__(7, rows[3][7] ^ 1))


def lose_shard(folder: Path) -> None:
    (folder / SECOND).unlink()


def lose_certificate(folder: Path) -> None:
    (folder / "v4quant.certificate.jsonl").unlink()


def edit_certificate(folder: Path) -> None:
    path = folder / "v4quant.certificate.jsonl"
    path.write_text(path.read_text().replace('"value_exact"', '"bit_identical"', 1))


def edit_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rope_theta": 10000', '"rope_theta": 10001'))


def edit_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text() + "\n")


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (flip, "layers.0.attn.wq_a.weight"),
    (lose_shard, SECOND),
    (lose_certificate, "no certificate"),
    (edit_certificate, "certificate_sha256"),
    (edit_config, "config"),
    (edit_index, "index_sha256"),
]


@pytest.mark.parametrize(("damage", "named"), DAMAGES, ids=lambda value: getattr(value, "__name__", None))
def test_a_folder_that_does_not_fit_is_refused(
    hub: TestHub,
    chain: Chain,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    named: str,
) -> None:
    folder = shutil.copytree(chain.fp8, tmp_path / "fp8")
    damage(folder)
    assert push(chain, folder=folder) == 1
    errors = capsys.readouterr().err
    assert "is not published" in errors
    assert named in errors
    assert hub.requests == []


def write_report(chain: Chain, path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    report = json.loads(chain.report.read_text())
    change(report)
    path.write_text(json.dumps(report))
    return path


REPORTS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda report: report.update(verdict="different"), "the verdict is different"),
    (lambda report: report.update(verdict="fine"), "the verdict is fine"),
    (lambda report: report["gates"].append({"name": "--max-kl", "passed": False}), "--max-kl was not passed"),
    (lambda report: report["evidence"]["candidate"].update(source_id="0" * 64), "source_id"),
    (lambda report: report["evidence"].update(reference=report["evidence"]["candidate"]), "with itself"),
    (lambda report: report.pop("noise_floor"), "is no parity report"),
    (lambda report: report["evidence"].pop("candidate"), "is no parity report"),
]


@pytest.mark.parametrize(("change", "named"), REPORTS, ids=lambda value: value if isinstance(value, str) else None)
def test_a_report_that_does_not_speak_for_it_is_refused(
    hub: TestHub,
    chain: Chain,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], object],
    named: str,
) -> None:
    report = write_report(chain, tmp_path / "parity.json", change)
    assert main(["push", str(chain.fp8), REPO, "--parity", str(report)]) == 1
    assert named in capsys.readouterr().err
    assert hub.requests == []


@pytest.mark.parametrize("content", [None, "", "{}", "[]", "nonsense", '{"verdict": "identical"}'])
def test_no_report_is_no_pass(
    hub: TestHub, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    path = tmp_path / "parity.json"
    if content is not None:
        path.write_text(content)
    assert main(["push", str(chain.fp8), REPO, "--parity", str(path)]) == 1
    assert "is no parity report" in capsys.readouterr().err
    assert main(["push", str(chain.fp8), REPO]) == 1
    assert "no parity report" in capsys.readouterr().err
    assert hub.requests == []


def test_the_report_of_another_checkpoint_is_refused(
    hub: TestHub, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_small(tmp_path / "other", mtp=True, seed=5)
    convert(other, tmp_path / "other-fp8", "fp8")
    assert push(chain, folder=tmp_path / "other-fp8") == 1
    assert "is not of these bytes: certificate_sha256 differ" in capsys.readouterr().err
    assert hub.requests == []


def test_force_says_so_in_the_first_line(hub: TestHub, chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(chain.source), REPO, "--force-unverified"]) == 0
    tree = hub.store.repos[REPO].main
    body = hub.store.content(tree["README.md"]).decode().split("---\n", 2)[2]
    assert body.lstrip().splitlines()[0].startswith("> **NOT VERIFIED.")
    assert "there is no certificate" in body.replace("\\", "")
    assert hub.store.content(tree[SECOND]) == (chain.source / SECOND).read_bytes()
    assert str(chain.source) not in body.replace("\\", "")
    capsys.readouterr()


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("relative", [False, True])
def test_no_path_of_this_machine_is_on_the_card(
    chain: Chain,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    relative: bool,
) -> None:
    folder = shutil.copytree(chain.fp8, tmp_path / "my_private_place")
    certificate = folder / "v4quant.certificate.jsonl"
    certificate.write_text("nonsense\n" + certificate.read_text())
    monkeypatch.chdir(tmp_path)
    given = Path(folder.name) if relative else folder
    assert main(["push", str(given), REPO, "--force-unverified", "--dry-run", "--json"]) == 0
    card = result_of(capsys)["card"].replace("\\", "")
    assert "> - v4quant.certificate.jsonl line 1: not JSON" in card
    assert "my_private_place" not in card
    assert str(tmp_path) not in card


@pytest.mark.usefixtures("hub")
def test_the_card_of_another_branch_verifies_that(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(chain, "--revision", "v2", "--dry-run", "--json") == 0
    assert f"v4quant verify hf://{REPO}@v2 --against hf://me/source@" in result_of(capsys)["card"]


def test_a_sharded_checkpoint_is_refused(
    hub: TestHub, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reads as the checkpoint that it was made from, whose files it does not have."""
    folder = tmp_path / "ranks"
    assert main(["shard", str(chain.fp8), str(folder), "--tp", "2"]) == 0
    for options in ([], ["--force-unverified"], ["--dry-run"]):
        assert push(chain, *options, folder=folder) == 1
        assert "v4quant merge" in capsys.readouterr().err
    assert hub.requests == []


def test_force_does_not_publish_what_contradicts_itself(hub: TestHub, chain: Chain, tmp_path: Path) -> None:
    folder = shutil.copytree(chain.fp8, tmp_path / "fp8")
    lose_shard(folder)
    assert push(chain, "--force-unverified", folder=folder) == 3
    assert hub.requests == []


def test_pull_request(hub: TestHub, chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    hub.store.create(REPO)
    assert push(chain, "--create-pr", "--commit-message", "Add FP8", "--json") == 0
    result = result_of(capsys)
    repo = hub.store.repos[REPO]
    assert is_untouched(hub)
    assert repo.pulls == {1: "Add FP8"}
    assert result["url"] == f"{hub.url()}/{REPO}/discussions/1"
    assert_published(hub, chain.fp8, "refs/pr/1")


def test_another_branch(hub: TestHub, chain: Chain) -> None:
    assert push(chain, "--revision", "fp8") == 0
    assert is_untouched(hub)
    assert_published(hub, chain.fp8, "refs/heads/fp8")


def test_private(hub: TestHub, chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(chain, "--private") == 0
    assert hub.store.repos[REPO].private
    hub.store.repos[REPO].private = False
    assert push(chain, "--private") == 4
    assert "is public" in capsys.readouterr().err


def test_an_older_checkpoint_gives_way_whole(hub: TestHub, chain: Chain, tmp_path: Path) -> None:
    """Its shards have other names; they must not stay beside an index that does not know them."""
    repo = hub.store.create(REPO)
    old = {f"model-0000{n}-of-00009.safetensors": hub.store.add_file(repo, "x.safetensors", b"old") for n in (1, 2)}
    picture = {"picture.png": hub.store.add_file(repo, "picture.png", b"png")}
    repo.add_commit("refs/heads/main", "old", {**repo.main, **old, **picture})
    assert push(chain) == 0
    assert not set(old) & set(repo.main)
    assert "picture.png" in repo.main
    assert main(["inspect", f"hf://{REPO}"]) == 0
    assert main(["download", REPO, "--local-dir", str(tmp_path / "again")]) == 0
    assert main(["verify", str(tmp_path / "again")]) == 0


def test_a_third_party_verifies_without_downloading(
    hub: TestHub, chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.store.add_folder("me/source", chain.source)
    assert push(chain) == 0
    assert main(["verify", REPO]) == 0
    capsys.readouterr()
    assert main(["verify", REPO, "--against", "hf://me/source", "--json"]) == 0
    assert result_of(capsys)["ok"]
    path = hub.store.object_path(hub.store.repos[REPO].main[SECOND].oid)
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    for command in (["verify", REPO], ["verify", REPO, "--against", "hf://me/source"]):
        assert main(command) == 1
        assert "MISMATCH layers.0." in capsys.readouterr().out


def test_a_second_push_sends_nothing(hub: TestHub, chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(chain, "--json") == 0
    first = result_of(capsys)
    hub.forget()
    assert push(chain, "--json") == 0
    second = result_of(capsys)
    assert (second["commit"], second["uploaded"]) == (first["commit"], [])
    assert hub.asked("/(commit|upload|branch)/", "POST") == []


STRUCK = [
    Fault("/commit/v4quant-", "POST", status=503, times=99),
    Fault("/commit/v4quant-", "POST", skip=1, status=500, times=99),
    Fault("/upload/", "PUT", host="storage", skip=2, status=403, times=99),
    Fault("/branch/v4quant-", "POST", status=403, times=99),
    Fault("/commit/main", "POST", status=403, times=99),
    Fault("/preupload/", "POST", skip=1, status=429, headers={"Retry-After": "9999"}, times=99),
    Fault("objects/batch", "POST", status=200, body=b'{"objects": 7}', times=99),
]


@pytest.mark.parametrize("fault", STRUCK, ids=lambda fault: f"{fault.path} {fault.status}")
def test_a_push_that_fails_shows_nothing_and_the_next_sends_what_is_missing(
    hub: TestHub, chain: Chain, capsys: pytest.CaptureFixture[str], fault: Fault
) -> None:
    hub.faults.append(fault)
    assert push(chain) == 4
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert TOKEN not in errors
    assert "s3cr3t" not in errors
    assert is_untouched(hub)
    stored = set(hub.store.repos[REPO].lfs)
    hub.forget()
    assert push(chain) == 0
    assert_published(hub, chain.fp8)
    again = {request.path.split("/")[-2] for request in hub.asked("/upload/", "PUT")}
    assert not again & stored


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/commit/", "POST", status=503, times=2),
        Fault("/commit/", "POST", status=429, headers={"Retry-After": "3"}),
        Fault("/commit/main", "POST", lost=True),
        Fault("/commit/v4quant", "POST", lost=True, times=2),
        Fault("/upload/", "PUT", host="storage", status=500, times=2),
        Fault("objects/batch", "POST", status=502),
        Fault("/api/repos/create", "POST", lost=True),
        Fault("/branch/", "POST", lost=True),
        Fault("/api/models/me/fp8$", status=503, times=2),
        Fault("/revision/", status=429, headers={"Retry-After": "3"}),
        Fault("/revision/", lost=True),
    ],
    ids=lambda fault: f"{fault.path} {fault.status or 'lost'}",
)
def test_what_passes_is_waited_for(hub: TestHub, chain: Chain, fault: Fault) -> None:
    hub.faults.append(fault)
    assert push(chain) == 0
    assert_published(hub, chain.fp8)
    assert len(hub.store.repos[REPO].commits) <= 5


def test_what_the_hub_lists_is_compared(hub: TestHub, chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    """Storage that loses a byte, or a commit that loses a file, is found before anybody sees it."""

    def lose(_request: object) -> None:
        repo = hub.store.repos[REPO]
        ref = next(ref for ref in repo.refs if "v4quant-" in ref)
        repo.add_commit(ref, "lost", {n: b for n, b in repo.commits[repo.refs[ref]].tree.items() if n != SECOND})

    # The look at the branch after the last commit to it.
    hub.faults.append(Fault("/revision/v4quant-", skip=1, strike=lose))
    assert push(chain) == 4
    assert f"{SECOND} is not there as it was sent" in capsys.readouterr().err
    assert is_untouched(hub)
    hub.forget()
    assert push(chain) == 0
    assert_published(hub, chain.fp8)


def test_what_is_visible_is_compared_too(hub: TestHub, chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    """A commit of pointers that does not become what it says, as where the Hub follows one to another file."""

    def swap(request: Request) -> None:
        repo = hub.store.repos.get(REPO)
        if repo is not None and SECOND in repo.main and request.path.endswith(f"/tree/{repo.refs['refs/heads/main']}"):
            repo.main[SECOND] = repo.main["model-00001-of-00004.safetensors"]

    hub.before = swap
    assert push(chain) == 4
    assert f"{SECOND} is not as it was sent" in capsys.readouterr().err


def test_somebody_else_pushes_meanwhile(hub: TestHub, chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    def commit(_request: object) -> None:
        repo = hub.store.repos[REPO]
        repo.add_commit("refs/heads/main", "theirs", {**repo.main, "theirs.txt": hub.store.add_file(repo, "x", b"x")})

    hub.store.create(REPO)
    hub.faults.append(Fault("/commit/main", "POST", strike=commit))
    assert push(chain) == 4
    assert "412" in capsys.readouterr().err
    assert set(hub.store.repos[REPO].main) == {".gitattributes", "theirs.txt"}
    assert push(chain) == 0
    assert "theirs.txt" in hub.store.repos[REPO].main


def test_a_file_that_changes_during_the_push(hub: TestHub, chain: Chain, tmp_path: Path) -> None:
    folder = shutil.copytree(chain.fp8, tmp_path / "fp8")

    def change(_request: object) -> None:
        (folder / "inference" / "config.json").write_text("{}")

    hub.faults.append(Fault("/commit/v4quant-", "POST", strike=change))
    assert push(chain, folder=folder) == 3
    assert is_untouched(hub)


@pytest.mark.parametrize(("token", "said"), [("hf_wrongAbCdEfGhIjKlMnOp", "wrong or expired"), (READER, "permission")])
def test_accounts_that_may_not(
    hub: TestHub,
    chain: Chain,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    said: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert push(chain) == 4
    assert is_untouched(hub)
    errors = capsys.readouterr().err
    assert said in errors
    assert token not in errors


@pytest.mark.parametrize(
    "options",
    [
        ["me"],
        ["a/b/c"],
        ["../x"],
        [REPO, "--revision", "a..b"],
        [REPO, "--create-pr", "--revision", "x"],
        [REPO, "--revision", "refs/pr/1"],
        [REPO, "--revision", "a" * 40],
    ],
)
def test_usage(hub: TestHub, chain: Chain, options: list[str]) -> None:
    assert main(["push", str(chain.fp8), *options, "--parity", str(chain.report)]) == 2
    assert hub.requests == []


def test_a_folder_that_is_none(hub: TestHub, tmp_path: Path) -> None:
    assert main(["push", str(tmp_path / "none"), REPO]) == 3
    assert hub.requests == []


@pytest.mark.parametrize(
    "readme",
    [
        "no metadata",
        "---\nlicense: [\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
        '---\nlicense: "x\\n\\n# forged"\n---\n',
        "\x00\xff",
    ],
)
def test_the_sources_metadata_is_foreign_text(
    hub: TestHub, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str], readme: str
) -> None:
    folder = shutil.copytree(chain.fp8, tmp_path / "fp8")
    (folder / "README.md").write_text(readme)
    assert push(chain, "--dry-run", "--json", folder=folder) == 0
    card = result_of(capsys)["card"]
    assert "forged" not in card
    assert "license" not in card.split("---\n")[1]
    assert hub.requests == []
