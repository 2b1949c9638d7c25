"""What the examples' trainer does besides training."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from skfac.client import Preconditioner
from tests.support.models import sgd
from tests.support.servers import serving

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def leave_a_core(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from common.training import a_core_for_the_engine_of

    yield a_core_for_the_engine_of
    for name in [name for name in sys.modules if name.split(".")[0] == "common"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("threads", "cores", "left"), [(4, 4, 3), (2, 4, 2), (2, 1, 1), (1, 2, 1)]
)
def test_an_embedded_engine_gets_a_core(
    leave_a_core, monkeypatch, threads, cores, left
):
    affinity = set(range(cores))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: affinity, raising=False)
    model = nn.Linear(3, 2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with Preconditioner(model, sgd(model)) as own, leave_a_core(own):
            assert torch.get_num_threads() == left
        with serving() as server:
            other = Preconditioner(model, sgd(model), target=server.address)
            with other, leave_a_core(other):
                assert torch.get_num_threads() == threads
        with leave_a_core(None):
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
