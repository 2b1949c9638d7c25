"""What several tests of the server need."""

import threading

import pytest

from skfac.service.scheduler import Task
from skfac.service.solver import Solver
from tests.support.values import PATIENCE_S


@pytest.fixture
def gate(monkeypatch):
    """Keeps the solver inside its first batch until the test opens the gate.

    Whether it is inside, what opens the gate, and the batches that came to it.
    """
    entered, opened, solve = threading.Event(), threading.Event(), Solver.solve
    taken: list[list[Task]] = []

    def wait(self, batch):
        taken.append(list(batch))
        entered.set()
        assert opened.wait(PATIENCE_S)
        return solve(self, batch)

    monkeypatch.setattr(Solver, "solve", wait)
    yield entered, opened, taken
    opened.set()
