"""Verify a checkpoint: re-hash it against its certificate, or compare every value with the checkpoint it came from.

Hashes catch damage after the conversion; values catch a conversion that was wrong. Values are decoded by a second
decoder that shares nothing with the one that converted (second_decoder.py). Both stream, a tensor a thread. Several
processes share the tensors out by bytes; the first one merges what they find into the report that one would have made.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from v4quant.checkpoint.certificate import CERTIFICATE_NAME, TensorRecord, Verdict, read_certificate
from v4quant.checkpoint.compare import compare_plain, compare_weight
from v4quant.checkpoint.compare_config import config_differences
from v4quant.checkpoint.file_stamp import seen_differently
from v4quant.checkpoint.files import Source
from v4quant.checkpoint.header import TensorEntry
from v4quant.checkpoint.plan import DEFAULT_WORKERS
from v4quant.checkpoint.process_group import ProcessGroup
from v4quant.checkpoint.reader import Checkpoint
from v4quant.checkpoint.shares import share_in_order
from v4quant.checkpoint.verify_report import Findings, Mismatch, VerifyReport
from v4quant.config import CONFIG_NAME
from v4quant.errors import CheckpointError
from v4quant.inventory import LogicalTensor
from v4quant.names import scale_name

Advance = Callable[[int, str], None]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_READ_BYTES = 4 * 2**20


def _ignore(_count: int, _file: str) -> None:
    """Report progress to nobody."""


def verify_hashes(
    out: Checkpoint,
    *,
    workers: int = DEFAULT_WORKERS,
    progress: Advance = _ignore,
    group: ProcessGroup | None = None,
) -> VerifyReport:
    """Hash every tensor and compare with the certificate, both ways.

    Args:
        out: the checkpoint to verify.
        progress: told bytes hashed, and of which file.
        group: the processes that call this with the same checkpoint, to share the tensors out; one by default.

    Returns:
        What all processes found, in the first one; in the others what they found themselves.

    Raises:
        CheckpointError: if there is no certificate, or it is damaged, or processes see different checkpoints.
        EndedElsewhereError, LostProcessError: if another process has failed or died.
    """
    group = group or ProcessGroup()
    _require_same_view(out, group)
    header, records = read_certificate(out.files)
    in_place = sorted(out.tensors.values(), key=lambda entry: (entry.file, entry.start))
    rank_of = _ranks(out, (entry.name for entry in in_place), group)
    advance = group.progress(progress)
    seen: Counter[str] = Counter()

    def own() -> Iterator[tuple[int, TensorRecord, bool]]:
        """The records of this process with their numbers, and whether their tensor had one before."""
        for number, record in enumerate(records):
            seen[record.tensor] += 1
            if rank_of.get(record.tensor, 0) == group.rank:
                yield number, record, seen[record.tensor] > 1

    def check(item: tuple[int, TensorRecord, bool]) -> tuple[int, Mismatch | TensorRecord]:
        number, record, is_second = item
        mismatch = _check_record(out, record, advance)
        if is_second:
            mismatch = Mismatch(record.tensor, "has two lines in the certificate")
        return number, mismatch or record

    found = Findings()
    for number, result in _in_threads(check, own(), workers):
        if isinstance(result, Mismatch):
            found.mismatches.append((number, result))
        else:
            found.verdicts[result.verdict] += 1
    report = VerifyReport(mismatches=_structural(out))
    if hashlib.sha256(out.config_bytes).hexdigest() != header.config_sha256:
        report.mismatches.append(Mismatch(CONFIG_NAME, "is not the file that the certificate was made with"))
    found.merge_into(report, group)
    for name in sorted(out.tensors.keys() - seen.keys()):
        report.mismatches.append(Mismatch(name, "is in no line of the certificate"))
    if header.tensors != len(seen):
        reason = f"promises {header.tensors:,} tensors, but has lines for {len(seen):,}"
        report.mismatches.append(Mismatch(CERTIFICATE_NAME, reason))
    return report


def verify_values(
    out: Checkpoint,
    source: Checkpoint,
    *,
    workers: int = DEFAULT_WORKERS,
    progress: Advance = _ignore,
    group: ProcessGroup | None = None,
) -> VerifyReport:
    """Decode both checkpoints and compare every value of every tensor, signs of zero included, and config.json.

    Of config.json all that is not about storage counts (compare_config.py). A tensor that the certificate calls
    rounded may differ, but not by more than the certificate says.

    Args:
        out: the checkpoint to verify.
        source: what it must hold the values of; sound.
        progress: told bytes of `out` compared, and of which file.
        group, Returns: as verify_hashes.

    Raises:
        CheckpointError: if the source has problems, the certificate is damaged, or processes see different checkpoints.
        EndedElsewhereError, LostProcessError: if another process has failed or died.
    """
    group = group or ProcessGroup()
    source.require_sound()
    _require_same_view(out, group)
    _require_same_view(source, group)
    advance, allowed = group.progress(progress), _rounded_records(out)
    ranks = _ranks(out, (tensor.name for tensor in source.logical), group)
    own = ((number, tensor) for number, tensor in enumerate(source.logical) if ranks[tensor.name] == group.rank)

    def check(item: tuple[int, LogicalTensor]) -> tuple[int, int, Verdict | Mismatch]:
        number, tensor = item
        result = _check_values(out, source, tensor, allowed.get(tensor.name), advance)
        return number, _stored_parts(out, tensor), result

    found = Findings()
    for number, parts, result in _in_threads(check, own, workers):
        if isinstance(result, Mismatch):
            found.mismatches.append((number, result))
        else:
            found.verdicts[result] += parts
    report = VerifyReport(mismatches=_structural(out))
    report.mismatches += [Mismatch(CONFIG_NAME, difference) for difference in config_differences(out, source)]
    found.merge_into(report, group)
    ours = {tensor.name for tensor in source.logical}
    for name in sorted(out.tensors.keys() - ours - {scale_name(n) for n in ours if n.endswith(".weight")}):
        report.mismatches.append(Mismatch(name, f"is not in {source.where}"))
    return report


def value_differences(
    out: Checkpoint, source: Checkpoint, prefix: str, *, workers: int = DEFAULT_WORKERS
) -> list[Mismatch]:
    """Tensors whose name begins with `prefix` and whose values are not the source's, whatever a certificate allows.

    Raises:
        CheckpointError: if data cannot be read.
    """
    tensors = [tensor for tensor in source.logical if tensor.name.startswith(prefix)]

    def check(tensor: LogicalTensor) -> Verdict | Mismatch:
        return _check_values(out, source, tensor, None, _ignore)

    return [found for found in _in_threads(check, tensors, workers) if isinstance(found, Mismatch)]


def verify_against(
    out: Checkpoint,
    source: Checkpoint,
    *,
    workers: int = DEFAULT_WORKERS,
    progress: Advance = _ignore,
    group: ProcessGroup | None = None,
) -> VerifyReport:
    """Compare every value with the source and, where there is a certificate, every byte with it.

    The certificate is what allows rounded tensors to differ, so it must fit the bytes itself.

    Args, Returns, Raises: as verify_values.
    """
    report = verify_values(out, source, workers=workers, progress=progress, group=group)
    if CERTIFICATE_NAME in out.files:
        named = {_module(mismatch.tensor) for mismatch in report.mismatches}
        hashes = verify_hashes(out, workers=workers, progress=progress, group=group)
        report.mismatches += [mismatch for mismatch in hashes.mismatches if _module(mismatch.tensor) not in named]
    return report


def _require_same_view(checkpoint: Checkpoint, group: ProcessGroup) -> None:
    """Refuse processes that see other files than the first one: what they find would be of another checkpoint.

    Raises:
        CheckpointError: in the first process, if there are any.
    """
    own = checkpoint.source_id(), checkpoint.fingerprints()
    for rank, (source_id, fingerprints) in enumerate(group.gather(own)):
        changed = seen_differently(own[1], fingerprints)
        if source_id != own[0] or changed:
            where = f" ({changed[0]})" if changed else ""
            raise CheckpointError(
                f"{checkpoint.where}: process {rank} sees another checkpoint there than process 0{where}",
                hint="Give all processes the same folder, which all machines share.",
            )


def _ranks(out: Checkpoint, names: Iterable[str], group: ProcessGroup) -> dict[str, int]:
    """Which process looks at which tensor: runs of neighbours, of about the same bytes."""
    sizes = {name: out.tensors[name].bytes if name in out.tensors else 0 for name in names}
    return dict(zip(sizes, share_in_order(list(sizes.values()), group.size), strict=True))


def _module(tensor: str) -> str:
    """What a weight and its scale have in common: a damaged scale is named by its weight's wrong values."""
    module, dot, leaf = tensor.rpartition(".")
    return module if dot and leaf in ("weight", "scale") else tensor


