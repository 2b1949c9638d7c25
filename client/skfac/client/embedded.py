"""The same engine on a thread of the trainer's own process."""

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from skfac.client.capture import PendingSnapshot
from skfac.client.link import Link
from skfac.client.outbox import Outbox
from skfac.service.config import EngineConfig
from skfac.service.local_engine import LocalEngine
from skfac.wire.errors import ServiceError
from skfac.wire.session import SessionSpec
from skfac.wire.state import SessionState

logger = logging.getLogger(__name__)

_LOOK_AROUND_S = 60.0  # the subscription wakes by itself; this bounds a lost wake-up


class EmbeddedTransport:
    """A `Transport` without a network: one thread sends and one receives.

    The engine inverts on the device of the model; a GPU does so on a stream of its own.

    Raises:
        ServiceError: If the session is over a limit of the engine.
    """

    def __init__(self, spec: SessionSpec, link: Link, device: torch.device) -> None:
        self._link = link
        where = str(device) if device.type == "cuda" else "cpu"
        self._engine = LocalEngine(EngineConfig(device=where))
        try:
            self._session_id = self._engine.open_session(spec, rank=0).session_id
        except ServiceError:
            self._engine.close()
            raise
        self._subscription = self._engine.subscribe(self._session_id, link.held())
        self._outbox = Outbox(spec.versions_in_flight)
        self._stop = threading.Event()
        self._counts: Counter[str] = Counter(connects=1)
        self._threads = [
            threading.Thread(target=self._send, name="skfac-send", daemon=True),
            threading.Thread(target=self._receive, name="skfac-receive", daemon=True),
        ]
        link.set_link(up=True)
        for thread in self._threads:
            thread.start()

    def push(self, snapshot: PendingSnapshot) -> None:
        """Take a snapshot and return at once."""
        for step in self._outbox.put(snapshot):
            self._link.lose(step, "superseded", "The sender did not keep up.")

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Make memory for rows.

        Returns:
            A tensor on the CPU, of any content.
        """
        return torch.empty(tuple(shape), dtype=dtype)

    def export_state(self, timeout_s: float) -> SessionState | None:
        """Copy what the engine keeps of earlier updates; it takes no time.

        Returns:
            The histories, or None if the transport is closed.
        """
        try:
            return self._engine.export_state(self._session_id)
        except ServiceError as error:
            logger.warning("The histories were not exported: %s", error)
            return None

    def import_state(self, state: SessionState, timeout_s: float) -> bool:
        """Let the engine go on from exported histories.

        Returns:
            Whether it does.
        """
        try:
            self._engine.import_state(self._session_id, state)
        except ServiceError as error:
            logger.warning("The histories were not imported: %s", error)
            return False
        return True

    def counts(self) -> Mapping[str, int]:
        """Count what went over it.

        Returns:
            `connects`; there are no bytes to count.
        """
        return dict(self._counts)

    def close(self) -> None:
        """Leave the session and end all threads; idempotent."""
        self._stop.set()
        self._outbox.close()
        self._subscription.close()
        for thread in self._threads:
            thread.join()
        self._engine.close()
        self._link.set_link(up=False)

    def _send(self) -> None:
        step = -1
        with self._link.guard():
            while (snapshot := self._outbox.next_after(step, self._stop)) is not None:
                step = snapshot.step
                try:
                    self._engine.submit(self._session_id, snapshot)
                except ServiceError as error:
                    self._link.lose(step, "refused", str(error))
                self._outbox.discard(step)

    def _receive(self) -> None:
        with self._link.guard():
            while not self._stop.is_set():
                self._link.receive(self._subscription.take(_LOOK_AROUND_S))
