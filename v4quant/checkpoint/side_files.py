"""The files beside weights, config and index: tokenizer, generation config, encoding/, inference/, licence, README.

Loaders and users need them as much as the weights, so all of them travel, unchanged but for inference/config.json,
which says how experts are stored. Weights in other containers, pickles above all, do not.
"""

import contextlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from v4quant import strict_json
from v4quant.checkpoint.certificate import CERTIFICATE_NAME
from v4quant.checkpoint.index import INDEX_NAME
from v4quant.checkpoint.output import write_file
from v4quant.checkpoint.reader import (
    JOURNAL_NAME,
    PICKLE_SUFFIXES,
    SHARDS_NAME,
    SOURCE_NAME,
    UPLOADS_NAME,
    Checkpoint,
)
from v4quant.config import CONFIG_NAME, INFERENCE_CONFIG_NAME, MAX_CONFIG_BYTES
from v4quant.errors import CheckpointError
from v4quant.formats import Format

# Made anew for every output.
_OWN_FILES = {CONFIG_NAME, INDEX_NAME, CERTIFICATE_NAME, JOURNAL_NAME, SHARDS_NAME, SOURCE_NAME, UPLOADS_NAME}
# Certificates, reports and notes: what v4quant says of one checkpoint is not true of another.
_OWN_PREFIX = "v4quant."
_WEIGHT_SUFFIXES = {".safetensors", ".partial", ".gguf", ".h5", ".msgpack", *PICKLE_SUFFIXES}
_COPY_BYTES = 4 * 2**20


def side_files(source: Checkpoint) -> list[str]:
    """Names of the files that travel with a conversion, sorted."""
    return [
        name
        for name in source.files.names()
        if name not in _OWN_FILES and not name.startswith(_OWN_PREFIX) and not _holds_weights(name)
    ]


def kept_files(source: Checkpoint) -> list[str]:
    """Names of the files without weights that make up a checkpoint: the side files, config, index and certificate."""
    not_kept = {JOURNAL_NAME, SHARDS_NAME}
    return [name for name in source.files.names() if name not in not_kept and not _holds_weights(name)]


def files_left_behind(source: Checkpoint) -> list[str]:
    """Names of the files that do not travel and are no part of the checkpoint: weights in other containers."""
    return [name for name in source.files.names() if _holds_weights(name) and name not in source.header_sha256]


def _holds_weights(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in _WEIGHT_SUFFIXES


def require_side_files_fit(source: Checkpoint) -> None:
    """Find out before hours of work what would stop the last step of a conversion.

    Raises:
        CheckpointError: if inference/config.json is no JSON object, or a folder has the name of a file that is written.
    """
    if INFERENCE_CONFIG_NAME in source.files:
        _read_inference_config(source)
    for name in side_files(source):
        first, slash, _ = name.partition("/")
        if slash and (first in _OWN_FILES or _holds_weights(first)):
            raise CheckpointError(
                f"{source.where}/{first}: is a folder, expected a file or nothing of this name", hint="Rename it."
            )


def write_side_files(source: Checkpoint, like: Checkpoint | None, target: Format, names: list[str], out: Path) -> None:
    """Copy side files into an output folder.

    Args:
        like: the original, under --like: its inference/config.json is used where it says what is stored.

    Raises:
        CheckpointError: if one cannot be read, or inference/config.json is no JSON object.
        OutputError: if the disk refuses.
    """
    files = source.files
    for name in names:
        if name == INFERENCE_CONFIG_NAME:
            write_file(out / name, [_inference_config(source, like, target)])
        else:
            size = files.size(name)
            ranges = ((start, min(start + _COPY_BYTES, size)) for start in range(0, size, _COPY_BYTES))
            write_file(out / name, (files.read(name, start, stop) for start, stop in ranges))


def _inference_config(source: Checkpoint, like: Checkpoint | None, target: Format) -> bytes:
    """DeepSeek's inference/config.json for the output; the source's (or the original's) own bytes where they say so."""
    wanted = target.inference_config(_read_inference_config(source)[1])
    for candidate in (source, like):
        if candidate is not None and INFERENCE_CONFIG_NAME in candidate.files:
            text, stored = _read_inference_config(candidate)
            if stored == wanted:
                return text
    return (json.dumps(wanted, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _read_inference_config(checkpoint: Checkpoint) -> tuple[bytes, dict[str, Any]]:
    """inference/config.json as bytes and parsed.

    Raises:
        CheckpointError: if it is no JSON object, or too large for one.
    """
    where = f"{checkpoint.where}/{INFERENCE_CONFIG_NAME}"
    if checkpoint.files.size(INFERENCE_CONFIG_NAME) <= MAX_CONFIG_BYTES:
        with contextlib.suppress(ValueError):
            text = checkpoint.files.read(INFERENCE_CONFIG_NAME)
            parsed = strict_json.parse(text)
            if isinstance(parsed, dict):
                return text, parsed
    raise CheckpointError(f"{where}: is no JSON object, expected one", hint="Restore it from the release.")
