"""Bytes of a file on the Hub by range, over HTTP: pinned to a commit, continued where it broke, checked on the way.

The endpoint answers for a large file with a redirect to a storage host and a signed URL. That URL is kept and asked
again, without the token, until it expires; so a thousand ranges of a file cost the endpoint one request.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from urllib.parse import urljoin

import httpx2
from huggingface_hub import get_session, hf_hub_url
from huggingface_hub.utils._http import hf_raise_for_status

from v4quant.errors import HubError
from v4quant.hub.client import Hub, origin
from v4quant.hub.errors import hub_errors, scrubbed
from v4quant.hub.listing import Listing, RemoteFile
from v4quant.hub.retry import RETRY_STATUS, Patience

_MAX_REDIRECTS = 8
# No data for so many seconds, and the connection counts as broken.
_TIMEOUT = httpx2.Timeout(30.0, connect=20.0)
# The last where huggingface_hub, in another thread that cannot connect, closes the client that all share.
_PASSING = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError, RuntimeError)


class _TryAgainError(Exception):
    """A failure that may pass."""

    def __init__(self, why: str, retry_after: str | None = None) -> None:
        super().__init__(why)
        self.retry_after = retry_after


class Ranges:
    """Reads files of one commit by range; safe from any thread.

    Attributes:
        bytes_fetched: bytes of content that arrived so far.
    """

    def __init__(self, hub: Hub, listing: Listing) -> None:
        self._hub = hub
        self._listing = listing
        self._storage_urls: dict[str, str] = {}
        self._lock = threading.Lock()
        self.bytes_fetched = 0

    def fetch(self, file: RemoteFile, start: int, stop: int, take: Callable[[bytes], None]) -> None:
        """Get bytes [start, stop) of a file, in order and exactly once, whatever breaks on the way.

        Args:
            take: given the bytes as they arrive.

        Raises:
            HubError: if they cannot be had, or what arrives is not what the listing promised.
        """
        patience, done = Patience(f"{self._listing}: {file.name}"), start
        while done < stop:
            try:
                with hub_errors(f"{self._listing}: {file.name}"), self._open(file, done, stop) as response:
                    for chunk in _whole_chunks(response):
                        if done + len(chunk) > stop:
                            raise HubError(
                                f"{self._listing}: {file.name}: the Hub sends more bytes than it was asked for"
                            )
                        take(chunk)
                        done += len(chunk)
                        patience.progress()
                        with self._lock:
                            self.bytes_fetched += len(chunk)
                if done < stop:
                    raise _TryAgainError(f"ends after {done:,} of {stop:,} bytes")
            except _TryAgainError as error:
                patience.wait(str(error), error.retry_after)

    @contextlib.contextmanager
    def _open(self, file: RemoteFile, start: int, stop: int) -> Iterator[httpx2.Response]:
        """A response whose body is the range.

        Raises:
            _TryAgainError: for what may pass.
            HubError: for what will not.
        """
        kept = self._storage_urls.get(file.name)
        url = kept or hf_hub_url(
            self._listing.repo_id, file.name, revision=self._listing.commit, endpoint=self._hub.endpoint
        )
        for _ in range(_MAX_REDIRECTS):
            headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}
            if self._hub.is_endpoint(url):
                headers |= self._hub.headers()
            with contextlib.ExitStack() as stack:
                try:
                    stream = get_session().stream("GET", url, headers=headers, follow_redirects=False, timeout=_TIMEOUT)
                    response = stack.enter_context(stream)
                except _PASSING as error:
                    raise _TryAgainError(_named(error)) from error
                if response.has_redirect_location:
                    url = self._next(file, url, response)
                    continue
                if url == kept and response.status_code in (401, 403, 404, 410):
                    self._storage_urls.pop(file.name, None)  # another thread may have found it expired, too
                    raise _TryAgainError("the storage's URL has expired")
                self._require_range(file, response, start, stop)
                yield response
                return
        raise HubError(f"{self._listing}: {file.name}: redirected more than {_MAX_REDIRECTS} times")

    def _next(self, file: RemoteFile, url: str, response: httpx2.Response) -> str:
        """Where a redirect leads; kept if that is off the endpoint."""
        target = urljoin(url, response.headers["Location"])
        found = origin(target)
        if found is None or (url.startswith("https:") and found[0] == "http"):
            raise HubError(f"{self._listing}: {file.name}: redirected to {scrubbed(target)!r}, expected https")
        if not self._hub.is_endpoint(target):
            self._storage_urls[file.name] = target
        return target

    def _require_range(self, file: RemoteFile, response: httpx2.Response, start: int, stop: int) -> None:
        where, status = f"{self._listing}: {file.name}", response.status_code
        if status in RETRY_STATUS:
            raise _TryAgainError(f"the Hub fails ({status})", response.headers.get("Retry-After"))
        if status not in (200, 206):
            if status == 416:
                raise HubError(
                    f"{where}: the Hub has no bytes {start:,} to {stop:,} of it, though it lists {file.size:,}"
                )
            hf_raise_for_status(response)
            raise HubError(f"{where}: the Hub answers {status}, expected the file")
        commit = response.headers.get("X-Repo-Commit", self._listing.commit)
        if commit != self._listing.commit:
            raise HubError(f"{where}: the Hub answers from commit {scrubbed(commit)}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise HubError(f"{where}: comes compressed, expected bytes as stored")
        expected = f"bytes {start}-{stop - 1}/{file.size}"
        found = response.headers.get("Content-Range", "") if status == 206 else f"bytes 0-{file.size - 1}/{file.size}"
        if found != expected:
            raise HubError(f"{where}: comes as {scrubbed(found)!r}, expected {expected!r}")
        length = response.headers.get("Content-Length")
        if length is not None and length != str(stop - start):
            raise HubError(f"{where}: comes with {scrubbed(length)} bytes, expected {stop - start:,}")


def _whole_chunks(response: httpx2.Response) -> Iterator[bytes]:
    """The body, until it ends or breaks.

    Raises:
        _TryAgainError: where it breaks.
    """
    chunks = response.iter_raw()  # as they come: what is gathered into larger ones is lost where the body breaks
    while True:
        try:
            chunk = next(chunks, b"")
        except _PASSING as error:
            raise _TryAgainError(_named(error)) from error
        if not chunk:
            return
        yield chunk


def _named(error: Exception) -> str:
    return scrubbed(f"{type(error).__name__}: {error}")
