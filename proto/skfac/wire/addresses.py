"""What an address says about who can reach it."""

import ipaddress


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
