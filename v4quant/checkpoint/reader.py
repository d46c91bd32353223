"""Open a checkpoint: config, every header, the index, and what is wrong with them. No tensor data is read."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from v4quant.checkpoint.audit import Problem, audit_config, audit_index, audit_tensors, stored_name, summarise
from v4quant.checkpoint.detect import Entries, Parsed, detect_scheme, stored_config
from v4quant.checkpoint.files import Files, Source
from v4quant.checkpoint.header import TensorEntry, read_header
from v4quant.checkpoint.index import INDEX_NAME, MAX_INDEX_BYTES, Index, parse_index
from v4quant.config import CONFIG_NAME, MAX_CONFIG_BYTES, V4Config, parse_config_json
from v4quant.encodings import Scheme
from v4quant.errors import CheckpointError
from v4quant.inventory import LogicalTensor, logical_tensors, mtp_copies, release_name
from v4quant.names import TensorName, parse_name

JOURNAL_NAME = "v4quant.journal.jsonl"  # of an unfinished run, see journal.py
SHARDS_NAME = "v4quant.shards.json"  # of a folder that `v4quant shard` wrote, and of its ranks, see sharding/record.py
SOURCE_NAME = "v4quant.source.json"  # where the source of a conversion was, see hub/origin.py
UPLOADS_NAME = "v4quant.uploads.jsonl"  # shards that lie on the Hub and no longer here, see hub/uploads.py
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
TENSOR_PARALLEL_FILE = re.compile(r"model\d+-mp\d+\.safetensors")
_SHOWN_PROBLEMS = 10
# Pro-0813 has 149,782, the most of any release.
MAX_TENSORS = 400_000


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its headers describe it.

    Attributes:
        files: the folder.
        config_bytes, config_json, config: config.json, as bytes, parsed, and checked.
        tensors: every stored tensor by name.
        parsed: the names among them that are V4 names, taken apart.
        scheme: how matrices are stored, told from headers.
        model: the model that is stored, in the words of a config; `config` itself where the two agree.
        problems: everything that is wrong; empty for a sound checkpoint.
        header_sha256: of each weight file's header, by file.
        foreign_files: safetensors files that hold no V4 tensor and are in no index: no part of the checkpoint.
    """

    files: Source
    config_bytes: bytes
    config_json: Mapping[str, Any]
    config: V4Config
    tensors: Entries
    parsed: Parsed
    scheme: Scheme
    model: V4Config
    problems: list[Problem]
    header_sha256: Mapping[str, str]
    foreign_files: list[str]

    @property
    def where(self) -> str:
        """The folder, as the user named it."""
        return self.files.where

    @property
    def release(self) -> str:
        """Name of the release that is stored."""
        return release_name(self.model, self.scheme)

    @property
    def bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(entry.bytes for entry in self.tensors.values())

    @cached_property
    def logical(self) -> list[LogicalTensor]:
        """Every tensor that a sound checkpoint holds, without scales, under its stored name, in release order.

        The embedding and head of an MTP block's own come right after the rest of their block.
        """
        tensors = [
            LogicalTensor(stored_name(tensor, self.tensors), tensor.shape, tensor.dtype, tensor.kind)
            for tensor in logical_tensors(self.config)
        ] + mtp_copies(self.config, self.parsed.values())
        order: dict[tuple[str, bool], int] = {}
        return sorted(tensors, key=lambda tensor: order.setdefault(_block(self.parsed[tensor.name]), len(order)))

    def source_id(self) -> str:
        """What tells this checkpoint from others without reading data: a hash over config, headers and file sizes."""
        digest = hashlib.sha256(self.config_bytes)
        for name in sorted(self.header_sha256):
            digest.update(f"\0{name}\0{self.files.size(name)}\0{self.header_sha256[name]}".encode())
        return digest.hexdigest()

    def fingerprints(self) -> dict[str, str]:
        """Size and time of last change of config.json and of every weight file."""
        return {name: self.files.fingerprint(name) for name in (CONFIG_NAME, *sorted(self.header_sha256))}

    def require_sound(self) -> None:
        """Refuse a checkpoint that contradicts itself.

        Raises:
            CheckpointError: if there is any problem; lists the first of each kind.
        """
        if self.problems:
            lines = [f"{text} (and {count - 1:,} alike)" if count > 1 else text for text, count in self.problem_groups]
            raise CheckpointError(
                f"{self.where}: {'1 problem' if len(self.problems) == 1 else f'{len(self.problems):,} problems'}:\n  "
                + "\n  ".join(lines),
                hint=f"See all of them with: v4quant inspect {self.where} --json",
            )

    @property
    def problem_groups(self) -> list[tuple[str, int]]:
        """The problems for people: the first of each kind, and how many there are of it."""
        return summarise(self.problems, _SHOWN_PROBLEMS)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read everything about a checkpoint but its data.

    Args:
        folder: a local folder with config.json and *.safetensors.

    Returns:
        The checkpoint; what is wrong with single tensors or files is in its `problems`.

    Raises:
        CheckpointError: if the folder holds no V4 checkpoint at all, or in a form that v4quant does not know.
        UsageError: if config.json is not that of a supported V4 model.
    """
    return open_source(_source(folder))


def _source(folder: Path) -> Source:
    """A folder's files; of a sharded one those of the checkpoint that it was made from."""
    files = Files(folder)
    if SHARDS_NAME not in files:
        return files
    # Sharded folders need numpy, which takes longer to import than `inspect` of an ordinary one to run.
    from v4quant.checkpoint.sharding.folder import open_sharded_folder
    from v4quant.checkpoint.sharding.whole import WholeFiles

    return WholeFiles(open_sharded_folder(files))


