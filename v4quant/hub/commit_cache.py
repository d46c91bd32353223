"""What was read of a commit, kept on disk: a commit never changes, so it need not be asked for twice.

    HF_HOME/v4quant/<endpoint and repository, hashed>/<commit>/<name, hashed>   sha256 of the rest | the rest

Only small things: the listing, config, index and headers. Losing the cache costs a few requests.
"""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from huggingface_hub import constants

_HASH_BYTES = 32


class CommitCache:
    """The kept bytes of one commit."""

    def __init__(self, endpoint: str, repo_id: str, commit: str) -> None:
        place = hashlib.sha256(f"{endpoint}\0{repo_id}".encode()).hexdigest()[:32]
        self._folder = Path(constants.HF_HOME) / "v4quant" / place / commit

    def get(self, name: str) -> bytes | None:
        """What was kept under a name; None where nothing was, or it is damaged."""
        with contextlib.suppress(OSError):
            kept = self._path(name).read_bytes()
            if hashlib.sha256(kept[_HASH_BYTES:]).digest() == kept[:_HASH_BYTES]:
                return kept[_HASH_BYTES:]
        return None

    def put(self, name: str, data: bytes) -> None:
        """Keep bytes under a name; a disk that refuses is no reason to fail."""
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self._folder)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(hashlib.sha256(data).digest() + data)
                Path(temporary).replace(self._path(name))
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise

    def _path(self, name: str) -> Path:
        return self._folder / hashlib.sha256(name.encode()).hexdigest()[:32]
