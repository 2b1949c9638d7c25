"""A name server on loopback whose answers a test changes while it runs."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dnslib import QTYPE, RR, A
from dnslib.server import DNSLogger, DNSServer

NAME = "skfac.test"


class Records:
    """The addresses of one name; none of any other."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = tuple(addresses)

    def resolve(self, request: Any, handler: Any) -> Any:
        """Answer a question."""
        reply = request.reply()
        name = str(request.q.qname).rstrip(".")
        if name == NAME and request.q.qtype == QTYPE.A:
            for address in self.addresses:
                reply.add_answer(RR(NAME, QTYPE.A, rdata=A(address), ttl=0))
        return reply


@contextmanager
def name_server(*addresses: str) -> Iterator[tuple[Records, str]]:
    """Answers for `NAME`; gives what to change, and where it listens."""
    records = Records(addresses)
    server = DNSServer(
        records, address="127.0.0.1", port=0, logger=DNSLogger("-request,-reply")
    )
    host, port = server.server.server_address
    server.start_thread()
    try:
        yield records, f"{host}:{port}"
    finally:
        server.stop()
        server.thread.join()
        server.server.server_close()


def free_port(*hosts: str) -> int:
    """A port that nobody listens on at any of some addresses."""
    while True:
        with socket.socket() as first:
            first.bind((hosts[0], 0))
            port: int = first.getsockname()[1]
            try:
                for host in hosts[1:]:
                    with socket.socket() as other:
                        other.bind((host, port))
            except OSError:
                continue
        return port
