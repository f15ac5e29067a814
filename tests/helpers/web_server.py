"""A real HTTP server of a folder on the loopback that misbehaves on command.

    with serve(folder) as server:
        server.statuses += [500, 503, 429]      # answers of the next requests for tars
        open_manifest(server.url + "/train", folder=cache)

As a program it serves a folder until it is killed, and prints its port: `python -m
tests.helpers.web_server FOLDER [BYTES_A_SECOND]`.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PIECE = 2**14


class Server(ThreadingHTTPServer):
    """``served`` counts the bytes of the bodies that went out, ``asked`` the requests, both by file
    name.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, *, suffix: str = ".tar") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.suffix, self.url = folder, suffix, f"http://127.0.0.1:{self.server_port}"
        self.served: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.order: list[str] = []  # names, as they were first asked for
        # what goes wrong, for names that end in `suffix`
        self.statuses: list[int] = []  # of the next answers, one each
        self.drops: list[
            int
        ] = []  # the next answers end after these many bytes of their body, one each
        self.pause_at: int | None = (
            None  # bytes of a file after which no more come until this is None again
        )
        self.rate = 0  # bytes a second of each answer; 0 for as fast as it goes
        self.hangs = 0  # the next answers never come
        self.ranges = True  # else every answer is the whole file
        self.gone = False  # no answers at all, as if there were no server
        self.files: dict[str, bytes] = {}  # by path, in place of those of the folder

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that go away are what the tests are about."""


class Handler(BaseHTTPRequestHandler):
    """One request. Bytes are counted as they leave."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer, or fail as told."""
        server, name = self.server, self.path.partition("?")[0].rpartition("/")[2]
        if server.gone:
            self.close_connection = True
            return
        if name not in server.asked:
            server.order.append(name)
        server.asked[name] += 1
        chosen = name.endswith(server.suffix)
        if chosen and server.hangs:
            server.hangs -= 1
            time.sleep(20)
            self.close_connection = True
            return
        if chosen and server.statuses:
            self._status(server.statuses.pop(0))
            return
        place = self.path.partition("?")[0].lstrip("/")
        if place not in server.files and not (server.folder / place).is_file():
            self._status(404)
            return
        data = (
            server.files[place] if place in server.files else (server.folder / place).read_bytes()
        )
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span and server.ranges:
            first, last = int(span[1]), min(int(span[2]), len(data) - 1)
            if first >= len(data):
                self._status(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self._body(
            name, data, ends=server.drops.pop(0) if chosen and server.drops else None, chosen=chosen
        )

    def _body(self, name: str, data: bytes, *, ends: int | None, chosen: bool) -> None:
        for first in range(0, len(data), PIECE):
            piece = data[first : first + PIECE]
            if ends is not None and first + len(piece) > ends:
                self.wfile.write(piece[: ends - first])
                self.server.served[name] += ends - first
                self.close_connection = True
                self.connection.close()
                return
            while (
                chosen
                and self.server.pause_at is not None
                and self.server.served[name] >= self.server.pause_at
            ):
                time.sleep(0.005)
            if chosen and self.server.rate:
                time.sleep(len(piece) / self.server.rate)
            self.wfile.write(piece)
            self.server.served[name] += len(piece)

    def _status(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


def eventually(what: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Return when ``what`` is true: an event that must come, however busy the machine is."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def serve(folder: Path, *, suffix: str = ".tar") -> Iterator[Server]:
    """Yield a running server of ``folder``; what goes wrong does so for files whose names end in
    ``suffix``.
    """
    server = Server(folder, suffix=suffix)
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    ).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    with Server(Path(sys.argv[1])) as forever:
        forever.rate = int(sys.argv[2]) if len(sys.argv) > 2 else 0
        print(forever.server_port, flush=True)
        forever.serve_forever()
