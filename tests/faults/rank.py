"""One rank of the job under faults: trains, and writes what it did after every step.

It is started as `python -m tests.faults.rank`, reads its `Orders` as JSON from stdin
and writes lines of JSON to stdout: one for each step, and one with `done` at the end.
"""

import faulthandler
import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy

from skfac.client import Preconditioner, preconditioner, shared_link, transport
from skfac.client.transport import Transport

GROUP_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Orders:
    """What one rank is to do.

    Attributes:
        rank: Its number.
        ranks: How many there are.
        targets: The servers, by the names that all ranks have for them.
        routes: The address of this rank's own link to each, by these names.
        settings: Keywords of `Preconditioner`.
        folder: Where the ranks meet, the digits are, and checkpoints go.
        meeting: Name of this start of the job.
        steps: How many to train.
        first: Step of the checkpoint to begin with; 0 for none.
        every: Steps between two checkpoints; 0 for none.
        order: Seed of the order of the digits.
        batch: Digits of all ranks together, in each step.
        pace_s: Least time of a step; what a larger model would take to compute.
        shared: Whether tensors may go through shared memory, past the links.
    """

    rank: int
    ranks: int
    targets: tuple[str, ...]
    routes: dict[str, str]
    settings: dict[str, Any]
    folder: str
    meeting: str
    steps: int
    first: int
    every: int
    order: int
    batch: int
    pace_s: float
    shared: bool

    def json(self) -> str:
        return json.dumps(asdict(self))


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


class Rank:
    """A replica that is trained."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.inputs, self.labels = torch.load(Path(orders.folder) / "digits.pt")
        self.model = build()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.5)

    def train(self) -> None:
        orders = self.orders
        with Preconditioner(
            self.model, self.optimizer, target=list(orders.targets), **orders.settings
        ) as preconditioner:
            if orders.first:
                self._load(preconditioner)
            for step in range(orders.first, orders.steps):
                self._take(step, preconditioner)
            report = preconditioner.report()
            began_s = time.monotonic()
        closing_s = time.monotonic() - began_s
        with torch.no_grad():
            loss = cross_entropy(self.model(self.inputs), self.labels)
        say(done=True, loss=float(loss), closing_s=closing_s, report=report)

    def _take(self, step: int, preconditioner: Preconditioner) -> None:
        orders, began_s = self.orders, time.monotonic()
        if orders.every and step and step % orders.every == 0 and step > orders.first:
            self._save(step, preconditioner)
        loss = self._backward(step)
        no_core_s = _waited_for_core_s()
        entered_s = time.monotonic()
        preconditioner.step()
        left_s = time.monotonic()
        no_core_s = _waited_for_core_s() - no_core_s
        self.optimizer.step()
        self.optimizer.zero_grad()
        say(
            step=step,
            digest=_digest(self.model),
            loss=loss,
            entered_s=entered_s,
            left_s=left_s,
            no_core_s=no_core_s,
            report=preconditioner.report(),
        )
        time.sleep(max(began_s + orders.pace_s - time.monotonic(), 0))

    def _backward(self, step: int) -> float:
        orders = self.orders
        generator = torch.Generator().manual_seed(orders.order * 100_003 + step)
        drawn = torch.randperm(len(self.labels), generator=generator)[: orders.batch]
        own = drawn.chunk(orders.ranks)[orders.rank]
        loss = cross_entropy(self.model(self.inputs[own]), self.labels[own])
        loss.backward()
        return self._average(loss.detach())

    def _average(self, loss: Tensor) -> float:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients] + [loss.reshape(1)])
        distributed.all_reduce(flat)
        flat /= self.orders.ranks
        for gradient in gradients:
            mean, flat = flat.split([gradient.numel(), len(flat) - gradient.numel()])
            gradient.copy_(mean.view_as(gradient))
        return float(flat)

    def _save(self, step: int, preconditioner: Preconditioner) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "preconditioner": preconditioner.state_dict(),
        }
        path = checkpoint(self.orders.folder, self.orders.rank, step)
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)

    def _load(self, preconditioner: Preconditioner) -> None:
        orders = self.orders
        state = torch.load(checkpoint(orders.folder, orders.rank, orders.first))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        preconditioner.load_state_dict(state["preconditioner"])


def checkpoint(folder: str, rank: int, step: int) -> Path:
    """Where a rank keeps what it had before a step."""
    return Path(folder) / f"checkpoint-{rank}-{step}.pt"


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def take_own_links(routes: dict[str, str]) -> None:
    """Connect to servers over the links that lead to them."""
    direct = transport.connect

    def routed(target: str, **settings: Any) -> Transport:
        return direct(routes.get(target, target), **settings)

    # Of the process, until it ends. The ranks share rank 0's names of the servers.
    mock.patch.object(preconditioner, "connect", routed).start()


def _digest(model: nn.Module) -> str:
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def _waited_for_core_s() -> float:
    # Of this thread, while it could have run.
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def main() -> None:
    orders = Orders(**json.loads(sys.stdin.readline()))
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{orders.folder}/{orders.meeting}",
        rank=orders.rank,
        world_size=orders.ranks,
        timeout=timedelta(seconds=GROUP_TIMEOUT_S),
    )
    take_own_links(orders.routes)
    elsewhere = mock.patch.object(
        shared_link, "OwnRegion", side_effect=OSError("as if on another host")
    )
    if not orders.shared:
        elsewhere.start()
    Rank(orders).train()
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
