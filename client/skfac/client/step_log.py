"""What steps did with their versions, for the servers to count."""

import time
from collections import deque
from collections.abc import Callable, Sequence

from skfac.wire.outcome import Version
from skfac.wire.report import MAX_REPORTED, StepReport

_NONE, _TOO_OLD = -1, -2  # instead of an age


class StepLog:
    """Collects from one snapshot to the next what each server is told with the next.

    Transports tell when outcomes arrive, from their threads; the trainer's thread does
    the rest. The latest `MAX_REPORTED` steps and latencies are kept.

    Args:
        clock: Tells the seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ages: deque[tuple[int, ...]] = deque(maxlen=MAX_REPORTED)
        self._late: deque[Sequence[int]] = deque(maxlen=MAX_REPORTED)
        self._captured: dict[int, tuple[float, set[int]]] = {}
        self._latencies: deque[tuple[int, float]] = deque(maxlen=MAX_REPORTED)

    def used(
        self,
        step: int,
        in_use: Sequence[Version | None],
        found: Sequence[Version | None],
    ) -> None:
        """Log the versions of a step.

        Args:
            step: The step.
            in_use: The newest version of each layer.
            found: The same without those that are too old.
        """
        self._ages.append(
            tuple(
                _NONE if v is None else _TOO_OLD if ok is None else step - v.step
                for v, ok in zip(in_use, found, strict=True)
            )
        )

    def late(self, layers: Sequence[int]) -> None:
        """Log the layers whose version missed its deadline."""
        self._late.append(layers)

    def captured(self, step: int, servers: Sequence[int], in_flight: int) -> None:
        """Log that a snapshot goes out.

        Args:
            step: Its step.
            servers: They that get it.
            in_flight: How many may be on their way; older ones are forgotten.
        """
        self._captured[step] = self._clock(), set(servers)
        for old in list(self._captured)[:-in_flight]:
            del self._captured[old]

    def arrived(self, server: int, steps: Sequence[int]) -> None:
        """Log the steps that a server owes nothing of any more."""
        now_s = self._clock()
        for step in steps:
            captured_s, owing = self._captured.get(step, (now_s, set()))
            if server in owing:  # after a reconnect outcomes may come twice
                owing.discard(server)
                self._latencies.append((server, now_s - captured_s))

    def report(self, server: int, layers: Sequence[int]) -> StepReport:
        """Sum up for a server.

        Args:
            server: Whose outcomes the latencies are of.
            layers: Those that it has.

        Returns:
            What happened to these layers since `clear`.
        """
        own = set(layers)
        ages = [[row[layer] for layer in layers] for row in list(self._ages)]
        oldest = (max(row, default=_NONE) for row in ages)
        latencies = list(self._latencies)
        return StepReport(
            staleness=tuple(age for age in oldest if age >= 0),
            late=sum(len(own.intersection(late)) for late in self._late),
            stale=sum(row.count(_TOO_OLD) for row in ages),
            raw=sum(age < 0 for row in ages for age in row),
            end_to_end_s=tuple(s for owner, s in latencies if owner == server),
        )

    def clear(self) -> None:
        """Begin anew, once all servers were told."""
        self._ages.clear()
        self._late.clear()
        self._latencies.clear()
