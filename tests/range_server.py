"""A server of byte ranges on loopback whose next answers can be made to fail, one way or another, on purpose.

`http://127.0.0.1:PORT/BUCKET/KEY` answers GET and HEAD, with ranges, from a dictionary; the clients of S3, Google Cloud
Storage and Azure ask for the same (signatures are not looked at). `fail(fault, times)` spoils the next GETs:

    error 500 / slow down 503 / too many 429 / missing 404 / denied 403       an answer of that status
    stalled      headers and half the body, then nothing until `release`
    truncated    headers of the whole body, half of it, then the connection is closed
    short        206 of half the range, headers consistent with that
    whole        the range ignored: 200 and the whole object
    flipped      one bit of the body is wrong
    shifted      206 of a range beside the one that was asked for, and says so
    unlabelled   206 without Content-Range
    compressed   the body by gzip, with Content-Encoding
    redirected   302 to the same path at `elsewhere`
"""

from __future__ import annotations

import gzip
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

STATUS = {
    "error 500": (500, "InternalError"),
    "slow down 503": (503, "SlowDown"),
    "too many 429": (429, "TooManyRequests"),
    "missing 404": (404, "NoSuchKey"),
    "denied 403": (403, "AccessDenied"),
}


class RangeServer:
    """Serves `objects` (path without the leading slash -> bytes). Use as a context manager."""

    def __init__(self, objects: dict[str, bytes], *, latency_s: float = 0.0) -> None:
        self.objects = objects
        self.latency_s = latency_s
        self.requests: list[tuple[str, int, int]] = []  # path, begin, end of every ranged GET that came
        self.addresses: list[str] = []  # of every request, with its query and its referrer
        self.elsewhere = ""
        self.etag = "1"
        self._faults: list[str] = []
        self._always: str | None = None
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(self, fault: str, times: int | None = 1) -> None:
        """The next `times` GETs (all of them, if None) are answered with `fault`."""
        with self._lock:
            if times is None:
                self._always = fault
            else:
                self._faults += [fault] * times

    def heal(self) -> None:
        with self._lock:
            self._faults, self._always = [], None

    def release(self) -> None:
        """Let go of answers that are stalled."""
        self._released.set()

    def __enter__(self) -> RangeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()

    def _next_fault(self) -> str | None:
        with self._lock:
            return self._faults.pop(0) if self._faults else self._always

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or a body waits 40 ms for the receipt of its headers

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer(None, body=False)

            def do_GET(self) -> None:
                self._answer(server._next_fault(), body=True)

            def _answer(self, fault: str | None, body: bool) -> None:
                try:
                    self._send(fault, body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def _send(self, fault: str | None, body: bool) -> None:
                path = unquote(self.path.split("?")[0]).lstrip("/")
                server.addresses.append(f"{self.path} {self.headers.get('Referer', '')}")
                if fault == "redirected":
                    self.send_response(302)
                    self.send_header("Location", f"{server.elsewhere}/{path}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if server.latency_s:
                    time.sleep(server.latency_s)
                data = server.objects.get(path)
                if fault in STATUS or data is None:
                    status, code = STATUS[fault if fault in STATUS else "missing 404"]
                    text = f"<Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()
                    self._head(status, len(text))
                    self.wfile.write(text if body else b"")
                    return
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if asked is None or fault == "whole":
                    packed = fault == "compressed"
                    data = gzip.compress(data) if packed else data
                    self._head(200, len(data), packed=packed)
                    self.wfile.write(data if body else b"")
                    return
                begin, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
                server.requests.append((path, begin, end))
                if fault == "short":
                    end = begin + (end - begin) // 2
                if fault == "shifted":
                    begin, end = begin + 1, end + 1
                part = bytearray(data[begin:end])
                if fault == "flipped":
                    part[len(part) // 3] ^= 4
                if fault == "compressed":
                    part = bytearray(gzip.compress(part))
                named = f"bytes {begin}-{end - 1}/{len(data)}" if fault != "unlabelled" else None
                self._head(206, len(part), named, packed=fault == "compressed")
                if fault in ("stalled", "truncated"):
                    self.wfile.write(part[: len(part) // 2])
                    self.wfile.flush()
                    if fault == "stalled":
                        server._released.wait(30)
                    self.close_connection = True
                    return
                self.wfile.write(part)

            def _head(
                self, status: int, num_bytes: int, content_range: str | None = None, *, packed: bool = False
            ) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(num_bytes))
                self.send_header("ETag", f'"{server.etag}"')
                if packed:
                    self.send_header("Content-Encoding", "gzip")
                self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
                if content_range is not None:
                    self.send_header("Content-Range", content_range)
                self.send_header("Accept-Ranges", "bytes")
                self.end_headers()

        return Handler
