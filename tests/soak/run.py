"""Sessions that come and go for a long time: the server must not grow.

    python tests/soak/run.py [--minutes 30] [--trainers 3] [--seed 0] [--plot FILE]

A real `skfac serve`, and in this process a few trainers, each of which opens a session
of a random shape, trains with a random cadence, and leaves: properly, or by letting its
connection fall, so that its lease has to run out. Meanwhile the server's memory (of its
own, without what it shares), descriptors, threads and the files in /dev/shm are read
every second. The last line is one JSON object; the exit code is 1 if anything grew.

Growth is the slope of a line through the samples after the first third (the median of
the slopes of all pairs, which single peaks do not move), times the time they span.
"""

import argparse
import json
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from skfac.client import Preconditioner
from skfac.wire.shared_memory import FOLDER
from tests.support.models import backward, sgd, small_cnn
from tests.support.raw_client import RawClient, snapshot_of, spec_of
from tests.support.servers import ServerProcess

ALLOWED = {"memory_mib": 24.0, "descriptors": 4.0, "threads": 4.0, "shm_files": 1.0}
"""Growth that is noise: a page cache of the allocator, a connection that is ending."""

# Nobody reads what the server prints, so that it prints little.
SETTINGS: dict[str, Any] = {
    "lease_s": 5.0, "idle_s": 10.0, "grace_s": 5.0, "log_level": "warning",
}  # fmt: skip


class Trainers:
    """Threads that train until they are told to stop."""

    def __init__(self, address: str, count: int, seed: int) -> None:
        self.sessions = self.steps = self.versions = 0
        self.errors: list[str] = []
        self._fallen = [0] * count
        self._address = address
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(seed + i), i))  # noqa: S311
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End all sessions."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, choose: random.Random, index: int) -> None:
        while not self._stop.is_set():
            try:
                if choose.random() < 0.2:
                    self._fall(choose, index)
                else:
                    self._train(choose, index)
            except Exception as error:  # it is what a soak is to find
                self.errors.append(f"{type(error).__name__}: {error}")

    def _train(self, choose: random.Random, index: int) -> None:
        model = small_cnn() if choose.random() < 0.5 else mlp(choose.randrange(20, 90))
        optimizer = sgd(model)
        pause_s = choose.choice([0.0, 0.01, 0.1])
        settings: dict[str, Any] = {
            "update_every": choose.choice([1, 2, 5]),
            "lag": choose.choice([0, 1, 3]),
            "history": choose.choice(["snapshot", "window", "ema"]),
            "job": f"soak-{index}-{choose.randrange(200)}",
        }
        pre = Preconditioner(model, optimizer, target=self._address, **settings)
        with pre:
            for step in range(choose.randrange(5, 60)):
                if self._stop.is_set():
                    break
                backward(model, step)
                pre.step()
                optimizer.step()
                optimizer.zero_grad()
                time.sleep(pause_s * choose.random())
                with self._lock:
                    self.steps += 1
        with self._lock:
            self.sessions += 1

    def _fall(self, choose: random.Random, index: int) -> None:
        # Of a name of its own: a session whose lease runs on would have its versions.
        self._fallen[index] += 1
        job = f"fallen-{index}-{self._fallen[index]}"
        spec = spec_of(job, (40, 30), (30, 20))
        with RawClient(self._address, spec) as client:
            frames = client.frames(snapshot_of(spec, 0))
            client.push(*frames)
            client.push(*client.frames(snapshot_of(spec, 1)))
            received = client.outcomes(4)
        with self._lock:
            self.sessions += 1
            self.versions += len(received)


def mlp(width: int) -> nn.Sequential:
    """A perceptron for the batches of `backward`."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 5)
    )


def sample(server: psutil.Process) -> dict[str, float]:
    """Read what must not grow."""
    return {
        "memory_mib": server.memory_full_info().uss / 2**20,
        "descriptors": server.num_fds(),
        "threads": server.num_threads(),
        "shm_files": len(list(FOLDER.glob("skfac-*"))),
    }


def slope(times_s: np.ndarray, values: np.ndarray) -> float:
    """The median of the slopes of all pairs of samples (Theil and Sen)."""
    first, second = np.triu_indices(len(values), k=1)
    rises = values[second] - values[first]
    return float(np.median(rises / (times_s[second] - times_s[first])))


def growth(samples: list[tuple[float, dict[str, float]]], name: str) -> float:
    """How much a measure grew after the first third."""
    kept = samples[len(samples) // 3 :]
    kept = kept[:: max(1, len(kept) // 500)]
    times_s = np.array([moment for moment, _ in kept])
    values = np.array([values[name] for _, values in kept])
    return slope(times_s, values) * float(times_s[-1] - times_s[0])


def soak(minutes: float, trainers: int, seed: int) -> dict[str, Any]:
    """Run it; returns what is printed, and the samples."""
    samples: list[tuple[float, dict[str, float]]] = []
    shm_before = len(list(FOLDER.glob("skfac-*")))
    with ServerProcess(**SETTINGS) as server:
        process = psutil.Process(server.process.pid)
        running = Trainers(server.address, trainers, seed)
        began_s = time.monotonic()
        try:
            with Progress(console=Console(stderr=True)) as progress:
                bar = progress.add_task("seconds", total=60 * minutes)
                while (now_s := time.monotonic() - began_s) < 60 * minutes:
                    samples.append((now_s, sample(process)))
                    progress.update(bar, completed=now_s)
                    time.sleep(min(1.0, 0.6 * minutes))
        finally:
            running.stop()
        alive = process.is_running() and server.process.poll() is None
    grown = {name: round(growth(samples, name), 2) for name in ALLOWED}
    last = samples[-1][1]
    flat = all(grown[name] <= most for name, most in ALLOWED.items())
    return {
        "minutes": minutes,
        "sessions": running.sessions,
        "steps": running.steps,
        "errors": running.errors[:5],
        "server_alive": alive,
        "growth": grown,
        "last": {name: round(value, 1) for name, value in last.items()},
        "shm_left": len(list(FOLDER.glob("skfac-*"))) - shm_before,
        "flat": flat,
        "samples": samples,
    }


def plot(samples: list[tuple[float, dict[str, float]]], file: Path) -> None:
    """Draw the samples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(ALLOWED), sharex=True, figsize=(7, 6), layout="constrained"
    )
    minutes = [moment / 60 for moment, _ in samples]
    for axis, name in zip(axes, ALLOWED, strict=True):
        axis.plot(minutes, [values[name] for _, values in samples], linewidth=0.8)
        axis.set_ylabel(name.replace("_", " "))
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("minutes")
    figure.savefig(file, dpi=110)


def main() -> int:
    """Soak, and print one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--trainers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="PNG file of what was read")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"seed {options.seed}")
    found = soak(options.minutes, options.trainers, options.seed)
    samples = found.pop("samples")
    if options.plot is not None:
        plot(samples, options.plot)
    print(json.dumps(found))
    good = found["flat"] and found["server_alive"] and not found["errors"]
    return 0 if good and not found["shm_left"] else 1


if __name__ == "__main__":
    sys.exit(main())
