"""Certificates of what `shard` and `merge` wrote: for each tensor its hash, and that of the whole it is a share of.

A rank's certificate lets its folder be verified where it lies alone; that of a merged checkpoint says, tensor by
tensor, that what was put together is what was taken apart.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import v4quant
from v4quant.checkpoint.certificate import CERTIFICATE_NAME, CertificateHeader
from v4quant.checkpoint.journal import Journal
from v4quant.checkpoint.output import StreamedFile, write_file
from v4quant.checkpoint.reader import Checkpoint
from v4quant.checkpoint.sharding.layout import ShardedLayout
from v4quant.checkpoint.sharding.rank_files import rank_folder
from v4quant.errors import OutputError


def write_rank_certificates(source: Checkpoint, layout: ShardedLayout, journal: Journal, out: Path) -> None:
    """Write the certificate of every rank, in one pass over the journal.

    Raises:
        OutputError: if the journal is damaged, or the disk refuses.
    """
    rank_of = {file.name: rank for rank, files in enumerate(layout.ranks) for file in files}
    shares = {place.source.name: place.shares for places in layout.placements.values() for place in places}
    with ExitStack() as stack:
        files = []
        for rank in range(layout.grid.ranks):
            file = stack.enter_context(StreamedFile(out / rank_folder(rank) / CERTIFICATE_NAME))
            file.write(_line(rank_certificate_header(source, layout, rank).to_json()))
            files.append(file)
        left = {(name, number) for name, own in shares.items() for number in range(len(own))}
        for name, number, line in _tensor_lines(journal, left):
            for part in shares[name][number]:
                files[rank_of[part.file]].write(line)
        for file in files:
            file.finish()


def write_whole_certificate(source: Checkpoint, journal: Journal, out: Path) -> None:
    """Write the certificate of a merged checkpoint.

    Args:
        source: the same, as its ranks hold it.

    Raises:
        OutputError: if the disk refuses.
    """

    def lines() -> Iterator[bytes]:
        yield _line(_header(source, source.scheme.name, len(source.tensors)).to_json())
        for _, _, line in _tensor_lines(journal, {(name, 0) for name in source.tensors}):
            yield line

    write_file(out / CERTIFICATE_NAME, lines())


def rank_certificate_header(source: Checkpoint, layout: ShardedLayout, rank: int) -> CertificateHeader:
    """First line of a rank's certificate."""
    return _header(source, f"rank {rank} of {layout.grid}", len(layout.held_by(rank)))


def _header(source: Checkpoint, target: str, tensors: int) -> CertificateHeader:
    return CertificateHeader(
        tool_version=v4quant.__version__,
        source_id=source.source_id(),
        source_format=source.scheme.name,
        target=target,
        config_sha256=hashlib.sha256(source.config_bytes).hexdigest(),
        tensors=tensors,
    )


def _tensor_lines(journal: Journal, expected: set[tuple[str, int]]) -> Iterator[tuple[str, int, bytes]]:
    """Name, number of the share, and certificate line of each of the journal's tensors.

    Args:
        expected: names and numbers, each of which must come once.

    Raises:
        OutputError: if they do not.
    """
    left = set(expected)
    for entry in journal.objects():
        if not isinstance(entry, dict) or "tensor" not in entry:
            continue
        name, number = entry["tensor"], entry.pop("share", None)
        if not isinstance(name, str) or type(number) is not int or (name, number) not in left:
            raise _damaged(journal, f"has no expected line of {str(name)[:200]!a}, share {str(number)[:20]!a}")
        left.remove((name, number))
        yield name, number, _line(entry)
    if left:
        raise _damaged(journal, f"has no line of {min(left)[0]}, and of {len(left) - 1:,} more")


def _damaged(journal: Journal, what: str) -> OutputError:
    return OutputError(
        f"{journal.path}: {what}", hint="The journal was edited or damaged; remove the folder and start again."
    )


def _line(entry: dict[str, object]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
