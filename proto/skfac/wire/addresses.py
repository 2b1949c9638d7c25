"""What an address says: who can reach it, and whether one can listen there."""

import errno
import ipaddress
import socket
from pathlib import Path


def has_port(address: str) -> bool:
    """Tell whether a server can be found, or listen, at an address.

    Args:
        address: `host:port`, `[v6]:port` or `unix:path`.

    Returns:
        Whether it is a Unix socket, or ends with a port from 0 to 65535.
    """
    _, colon, port = address.rpartition(":")
    return address.startswith("unix:") or (
        bool(colon) and port.isdecimal() and int(port) < 65536
    )


def why_not_bound(address: str) -> str | None:
    """Find out why nobody can listen on an address, which gRPC does not tell.

    Args:
        address: As `has_port` takes.

    Returns:
        What the system says and what helps; None if one can listen there.
    """
    try:
        if address.startswith("unix:"):
            path = _path(address)
            with socket.socket(socket.AF_UNIX) as probe:
                probe.bind(path)
            Path(path).unlink()
            return None
        host, _, port = address.rpartition(":")
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        for family, kind, protocol, _, where in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(where)
    except OSError as error:
        way_out = " Choose another; port 0 picks a free one."
        busy = error.errno == errno.EADDRINUSE and not address.startswith("unix:")
        return f"{error.strerror or error}.{way_out if busy else ''}"
    return None


def why_taken(address: str) -> str | None:
    """Find out whether another server listens at a Unix socket, which gRPC replaces.

    Args:
        address: As `has_port` takes.

    Returns:
        That one does; None if not, or if it is no Unix socket.
    """
    if not address.startswith("unix:"):
        return None
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(_path(address))
        except OSError:
            return None  # nobody, or nothing that can be asked
    return "Another server listens there. Stop it first, or choose another path."


def _path(address: str) -> str:
    return address.removeprefix("unix:").removeprefix("//")


def is_local(address: str) -> bool:
    """Tell whether only processes of this machine can reach an address.

    Args:
        address: `host:port`, `[v6]:port` or `unix:path`.

    Returns:
        True for Unix sockets, loopback addresses and `localhost`.
    """
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
