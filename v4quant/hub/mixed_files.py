"""A folder whose shards lie on the Hub, as the files of one checkpoint."""

from pathlib import Path

from v4quant.checkpoint.files import Files, Source
from v4quant.hub.remote_files import RemoteFiles


class MixedFiles:
    """What is here is read here, the named rest from a repository. Implements Source.

    Attributes:
        where: the folder.
    """

    def __init__(self, local: Files, remote: RemoteFiles, names: set[str]) -> None:
        """Put a folder and files of a repository together.

        Args:
            names: the files that are read from the repository; those that it does not hold are missing.
        """
        self.where = local.where
        self._local = local
        self._remote = remote
        self._remote_names = {name for name in names if name in remote}
        self._names = sorted({name for name in local.names() if name not in names} | self._remote_names)

    def names(self) -> list[str]:
        """Relative paths of all files, sorted."""
        return list(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._source(name).size(name)

    def fingerprint(self, name: str) -> str:
        """What tells a file from a changed one without reading it."""
        return self._source(name).fingerprint(name)

    def noted_sha256(self, name: str) -> str | None:
        """The hash that the Hub lists of a file there."""
        return self._source(name).noted_sha256(name)

    def path(self, name: str) -> Path:
        """Absolute path of a file that is here.

        Raises:
            UsageError: if it is on the Hub.
        """
        return self._source(name).path(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read bytes [start, stop) of a file, all of it by default.

        Raises:
            V4QuantError: as the place that holds it.
        """
        return self._source(name).read(name, start, stop)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `start` on; safe from any thread.

        Raises:
            V4QuantError: as the place that holds it.
        """
        self._source(name).read_into(name, start, buffer)

    def require_unchanged(self, name: str) -> None:
        """Check that a file is still the one that was listed.

        Raises:
            V4QuantError: if it is not.
        """
        self._source(name).require_unchanged(name)

    def _source(self, name: str) -> Source:
        return self._remote if name in self._remote_names else self._local
