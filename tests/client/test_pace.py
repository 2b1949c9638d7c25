"""How long steps take, whoever is slow, and what is said of waiting."""

import logging

import pytest

from skfac.client.pace import WATCHED, Pace
from tests.support.values import FakeClock


def test_the_longest_step_is_kept():
    now_s = iter([5.0, 6.0, 9.0, 9.5])
    pace = Pace(1, lambda: next(now_s))

    assert pace.longest_s == 0.0
    found = []
    for _ in range(4):
        pace.step(0.0)
        found.append(pace.longest_s)
    assert found == [0.0, 1.0, 3.0, 3.0]


def said(caplog, lag: int, share: float, steps: int) -> list[str]:
    clock = FakeClock()
    pace = Pace(lag, clock)
    with caplog.at_level(logging.WARNING, "skfac.client"):
        for step in range(steps):
            pace.step(share * step)
            clock.now_s += 1.0
    return [record.getMessage() for record in caplog.records]


def test_much_waiting_is_said_once_with_the_way_out(caplog):
    (text,) = said(caplog, 3, 0.2, 5 * WATCHED)

    assert text.startswith("20 % of the last 100 steps' time was waiting")
    assert "lag = 3 steps" in text


@pytest.mark.parametrize(
    ("lag", "share", "steps"),
    [
        (1, 0.04, 5 * WATCHED),  # little of it
        (0, 0.9, 5 * WATCHED),  # what lag=0 is
        (1, 0.9, 2 * WATCHED),  # while engines begin
    ],
)
def test_other_waiting_is_not(caplog, lag, share, steps):
    assert said(caplog, lag, share, steps) == []


def test_waiting_that_comes_later_is_said(caplog):
    clock, waited_s = FakeClock(), 0.0
    pace = Pace(1, clock)
    for step in range(5 * WATCHED):
        waited_s += 0.5 * (step > 3 * WATCHED)
        pace.step(waited_s)
        clock.now_s += 1.0

    (record,) = caplog.records
    assert record.getMessage().startswith("50 %")