def open_source(files: Source, *, is_part: bool = False) -> Checkpoint:
    """The same of files that may lie anywhere.

    Args:
        is_part: they are a part of a checkpoint, as a rank's folder is: only what they say of themselves is checked.

    Raises:
        CheckpointError, UsageError: as open_checkpoint.
    """
    weight_files = _weight_files(files)
    config_bytes = _read_small(files, CONFIG_NAME, MAX_CONFIG_BYTES)
    config_json = parse_config_json(config_bytes, f"{files.where}/{CONFIG_NAME}")
    config = V4Config.from_json(config_json, f"{files.where}/{CONFIG_NAME}")
    headers = _Headers()
    for name in weight_files:
        headers.read(files, name)
    index = headers.read_index(files)
    foreign = headers.drop_foreign_files(index)
    parsed = {name: parts for name in headers.tensors if (parts := parse_name(name))}
    if not any(parts.is_quantised for parts in parsed.values()) and (lost := headers.lost(index)):
        raise CheckpointError(
            f"{files.where}: no header of weight matrices could be read:\n  "
            + "\n  ".join(map(str, lost[:_SHOWN_PROBLEMS])),
            hint="Download or export these files again.",
        )
    scheme = detect_scheme(headers.tensors, parsed, files.where)
    problems, model = list(headers.problems), config
    if not is_part:
        problems += audit_config(config, scheme, headers.tensors, parsed)
        if len(problems) > len(headers.problems):
            # A config of another model would make every tensor wrong; compare with the model that is there.
            model = stored_config(config_json, headers.tensors, parsed) or config
        problems += audit_tensors(model, scheme, headers.tensors, parsed)
    if index is not None:
        problems += audit_index(index, headers.tensors, set(headers.sha256))
    return Checkpoint(
        files,
        config_bytes,
        config_json,
        config,
        headers.tensors,
        parsed,
        scheme,
        model,
        problems,
        headers.sha256,
        foreign,
    )


