"""The files of a folder: nothing outside it is opened, every byte range is read exactly, and a change is noticed."""

import errno
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from v4quant.checkpoint import files as files_module
from v4quant.checkpoint.direct import BLOCK_BYTES, STAGING_BYTES
from v4quant.checkpoint.files import DIRECT_READ_BYTES, MAX_FOLDERS_DEEP, Files
from v4quant.errors import CheckpointError

FILE_BYTES = 2 * STAGING_BYTES + 12_345


def write(path: Path, data: bytes = b"data") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Files(folder)
    return str(caught.value)


# What is listed.


def test_regular_files_are_listed_by_relative_path(tmp_path: Path) -> None:
    for name in ("model.safetensors", "inference/config.json", "a/b/c.txt", "empty"):
        write(tmp_path / name, b"" if name == "empty" else name.encode())
    (tmp_path / "nothing in it").mkdir()
    found = Files(tmp_path)
    assert found.names() == ["a/b/c.txt", "empty", "inference/config.json", "model.safetensors"]
    assert "a/b/c.txt" in found
    assert "a" not in found
    assert (found.size("a/b/c.txt"), found.size("empty")) == (9, 0)
    assert (found.read("inference/config.json"), found.read("empty")) == (b"inference/config.json", b"")
    assert found.where == str(tmp_path)


def test_hidden_files_and_folders_are_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    for name in (".gitattributes", ".cache/huggingface/download/x.lock", "encoding/.hidden", "encoding/seen"):
        write(tmp_path / name)
    (tmp_path / ".link").symlink_to("/etc/passwd")
    assert Files(tmp_path).names() == ["encoding/seen"]


def test_what_is_no_regular_file_is_not_listed(tmp_path: Path) -> None:
    """A pipe would block whoever opens it."""
    write(tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert Files(tmp_path).names() == ["model.safetensors"]


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "real" / "weights", b"weights")
    (tmp_path / "model.safetensors").symlink_to("real/weights")
    (tmp_path / "again").symlink_to(tmp_path / "model.safetensors")
    (tmp_path / "folder").symlink_to("real")
    found = Files(tmp_path)
    assert found.names() == ["again", "model.safetensors", "real/weights"]
    assert found.read("again") == b"weights"


def test_a_folder_that_is_itself_a_link_is_fine(tmp_path: Path) -> None:
    write(tmp_path / "real" / "x")
    (tmp_path / "link").symlink_to("real")
    assert Files(tmp_path / "link").names() == ["x"]


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "..", "hop", "inside/../../secret"])
def test_links_out_of_the_folder_are_refused(target: str, tmp_path: Path) -> None:
    write(tmp_path / "secret")
    write(tmp_path / "checkpoint" / "inside" / "x")
    if target == "hop":
        (tmp_path / "checkpoint" / "inside" / "hop").symlink_to("../../secret")
    (tmp_path / "checkpoint" / "bait").symlink_to("inside/hop" if target == "hop" else target)
    message = refusal(tmp_path / "checkpoint")
    assert "is a link out of the checkpoint folder, to " in message
    assert "bait" in message or "hop" in message


def test_a_link_to_a_folder_whose_name_begins_alike_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "flash-secret" / "x")
    write(tmp_path / "flash" / "config.json")
    (tmp_path / "flash" / "bait").symlink_to("../flash-secret/x")
    assert "bait: is a link out of" in refusal(tmp_path / "flash")


# The Hub's cache: snapshots/REVISION/FILE -> ../../blobs/HASH.


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    repository = tmp_path / "models--deepseek-ai--DeepSeek-V4-Flash"
    write(repository / "blobs" / "0a1b", b"weights")
    write(repository / "blobs" / "2c3d", b"{}")
    write(repository / "refs" / "main", b"60d8d70")
    write(repository / "blobs" / "deeper" / "4e5f")
    folder = repository / "snapshots" / "60d8d70"
    (folder / "inference").mkdir(parents=True)
    (folder / "model.safetensors").symlink_to("../../blobs/0a1b")
    (folder / "inference" / "config.json").symlink_to("../../../blobs/2c3d")
    return folder


def test_the_hub_cache_is_accepted(snapshot: Path) -> None:
    found = Files(snapshot)
    assert found.names() == ["inference/config.json", "model.safetensors"]
    assert found.read("model.safetensors") == b"weights"
    assert found.read("inference/config.json") == b"{}"
    found.require_unchanged("model.safetensors")


