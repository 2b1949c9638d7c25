"""Servers that are restarted or replaced while a job goes on, to the bit."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from skfac.client import Preconditioner
from tests.end_to_end.test_ranks import STEPS as RANK_STEPS
from tests.end_to_end.test_ranks import train
from tests.support.models import backward, flat_parameters, sgd, small_cnn
from tests.support.ranks import run_ranks
from tests.support.servers import LONG_S, ServerProcess, free_address, start_all

pytestmark = pytest.mark.timeout(240)  # many processes; a busy machine

STEPS = 12
LONG = pytest.mark.long  # not in the default run


class Run:
    """A small trainer, a step at a time."""

    def __init__(self, target: Any, **settings: Any) -> None:
        self.model = small_cnn()
        self.optimizer = sgd(self.model)
        self.steps = 0
        self.pre = Preconditioner(
            self.model,
            self.optimizer,
            target=target,
            **{"on_late": "wait", "wait_s": LONG_S, "update_every": 1, **settings},
        )

    def train(self, steps: int) -> None:
        for _ in range(steps):
            backward(self.model, self.steps)
            self.pre.step()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1


def undisturbed(**settings: Any) -> torch.Tensor:
    run = Run("embedded", **settings)  # the bits of a server: test_bits.py
    run.train(STEPS)
    run.pre.close()
    return flat_parameters(run.model)


@pytest.mark.parametrize("on_late", ["wait", pytest.param("keep", marks=LONG)])
def test_servers_are_restarted_one_after_the_other(on_late):
    with ExitStack() as stack:
        servers = start_all(stack, free_address(), free_address())
        run = Run([server.address for server in servers], on_late=on_late)
        for server in servers:
            run.train(STEPS // 3)
            code, output = server.interrupt(signal.SIGTERM)
            assert code == 0, output
            stack.enter_context(ServerProcess(server.address))
        run.train(STEPS // 3)
        report = run.pre.report()
        run.pre.close()
        expected = undisturbed()

    assert report["transport"]["disconnects"] == 2
    if on_late == "wait":
        assert torch.equal(flat_parameters(run.model), expected)
        assert report["versions"]["solved"] >= 4 * (STEPS - 1)
    else:
        assert torch.isfinite(flat_parameters(run.model)).all()


@pytest.mark.parametrize("history", ["ema", pytest.param("window", marks=LONG)])
def test_a_volume_carries_histories_over_a_restart(tmp_path, history):
    settings = {"history": history, "window": 3}
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(state_dir=tmp_path))
        run = Run(server.address, **settings)
        run.train(STEPS // 2)
        code, output = server.interrupt(signal.SIGTERM)
        assert code == 0, output
        stack.enter_context(ServerProcess(server.address, state_dir=tmp_path))
        run.train(STEPS // 2)
        report = run.pre.report()
        run.pre.close()
        expected = undisturbed(**settings)

    assert torch.equal(flat_parameters(run.model), expected)
    assert report["versions"].get("history_losses", 0) == 0


@LONG
@pytest.mark.parametrize(("history", "counts"), [("ema", (2, 3)), ("window", (2, 1))])
def test_a_checkpoint_goes_on_with_another_number_of_servers(history, counts):
    settings = {"history": history, "window": 3, "rank": 30}
    with ExitStack() as stack:
        servers = start_all(stack, *(free_address() for _ in range(sum(counts))))
        first, second = servers[: counts[0]], servers[counts[0] :]
        run = Run([server.address for server in first], **settings)
        run.train(STEPS // 2)
        state = run.pre.state_dict()
        for server in first:
            server.kill()
        run.pre.close()
        again = Run([server.address for server in second], **settings)
        again.model.load_state_dict(run.model.state_dict())
        again.optimizer.load_state_dict(run.optimizer.state_dict())
        again.pre.load_state_dict(state)
        again.steps = run.steps
        again.train(STEPS // 2)
        again.pre.close()
        expected = undisturbed(**settings)

    assert torch.equal(flat_parameters(again.model), expected)


def stopped_while_pushing(rank: int, target: str, pid: int) -> dict[str, Any]:
    def before(step: int) -> None:
        if (rank, step) == (0, RANK_STEPS // 2):
            os.kill(pid, signal.SIGTERM)  # the other ranks push meanwhile

    settings = {"update_every": 1, "on_late": "keep", "wait_s": 1.0}
    return train(rank, target, ddp=False, before=before, **settings)


def test_a_server_stops_while_four_ranks_push():
    with ServerProcess() as server:
        ranks = run_ranks(4, stopped_while_pushing, server.address, server.process.pid)
        output, _ = server.process.communicate(timeout=LONG_S)

    assert server.process.returncode == 0, output
    assert "left unsolved" not in output
    assert "Traceback" not in output
    for rank in ranks:
        assert rank["digests"] == ranks[0]["digests"]
        assert not rank["report"]["connected"]
        assert rank["report"]["versions"].get("refused", 0) == 0


def waits_for_a_restart(rank: int, target: str, folder: Path) -> dict[str, Any]:
    def before(step: int) -> None:
        if (rank, step) == (0, RANK_STEPS // 2):
            (folder / "asked").touch()
            wait_for_file(folder / "done")

    settings = {"update_every": 1, "on_late": "wait", "wait_s": LONG_S}
    return train(rank, target, ddp=False, before=before, history="ema", **settings)


def wait_for_file(file: Path) -> None:
    end_s = time.monotonic() + 2 * LONG_S
    while not file.exists():
        assert time.monotonic() < end_s, file
        time.sleep(0.05)


def run_two_ranks(folder: Path, *, restart: bool) -> list[dict[str, Any]]:
    folder.mkdir()
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(state_dir=folder))

        def answer() -> None:
            wait_for_file(folder / "asked")
            if restart:
                code, output = server.interrupt(signal.SIGTERM)
                assert code == 0, output
                again = ServerProcess(server.address, state_dir=folder)
                stack.enter_context(again)
            (folder / "done").touch()

        with ThreadPoolExecutor(1) as pool:
            answered = pool.submit(answer)
            ranks = run_ranks(2, waits_for_a_restart, server.address, folder)
            answered.result()
        return ranks


@LONG
def test_a_volume_carries_the_histories_of_several_ranks_over_a_restart(tmp_path):
    ranks = run_two_ranks(tmp_path / "restarted", restart=True)
    undisturbed = run_two_ranks(tmp_path / "undisturbed", restart=False)

    for rank in ranks:
        assert rank["digests"] == undisturbed[0]["digests"]
        assert rank["report"]["transport"]["disconnects"] == 1
        assert rank["report"]["versions"].get("history_losses", 0) == 0