def _structural(out: Checkpoint) -> list[Mismatch]:
    """What headers and index already show to be wrong."""
    return [Mismatch(problem.where, problem.what) for problem in out.problems]


def _in_threads(function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int) -> Iterator[_Result]:
    """Results in order, a bounded number of items ahead, so that memory does not grow with the checkpoint."""
    iterator = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(function, item) for item in itertools.islice(iterator, 4 * workers)]
        try:
            while waiting:
                yield waiting.pop(0).result()
                waiting += [pool.submit(function, item) for item in itertools.islice(iterator, 1)]
        finally:
            for task in waiting:
                task.cancel()


def _check_record(out: Checkpoint, record: TensorRecord, progress: Advance) -> Mismatch | None:
    entry = out.tensors.get(record.tensor)
    if entry is None:
        return Mismatch(record.tensor, "is in the certificate, but not in the checkpoint")
    if (entry.dtype, entry.shape) != (record.dtype, record.shape):
        wanted = f"{record.dtype} {list(record.shape)}"
        return Mismatch(record.tensor, f"is {entry.dtype} {list(entry.shape)}, the certificate says {wanted}")
    digest = _sha256(out.files, entry, progress)
    if digest != record.sha256:
        reason = f"bytes differ from those converted: sha256 {digest[:16]}..., expected {record.sha256[:16]}..."
        return Mismatch(record.tensor, reason, {"expected": record.sha256, "found": digest})
    return None


