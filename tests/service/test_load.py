"""How busy a solver is, and what memory a device has left."""

import math
import resource

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skfac.service.load import BUSY_OVER_S, BusyShare, memory_bytes


def test_an_idle_solver_is_not_busy():
    assert BusyShare(5.0).at(1000.0) == 0.0


def test_a_busy_solver_becomes_busy_within_seconds():
    share = BusyShare(0.0)
    share.set(0.0, busy=True)

    assert share.at(0.0) == 0.0
    assert share.at(BUSY_OVER_S) == pytest.approx(1 - math.exp(-1))
    assert share.at(20 * BUSY_OVER_S) == pytest.approx(1.0)


def test_half_of_the_time_is_half():
    share = BusyShare(0.0)
    for turn in range(10_000):
        share.set(turn * 0.02, busy=True)
        share.set(turn * 0.02 + 0.01, busy=False)

    assert share.at(200.0) == pytest.approx(0.5, abs=0.01)


@given(
    st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=20),
    st.floats(0, 30),
)
def test_it_is_the_average_weighed_by_age(turns, rest_s):
    share, now_s, busy, busy_parts = BusyShare(0.0), 0.0, False, []
    for seconds, becomes in turns:
        if busy:
            busy_parts.append((now_s, now_s + seconds))
        now_s += seconds
        share.set(now_s, busy=becomes)
        busy = becomes
    end_s = now_s + rest_s
    if busy:
        busy_parts.append((now_s, end_s))

    weights = (
        math.exp((to_s - end_s) / BUSY_OVER_S)
        - math.exp((from_s - end_s) / BUSY_OVER_S)
        for from_s, to_s in busy_parts
    )
    assert share.at(end_s) == pytest.approx(sum(weights), abs=1e-9)


def test_the_memory_of_a_cpu_is_that_of_the_process():
    used, total = memory_bytes("cpu")

    assert total == pytest.approx(psutil.virtual_memory().total, rel=0.01)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 0.2 * peak < used <= 1.05 * peak
