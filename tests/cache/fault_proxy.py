"""An HTTP proxy in front of a storage server that does on purpose what networks do now and then.

Which request meets which fault is decided by its method, its path and how often that came before, not by threads or
clocks, so the same seed gives the same faults. Nothing here knows kdcache.

    with FaultProxy("http://127.0.0.1:5000", at_random({Fault.ERROR: 0.1, Fault.ZEROS: 0.02}, seed=1)) as proxy:
        ...  # talk to proxy.url; proxy.counts says what was done
"""

import hashlib
import http.client
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-connection"}
# An object store's answers to a good read; other bodies are its protocol and not content.
_WITH_CONTENT = {200, 206}


class Fault(Enum):
    """What can be done to one request."""

    ERROR = "503 instead of an answer, the request not passed on"
    RESET = "the connection is reset in the middle of the body; a write has been carried out"
    TRUNCATED = "the connection ends before the stated length"
    SHORT = "half of the body, and that length stated"
    ZEROS = "as many zero bytes"
    OTHER = "as many other bytes"
    LONG = "more bytes than there are"


@dataclass(frozen=True)
class Call:
    """A request: its method, its path without the query, and how often the same came before."""

    method: str
    path: str
    before: int


def never(call):
    """No fault at all."""
    return None


def at_random(rates, *, seed):
    """Faults at the given rates. Bad bodies concern reads alone."""

    def choose(call):
        digest = hashlib.sha256(f"{seed} {call.method} {call.path} {call.before}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2.0**64
        for fault, rate in rates.items():
            place -= rate
            if place < 0:
                return fault if call.method == "GET" or fault in (Fault.ERROR, Fault.RESET) else None
        return None

    return choose


class FaultProxy:
    """A reverse proxy on loopback; ``choose`` may be replaced at any time.

    Args:
        target: the server behind it, as ``http://host:port``.
        choose: the fault of a `Call`, or None.
    """

    def __init__(self, target, choose=never):
        self.target = urlsplit(target)
        self.choose = choose
        self.counts = Counter()
        self.calls = []
        self._lock = threading.Lock()
        self._seen = Counter()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fault(self, method, path):
        """Count a request and say what is to be done to it."""
        with self._lock:
            call = Call(method, path, self._seen[method, path])
            self._seen[method, path] += 1
            self.calls.append(call)
            fault = self.choose(call)
            return fault

    def count(self, fault):
        """Remember what was done."""
        with self._lock:
            self.counts[fault] += 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """Clients that hang up are none of our business."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultProxy

    def log_message(self, *arguments):
        """Silent."""

    def _serve(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.owner.fault(self.command, urlsplit(self.path).path)
        if fault is Fault.ERROR:
            self.owner.count(fault)
            self._answer(503, [("Content-Type", "text/plain")], b"try later")
            return
        status, headers, content = self._forward(body)
        reads = self.command == "GET" and status in _WITH_CONTENT and content
        if fault is Fault.RESET and (reads or self.command in ("PUT", "POST", "DELETE")):
            self.owner.count(fault)
            self._head(status, headers, max(1, len(content)))
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._hang_up()
            return
        if fault in (None, Fault.RESET) or not reads:
            self._answer(status, headers, content)
            return
        self.owner.count(fault)
        # Not every store states checksums of its own; what is tested is whether the reader needs them.
        headers = [(k, v) for k, v in headers if not k.lower().startswith("x-amz-checksum")]
        if fault is Fault.TRUNCATED:
            self._head(status, headers, len(content))
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self._hang_up()
            return
        changed = {
            Fault.SHORT: content[: len(content) // 2],
            Fault.ZEROS: bytes(len(content)),
            Fault.OTHER: bytes(b ^ 0x55 for b in content[:4096]) + content[4096:],
            Fault.LONG: content + bytes(4096),
        }[fault]
        self._answer(status, headers, changed)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_OPTIONS = _serve

    def _hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RD)
        # The file objects hold the socket open until they are closed too.
        for stream in (self.wfile, self.rfile, self.connection):
            stream.close()

    def _forward(self, body):
        target = self.owner.target
        upstream = http.client.HTTPConnection(target.hostname, target.port, timeout=30)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP | {"expect"}}
            upstream.request(self.command, self.path, body=body or None, headers=headers)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            upstream.close()

    def _head(self, status, headers, length):
        self.send_response_only(status)
        for key, value in headers:
            if key.lower() not in _HOP_BY_HOP | {"content-length", "content-encoding"}:
                self.send_header(key, value)
        if self.command == "HEAD":
            length = next((v for k, v in headers if k.lower() == "content-length"), "0")
        if status not in (204, 304):
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _answer(self, status, headers, content):
        self._head(status, headers, len(content))
        if self.command != "HEAD":
            self.wfile.write(content)
