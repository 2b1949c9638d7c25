"""Real servers for tests: in this process, or as the `skfac serve` command."""

import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import IO, Any

from skfac.service.config import ServiceConfig
from skfac.service.server import Server

LONG_S = 30.0  # for what takes milliseconds, on a machine that may be busy


def free_address() -> str:
    """A free port of some address of loopback, of which there are 16 million.

    On one address the port of a server that ended is soon another's, whom clients that
    wait for the first would take for it: of a test that runs beside this one, too.
    """
    if sys.platform != "linux":
        return "127.0.0.1:0"  # elsewhere loopback has but this address
    number = 2 + secrets.randbelow(2**24 - 4)
    return f"127.{number >> 16}.{number >> 8 & 255}.{number & 255}:0"


@contextmanager
def serving(**settings: Any) -> Iterator[Server]:
    """A server in this process on free ports."""
    free = {"address": free_address(), "metrics_address": free_address()}
    with Server(ServiceConfig(**{**free, **settings})) as server:
        yield server


class ServerProcess:
    """`skfac serve` as a process of its own; killed on exit if it still runs."""

    def __init__(
        self,
        address: str = "",
        metrics_address: str = "",
        **settings: object,
    ) -> None:
        flags = [f"--set={name}={value}" for name, value in settings.items()]
        self.process = start(
            "-m", "tests.support.serve", "--address", address or free_address(),
            "--metrics-address", metrics_address, *flags,
        )  # fmt: skip
        self.address = wait_for_line(self.process.stdout, "Serving on ").split()[-1]
        self.metrics_address = ""
        if metrics_address:
            line = wait_for_line(self.process.stdout, "Metrics on ")
            self.metrics_address = line.split("/")[2]

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End it as a crash would; it may have ended already."""
        self.process.kill()
        if self.process.stdout is not None and not self.process.stdout.closed:
            self.process.communicate()

    def interrupt(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal; returns the exit code and what was printed after it."""
        self.process.send_signal(number)
        try:
            output, _ = self.process.communicate(timeout=LONG_S)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # it says what its threads do
            output, _ = self.process.communicate()
            raise AssertionError(f"It did not end:\n{output}") from None
        return self.process.returncode, output


def start_all(stack: ExitStack, *addresses: str) -> list[ServerProcess]:
    """Start servers side by side, which takes seconds; the stack ends them."""

    def begin(address: str) -> ServerProcess:
        return stack.enter_context(ServerProcess(address))

    with ThreadPoolExecutor(len(addresses)) as pool:
        return list(pool.map(begin, addresses))


def start(*arguments: str) -> "subprocess.Popen[str]":
    """Run this Python with some arguments; stdout and stderr in one pipe."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_line(stream: "IO[str] | None", beginning: str) -> str:
    """Read until a line begins so; fails with what was read if none does."""
    assert stream is not None
    seen = []
    for line in stream:
        seen.append(line)
        if line.startswith(beginning):
            return line
    raise AssertionError(f"No line began with {beginning!r}: {''.join(seen)}")
