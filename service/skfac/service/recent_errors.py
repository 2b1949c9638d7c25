"""The latest failures and refusals, as an operator reads them."""

from dataclasses import dataclass

from skfac.service.engine import RecentError

KINDS_KEPT = 64
"""Kinds of errors remembered; the one that is silent the longest goes first."""

MESSAGE_LENGTH = 400
"""Characters kept of a message."""


@dataclass(frozen=True)
class _Seen:
    message: str
    count: int
    at_s: float


class RecentErrors:
    """Messages of errors, never what was sent. Its owner's lock guards it.

    Errors of one job, layer and kind are one entry with a count: a layer that fails at
    every step does not push out what else went wrong.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str, str], _Seen] = {}  # the latest last

    def add(self, now_s: float, job: str, layer: str, kind: str, message: str) -> None:
        """Remember an error."""
        before = self._seen.pop((job, layer, kind), None)
        count = before.count + 1 if before else 1
        if len(message) > MESSAGE_LENGTH:
            message = message[: MESSAGE_LENGTH - 1] + "…"
        self._seen[job, layer, kind] = _Seen(message, count, now_s)
        if len(self._seen) > KINDS_KEPT:
            del self._seen[next(iter(self._seen))]

    def status(self, now_s: float) -> tuple[RecentError, ...]:
        """Describe them.

        Returns:
            At most `KINDS_KEPT`, the latest first.
        """
        return tuple(
            RecentError(*key, seen.message, seen.count, now_s - seen.at_s)
            for key, seen in reversed(self._seen.items())
        )
