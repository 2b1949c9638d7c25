"""A trainer that forks, as data loaders do, trains on, and so do its children."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from skfac.client import Preconditioner
from tests.support.models import backward, batch_at, sgd, small_cnn
from tests.support.servers import serving

ENOUGH_S = 50.0  # for seconds of work, on a machine that may be busy

pytestmark = pytest.mark.timeout(120)


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """The batches of `backward`, made in a worker."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        return batch_at(step)


def train(address: str, *, workers: int = 0) -> dict:
    """Two epochs of synchronous steps; returns the report."""
    model = small_cnn()
    optimizer = sgd(model)
    settings = {
        "update_every": 1,
        "lag": 0,
        "on_late": "wait",
        "job": f"j{os.getpid()}",
    }
    with Preconditioner(model, optimizer, target=address, **settings) as pre:
        for _ in range(2):
            for images, labels in loader(workers):
                loss = (model(images) - labels[:, None]).square().mean()
                loss.backward()
                pre.step()
                optimizer.step()
                optimizer.zero_grad()
        return pre.report()


def loader(workers: int) -> DataLoader:
    """It forks anew for each epoch."""
    fork: dict[str, Any] = {}
    if workers:
        fork = {"multiprocessing_context": "fork", "timeout": ENOUGH_S}
    return DataLoader(Batches(), batch_size=None, num_workers=workers, **fork)


def report_of_loaders(address: str) -> dict:
    """Fork workers from a trainer that is connected."""
    return train(address, workers=2)


def report_of_child(address: str) -> dict:
    """Fork after the import, and train in the child alone."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, json.dumps(train(address)).encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(os.read(reading, 60_000))


def report_beside_child(address: str) -> dict:
    """Fork while connected; the child computes, exits as programs do, and all go on."""
    model = small_cnn()
    with Preconditioner(
        model, sgd(model), target=address, update_every=1, lag=0, on_late="wait"
    ) as pre:
        backward(model, 0)
        pre.step()
        child = os.fork()
        if child == 0:
            small_cnn()(batch_at(1)[0])
            sys.exit(0)  # with all that is registered for the exit
        assert os.waitpid(child, 0)[1] == 0
        for step in range(1, 4):
            backward(model, step)
            pre.step()
        return pre.report()


CODE = """
import json, sys
from tests.end_to_end import test_forks as forks
for fork in forks.report_of_child, forks.report_of_loaders, forks.report_beside_child:
    print(json.dumps(fork(sys.argv[1])), flush=True)
"""


def test_a_trainer_that_forks_trains_on():
    # In a process of its own: only the first of them forks where nothing ran before.
    with serving() as server:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-W", "ignore:This process",
             "-c", CODE, server.address],
            capture_output=True, text=True, timeout=ENOUGH_S,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report["transport"]["connects"] for report in reports] == [1, 1, 1]
    assert [report["versions"]["solved"] for report in reports] == [32, 32, 16]
    assert [report["raw_gradients"] for report in reports] == [0, 0, 0]
