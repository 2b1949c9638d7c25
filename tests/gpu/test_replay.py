"""Kernels that are recorded once and replayed, beside whatever else uses the GPU."""

import threading

import pytest
import torch
from torch import nn

from skfac.client import Preconditioner
from skfac.client.replay import RUNS_BEFORE, Replay
from tests.support.models import batch_at, sgd
from tests.support.servers import LONG_S

pytestmark = pytest.mark.gpu


def products(source: torch.Tensor):
    """What a step does with stacks: products, sums and new memory."""
    runs: list[int] = []

    def body() -> tuple[torch.Tensor, torch.Tensor]:
        runs.append(1)
        left = torch.baddbmm(source, source, source, beta=0.5, alpha=-0.5)
        return left, (left * source).flatten(1).sum(1)

    return body, runs


def test_it_is_recorded_and_gives_what_it_gave():
    source = torch.empty(3, 40, 40, device="cuda")
    body, runs = products(source)
    replay = Replay(body, source.device)
    for number in range(RUNS_BEFORE + 5):
        source.copy_(torch.randn(3, 40, 40))
        expected = [one.clone() for one in body()]
        runs.clear()

        found = replay()

        assert len(runs) == (number <= RUNS_BEFORE)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert replay._recorded is not None


def test_others_may_allocate_and_copy_meanwhile():
    stop, errors = threading.Event(), []

    def copies():
        try:
            stream = torch.cuda.Stream()
            number = 0
            while not stop.is_set():
                number += 1
                with torch.cuda.stream(stream):
                    host = torch.empty(1000 + number).pin_memory()
                    there = host.to("cuda", non_blocking=True)
                    there.record_stream(torch.cuda.default_stream())
                stream.synchronize()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=copies)
    thread.start()
    try:
        for _ in range(20):
            source = torch.randn(3, 40, 40, device="cuda")
            body, _ = products(source)
            replay = Replay(body, source.device)
            for _ in range(RUNS_BEFORE + 2):
                found = replay()
            assert replay._recorded is not None
            torch.testing.assert_close(found[0], body()[0])
    finally:
        stop.set()
        thread.join()
    assert not errors


def test_what_cannot_be_recorded_runs_by_itself(caplog):
    source = torch.ones(3, device="cuda")

    def body() -> torch.Tensor:
        return source * float(source.sum())  # waits, which a recording refuses

    replay = Replay(body, source.device)
    for number in range(RUNS_BEFORE + 4):
        source.fill_(number)
        assert replay().tolist() == [3.0 * number * number] * 3
    assert "one by one" in caplog.text
    assert source.sum().item() == 3.0 * (RUNS_BEFORE + 3)


@pytest.mark.parametrize("trust", ["kl", "graft"])
def test_a_training_run_is_as_without_it(trust, monkeypatch):
    ends = []
    for most in (0, 1 << 26):
        monkeypatch.setattr("skfac.client.stacked.MOST_REPLAYED", most)
        torch.manual_seed(0)
        wide = [layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.Tanh())]
        model = nn.Sequential(nn.Flatten(), *wide, nn.Linear(64, 5)).cuda()
        optimizer = sgd(model)
        settings = {"update_every": 3, "lag": 2, "trust": trust, "apply": "gradient"}
        with Preconditioner(model, optimizer, **settings) as pre:
            for step in range(14):
                images, labels = (tensor.cuda() for tensor in batch_at(step))
                nn.functional.cross_entropy(model(images), labels).backward()
                pre._store.settle(LONG_S)
                pre.step()
                optimizer.step()
                optimizer.zero_grad()
            replay = pre._apply._stacks._replay
            assert (replay is not None and replay._recorded is not None) == (most > 0)
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
    for mine, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
