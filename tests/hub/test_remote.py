"""Reading a repository without downloading it: inspect, open, what is asked and how much of it, and what goes wrong."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import get_session

from tests.checkpoint.conversion import write_small
from tests.hub.server import TOKEN, Fault, Request, TestHub
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.checkpoint.reader import open_source as open_files
from v4quant.cli._source import open_source
from v4quant.cli.main import main, run
from v4quant.hub.location import Location, parse_location
from v4quant.hub.remote_files import open_remote

REPO = "me/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("remote") / "tiny", mtp=True)


def inspected(source: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", source, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_inspect_says_of_a_repository_what_it_says_of_the_folder(
    hub: TestHub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.store.add_folder(REPO, folder).refs["refs/heads/main"]
    expected = inspected(str(folder), capsys)
    for source in (REPO, f"hf://{REPO}", f"hf://{REPO}@main", f"hf://{REPO}@{commit}"):
        found = inspected(source, capsys)
        assert found.pop("commit") == commit
        assert found.pop("repo") == REPO
        assert found.pop("bytes_fetched") >= 0
        assert found == expected


def test_only_headers_are_fetched_and_only_once(hub: TestHub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.store.add_folder(REPO, folder)
    first = inspected(REPO, capsys)
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors"))
    small = sum((folder / name).stat().st_size for name in ("config.json", "model.safetensors.index.json"))
    assert first["bytes_fetched"] == headers + small
    assert sum(request.sent for request in hub.asked("/(objects|resolve)/")) == headers + small
    hub.forget()
    assert inspected(REPO, capsys)["bytes_fetched"] == 0
    assert [request.path for request in hub.requests] == [f"/api/models/{REPO}"]  # where main is now


def test_a_commit_that_is_kept_needs_no_network(
    hub: TestHub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = inspected_commit(hub, folder, capsys)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.forget()
    assert inspected(f"hf://{REPO}@{commit}", capsys)["tensors"] > 0
    assert hub.requests == []


def inspected_commit(hub: TestHub, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    hub.store.add_folder(REPO, folder)
    return str(inspected(REPO, capsys)["commit"])


def test_a_damaged_cache_is_read_again(
    hub: TestHub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.store.add_folder(REPO, folder)
    expected = inspected(REPO, capsys)
    kept = [path for path in (tmp_path / "hf-home").rglob("*") if path.is_file()]
    assert len(kept) > 3
    for number, path in enumerate(kept):
        path.write_bytes(b"" if number % 2 else path.read_bytes()[:-1] + b"x")
    assert inspected(REPO, capsys)["by_role"] == expected["by_role"]


def test_a_commit_is_pinned_while_main_moves(hub: TestHub, folder: Path) -> None:
    hub.store.add_folder(REPO, folder)
    files = open_remote(Location(REPO))
    (changed := {**hub.store.repos[REPO].main}).pop("config.json")
    hub.store.repos[REPO].add_commit("refs/heads/main", "config is gone", changed)
    assert open_files(files).config_bytes == (folder / "config.json").read_bytes()


def test_listings_come_in_pages(hub: TestHub, folder: Path) -> None:
    hub.page_size = 2
    hub.store.add_folder(REPO, folder)
    assert open_remote(Location(REPO)).names() == open_checkpoint(folder).files.names()
    assert len(hub.asked("/tree/")) > 2


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/objects/", host="storage", cut=5, times=3),
        Fault("/objects/", host="storage", status=503, times=2),
        Fault("/objects/", host="storage", status=429, headers={"Retry-After": "7"}),
        Fault("/resolve/", status=429, headers={"Retry-After": "7"}),
        Fault("/objects/", host="storage", lost=True, times=2),
        Fault("/resolve/.*config.json", cut=100),
        Fault("/api/models/me/tiny$", status=503, times=2),
        Fault("/api/models/me/tiny$", status=429, headers={"Retry-After": "7"}),
        Fault("/api/models/me/tiny$", lost=True),
        Fault("/tree/", status=502),
        Fault("/tree/", status=429, headers={"Retry-After": "7"}),
    ],
    ids=lambda fault: f"{fault.host} {fault.status or ('cut' if fault.cut else 'lost')}",
)
def test_what_passes_is_waited_for(
    hub: TestHub, folder: Path, capsys: pytest.CaptureFixture[str], fault: Fault
) -> None:
    hub.store.add_folder(REPO, folder)
    hub.faults.append(fault)
    found = inspected(REPO, capsys)
    assert found["problems"] == []
    assert fault.times < 0 or fault.times == 0
    assert hub.waits
    assert max(hub.waits) == (7 if fault.headers else max(hub.waits))


def test_no_data_is_asked_for_twice_when_a_body_is_cut(hub: TestHub, folder: Path) -> None:
    hub.store.add_folder(REPO, folder)
    name = "model-00001-of-00004.safetensors"
    files = open_remote(Location(REPO))
    hub.faults.append(Fault("/objects/", host="storage", cut=1000, skip=2))
    assert files.read(name) == (folder / name).read_bytes()
    ranges = [request.headers["range"] for request in hub.asked("/objects/")]
    size = (folder / name).stat().st_size
    assert ranges[-2:] == [f"bytes=0-{size - 1}", f"bytes=1000-{size - 1}"]


REFUSED = [
    (Fault("/api/models/", status=401, headers={"X-Error-Message": "Invalid credentials in Authorization header"}), 4),
    (Fault("/api/models/", status=403), 4),
    (Fault("/api/models/", status=404, headers={"X-Error-Code": "RepoNotFound"}), 4),
    (Fault("/api/models/", body=b"<html>a captive portal</html>", status=200), 4),
    (Fault("/tree/", body=b'[{"type": "file"}]', status=200), 4),
    (Fault("/tree/", body=b'{"error": 1}', status=200), 4),
    (Fault("/tree/", status=429, headers={"Retry-After": "86400"}), 4),
    (Fault("/api/models/", status=503, times=100), 4),
    (Fault("/objects/", host="storage", status=503, times=100), 4),
    (Fault("/objects/", host="storage", status=429, headers={"Retry-After": "86400"}), 4),
    (Fault("/objects/", host="storage", status=200, body=b"the whole file"), 4),
    (Fault("/objects/", host="storage", status=206, headers={"Content-Range": "bytes 5-12/99"}, body=b"12345678"), 4),
    (Fault("/objects/", host="storage", status=416), 4),
    (Fault("/resolve/.*config.json", flip=3), 4),
    (Fault("/resolve/.*config.json", status=302, headers={"Location": "file:///etc/passwd"}, times=9), 4),
    (Fault("/resolve/", status=302, headers={"Location": "/resolve/me"}, times=10**6), 4),
    (Fault("/resolve/.*config.json", status=206, headers={"Content-Encoding": "gzip"}), 4),
    (Fault("/resolve/.*config.json", status=206, headers={"X-Repo-Commit": "0" * 40}), 4),
]


@pytest.mark.parametrize(("fault", "code"), REFUSED, ids=lambda value: getattr(value, "path", None))
def test_what_does_not_pass_is_one_clear_error(
    hub: TestHub, folder: Path, capsys: pytest.CaptureFixture[str], fault: Fault, code: int
) -> None:
    hub.store.add_folder(REPO, folder)
    hub.faults.append(fault)
    assert main(["inspect", REPO]) == code
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert REPO in errors
    assert errors.count("\n") <= 2
    assert TOKEN not in errors
    assert "s3cr3t" not in errors


@pytest.mark.parametrize(
    ("headers", "more", "said"),
    [
        ({"X-Repo-Commit": "0" * 40}, b"", "answers from commit 000"),
        ({"Content-Encoding": "gzip"}, b"", "comes compressed"),
        ({}, b"x", "bytes, expected"),
    ],
)
def test_an_answer_that_is_right_but_for_one_thing(
    hub: TestHub,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    headers: dict[str, str],
    more: bytes,
    said: str,
) -> None:
    hub.store.add_folder(REPO, folder)
    config = (folder / "config.json").read_bytes()
    whole = {"Content-Range": f"bytes 0-{len(config) - 1}/{len(config)}"}
    hub.faults.append(Fault("/resolve/.*/config.json", status=206, headers=whole | headers, body=config + more))
    assert main(["inspect", REPO]) == 4
    assert said in capsys.readouterr().err
    hub.forget()
    assert main(["inspect", REPO]) == 0


def test_an_expired_token(hub: TestHub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.store.add_folder(REPO, folder)
    hub.users.clear()
    assert main(["inspect", REPO]) == 4
    errors = capsys.readouterr().err
    assert "does not accept the token; it is wrong or expired" in errors
    assert "hf auth login" in errors


def test_a_private_repository(
    hub: TestHub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.add_folder(REPO, folder).private = True
    assert main(["inspect", REPO]) == 0
    monkeypatch.setenv("HF_TOKEN", "")
    assert main(["inspect", REPO]) == 4
    assert "no token is set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "code"), [("me/other", 4), (f"hf://{REPO}@nowhere", 4), (f"hf://{REPO}@{'a' * 40}", 4)]
)
def test_what_is_not_there(
    hub: TestHub, folder: Path, capsys: pytest.CaptureFixture[str], source: str, code: int
) -> None:
    hub.store.add_folder(REPO, folder)
    assert main(["inspect", source]) == code
    assert "no such" in capsys.readouterr().err


def test_an_expired_storage_url_is_asked_for_anew(hub: TestHub, folder: Path) -> None:
    hub.store.add_folder(REPO, folder)
    name = "model-00002-of-00004.safetensors"
    files = open_remote(Location(REPO))
    files.read(name, 0, 8)
    before = len(hub.asked("/resolve/"))
    files.read(name, 5000, 6000)
    assert len(hub.asked("/resolve/")) == before
    hub.faults.append(Fault("/objects/", host="storage", status=403))
    assert files.read(name, 5000, 6000) == (folder / name).read_bytes()[5000:6000]
    assert len(hub.asked("/resolve/")) == before + 1


def test_the_token_goes_to_the_endpoint_alone(hub: TestHub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.store.add_folder(REPO, folder)
    hub.page_size = 1
    # The next page of the listing, and a small file, are said to be on the other host.
    hub.faults.append(
        Fault("/tree/", status=200, body=b"[]", headers={"Link": f'<{hub.url("storage")}/x>; rel="next"'})
    )
    assert main(["inspect", REPO]) == 4
    hub.faults.append(Fault("/resolve/.*config", status=302, headers={"Location": f"{hub.url('storage')}/y"}))
    assert main(["inspect", REPO]) == 4
    assert {request.authorization for request in hub.asked("/", host="hub")} == {f"Bearer {TOKEN}"}
    stored = hub.asked("/", host="storage")
    assert {"/x", "/y"} <= {request.path for request in stored}
    assert {request.authorization for request in stored} == {None}
    assert TOKEN not in capsys.readouterr().err


def test_what_a_server_echoes_is_scrubbed(
    hub: TestHub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.add_folder(REPO, folder)
    hub.users["plain-secret-123"] = "me"
    monkeypatch.setenv("HF_TOKEN", "plain-secret-123")
    echo = f"plain-secret-123 and {TOKEN} and https://storage/x?X-Amz-Signature=s3cr3t and \x1b[2J" + "long " * 500
    for place in ("/api/models/", "/resolve/"):
        hub.faults[:] = [Fault(place, status=403, body=json.dumps({"error": echo}).encode(), times=99)]
        assert main(["inspect", REPO]) == 4
        errors = capsys.readouterr().err
        assert "*** and *** and https://storage/x?***" in errors
        assert len(errors) < 1_000
        for secret in ("plain-secret-123", TOKEN, "s3cr3t", "\x1b"):
            assert secret not in errors


def test_a_traceback_has_no_secrets_either(
    hub: TestHub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.add_folder(REPO, folder)
    monkeypatch.setenv("V4QUANT_DEBUG", "1")
    echo = f"{TOKEN} and https://storage/x?X-Amz-Signature=s3cr3t and \x1b[2J"
    for place, host in (("/api/models/", "hub"), ("/tree/", "hub"), ("/resolve/", "hub"), ("/objects/", "storage")):
        fault = Fault(place, host=host, status=403, body=json.dumps({"error": echo}).encode(), times=99)
        hub.faults[:] = [fault]
        assert main(["inspect", REPO]) == 4
        errors = capsys.readouterr().err
        assert "Traceback" in errors
        assert "HfHubHTTPError" in errors
        for secret in (TOKEN, "s3cr3t", "\x1b"):
            assert secret not in errors


def test_a_fault_of_ours_shows_no_token(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_argv: list[str]) -> int:
        raise ZeroDivisionError(f"with {TOKEN}")

    monkeypatch.setattr("v4quant.cli.main.main", fail)
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 1
    errors = capsys.readouterr().err
    assert "ZeroDivisionError: with ***" in errors
    assert TOKEN not in errors


def test_a_listing_without_end(hub: TestHub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.store.add_folder(REPO, folder)
    again = f'<{hub.url()}/api/models/{REPO}/tree/main?cursor=1>; rel="next"'
    hub.faults.append(Fault("/tree/", status=200, body=b"[]", headers={"Link": again}, times=10**6))
    assert main(["inspect", REPO]) == 3
    assert "holds more than 100,000 files" in capsys.readouterr().err
    assert len(hub.requests) < 1_000


def test_a_token_that_cannot_be_sent(
    hub: TestHub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.add_folder(REPO, folder)
    monkeypatch.setenv("HF_TOKEN", "hf_t\u00f6k\u00e9n")
    assert main(["inspect", REPO]) == 4
    assert "the token holds characters that no token has" in capsys.readouterr().err


def test_an_url_that_expires_under_two_readers(hub: TestHub, folder: Path) -> None:
    hub.store.add_folder(REPO, folder)
    name = "model-00002-of-00004.safetensors"
    files, expected = open_remote(Location(REPO)), (folder / name).read_bytes()
    files.read(name, 0, 8)
    both = threading.Barrier(2)

    def meet(_request: Request) -> None:
        both.wait(20)

    hub.faults.append(Fault("/objects/", host="storage", status=403, times=2, strike=meet))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda start: files.read(name, start, start + 500), [5_000, 6_000]))
    assert found == [expected[5_000:5_500], expected[6_000:6_500]]


def test_a_client_that_another_thread_closes(hub: TestHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub closes the client that all threads share when one of them cannot connect."""
    hub.store.add_folder(REPO, folder)
    name = "model-00002-of-00004.safetensors"
    files = open_remote(Location(REPO))
    closed = httpx2.Client()
    closed.close()
    clients = [closed]
    monkeypatch.setattr("v4quant.hub.ranges.get_session", lambda: clients.pop() if clients else get_session())
    assert files.read(name, 5_000, 6_000) == (folder / name).read_bytes()[5_000:6_000]
    assert hub.waits == [1.0]


