"""Snapshots on their way to a server, kept until their outcome is known."""

import threading

from skfac.client.capture import PendingSnapshot
from skfac.wire.snapshot import Snapshot


class Outbox:
    """A bounded queue that can be read again from the start after a broken stream.

    `put` never blocks: when the outbox is full the oldest snapshot is dropped, whose
    deadline has passed by then.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._changed = threading.Condition()
        self._snapshots: dict[int, PendingSnapshot] = {}
        self._closed = False

    def put(self, snapshot: PendingSnapshot) -> list[int]:
        """Add the newest snapshot.

        Returns:
            The steps that were dropped for it.
        """
        with self._changed:
            excess = len(self._snapshots) + 1 - self._capacity
            dropped = list(self._snapshots)[: max(excess, 0)]
            for step in dropped:
                del self._snapshots[step]
            self._snapshots[snapshot.step] = snapshot
            self._changed.notify_all()
            return dropped

    def next_after(self, step: int, stop: threading.Event) -> Snapshot | None:
        """Wait for the first snapshot after `step`.

        Returns:
            It, or None once `stop` is set (call `wake` then) or the outbox is closed.
        """

        def find() -> PendingSnapshot | None:
            later = (s for c, s in self._snapshots.items() if c > step)
            return next(later, None)

        with self._changed:
            self._changed.wait_for(lambda: self._closed or stop.is_set() or find())
            pending = None if self._closed or stop.is_set() else find()
        return None if pending is None else pending.wait()

    def discard(self, step: int) -> None:
        """Forget a snapshot whose outcome is known."""
        with self._changed:
            self._snapshots.pop(step, None)

    def wake(self) -> None:
        """Let `next_after` look at its `stop` again."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """End all waiting; idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
