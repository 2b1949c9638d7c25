"""How much of one session may be half received at once."""

import threading
from collections import Counter

from skfac.wire.errors import LimitExceededError


class Receiving:
    """Bytes that streams have declared and not brought yet, by session.

    All methods may be called from any thread.

    Args:
        limit: Name of the setting, for people.
        max_bytes: Its value: the most bytes of one session.
    """

    def __init__(self, limit: str, max_bytes: int) -> None:
        self._limit = limit
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._nbytes: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._nbytes)

    def begin(self, session_id: str, nbytes: int) -> "Share":
        """Make room for a payload.

        Returns:
            The room, which is to be given back.

        Raises:
            LimitExceededError: If the session's other streams leave too little.
        """
        with self._lock:
            taken = self._nbytes[session_id]
            if taken + nbytes > self._max_bytes:
                raise LimitExceededError(
                    f"{taken} bytes of the session are half received; {nbytes} more "
                    f"are over {self._limit} = {self._max_bytes}."
                )
            self._nbytes[session_id] = taken + nbytes
        return Share(self, session_id, nbytes)

    def give_back(self, session_id: str, nbytes: int) -> None:
        """End what was begun."""
        with self._lock:
            self._nbytes[session_id] -= nbytes
            if not self._nbytes[session_id]:
                del self._nbytes[session_id]


class Share:
    """What one stream may bring."""

    def __init__(self, receiving: Receiving, session_id: str, nbytes: int) -> None:
        self._receiving = receiving
        self._session_id = session_id
        self._nbytes = nbytes

    def close(self) -> None:
        """Give it back; idempotent."""
        self._receiving.give_back(self._session_id, self._nbytes)
        self._nbytes = 0
