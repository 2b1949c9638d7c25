"""One core for the trainer, another for a server of its own."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import torch

_START_S = 60.0


def pin_trainer() -> None:
    """Keep this process, all its threads and torch's products on the first core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


@contextmanager
def engine(where: str) -> Iterator[str]:
    """Start what a trainer connects to.

    Args:
        where: `"embedded"`, or the device of a server of its own.

    Yields:
        The target.
    """
    if where == "embedded":
        yield where
        return
    # With a GPU a core is for what starts its kernels: nothing is pinned there.
    setting = "--set", f"device={where}"
    with running_server(*setting, pinned=where == "cpu") as (target, _):
        yield target


@contextmanager
def running_server(*options: str, pinned: bool = True) -> Iterator[tuple[str, int]]:
    """Run `skfac serve` on the last core, with options.

    Args:
        options: Of the command.
        pinned: False lets it use all cores.

    Yields:
        The target that a trainer connects to, and the number of the process.
    """
    cores = {max(range(os.cpu_count() or 1))} if pinned else os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory(prefix="skfac-") as folder:
        target = f"unix:{Path(folder) / 'socket'}"
        command = [
            *(str(Path(sys.executable).with_name("skfac")), "serve"),
            *("--address", target, "--metrics-address", "", *options),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        server = subprocess.Popen(  # noqa: S603  # our own command
            command,
            env=environment,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        try:
            with grpc.insecure_channel(target) as channel:
                grpc.channel_ready_future(channel).result(_START_S)
            yield target, server.pid
        finally:
            server.terminate()
            server.wait()
