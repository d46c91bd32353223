"""A Hub on loopback that speaks the protocol of the real one: API and files on one port, storage on another.

Two ports are two origins, as huggingface.co and its storage are. Every request is noted, and any can be made to fail:
by a status, a cut or altered body, a redirect, or by a callback that strikes at that very moment.
"""

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from tests.hub.api import Api, Reply
from tests.hub.repos import Store

TOKEN = "hf_testtokenAbCdEfGhIjKlMnOpQrStUv"
READER = "hf_readertokenAbCdEfGhIjKlMnOpQr"


@dataclass
class Request:
    """A request as it came.

    Attributes:
        host: "hub" or "storage".
        path: without the query, unquoted; query, headers: as sent.
        sent: bytes of body that were answered.
    """

    host: str
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes = b""
    sent: int = 0

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")


@dataclass
class Fault:
    """How some requests fail.

    Attributes:
        method, path: of the requests that are meant; path is a regular expression.
        host: of the two.
        skip, times: let so many pass first; then strike so many.
        status, headers, body: answer this.
        cut: close the connection after so many bytes of the body.
        flip: alter this byte of the body.
        lost: do the work, but close the connection without an answer.
        strike: called first, with the request.
    """

    path: str
    method: str = "GET"
    host: str = "hub"
    skip: int = 0
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    cut: int | None = None
    flip: int | None = None
    lost: bool = False
    strike: Callable[[Request], None] | None = None

    def altered(self, body: bytes) -> bytes:
        """The body with a byte altered, or cut."""
        if self.flip is not None and self.flip < len(body):
            body = body[: self.flip] + bytes([body[self.flip] ^ 1]) + body[self.flip + 1 :]
        return body if self.cut is None else body[: self.cut]

    def meets(self, request: Request) -> bool:
        """True if this request is to fail; counts."""
        if (request.host, request.method) != (self.host, self.method) or not re.search(self.path, request.path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return self.times >= 0


class TestHub:
    """The two servers, what they hold, and what they were asked."""

    __test__ = False

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.page_size = 1_000
        self.multipart_bytes = 5 * 2**30
        self.users = {TOKEN: "me", READER: "reader"}
        self.waits: list[float] = []  # seconds that clients would have slept
        self.before: Callable[[Request], None] | None = None
        self._lock = threading.Lock()
        self._servers = {host: _Server(("127.0.0.1", 0), host, self) for host in ("hub", "storage")}
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def url(self, host: str = "hub") -> str:
        return f"http://127.0.0.1:{self._servers[host].server_address[1]}"

    def close(self) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def asked(self, path: str, method: str | None = None, host: str | None = None) -> list[Request]:
        """The requests so far whose path matches."""
        return [
            request
            for request in self.requests
            if re.search(path, request.path) and method in (None, request.method) and host in (None, request.host)
        ]

    def sent(self) -> int:
        """Bytes of bodies that were answered so far."""
        return sum(request.sent for request in self.requests)

    def forget(self) -> None:
        """Begin to count anew."""
        self.requests.clear()
        self.faults.clear()

    def note(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            fault = next((fault for fault in self.faults if fault.meets(request)), None)
        if self.before is not None:
            self.before(request)
        if fault is not None and fault.strike is not None:
            fault.strike(request)
        return fault


@contextmanager
def running(folder: Path) -> Iterator[TestHub]:
    """A Hub for the time of a block."""
    hub = TestHub(folder)
    try:
        yield hub
    finally:
        hub.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], host: str, hub: TestHub) -> None:
        super().__init__(address, _Handler)
        self.host = host
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error of ours."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    disable_nagle_algorithm: ClassVar[bool] = True

    def _serve(self) -> None:
        hub = self.server.hub
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(
            self.server.host, self.command, parts.path, parse_qs(parts.query, keep_blank_values=True), headers
        )
        request.body = self._body(headers)
        fault = hub.note(request)
        if fault is not None and fault.status is not None:
            self._send(request, Reply(fault.status, fault.headers, fault.body), None)
            return
        with hub.store.lock:
            api = Api(hub.store, hub.users, hub.url(), hub.url("storage"), hub.page_size, hub.multipart_bytes)
            reply = api.answer(request.host, request.method, request.path, request.query, headers, request.body)
        if fault is not None and fault.lost:
            self._drop()
            return
        self._send(request, reply, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") == "chunked":
            parts: list[bytes] = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(headers.get("content-length", 0)))

    def _send(self, request: Request, reply: Reply, fault: Fault | None) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in reply.headers:
            self.send_header("Content-Length", str(reply.size))
        self.end_headers()
        if request.method == "HEAD":
            return
        pieces = reply.pieces()
        if fault is not None:
            pieces = iter([fault.altered(b"".join(pieces))])
        for piece in pieces:
            self.wfile.write(piece)
            request.sent += len(piece)
        if fault is not None and fault.cut is not None:
            self._drop()

    def _drop(self) -> None:
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, *_args: Any) -> None:
        """Say nothing."""
