"""Servers that die, hang or come back, and trainers that are interrupted."""

import ctypes
import math
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable

import psutil
import pytest

from skfac.client import LateVersionError, Preconditioner, ServiceError
from skfac.service.solver import Solver
from tests.support.models import backward, sgd, small_cnn
from tests.support.servers import (
    LONG_S,
    ServerProcess,
    serving,
    start,
    wait_for_line,
)

WAIT_S = 1.0  # far longer than a step takes, even on a busy machine


class Trainer:
    """A small model that can be trained for a while."""

    def __init__(self, target: str, **settings) -> None:
        self.model = small_cnn()
        self.optimizer = sgd(self.model)
        self.preconditioner = Preconditioner(
            self.model, self.optimizer, target=target, **settings
        )
        self.steps = 0

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.preconditioner.close()

    def step(self) -> float:
        """One step; returns the seconds that the preconditioner took."""
        assert math.isfinite(backward(self.model, self.steps))
        began_s = time.monotonic()
        self.preconditioner.step()
        stalled_s = time.monotonic() - began_s
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return stalled_s

    def step_until(self, condition: Callable[[dict], bool]) -> dict:
        """Train until the report says so; fails after a long time."""
        end_s = time.monotonic() + LONG_S
        while not condition(report := self.preconditioner.report()):
            assert time.monotonic() < end_s, report
            self.step()
        return report


def ages(report: dict) -> set[int | None]:
    return {layer["age"] for layer in report["layers"].values()}


def test_a_killed_server_costs_freshness_and_nothing_else():
    settings = {"update_every": 2, "wait_s": WAIT_S, "max_staleness": 40}
    with ServerProcess() as server, Trainer(server.address, **settings) as trainer:
        trainer.step_until(lambda report: report["versions"].get("solved", 0) >= 8)
        server.kill()
        trainer.step_until(lambda report: not report["connected"])
        stalls_s = [trainer.step() for _ in range(10)]
        kept = trainer.preconditioner.report()

        assert max(stalls_s) < WAIT_S  # nobody waits for a server that is gone
        assert min(ages(kept)) >= 10
        assert kept["versions"]["late"] > 0

        raw = trainer.step_until(
            lambda report: report["raw_gradients"] > kept["raw_gradients"]
        )
        assert min(ages(raw)) >= 40

        with ServerProcess(server.address):
            trainer.step_until(lambda report: report["connected"])
            back = trainer.step_until(lambda report: max(ages(report)) <= 3)
            assert back["transport"]["connects"] == 2
            assert back["transport"]["disconnects"] == 1
            assert back["failure"] is None


def test_a_server_that_hangs_is_waited_for_once():
    settings = {"update_every": 1, "wait_s": WAIT_S}
    with ServerProcess() as server, Trainer(server.address, **settings) as trainer:
        trainer.step_until(lambda report: report["versions"].get("solved", 0) >= 8)
        server.process.send_signal(signal.SIGSTOP)
        stalls_s = [trainer.step() for _ in range(12)]
        server.process.send_signal(signal.SIGCONT)
        report = trainer.step_until(lambda report: max(ages(report)) <= 1)

        # What was in flight may arrive and renew its patience, but not every step.
        assert sum(stalls_s) < 4 * WAIT_S
        assert report["versions"]["vain_waits"] >= 1


def test_a_server_that_is_not_there_yet_is_joined_later(caplog):
    with ServerProcess() as server:
        address = server.address
    with Trainer(address, wait_s=0.1, update_every=2) as trainer:
        before = trainer.step_until(lambda report: report["step"] == 5)
        assert ages(before) == {None}
        assert before["raw_gradients"] == 5 * 4
        with ServerProcess(address):
            trainer.step_until(lambda report: report["connected"])
            trainer.step_until(lambda report: None not in ages(report))
            assert "training begins with raw gradients" in caplog.text
            assert caplog.text.count(" yet: ") == 1  # said once, not every try


def test_waiting_outlives_a_restart():
    with (
        ServerProcess() as server,
        Trainer(server.address, update_every=1, on_late="wait", wait_s=1.0) as trainer,
    ):
        trainer.step_until(lambda report: report["step"] == 5)
        server.kill()
        restarted: list[ServerProcess] = []
        restart = threading.Thread(
            target=lambda: restarted.append(ServerProcess(server.address))
        )
        restart.start()
        for _ in range(5):
            trainer.step()
        restart.join()
        with restarted[0]:
            report = trainer.preconditioner.report()

        assert ages(report) == {1}  # every version came, none was given up


