"""Which servers a store hears of, and what is to be hoped of each."""

from collections.abc import Collection, Iterable

from skfac.wire.errors import ServiceError


class Roster:
    """The servers of one run by their numbers; the store's lock guards it.

    Args:
        servers: How many there are to begin with.
    """

    def __init__(self, servers: int) -> None:
        self._up = dict.fromkeys(range(servers), False)
        self._silent: set[int] = set()  # waited for in vain, and not heard since
        self._failures: dict[int, ServiceError] = {}
        self._retired: set[int] = set()
        self._gone: set[int] = set()

    def add(self, server: int) -> None:
        """Take a server in, not connected yet, unless it is there."""
        self._up.setdefault(server, False)

    def set_link(self, server: int, *, up: bool) -> None:
        """Note whether a server is connected; it may be waited for again."""
        self._up[server] = up
        self._silent.discard(server)

    def hear(self, server: int) -> None:
        """Note that a server has spoken."""
        self._silent.discard(server)

    def fall_silent(self, servers: Iterable[int]) -> None:
        """Note which servers were waited for in vain."""
        self._silent.update(servers)

    def fail(self, server: int, error: ServiceError) -> None:
        """Note that a server will never answer."""
        self._failures[server] = error

    def retire(self, server: int) -> None:
        """Use a server no more."""
        self._retired.add(server)
        self._failures.pop(server, None)

    def give_up_on(self, servers: Collection[int]) -> None:
        """Note which servers will not be back once they are not connected any more."""
        self._gone = set(servers)

    @property
    def links(self) -> list[bool]:
        """Whether each server in use is connected, in the order of their numbers."""
        return [self._up[server] for server in self._in_use()]

    @property
    def first_failure(self) -> ServiceError | None:
        """Why some server will never answer."""
        return next(iter(self._failures.values()), None)

    @property
    def failure(self) -> ServiceError | None:
        """Why no server will ever answer; None while one may."""
        may = any(server not in self._failures for server in self._in_use())
        return None if may else self.first_failure

    @property
    def all_known(self) -> bool:
        """Whether each server is connected, or will never be."""
        return all(up or s in self._failures for s, up in self._up.items())

    @property
    def connected(self) -> list[int]:
        """Servers that are there."""
        return [server for server, up in self._up.items() if up]

    @property
    def hopeful(self) -> list[int]:
        """Servers whose answer may come soon: there, and not silent."""
        return [server for server in self.connected if server not in self._silent]

    @property
    def possible(self) -> list[int]:
        """Servers whose answer may come some day."""
        return [server for server in self._up if server not in self._failures]

    @property
    def lost(self) -> list[int]:
        """Servers that are not there and will not be back."""
        return [s for s in sorted(self._gone | self._retired) if not self._up[s]]

    def _in_use(self) -> list[int]:
        return [server for server in sorted(self._up) if server not in self._retired]