@pytest.mark.parametrize("target", ["../../refs/main", "../../blobs/deeper/4e5f", "../../blobs/../../x", "../other/x"])
def test_only_blobs_are_trusted_in_the_hub_cache(target: str, snapshot: Path) -> None:
    write(snapshot / target)
    (snapshot / "bait").symlink_to(target)
    assert "bait: is a link out of" in refusal(snapshot)


def test_blobs_are_trusted_from_snapshots_only(snapshot: Path) -> None:
    assert "is a link out of" in refusal(snapshot.rename(snapshot.parent.parent / "revision"))
    (snapshot.parent.parent / "checkpoints").mkdir()
    assert "is a link out of" in refusal(
        (snapshot.parent.parent / "revision").rename(snapshot.parent.parent / "checkpoints" / "60d8d70")
    )


# What cannot be listed.


def test_missing_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"{tmp_path}/none: no such folder, expected a checkpoint"


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors")
    assert "is a file, expected the folder" in refusal(path)
    assert "no such folder" in refusal(path / "inside")


def test_a_name_that_no_file_system_takes(tmp_path: Path) -> None:
    assert "cannot read: File name too long" in refusal(tmp_path / ("x" * 300))


@pytest.mark.parametrize(("target", "says"), [("b", "symbolic links"), ("nowhere", "No such file")])
def test_a_link_that_leads_nowhere_is_named(target: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(target)
    if target == "b":
        (tmp_path / "b").symlink_to("a")
    message = refusal(tmp_path)
    assert message.startswith((f"{tmp_path}/a: cannot read: ", f"{tmp_path}/b: cannot read: "))
    assert says in message


@pytest.mark.parametrize("name", [b"two\nlines", b"red\x1b[31m", b"bell\x07", b"latin-\xe9", "c1-\x9b".encode()])
def test_names_that_steer_a_terminal_or_are_no_text_are_refused(name: bytes, tmp_path: Path) -> None:
    os.close(os.open(os.fsencode(tmp_path) + b"/" + name, os.O_CREAT))
    message = refusal(tmp_path)
    assert "has a name with control characters or not in UTF-8" in message
    assert message.isascii()
    assert message.isprintable()


def test_folders_in_folders_without_end(tmp_path: Path) -> None:
    write(tmp_path / ("d/" * MAX_FOLDERS_DEEP) / "deepest")
    assert Files(tmp_path).names() == ["d/" * MAX_FOLDERS_DEEP + "deepest"]
    write(tmp_path / ("d/" * (MAX_FOLDERS_DEEP + 1)) / "deeper")
    assert f"more than {MAX_FOLDERS_DEEP} deep" in refusal(tmp_path)


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "MAX_FILES", 3)
    for number in range(3):
        write(tmp_path / str(number))
    assert len(Files(tmp_path).names()) == 3
    write(tmp_path / "3")
    assert "holds 4 files, expected at most 3" in refusal(tmp_path)


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, who may read everything; so the system's answer is made up."""
    write(tmp_path / "closed" / "x")
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if path.name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert refusal(tmp_path) == f"{tmp_path}/closed: cannot read: Permission denied"


# Reading.


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random("test_files").randbytes(FILE_BYTES)


@pytest.fixture
def one_file(content: bytes, tmp_path: Path) -> Files:
    write(tmp_path / "model.safetensors", content)
    return Files(tmp_path)


EDGES = (0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1)
LENGTHS = (0, 1, DIRECT_READ_BYTES - 1, DIRECT_READ_BYTES, DIRECT_READ_BYTES + 1, STAGING_BYTES, STAGING_BYTES + 4097)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_range_is_what_is_there(length: int, one_file: Files, content: bytes) -> None:
    for edge in EDGES:
        for start in (edge, FILE_BYTES - length - edge):
            found = one_file.read("model.safetensors", start, start + length)
            assert found == content[start : start + length], f"[{start}, {start + length})"


def test_the_rest_of_a_file(one_file: Files, content: bytes) -> None:
    assert one_file.read("model.safetensors") == content
    assert one_file.read("model.safetensors", 4097) == content[4097:]
    assert one_file.read("model.safetensors", FILE_BYTES) == b""


