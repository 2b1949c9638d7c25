"""Ranks of one training job, each a process of its own, over gloo on loopback."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing
from torch.multiprocessing.spawn import start_processes

Body = Callable[..., Any]


def run_ranks(world_size: int, body: Body, *arguments: Any) -> list[Any]:
    """Call `body(rank, *arguments)` in each rank; returns what each returned.

    `body` must be importable by name. A rank that raises fails the call, with its
    traceback.
    """
    # Forks of a process that has done nothing but import: that takes seconds a rank.
    multiprocessing.set_forkserver_preload(["torch", "skfac.client", __name__])
    with tempfile.TemporaryDirectory() as folder:
        rest = (world_size, folder, body, arguments)
        start_processes(_run, rest, world_size, start_method="forkserver")
        paths = [Path(folder) / f"{rank}.pt" for rank in range(world_size)]
        return [torch.load(path, weights_only=False) for path in paths]


def _run(
    rank: int, world_size: int, folder: str, body: Body, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world_size,
    )
    try:
        torch.save(body(rank, *arguments), Path(folder) / f"{rank}.pt")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
