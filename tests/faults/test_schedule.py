"""Schedules are the same for the same seed, and have what the scenario asks for."""

from collections import Counter

import pytest

from tests.faults.schedule import (
    KINDS,
    Event,
    Shape,
    each_kind_once,
    planned,
    without_crashes,
)

SEEDS = range(10)
SHAPE = Shape()


def of_kind(events: tuple[Event, ...], kind: str) -> Event:
    return next(event for event in events if event.kind == kind)


def test_a_seed_is_one_schedule():
    assert planned(3, SHAPE) == planned(3, SHAPE)
    assert len({planned(seed, SHAPE) for seed in SEEDS}) == len(SEEDS)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_schedule_has_all_that_the_scenario_asks_for(seed):
    events = planned(seed, SHAPE)
    counts = Counter(event.kind for event in events)

    assert [event.step for event in events] == sorted(event.step for event in events)
    assert all(0 < event.step < SHAPE.steps for event in events)
    assert (counts["kill"], counts["restart"], counts["stall"]) == (1, 1, 1)
    assert counts["delay"] >= 2
    assert counts["crash"] <= 1
    killed, restarted = of_kind(events, "kill"), of_kind(events, "restart")
    assert killed.server != restarted.server
    assert of_kind(events, "stall").amount == 10
    # Time enough to come back, and to see it.
    assert restarted.step + restarted.steps < 0.8 * SHAPE.steps


def test_both_servers_may_be_away_at_once_and_ranks_may_crash():
    plans = [planned(seed, SHAPE) for seed in SEEDS]
    killed_first = [of_kind(p, "kill").step < of_kind(p, "restart").step for p in plans]
    crashes = [any(event.kind == "crash" for event in plan) for plan in plans]

    assert {True, False} == set(killed_first) == set(crashes)


def test_the_short_schedule_has_each_kind_once():
    events = each_kind_once(0, Shape(ranks=2, steps=110))

    assert sorted(event.kind for event in events) == sorted(KINDS)
    assert of_kind(events, "kill").server != of_kind(events, "restart").server


def test_crashes_can_be_left_out():
    events = without_crashes(each_kind_once(0, SHAPE))

    assert len(events) == len(KINDS) - 1
    assert "crash" not in {event.kind for event in events}
