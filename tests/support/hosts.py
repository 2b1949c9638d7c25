"""Two hosts on one machine: namespaces of Linux, with a cable between them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

_TOOLS = ("ip", "iptables", "unshare")
_APART = (
    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
    *("sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "host"),
)


@dataclass(frozen=True)
class Host:
    """One end of the cable.

    Attributes:
        name: Of its network namespace.
        address: Its own.
    """

    name: str
    address: str

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Run this Python there, where no other host's processes or memory are."""
        return subprocess.Popen(
            [*self._inside, *_APART, sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def deafen(self) -> None:
        """Drop all that comes in, without a word to who sent it."""
        self._filter("--insert")

    def hear(self) -> None:
        """Take it again."""
        self._filter("--delete")

    @property
    def _inside(self) -> tuple[str, ...]:
        return "ip", "netns", "exec", self.name

    def _filter(self, change: str) -> None:
        _run(*self._inside, "iptables", change, "INPUT", "-j", "DROP")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make two hosts that reach each other; skips a test where nobody may.

    Yields:
        Both.
    """
    if os.getuid() or not all(map(shutil.which, _TOOLS)):
        pytest.skip("Only root may make network namespaces, with ip and iptables.")
    first, second = (
        Host(f"skfac{os.getpid()}-{end}", f"10.77.0.{end}") for end in (1, 2)
    )
    cables = {host: f"sk{os.getpid()}-{host.address[-1]}" for host in (first, second)}
    with ExitStack() as stack:
        for host in cables:
            _make(host)
            stack.callback(_run, "ip", "netns", "delete", host.name)
        _run(
            *("ip", "link", "add", cables[first], "netns", first.name, "type", "veth"),
            *("peer", "name", cables[second], "netns", second.name),
        )
        for host, cable in cables.items():
            at = "ip", "-n", host.name
            _run(*at, "address", "add", f"{host.address}/24", "dev", cable)
            for device in ("lo", cable):
                _run(*at, "link", "set", device, "up")
        yield first, second


def _make(host: Host) -> None:
    try:
        _run("ip", "netns", "add", host.name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"No network namespace may be made here: {error.stderr.strip()}")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