def _sha256(files: Source, entry: TensorEntry, progress: Advance) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_READ_BYTES, entry.bytes)))
    for start in range(entry.start, entry.stop, _READ_BYTES):
        view = buffer[: min(_READ_BYTES, entry.stop - start)]
        files.read_into(entry.file, start, view)
        digest.update(view)
        progress(len(view), entry.file)
    return digest.hexdigest()


def _rounded_records(out: Checkpoint) -> dict[str, TensorRecord]:
    """The certificate's lines of rounded weights; none where there is no certificate."""
    if CERTIFICATE_NAME not in out.files:
        return {}
    _, records = read_certificate(out.files)
    return {record.tensor: record for record in records if record.verdict is Verdict.ROUNDED}


def _stored_parts(out: Checkpoint, tensor: LogicalTensor) -> int:
    """Stored tensors of `out` that a logical tensor stands for: a weight and its scale, or one."""
    return 1 + (tensor.kind != "plain" and scale_name(tensor.name) in out.tensors)


def _check_values(
    out: Checkpoint, source: Checkpoint, tensor: LogicalTensor, rounded: TensorRecord | None, progress: Advance
) -> Verdict | Mismatch:
    if tensor.name not in out.tensors:
        return Mismatch(tensor.name, f"is missing, {source.where} holds it")
    compare = compare_plain if tensor.kind == "plain" else compare_weight
    found = compare(out, source, tensor, progress)
    if found.first is None and not found.unlike:
        return Verdict.BIT_IDENTICAL if found.same_bytes else Verdict.VALUE_EXACT
    if rounded is not None and found.first is not None and found.is_within(rounded):
        return Verdict.ROUNDED
    beyond = "; more than the certificate says" if rounded else ""
    return Mismatch(tensor.name, found.describe() + beyond, found.first.to_json() if found.first else {})
