"""One or more servers that share the layers of a trainer."""

import logging
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from skfac.client.capture import PendingSnapshot
from skfac.client.layer_map import LayerMap
from skfac.client.link import Link
from skfac.client.step_log import StepLog
from skfac.client.store import Store
from skfac.client.targets import Lookout, Names
from skfac.client.transport import Transport
from skfac.client.world import World
from skfac.wire.session import SessionSpec
from skfac.wire.state import LayerState, SessionState

logger = logging.getLogger(__name__)


class Connect(Protocol):
    """Starts the transport of a target."""

    def __call__(self, target: str, *, link: Link) -> Transport:
        """Start it; `link` takes what it reports."""


@dataclass(frozen=True, eq=False)
class _Server:
    number: int  # in the store; no two servers of a run have the same
    target: str
    transport: Transport


class Servers:
    """The transports of all servers, and the layers that each of them has.

    Every server has a session with all layers, and gets the rows of its own. All ranks
    use one map: it follows from the servers that the names stand for on every rank, and
    from what every rank can reach, both of which they agree on at each snapshot. A
    server that has left is kept until it owes nothing.

    Attributes:
        targets: Of the servers.
        changes: How often servers came or went.
    """

    def __init__(
        self,
        targets: Sequence[str],
        spec: SessionSpec,
        world: World,
        store: Store,
        log: StepLog,
        connect: Connect,
        lookout: tuple[Names, float] | None = None,
    ) -> None:
        self.targets = tuple(targets)
        self.changes = 0
        self._spec = spec
        self._world = world
        self._store = store
        self._log = log
        self._connect = connect
        self._servers: list[_Server] = []
        self._leaving: list[_Server] = []
        self._past: Counter[str] = Counter()  # of servers that have left
        self._goodbyes: list[threading.Thread] = []
        self._numbers = 0
        self._said = False
        self._lookout: Lookout | None = None
        self._owner = os.getpid()
        try:
            self._servers = [self._start(target) for target in targets]
        except BaseException:
            self.close()
            raise
        self._map = LayerMap(spec.layers, self.targets)
        self._assigned = self._owners([True] * len(targets))
        self._offered = self.targets  # what this rank last told the others
        if lookout is not None and lookout[0].moving:
            names, every_s = lookout
            self._lookout = Lookout(
                names, self.targets, every_s, self._is_one_down, self._look_for_gone
            )

    def empty(self, layer: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Make memory for the rows of a layer, where they can be sent from.

        Returns:
            A tensor on the CPU, of any content.
        """
        return self._assigned[layer].transport.empty(shape, dtype)

    def push(self, snapshot: PendingSnapshot) -> None:
        """Send each server its layers and return at once; all ranks do it together."""
        together = self._world.size > 1  # a version is used by all ranks or none
        reachable = [True]
        if together or self._lookout is not None or len(self._servers) > 1:
            reachable = self._agree()
            self._assigned = self._owners(reachable)
        numbers = [server.number for server in self._assigned]
        self._store.expect(snapshot.step, numbers, hoped=any(reachable))
        self._say_if_doubted(any(reachable))
        self._log.captured(snapshot.step, numbers, self._spec.versions_in_flight)
        for server in self._servers:
            own = self._layers_of(server)
            if own:
                report = self._log.report(server.number, own)
                server.transport.push(snapshot.only(own, report))
        self._log.clear()
        self._let_go()

    def _say_if_doubted(self, hoped: bool) -> None:
        if not hoped and any(self._store.links) and not self._said:
            logger.warning(
                "Another rank cannot reach %s: no version is used or waited for "
                "meanwhile.",
                ", ".join(self.targets),
            )
        self._said = not hoped

    def export_state(self, timeout_s: float) -> SessionState | None:
        """Copy what the servers keep of earlier updates.

        Returns:
            The histories of all layers, each from the server that has it now; None if
            a server gave none in time.
        """
        layers: list[LayerState] = []
        for server in self._servers:
            own = self._layers_of(server)
            state = server.transport.export_state(timeout_s) if own else None
            if own and state is None:
                return None
            layers += (s for s in (state.layers if state else ()) if s.layer in own)
        return SessionState(tuple(sorted(layers, key=lambda state: state.layer)))

    def import_state(self, state: SessionState, timeout_s: float) -> bool:
        """Let the servers go on from exported histories, each with its own layers.

        Returns:
            Whether all do.
        """
        done = []
        for server in self._servers:
            own = self._layers_of(server)
            layers = tuple(s for s in state.layers if s.layer in own)
            done.append(server.transport.import_state(SessionState(layers), timeout_s))
        return all(done)

    def counts(self) -> Mapping[str, int]:
        """Count what went over all links.

        Returns:
            Sums over the servers, those that have left among them.
        """
        total = Counter(self._past)
        for server in [*self._servers, *self._leaving]:
            total.update(server.transport.counts())
        return dict(total)

    def describe(self) -> dict[str, Any]:
        """Describe the servers.

        Returns:
            `servers`, `server_changes` and `lookup_failures`, as
            `Preconditioner.report` describes them.
        """
        servers = {
            server.target: {"connected": up, "layers": len(self._layers_of(server))}
            for server, up in zip(self._servers, self._store.links, strict=True)
        }
        return {
            "servers": servers,
            "server_changes": self.changes,
            "lookup_failures": self._lookout.failures if self._lookout else 0,
        }

    def close(self) -> None:
        """Leave all sessions and end all threads; idempotent.

        In a forked child there are no threads, and the sessions are the parent's.
        """
        if os.getpid() != self._owner:
            return
        if self._lookout is not None:
            self._lookout.close()
        for server in [*self._servers, *self._leaving]:
            server.transport.close()
        for goodbye in self._goodbyes:
            goodbye.join()

    # ---------------------------------------------------------------- the map

    def _owners(self, reachable: Sequence[bool]) -> list[_Server]:
        return [self._servers[index] for index in self._map.at(reachable)]

    def _layers_of(self, server: _Server) -> list[int]:
        return [layer for layer, owner in enumerate(self._assigned) if owner is server]

    def _agree(self) -> list[bool]:
        # Which servers every rank can reach, once they have agreed on the servers.
        view = self._offered if self._lookout is None else self._lookout.view
        unchanged, *reachable = self._world.agree(
            [view == self._offered, *self._store.links]
        )
        if unchanged:
            return reachable
        self._offered = view
        views = [text.split("\n") for text in self._world.gather("\n".join(view))]
        common = tuple(t for t in views[0] if all(t in other for other in views))
        if not common:
            logger.warning("The ranks have found no server in common.")
        elif set(common) != set(self.targets):
            return self._change(common, dict(zip(self.targets, reachable, strict=True)))
        return reachable

    def _change(
        self, targets: tuple[str, ...], reachable: dict[str, bool]
    ) -> list[bool]:
        # A new server is reached by nobody yet: it gets layers at a later snapshot.
        logger.info("The servers are now %s.", ", ".join(targets))
        kept = [server for server in self._servers if server.target in targets]
        for server in self._servers:
            if server not in kept:
                self._store.retire(server.number)
                self._leaving.append(server)
        new = [self._start(target) for target in targets if target not in reachable]
        self._servers = kept + new  # by number, as the store's links
        self.targets = tuple(server.target for server in self._servers)
        self.changes += 1
        self._map = LayerMap(self._spec.layers, self.targets)
        return [reachable.get(target, False) for target in self.targets]

    def _start(self, target: str) -> _Server:
        number, self._numbers = self._numbers, self._numbers + 1
        link = self._store.link(number, self._log)
        transport = self._connect(target, link=link)
        return _Server(number, target, transport)

    def _let_go(self) -> None:
        for server in [s for s in self._leaving if not self._store.owes(s.number)]:
            self._leaving.remove(server)
            self._past.update(server.transport.counts())
            # It says goodbye over the network: not in the trainer's time.
            goodbye = threading.Thread(
                target=server.transport.close, name="skfac-goodbye", daemon=True
            )
            goodbye.start()
            self._goodbyes = [t for t in self._goodbyes if t.is_alive()] + [goodbye]

    # ---------------------------------------------------------------- the lookout

    def _is_one_down(self) -> bool:
        return not all(self._store.links)

    def _look_for_gone(self, view: tuple[str, ...]) -> None:
        gone = [server.number for server in self._servers if server.target not in view]
        self._store.give_up_on(gone)