class _Headers:
    """What the headers of all files say, collected file by file."""

    def __init__(self) -> None:
        self.tensors: dict[str, TensorEntry] = {}
        self.sha256: dict[str, str] = {}
        self.problems: list[Problem] = []

    def read(self, files: Source, name: str) -> None:
        """Add one file; one that cannot be read becomes a problem."""
        try:
            text, entries = read_header(name, files.size(name), lambda start, stop: files.read(name, start, stop))
        except CheckpointError as error:
            file, _, what = str(error).partition(": ")
            self.problems.append(Problem(file, what))
            return
        if len(self.tensors) + len(entries) > MAX_TENSORS:
            raise CheckpointError(f"{files.where}: holds more than {MAX_TENSORS:,} tensors, expected a V4 checkpoint")
        self.sha256[name] = hashlib.sha256(text).hexdigest()
        for entry in entries.values():
            first = self.tensors.setdefault(entry.name, entry)
            if first is not entry:
                self.problems.append(Problem(entry.name, f"is stored twice, in {first.file} and in {name}"))

    def read_index(self, files: Source) -> Index | None:
        """The index; None where there is none or it cannot be read."""
        if INDEX_NAME not in files:
            if len(self.sha256) > 1:
                what = f"is missing, expected beside {len(self.sha256)} weight files; loaders need it"
                self.problems.append(Problem(INDEX_NAME, what))
            return None
        try:
            return parse_index(_read_small(files, INDEX_NAME, MAX_INDEX_BYTES), INDEX_NAME)
        except CheckpointError as error:
            self.problems.append(Problem(INDEX_NAME, str(error).removeprefix(f"{INDEX_NAME}: ")))
            return None

    def lost(self, index: Index | None) -> list[Problem]:
        """Files that cannot be read; where all can be, what the index says of files that are not there."""
        if self.problems or index is None or set(index.weight_map.values()) <= self.sha256.keys():
            return self.problems
        return list(audit_index(index, self.tensors, set(self.sha256)))

    def drop_foreign_files(self, index: Index | None) -> list[str]:
        """Leave out files that the index does not name and that hold no V4 tensor, such as reference outputs."""
        if index is None:
            return []
        suspects = self.sha256.keys() - set(index.weight_map.values())
        if not suspects:
            return []
        suspects -= {entry.file for name, entry in self.tensors.items() if parse_name(name)}
        foreign = sorted(suspects)
        for name in foreign:
            del self.sha256[name]
        self.tensors = {name: entry for name, entry in self.tensors.items() if entry.file in self.sha256}
        return foreign


def _weight_files(files: Source) -> list[str]:
    """The safetensors files of the folder itself.

    Raises:
        CheckpointError: if there are none that make a checkpoint.
    """
    top = [name for name in files.names() if "/" not in name]
    found = [name for name in top if name.endswith(".safetensors")]
    parallel = [name for name in found if TENSOR_PARALLEL_FILE.fullmatch(name)]
    if parallel:
        raise CheckpointError(
            f"{files.where}: holds tensor-parallel shards ({parallel[0]}), expected whole tensors and config.json",
            hint="Give the checkpoint that these were sharded from; of what v4quant shard wrote, "
            f"{SHARDS_NAME} is missing.",
        )
    if JOURNAL_NAME in files and (not found or CONFIG_NAME not in files):
        raise CheckpointError(
            f"{files.where}: is an unfinished conversion, expected a whole checkpoint",
            hint="Run the v4quant command that began it again; it continues where it stopped.",
        )
    if found:
        return found
    pickles = [name for name in top if PurePosixPath(name).suffix in PICKLE_SUFFIXES]
    if pickles:
        raise CheckpointError(
            f"{files.where}: holds pickle files ({pickles[0]}), which can run code and are never loaded; expected "
            "*.safetensors",
            hint="Download the safetensors files of the release.",
        )
    raise CheckpointError(
        f"{files.where}: holds no *.safetensors file, expected config.json and weight files",
        hint="Give the folder that the checkpoint itself lies in.",
    )


def _read_small(files: Source, name: str, most: int) -> bytes:
    """Read a file whole that must be there and small.

    Raises:
        CheckpointError: if it is missing or too large.
    """
    if name not in files:
        raise CheckpointError(
            f"{files.where}: has no {name}", hint="Copy it from the release that these weights came from."
        )
    if files.size(name) > most:
        raise CheckpointError(f"{files.where}/{name}: has {files.size(name):,} bytes, expected at most {most:,}")
    return files.read(name)


def _block(parts: TensorName) -> tuple[str, bool]:
    """Part of the released file order: the embedding, each layer, final norm and head together, each MTP block."""
    return (f"{parts.block}.{parts.index}", parts.name == "embed.weight")
