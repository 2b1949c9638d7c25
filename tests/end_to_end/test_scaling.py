"""Two ranks find more servers under a name while they train, then fewer."""

import hashlib
import os
import signal
import time
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import distributed, nn

from skfac.client import Preconditioner
from skfac.v1 import preconditioning_pb2 as pb
from skfac.v1 import preconditioning_pb2_grpc as rpc
from skfac.wire.credentials import open_channel
from tests.support.models import flat_parameters
from tests.support.names import NAME, Records, free_port, name_server
from tests.support.ranks import run_ranks
from tests.support.servers import LONG_S, start_all

pytestmark = pytest.mark.timeout(240)  # each rank imports torch; a busy machine

HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
MOST_STEPS = 5000
EXTRA = 6  # steps after the last change


class Run:
    """One rank's training, a step at a time."""

    def __init__(self, rank: int, target: str) -> None:
        torch.manual_seed(3)
        layers = [nn.Linear(6, 6) for _ in range(6)]
        self.rank, self.model = rank, nn.Sequential(*layers)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.pre = Preconditioner(
            self.model,
            self.optimizer,
            target=target,
            update_every=1,
            on_late="wait",
            wait_s=LONG_S,
            resolve_every_s=0.05,
        )
        self.digests: list[str] = []

    def step(self) -> None:
        generator = torch.Generator().manual_seed(2 * len(self.digests) + self.rank)
        inputs = torch.randn(4, 6, generator=generator)
        (self.model(inputs) - inputs.roll(1, 1)).square().mean().backward()
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            distributed.all_reduce(parameter.grad)
            parameter.grad.div_(2)
        self.pre.step()
        self.optimizer.step()
        self.optimizer.zero_grad()
        data = flat_parameters(self.model).numpy().tobytes()
        self.digests.append(hashlib.sha256(data).hexdigest())

    def step_until_all_have_layers(self, targets: list[str]) -> dict[str, Any]:
        """Train until these servers, and no others, have all layers."""
        while len(self.digests) < MOST_STEPS:
            self.step()
            servers = self.pre.report()["servers"]
            busy = {t for t, server in servers.items() if server["layers"]}
            done = torch.tensor(int(busy == set(servers) == set(targets)))
            distributed.all_reduce(done, distributed.ReduceOp.MIN)
            if done:
                return servers
        raise AssertionError(f"Still {servers} after {MOST_STEPS} steps.")


def wait_until_left(target: str) -> None:
    """Wait for both ranks to leave a server, which they do besides training."""
    end_s = time.monotonic() + LONG_S
    with open_channel(target, None) as channel:
        stub = rpc.PreconditioningServiceStub(channel)
        while stub.GetStatus(pb.GetStatusRequest(), timeout=LONG_S).sessions:
            assert time.monotonic() < end_s, target
            time.sleep(0.05)


def scale(rank: int, port: int, pids: list[int]) -> dict[str, Any]:
    targets = [f"{host}:{port}" for host in HOSTS]
    with ExitStack() as stack:
        # Rank 0's thread answers for the name; all ranks ask it.
        records, authority = Records(HOSTS[:1]), [""]
        if rank == 0:
            records, authority[0] = stack.enter_context(name_server(*HOSTS[:1]))
        distributed.broadcast_object_list(authority)
        run = Run(rank, f"dns://{authority[0]}/{NAME}:{port}")
        stack.callback(run.pre.close)
        run.step_until_all_have_layers(targets[:1])
        records.addresses = HOSTS
        three = run.step_until_all_have_layers(targets)
        records.addresses = HOSTS[:2]
        two = run.step_until_all_have_layers(targets[:2])
        if rank == 0:
            wait_until_left(targets[2])
            os.kill(pids[2], signal.SIGTERM)
        for _ in range(EXTRA):
            run.step()
        report = run.pre.report()
    undisturbed = Run(rank, targets[0])
    for _ in run.digests:
        undisturbed.step()
    undisturbed.pre.close()
    return {
        "digests": run.digests,
        "undisturbed": undisturbed.digests,
        "three": three,
        "two": two,
        "report": report,
    }


def test_servers_come_and_go_between_snapshots():
    port = free_port(*HOSTS)
    with ExitStack() as stack:
        servers = start_all(stack, *(f"{host}:{port}" for host in HOSTS))
        pids = [server.process.pid for server in servers]
        first, second = run_ranks(2, scale, port, pids)
        output, _ = servers[2].process.communicate(timeout=LONG_S)

    assert first["digests"] == second["digests"]
    assert first["digests"] == first["undisturbed"]  # nothing was lost on the way
    assert servers[2].process.returncode == 0
    assert "All ranks have left" in output
    for rank in (first, second):
        assert rank["three"] == second["three"]
        assert sum(server["layers"] for server in rank["three"].values()) == 6
        assert list(rank["two"]) == list(rank["report"]["servers"])
        assert rank["report"]["server_changes"] == 2
        assert rank["report"]["versions"].get("gone", 0) == 0
        assert rank["report"]["connected"]