HOSTILE = [
    "../evil",
    "a/../../evil",
    "/etc/passwd",
    "a//b",
    "a\\b",
    "C:evil",
    "new\nline",
    "esc\x1b[2J",
    "right\u202eleft",
    ".git/hooks/post-checkout",
    "a/.GIT/config",
    "CONFIG.JSON",
    "config.json/inside",
    "x" * 300,
    "dot.",
]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_tricks_in_file_names(hub: TestHub, folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    repo = hub.store.add_folder(REPO, folder)
    repo.add_commit("refs/heads/main", "trick", {**repo.main, name: repo.main["config.json"]})
    assert main(["inspect", REPO]) == 3
    errors = capsys.readouterr().err
    assert "expected" in errors
    assert errors.isascii() and "\x1b" not in errors


@pytest.mark.parametrize(
    "change", [{"size": -1}, {"size": "8"}, {"oid": "x"}, {"lfs": {"oid": "../x", "size": 1, "pointerSize": 1}}]
)
def test_sizes_and_hashes_that_are_none(hub: TestHub, folder: Path, change: dict[str, Any]) -> None:
    hub.store.add_folder(REPO, folder)
    entry = {"type": "file", "path": "model.safetensors", "oid": "a" * 40, "size": 8} | change
    hub.faults.append(Fault("/tree/", status=200, body=json.dumps([entry]).encode()))
    assert main(["inspect", REPO]) == 4


def test_a_damaged_header_is_a_problem_of_the_file(
    hub: TestHub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = hub.store.add_folder(REPO, folder)
    bad = hub.store.add_file(repo, "x.safetensors", b"\xff" * 50)
    repo.add_commit("refs/heads/main", "bad", {**repo.main, "model-00002-of-00004.safetensors": bad})
    assert main(["inspect", REPO]) == 3
    assert "claims a header" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", Location("org/name")),
        ("hf://org/name", Location("org/name")),
        ("hf://org/name@refs/pr/3", Location("org/name", "refs/pr/3")),
        ("folder", None),
        ("./org/name", None),
        ("/abs/name", None),
        ("../name", None),
        ("a/b/c", None),
    ],
)
def test_locations(text: str, expected: Location | None) -> None:
    assert parse_location(text) == expected


def test_a_folder_that_exists_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_location("org/name") is None
    assert parse_location("hf://org/name") == Location("org/name")


@pytest.mark.parametrize(
    "text", ["hf://", "hf://x", "hf://a/b/c", "hf://a/b@", "hf://a/b@x y", "hf://a/b@a..b", "hf://a/..b"]
)
def test_what_is_no_location(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", text]) == 2
    assert "expected" in capsys.readouterr().err


def test_a_checkpoint_is_read_through_ranges_as_from_disk(hub: TestHub, folder: Path) -> None:
    hub.store.add_folder(REPO, folder)
    remote, local = open_source(REPO), open_checkpoint(folder)
    assert remote.source_id() == local.source_id()
    for entry in list(local.tensors.values())[::7]:
        assert remote.files.read(entry.file, entry.start, entry.stop) == local.files.read(
            entry.file, entry.start, entry.stop
        )
