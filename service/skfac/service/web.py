"""The HTTP side of a server: metrics for Prometheus, and pages for people."""

import contextlib
import logging
import math
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, MetricsHandler

logger = logging.getLogger(__name__)

CONNECTIONS = 32
"""Connections at once; more are closed without an answer."""

CONNECTION_S = 10.0
"""How long a connection, which carries one request, may take in all."""

_LOOKS_EVERY_S = 0.1  # whether it is to stop, and whose time is over

_EVERY_ANSWER = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True)
class Answer:
    """What a path is answered with.

    Attributes:
        content_type: Of the body.
        body: Its bytes.
        headers: More of them.
    """

    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class WebServer(ThreadingHTTPServer):
    """Serves `/metrics` and other paths on threads of its own until `close`.

    Slow and many clients hold threads of this server only: a bounded number of them,
    each for a bounded time.

    Args:
        host: Name or address to listen on.
        port: 0 picks a free one; `server_port` tells it.
        registry: What `/metrics` tells.
        pages: What makes the answer, by path.

    Raises:
        OSError: If the address cannot be bound.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        pages: Mapping[str, Callable[[], Answer]],
    ) -> None:
        self.pages = pages
        self._lock = threading.Lock()
        self._ends_s: dict[object, float] = {}  # by socket
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)
        self.address_family, *_, address = found[0]
        handler = type("Handler", (_Handler,), {"registry": registry})
        super().__init__((str(address[0]), int(address[1])), handler)
        self._thread = threading.Thread(
            target=partial(self.serve_forever, _LOOKS_EVERY_S),
            name="skfac-web",
            daemon=True,
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and cut the connections there are."""
        self.shutdown()
        self._thread.join()
        self._cut(math.inf)
        self.server_close()

    def server_bind(self) -> None:
        """Bind, without asking a name server who this machine is."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def verify_request(self, request: object, client_address: object) -> bool:
        """Take a connection, unless there are too many.

        Returns:
            Whether it was taken.
        """
        with self._lock:
            if len(self._ends_s) >= CONNECTIONS:
                return False
            self._ends_s[request] = time.monotonic() + CONNECTION_S
            return True

    def service_actions(self) -> None:
        """Cut the connections whose time is over; called every `_LOOKS_EVERY_S`."""
        self._cut(time.monotonic())

    def shutdown_request(self, request: object) -> None:
        """Close a connection."""
        with self._lock:
            self._ends_s.pop(request, None)
        super().shutdown_request(request)  # type: ignore[arg-type]

    def handle_error(self, request: object, client_address: object) -> None:
        """Log what is a bug; a connection that broke is none."""
        if not isinstance(sys.exception(), OSError):
            logger.exception("A request from %s failed.", client_address)

    def _cut(self, now_s: float) -> None:
        with self._lock:
            for connection, end_s in self._ends_s.items():
                if end_s <= now_s:
                    assert isinstance(connection, socket.socket)
                    with contextlib.suppress(OSError):  # its thread notices and closes
                        connection.shutdown(socket.SHUT_RDWR)


class _Handler(MetricsHandler):
    server: WebServer
    timeout = CONNECTION_S

    def do_GET(self) -> None:  # noqa: N802  # the name that http.server looks for
        path = urlsplit(self.path).path
        page = self.server.pages.get(path)
        if page is not None:
            self._send(HTTPStatus.OK, page())
        elif path == "/metrics":
            super().do_GET()
        else:
            there = ", ".join(("/metrics", *self.server.pages))
            text = f"There is no such page here. There are: {there}\n"
            self._send(HTTPStatus.NOT_FOUND, Answer("text/plain", text.encode()))

    def _send(self, status: HTTPStatus, answer: Answer) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{answer.content_type}; charset=utf-8")
        self.send_header("Content-Length", str(len(answer.body)))
        for name, value in {**_EVERY_ANSWER, **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    def version_string(self) -> str:
        return "skfac"
