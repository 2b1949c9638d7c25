"""Real servers for tests: in this process, or as the `skfac serve` command."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from skfac.service.config import ServiceConfig
from skfac.service.server import Server

LONG_S = 30.0  # for what takes milliseconds, on a machine that may be busy


@contextmanager
def serving(**settings: Any) -> Iterator[Server]:
    """A server in this process on free ports."""
    free = {"address": "127.0.0.1:0", "metrics_address": "127.0.0.1:0"}
    with Server(ServiceConfig(**{**free, **settings})) as server:
        yield server


class ServerProcess:
    """`skfac serve` as a process of its own; killed on exit if it still runs."""

    def __init__(self, address: str = "127.0.0.1:0", **settings: object) -> None:
        flags = [f"--set={name}={value}" for name, value in settings.items()]
        self.process = start(
            "-m", "tests.support.serve", "--address", address,
            "--metrics-address", "", *flags,
        )  # fmt: skip
        self.address = wait_for_line(self.process.stdout, "Serving on ").split()[-1]

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
        output, _ = self.process.communicate(timeout=LONG_S)
        return self.process.returncode, output


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
