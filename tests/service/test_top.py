"""`skfac top` in a terminal, as a person starts and ends it."""

import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import ioctl

import pytest

from tests.support.raw_client import RawClient, spec_of
from tests.support.servers import serving

PATIENCE_S = 90.0  # of a busy machine
COMMAND = "from skfac.service.main import app; app()"
ALTERNATE_ON, ALTERNATE_OFF = b"\x1b[?1049h", b"\x1b[?1049l"
HOME = b"\x1b[H"
CURSOR_OFF, CURSOR_ON = b"\x1b[?25l", b"\x1b[?25h"


class Terminal:
    """A program in a terminal of some width, and all that it printed so far."""

    def __init__(self, columns: int, *arguments: str) -> None:
        self.printed = b""
        self._end, inner = pty.openpty()
        ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            # These would stand for the terminal's own size, and other tests set them.
            env={k: v for k, v in os.environ.items() if k not in {"LINES", "COLUMNS"}}
            | {"TERM": "xterm"},
            start_new_session=True,
        )
        os.close(inner)

    def read_until(self, is_so: Callable[[bytes], bool]) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not is_so(self.printed):
            assert time.monotonic() < end_s, self.screen
            if select.select([self._end], [], [], 0.1)[0]:
                try:
                    self.printed += os.read(self._end, 65536)
                except OSError:  # the program has closed it
                    break
        assert is_so(self.printed), self.screen

    @property
    def screen(self) -> str:
        """What a person sees, for the message of a test that failed."""
        return words(self.printed.rpartition(HOME)[2]).decode(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


def words(printed: bytes) -> bytes:
    """The text without control sequences, and without the ends of lines."""
    return b" ".join(re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", printed).split())


@contextmanager
def top(columns: int, address: str) -> Iterator[Terminal]:
    terminal = Terminal(columns, "top", address, "--refresh", "0.2")
    try:
        yield terminal
    finally:
        terminal.close()


@pytest.mark.timeout(4 * PATIENCE_S)
def test_it_follows_the_server_and_outlives_it_until_ctrl_c():
    with (
        serving() as server,
        RawClient(server.address, spec_of("mnist")) as client,
        top(80, server.address) as terminal,
    ):
        terminal.read_until(lambda text: b"none" in text)
        assert len(client.versions_of(41)) == len(client.spec.layers)
        terminal.read_until(lambda text: b"41" in text.rpartition(b"layers")[2])
        server.close()
        terminal.read_until(lambda text: b"What follows is old." in words(text[-9999:]))
        terminal.read_until(lambda text: b"41" in text.rpartition(b"old")[2])
        terminal.process.send_signal(signal.SIGINT)
        terminal.read_until(lambda text: ALTERNATE_OFF in text)
        assert terminal.process.wait(PATIENCE_S) == 0

    text = terminal.printed
    assert text.count(ALTERNATE_ON) == text.count(ALTERNATE_OFF) == 1
    assert text.rindex(CURSOR_ON) > text.rindex(CURSOR_OFF)
    assert b"Traceback" not in text
