"""The servers that a target stands for, now and whenever it is looked up again."""

import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import dns.exception
import dns.resolver

from skfac.client.config import check_target
from skfac.client.handles import ActorTarget, is_handle
from skfac.client.world import World
from skfac.wire.errors import ConfigurationError

logger = logging.getLogger(__name__)

Target = str | Any | Sequence[str | Any]
"""What a trainer passes: one target, or a list of addresses or handles of actors."""

_SCHEME = "dns://"
_TIMEOUT_S = 5.0  # of one question to a name server
_TICK_S = 2.0  # between two looks while a server is not connected
_GOODBYE_S = 1.0
_DNS_PORT = 53


class Names:
    """A target as it was passed, which can be looked up.

    Attributes:
        moving: Whether servers may come and go: whether a name is among them.
    """

    def __init__(self, target: Target) -> None:
        several = isinstance(target, list | tuple)
        self._targets = list(target) if several else [target]
        self.moving = any(_is_name(one) for one in self._targets)

    def look_up(self) -> tuple[str, ...]:
        """Find the servers that the target stands for now.

        Returns:
            One target a server; `dns:///name:port` stands for every address of a name,
            in order.

        Raises:
            ConfigurationError: If one is no target, or a name cannot be looked up.
        """
        found: list[str] = []
        for one in self._targets:
            if is_handle(one):
                found.append(ActorTarget.of(one))
            elif _is_name(one):
                found += _addresses(one)
            else:
                found.append(one if isinstance(one, str) else check_target(one))
        return tuple(dict.fromkeys(found))

    def shared(self, world: World) -> tuple[str, ...]:
        """Find the servers to begin with, the same on all ranks: those of rank 0.

        Returns:
            One target a server.

        Raises:
            ConfigurationError: If there is none, or on rank 0 as `look_up` does; on all
                ranks alike.
        """
        own: tuple[str, ...] = ()
        refusal = ""
        try:
            # Handles are those of this process; names are looked up by one.
            own = () if self.moving and world.rank else self.look_up()
        except ConfigurationError as error:
            refusal = str(error)
        word, _, text = world.share("\n".join([refusal, *own])).partition("\n")
        if word or refusal:
            raise ConfigurationError(word or refusal)
        if not text:
            raise ConfigurationError("target is empty: name at least one server.")
        here = {name: name for name in own}
        return tuple(here.get(name, name) for name in text.split("\n"))


class Lookout:
    """Looks names up again and again, on a thread of its own.

    It does so every `every_s`, and every few seconds while `hurry` says so. A name that
    cannot be looked up, or stands for nothing, leaves things as they are.

    Attributes:
        view: The servers that were found last.
        failures: Lookups that found nothing.
    """

    def __init__(
        self,
        names: Names,
        view: tuple[str, ...],
        every_s: float,
        hurry: Callable[[], bool],
        found: Callable[[tuple[str, ...]], None],
    ) -> None:
        self.view = view
        self.failures = 0
        self._names = names
        self._every_s = every_s
        self._hurry = hurry
        self._found = found
        self._failing = False
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="skfac-lookout", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop looking; idempotent. A question that is out is not waited for."""
        self._closed.set()
        self._thread.join(_GOODBYE_S)

    def _run(self) -> None:
        next_s = time.monotonic()
        while not self._closed.wait(min(self._every_s, _TICK_S)):
            if time.monotonic() >= next_s or self._hurry():
                self._look()
                next_s = time.monotonic() + self._every_s

    def _look(self) -> None:
        try:
            view = self._names.look_up()
        except ConfigurationError as error:
            self.failures += 1
            level = logging.DEBUG if self._failing else logging.WARNING
            logger.log(level, "%s The servers stay as they are.", error)
            self._failing = True
            return
        self._failing = False
        if not self._closed.is_set():
            self.view = view
            self._found(view)


def _is_name(target: object) -> TypeGuard[str]:
    return isinstance(target, str) and target.startswith(_SCHEME)


def _addresses(target: str) -> list[str]:
    authority, _, name = target.removeprefix(_SCHEME).partition("/")
    host, _, port = name.rpartition(":")
    if not (host and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigurationError(
            f"{target!r} is not a target: a name is 'dns:///name:port', or "
            "'dns://address:port/name:port' to ask one name server."
        )
    look = _ask(authority) if authority else _ask_system
    try:
        found = look(host)
    except (OSError, dns.exception.DNSException) as error:
        raise ConfigurationError(f"{target!r} cannot be looked up: {error}.") from None
    return [f"[{a}]:{port}" if ":" in a else f"{a}:{port}" for a in sorted(found)]


def _ask_system(host: str) -> set[str]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return {str(address[4][0]) for address in found}


def _ask(authority: str) -> Callable[[str], set[str]]:
    host, _, port = authority.rpartition(":")
    if "]" in port or not host:  # there is no port
        host, port = authority, str(_DNS_PORT)
    resolver = dns.resolver.Resolver(configure=False)
    try:
        resolver.nameservers = [str(ipaddress.ip_address(host.strip("[]")))]
        resolver.port = int(port)
    except ValueError:
        raise ConfigurationError(
            f"{authority!r} is no address of a name server: an IP address, and a port "
            "if it is not 53."
        ) from None
    resolver.lifetime = _TIMEOUT_S
    return lambda name: set(resolver.resolve_name(name).addresses())