@pytest.mark.parametrize("length", [10, DIRECT_READ_BYTES + 10])
def test_nothing_is_read_past_the_end(length: int, one_file: Files) -> None:
    with pytest.raises(CheckpointError, match=f"model.safetensors: is shorter than its {FILE_BYTES:,} bytes"):
        one_file.read("model.safetensors", FILE_BYTES - length + 1, FILE_BYTES + 1)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_many_threads_read_many_files(content: bytes, tmp_path: Path) -> None:
    """Each thread keeps a few files open, whatever it reads, and closes them when it ends."""
    names = [f"{number}.safetensors" for number in range(20)]
    for number, name in enumerate(names):
        write(tmp_path / name, content[number : number + 300_000])
    reader = Files(tmp_path)
    before = open_descriptors()

    def read(job: int) -> bool:
        number, start = job % 20, job * 1001
        stop = start + (DIRECT_READ_BYTES if job % 3 else 100)
        return reader.read(names[number], start, stop) == content[number + start : number + stop]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(160)))
        # Each open file has a descriptor for large reads besides.
        assert open_descriptors() - before <= 4 * 2 * files_module._OPEN_FILES_A_THREAD
    assert open_descriptors() <= before


def test_a_file_that_may_not_be_read_is_named(one_file: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_options: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot read: Input/output error"):
        one_file.read("model.safetensors", 0, 8)


# Changes under our hands.


def grow(path: Path) -> None:
    """With the time of its last change put back, so that only the size tells."""
    found = path.stat()
    with path.open("ab") as file:
        file.write(b"x")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def shrink(path: Path) -> None:
    """With the time of its last change put back, so that only the size tells."""
    found = path.stat()
    os.truncate(path, found.st_size - 1)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def touch(path: Path) -> None:
    """As an edit in place does, within the same size."""
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))


def replace(path: Path) -> None:
    """Another file of the same size and time under the same name."""
    found = path.stat()
    other = path.with_name("other")
    other.write_bytes(bytes(found.st_size))
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [grow, shrink, touch, replace, Path.unlink], ids=lambda change: change.__name__)
@pytest.mark.parametrize("length", [8, DIRECT_READ_BYTES])
def test_a_change_before_the_first_read_is_noticed(change: object, length: int, one_file: Files) -> None:
    assert callable(change)
    change(one_file.path("model.safetensors"))
    for check in (
        lambda: one_file.read("model.safetensors", 0, length),
        lambda: one_file.require_unchanged("model.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: (has changed since|cannot read: No such file)"):
            check()


@pytest.mark.parametrize("change", [grow, shrink, touch], ids=lambda change: change.__name__)
@pytest.mark.parametrize("length", [8, DIRECT_READ_BYTES])
def test_a_change_between_two_reads_is_noticed(change: object, length: int, one_file: Files) -> None:
    assert callable(change)
    one_file.read("model.safetensors", 0, length)
    change(one_file.path("model.safetensors"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has changed since this run began"):
        one_file.read("model.safetensors", 0, length)


def test_a_file_replaced_between_two_reads_is_noticed(one_file: Files) -> None:
    """The open file is the old one, whose status changed when it lost its name; the path leads to the new one."""
    one_file.read("model.safetensors", 0, 8)
    replace(one_file.path("model.safetensors"))
    with pytest.raises(CheckpointError, match="has changed since this run began"):
        one_file.read("model.safetensors", 0, 8)
    with pytest.raises(CheckpointError, match="has changed since this run began"):
        one_file.require_unchanged("model.safetensors")


def test_fingerprint_is_size_and_times(tmp_path: Path) -> None:
    path = write(tmp_path / "x", b"1234")
    os.utime(path, ns=(0, 5))
    seen = [Files(tmp_path).fingerprint("x")]
    assert seen[0].startswith("4 5 ")
    touch(path)
    seen.append(Files(tmp_path).fingerprint("x"))
    assert seen[1].startswith("4 6 ")
    grow(path)
    seen.append(Files(tmp_path).fingerprint("x"))
    assert seen[2].startswith("5 6 ")
    path.write_bytes(b"54321")
    os.utime(path, ns=(0, 6))  # the time of the data is set back, which changes the other
    seen.append(Files(tmp_path).fingerprint("x"))
    assert seen[3].startswith("5 6 ")
    assert len(set(seen)) == 4