def test_raising_is_what_was_asked_for():
    with (
        ServerProcess() as server,
        Trainer(
            server.address, update_every=1, on_late="raise", wait_s=WAIT_S
        ) as trainer,
    ):
        trainer.step_until(lambda report: report["step"] == 5)
        server.kill()
        with pytest.raises(LateVersionError, match=r"wait_s = 1 s"):
            trainer.step_until(lambda report: report["step"] == 10)


def test_a_second_run_under_one_name_takes_over_and_the_first_goes_on():
    with serving() as server:
        first = Trainer(server.address, job="mnist", update_every=1)
        second = Trainer(server.address, job="mnist", update_every=1)
        with first, second:
            second.step_until(lambda report: report["versions"].get("solved", 0) >= 8)
            report = first.step_until(lambda report: report["failure"] is not None)
            first.step()

            assert "was started again" in report["failure"]
            assert second.preconditioner.report()["failure"] is None


def test_a_refusal_at_the_start_is_raised(monkeypatch):
    with serving(max_layers=2) as server:
        with pytest.raises(ServiceError, match="max_layers = 2"):
            Trainer(server.address)
        assert not [t for t in threading.enumerate() if t.name == "skfac-link"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's threads")
def test_a_signal_stops_a_server_whichever_thread_gets_it():
    with ServerProcess() as server:
        pid = server.process.pid
        other = max(thread.id for thread in psutil.Process(pid).threads())
        assert other != pid
        tgkill = 234 if platform.machine() == "x86_64" else 131
        assert ctypes.CDLL(None).syscall(tgkill, pid, other, signal.SIGTERM) == 0
        assert server.process.wait(LONG_S) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopping_server_solves_what_it_took_and_leaves_nothing(number, tmp_path):
    socket = tmp_path / "skfac.sock"
    with (
        ServerProcess(f"unix:{socket}") as server,
        Trainer(server.address, update_every=1, wait_s=WAIT_S) as trainer,
    ):
        trainer.step_until(lambda report: report["versions"].get("solved", 0) >= 8)
        code, output = server.interrupt(number)
        report = trainer.step_until(lambda report: not report["connected"])

        assert code == 0
        assert "Traceback" not in output
        assert not socket.exists()
        assert math.isfinite(backward(trainer.model, 0))
        assert "failed" not in report["versions"]


@pytest.mark.parametrize("embedded", [True, False])
def test_an_interrupted_trainer_leaves_nothing(embedded):
    with ServerProcess() as server:
        target = "embedded" if embedded else server.address
        trainer = start("-m", "tests.support.trainer", target)
        try:
            wait_for_line(trainer.stdout, "Trained 20 steps")
            children = psutil.Process(trainer.pid).children(recursive=True)
            trainer.send_signal(signal.SIGINT)
            output, _ = trainer.communicate(timeout=LONG_S)
        finally:
            trainer.kill()

        assert trainer.returncode == 130
        assert "Traceback" not in output
        assert not [child for child in children if child.is_running()]
        code, log = server.interrupt(signal.SIGTERM)
    assert code == 0
    if not embedded:
        assert "All ranks have left" in log


def test_closing_ends_all_threads():
    before = set(threading.enumerate())
    with serving() as server:
        for target in ("embedded", server.address):
            with Trainer(target, update_every=1) as trainer:
                trainer.step_until(lambda report: report["versions"].get("solved", 0))
    mine = {t for t in set(threading.enumerate()) - before if "skfac" in t.name}
    # The pool's threads end by themselves once their last call has returned.
    deadline_s = time.monotonic() + LONG_S
    for thread in mine:
        thread.join(max(deadline_s - time.monotonic(), 0))
    assert not [thread for thread in mine if thread.is_alive()]


def test_a_solver_that_fails_keeps_the_last_version(monkeypatch, caplog):
    with Trainer("embedded", update_every=1, wait_s=WAIT_S) as trainer:
        trainer.step_until(lambda report: None not in ages(report))

        def broken(self, batch):
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(Solver, "solve", broken)
        report = trainer.step_until(
            lambda report: report["versions"].get("failed", 0) >= 8
        )
        assert None not in ages(report)
    by_layer = [r for r in caplog.records if r.name == "skfac.service.monitor"]
    assert len(by_layer) == 4  # said once a layer, not every step
