"""Which server inverts which layers, the same on every rank that knows the same.

Costs are spread by longest processing time first: the most expensive layer goes to the
least loaded server. When a server is lost only its layers move, each to the server that
its name and theirs hash highest for; when it is back they return.

Sources: Graham, "Bounds on Multiprocessing Timing Anomalies", SIAM J. Appl. Math. 1969
(longest processing time); Thaler & Ravishankar, "Using Name-Based Mappings to Increase
Hit Rates", IEEE/ACM ToN 1998 (rendezvous hashing).
"""

import hashlib
from collections.abc import Sequence

from skfac.wire.session import LayerSpec


class LayerMap:
    """The layers of a session, spread over servers.

    Args:
        layers: Of the session.
        servers: Names of the servers, which decide ties and moves.
    """

    def __init__(self, layers: Sequence[LayerSpec], servers: Sequence[str]) -> None:
        self._layers = layers
        self._servers = servers
        self._home = [0] * len(layers)
        loads = [0] * len(servers)
        costs = list(map(_cost, layers))
        for index in sorted(range(len(layers)), key=lambda i: (-costs[i], i)):
            least = min(loads)
            tied = [server for server, load in enumerate(loads) if load == least]
            self._home[index] = home = self._highest(index, tied)
            loads[home] += costs[index]

    def at(self, reachable: Sequence[bool]) -> list[int]:
        """Assign all layers.

        Args:
            reachable: Whether each server can be reached.

        Returns:
            The server of each layer: its home where that can be reached, or if no
            server can.
        """
        there = [server for server, up in enumerate(reachable) if up]
        return [
            home if reachable[home] or not there else self._highest(index, there)
            for index, home in enumerate(self._home)
        ]

    def _highest(self, layer: int, servers: Sequence[int]) -> int:
        name = self._layers[layer].name
        return max(servers, key=lambda s: (_weight(self._servers[s], name), -s))


def _cost(layer: LayerSpec) -> int:
    # With n rows the n x n problem of a side costs about n² d; a diagonal costs little.
    return layer.groups * (layer.d_out if layer.diagonal else layer.d_in + layer.d_out)


def _weight(server: str, layer: str) -> bytes:
    return hashlib.blake2b(f"{server}\0{layer}".encode(), digest_size=8).digest()
