"""Write a synthetic checkpoint in the true stored form of a release, streamed and deterministic.

Names, dtypes, shapes, packing, header style and the split into shards are the release's, so at full size each file has
the released file's size to the byte. Only the numbers are made up (values.py).
"""

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4quant.checkpoint.header import TensorEntry
from v4quant.checkpoint.index import INDEX_NAME, build_index
from v4quant.checkpoint.layout import Shard, lay_out
from v4quant.checkpoint.output import PARTIAL_SUFFIX, ShardFile, make_room, require_free, write_file
from v4quant.config import CONFIG_NAME, V4Config
from v4quant.encodings import BASE_SCHEME, Scheme
from v4quant.inventory import StoredTensor, stored_tensors
from v4quant.testing.releases import inference_config
from v4quant.testing.values import Values

Advance = Callable[[int, str], None]

_README = """\
# A synthetic checkpoint

Written by `v4quant synth`: the stored form of a DeepSeek-V4 release with random numbers in it. It has learnt nothing.
"""
# The releases' own (170 bytes, the same in all of them).
_GENERATION_CONFIG = {
    "_from_model_config": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 1.0,
    "transformers_version": "4.46.3",
}


@dataclass(frozen=True)
class SynthReport:
    """What a synthetic checkpoint holds.

    Attributes:
        tensors: stored tensors.
        bytes: bytes of tensor data, the index's total_size.
        files: size in bytes of every shard, in order.
    """

    tensors: int
    bytes: int
    files: dict[str, int]


@dataclass(frozen=True)
class SynthPlan:
    """A synthetic checkpoint, decided: every file's bytes but the values.

    Attributes:
        config: the model.
        shards: the weight files, as released: embedding, one layer a file, final norm and head, one MTP block a file.
        tensors: by name, in release order.
        side_files: every other file by its relative path, in the order of writing: config.json comes last.
    """

    config: V4Config
    shards: list[Shard]
    tensors: dict[str, StoredTensor]
    side_files: dict[str, bytes]

    @property
    def report(self) -> SynthReport:
        """Counts and sizes."""
        return SynthReport(
            tensors=len(self.tensors),
            bytes=sum(tensor.bytes for tensor in self.tensors.values()),
            files={shard.name: shard.file_bytes for shard in self.shards},
        )

    @property
    def disk_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(shard.file_bytes for shard in self.shards) + sum(map(len, self.side_files.values()))

    def weight_of(self, tensor: StoredTensor) -> StoredTensor:
        """The matrix that a block scale belongs to; every other tensor is its own."""
        module, _, leaf = tensor.name.rpartition(".")
        return self.tensors[f"{module}.weight"] if leaf == "scale" else tensor


def plan_synth(config_json: Mapping[str, Any], scheme: Scheme) -> SynthPlan:
    """Lay a synthetic checkpoint out; nothing is written.

    Args:
        config_json: a parsed config.json, as synth_config makes it.
        scheme: how the matrices are stored.

    Raises:
        UsageError: if config_json describes no V4 model.
    """
    config = V4Config.from_json(config_json, CONFIG_NAME)
    stored = stored_tensors(config, scheme)
    shards = lay_out((((tensor.name, tensor.dtype, tensor.storage_shape),) for tensor in stored), sys.maxsize)
    index = {name: shard.name for shard in shards for name in shard.entries}
    side_files = {} if scheme == BASE_SCHEME else _release_side_files(config_json)
    side_files[INDEX_NAME] = build_index(index, sum(tensor.bytes for tensor in stored))
    side_files[CONFIG_NAME] = _json_bytes(config_json)
    return SynthPlan(config, shards, {tensor.name: tensor for tensor in stored}, side_files)


def write_checkpoint(
    out: Path,
    config_json: Mapping[str, Any],
    scheme: Scheme,
    seed: int = 0,
    *,
    workers: int = 2,
    overwrite: bool = False,
    progress: Advance | None = None,
) -> SynthReport:
    """Write a synthetic checkpoint; on any failure what was written is removed again.

    Args:
        out: folder to write into, made if missing.
        config_json: a parsed config.json, as synth_config makes it.
        scheme: how the matrices are stored.
        seed: the same seed gives the same bytes, whatever the workers.
        workers: threads.
        overwrite: replace the checkpoint that out holds.
        progress: told how many bytes of tensor data were written, and into which shard; called from any thread.

    Raises:
        UsageError: if config_json describes no V4 model.
        OutputError: if out exists and is not empty, or the disk is too small or refuses.
    """
    plan = plan_synth(config_json, scheme)
    require_free(out, overwrite=overwrite)
    make_room(out, plan.disk_bytes)
    writer = _Writer(plan, Values(plan.config, seed), progress or (lambda _count, _shard: None))
    written: list[Path] = []
    try:
        with ThreadPoolExecutor(workers) as pool:
            for shard in plan.shards:
                written.append(out / shard.name)
                writer.write_shard(out / shard.name, shard, pool)
        for name, data in plan.side_files.items():
            written.append(out / name)
            write_file(out / name, [data])
    except BaseException:
        _remove(out, written)
        raise
    return plan.report


class _StoppedError(Exception):
    """Another tensor failed, or the user interrupted; this one gave up between two pieces."""


class _Writer:
    """Writes shards, one tensor a task."""

    def __init__(self, plan: SynthPlan, values: Values, advance: Advance) -> None:
        self._plan = plan
        self._values = values
        self._advance = advance
        self._stop = threading.Event()

    def write_shard(self, path: Path, shard: Shard, pool: ThreadPoolExecutor) -> None:
        """Write a shard under its partial name, then rename it; no trace is left of one that failed.

        Raises:
            OutputError: if the disk refuses.
        """
        file = ShardFile(path, shard.header, shard.file_bytes)
        tasks = [pool.submit(self._write_tensor, file, entry, shard.name) for entry in shard.entries.values()]
        try:
            finished, _ = wait(tasks, return_when=FIRST_EXCEPTION)
            for task in finished:
                task.result()
            file.finish()
        except BaseException:
            self._stop.set()
            wait([task for task in tasks if not task.cancel()])
            file.abandon()
            raise

    def _write_tensor(self, file: ShardFile, entry: TensorEntry, shard_name: str) -> None:
        tensor = self._plan.tensors[entry.name]
        offset = entry.start
        for piece in self._values.pieces(tensor, self._plan.weight_of(tensor)):
            if self._stop.is_set():
                raise _StoppedError
            file.write(piece.data, offset)
            offset += piece.nbytes
            self._advance(piece.nbytes, shard_name)
        assert offset == entry.stop, f"{entry.name} is written in full"


def _release_side_files(config_json: Mapping[str, Any]) -> dict[str, bytes]:
    """Files that the releases have beside weights and config, as far as they matter without a tokenizer."""
    return {
        "README.md": _README.encode(),
        "generation_config.json": _json_bytes(_GENERATION_CONFIG),
        "inference/config.json": _json_bytes(inference_config(config_json)),
    }


def _remove(out: Path, written: list[Path]) -> None:
    """Take back the files of a run that failed, and the folders that held nothing else."""
    for path in written:
        path.unlink(missing_ok=True)
        path.with_name(path.name + PARTIAL_SUFFIX).unlink(missing_ok=True)
        if path.parent != out:
            with contextlib.suppress(OSError):
                path.parent.rmdir()


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
