"""One or more servers that share the layers of a trainer."""

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from skfac.client.capture import PendingSnapshot
from skfac.client.config import check_target
from skfac.client.handles import ActorTarget, is_handle
from skfac.client.layer_map import LayerMap
from skfac.client.store import Store
from skfac.client.transport import Transport, connect
from skfac.client.world import World
from skfac.wire.errors import ConfigurationError
from skfac.wire.session import SessionSpec
from skfac.wire.state import LayerState, SessionState

Target = str | Any | Sequence[str | Any]
"""What a trainer passes: one target, or a list of addresses or handles of actors."""

_DNS = "dns:///"


class Servers:
    """The transports of all servers, and the layers that each of them has.

    Every server has a session with all layers, and gets the rows of its own. All ranks
    use one map: it follows from what every rank can reach, which they agree on.

    Attributes:
        targets: Of the servers.
    """

    def __init__(
        self, targets: Sequence[str], spec: SessionSpec, world: World, store: Store
    ) -> None:
        self.targets = tuple(targets)
        self._world = world
        self._store = store
        self._map = LayerMap(spec.layers, targets)
        self._assigned = self._map.at([True] * len(targets))
        self._transports: list[Transport] = []
        try:
            for server, target in enumerate(targets):
                link = store.link(server)
                self._transports.append(connect(target, spec, world.rank, link))
        except BaseException:
            self.close()
            raise

    def empty(self, layer: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Make memory for the rows of a layer, where they can be sent from.

        Returns:
            A tensor on the CPU, of any content.
        """
        return self._transports[self._assigned[layer]].empty(shape, dtype)

    def push(self, snapshot: PendingSnapshot) -> None:
        """Send each server its layers and return at once; all ranks do it together."""
        if len(self._transports) > 1:
            self._assigned = self._map.at(self._world.agree(self._store.links))
        self._store.expect(snapshot.step, self._assigned)
        for server, transport in enumerate(self._transports):
            own = [i for i, owner in enumerate(self._assigned) if owner == server]
            if own:
                transport.push(snapshot.only(own))

    def export_state(self, timeout_s: float) -> SessionState | None:
        """Copy what the servers keep of earlier updates.

        Returns:
            The histories of all layers, each from the server that has it now; None if
            a server gave none in time.
        """
        states = [t.export_state(timeout_s) for t in self._transports]
        layers: list[LayerState] = []
        for server, state in enumerate(states):
            if state is None:
                return None
            own = (s for s in state.layers if self._assigned[s.layer] == server)
            layers += own
        return SessionState(tuple(sorted(layers, key=lambda state: state.layer)))

    def import_state(self, state: SessionState, timeout_s: float) -> bool:
        """Let the servers go on from exported histories, each with its own layers.

        Returns:
            Whether all do.
        """
        done = []
        for server, transport in enumerate(self._transports):
            own = (s for s in state.layers if self._assigned[s.layer] == server)
            done.append(transport.import_state(SessionState(tuple(own)), timeout_s))
        return all(done)

    def counts(self) -> Mapping[str, int]:
        """Count what went over all links.

        Returns:
            Sums over the servers.
        """
        total: Counter[str] = Counter()
        for transport in self._transports:
            total.update(transport.counts())
        return dict(total)

    def close(self) -> None:
        """Leave all sessions and end all threads; idempotent."""
        for transport in self._transports:
            transport.close()


def targets_of(target: Target, world: World) -> tuple[str, ...]:
    """Find the servers that a target stands for, the same on all ranks.

    Args:
        target: What the trainer passed; `dns:///name:port` stands for every address of
            the name.
        world: Rank 0 looks names up for all.

    Returns:
        One target a server.

    Raises:
        ConfigurationError: If there is none, one is no target, or a name is unknown.
    """
    several = isinstance(target, list | tuple)
    found: list[str] = []
    for one in target if several else [target]:
        name = ActorTarget.of(one) if is_handle(one) else one
        if isinstance(name, str) and name.startswith(_DNS):
            found += _resolved(name)
        else:
            found.append(name if isinstance(name, str) else check_target(name))
    shared = world.share("\n".join(dict.fromkeys(found)))
    if not shared:
        raise ConfigurationError("target is an empty list: name at least one server.")
    own = {name: name for name in found}  # handles are those of this process
    return tuple(own.get(name, name) for name in shared.split("\n"))


def _resolved(target: str) -> list[str]:
    host, _, port = target.removeprefix(_DNS).rpartition(":")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigurationError(f"{target!r} cannot be looked up: {error}.") from None
    addresses = sorted({str(address[4][0]) for address in found})
    return [f"[{a}]:{port}" if ":" in a else f"{a}:{port}" for a in addresses]
