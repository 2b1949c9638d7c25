"""The processes of one run: servers and ranks, to be killed or stopped."""

import json
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.faults.rank import Orders

START_S = 120.0  # an import of torch on a machine that is busy
_SCRAPE_EVERY_S = 0.5


@dataclass(frozen=True)
class Scrape:
    """What Prometheus would have seen of a server.

    Attributes:
        time_s: When, on the clock of all processes.
        life: Which process of this server answered, from 0 on; the latest if none did.
        samples: Sums over all labels but `le` and `stage`, by name and these; None if
            there was no answer.
    """

    time_s: float
    life: int
    samples: dict[str, float] | None


class Server:
    """`skfac serve` at one place, one process after the other; scraped all the time.

    All of its processes are started beforehand: a restart then takes as many steps of
    training as the schedule says, however long this machine needs to import torch.

    Attributes:
        scrapes: What was seen of it.
    """

    def __init__(
        self, index: int, folder: Path, settings: dict[str, Any], lives: int
    ) -> None:
        self.scrapes: list[Scrape] = []
        self._life = 0
        self._left = threading.Event()
        self._scraper = threading.Thread(target=self._scrape_all, name="scraper")
        flags = [f"--set={name}={value}" for name, value in settings.items()]
        self._logs = [folder / f"server-{index}-{life}.log" for life in range(lives)]
        self._processes = [_serve(flags, log) for log in self._logs]
        self._addresses: list[str] = []
        self._metrics: list[str] = []

    def wait(self) -> str:
        """Wait until all of its processes serve.

        Returns:
            The address of the first.
        """
        for process, log in zip(self._processes, self._logs, strict=True):
            address, metrics = _addresses(process, log)
            self._addresses.append(address)
            self._metrics.append(metrics)
        self._scraper.start()
        return self._addresses[0]

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it runs."""
        process = self._processes[self._life]
        if process.poll() is None:
            process.send_signal(number)

    def kill(self) -> None:
        """End it as a crash would."""
        self.send(signal.SIGKILL)
        self._processes[self._life].wait()

    def replace(self) -> str:
        """Let the next process take its place, which knows nothing.

        Returns:
            Its address.
        """
        self._life += 1
        return self._addresses[self._life]

    def close(self) -> None:
        """End all of its processes and the scraping."""
        self._left.set()
        for process in self._processes:
            process.kill()
            process.wait()
        if self._scraper.is_alive():
            self._scraper.join()

    def scrape(self) -> None:
        """Look at the metrics once."""
        life, samples = self._life, None
        try:
            with urllib.request.urlopen(self._metrics[life], timeout=1.0) as answer:
                samples = _sums(answer.read().decode())
        except OSError:
            samples = None
        self.scrapes.append(Scrape(time.monotonic(), life, samples))

    def _scrape_all(self) -> None:
        while not self._left.wait(_SCRAPE_EVERY_S):
            self.scrape()


class RankProcess:
    """One rank; what it writes goes to a queue as (rank, line)."""

    def __init__(
        self, orders: Orders, lines: "queue.Queue[tuple[int, dict[str, Any]]]"
    ) -> None:
        self.rank = orders.rank
        self.log = Path(orders.folder) / f"rank-{orders.rank}-{orders.meeting}.log"
        self._lines = lines
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.rank"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdin is not None
        self.process.stdin.write(orders.json() + "\n")
        self.process.stdin.close()
        self._reader = threading.Thread(target=self._read, name="rank-lines")
        self._reader.start()

    def finished(self) -> bool:
        """Whether it has ended and all of its lines are read."""
        return self.process.poll() is not None and not self._reader.is_alive()

    def dump(self) -> None:
        """Let it write the stacks of all threads to its log."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGUSR1)

    def close(self) -> None:
        """End it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                if line.startswith("{"):
                    self._lines.put((self.rank, json.loads(line)))


def _serve(flags: list[str], log: Path) -> "subprocess.Popen[str]":
    with log.open("w") as output:
        return subprocess.Popen(
            [
                sys.executable, "-m", "tests.support.serve",
                "--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0", *flags,
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip


def _addresses(process: "subprocess.Popen[str]", log: Path) -> tuple[str, str]:
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s:
        text = log.read_text()
        found = re.search(r"^Serving on (\S+)\nMetrics on (\S+)\n", text, re.MULTILINE)
        if found:
            return found[1], found[2]
        assert process.poll() is None, text
        time.sleep(0.02)
    raise TimeoutError(f"{log} has no address: {log.read_text()}")


def _sums(text: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            kept = {k: v for k, v in sample.labels.items() if k in {"le", "stage"}}
            parts = (f"{k}={v}" for k, v in sorted(kept.items()))
            key = "|".join([sample.name, *parts])
            sums[key] = sums.get(key, 0.0) + sample.value
    return sums
