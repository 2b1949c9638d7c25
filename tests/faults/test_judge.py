"""What a verdict says of evidence that is known."""

from dataclasses import replace

import pytest

from tests.faults import judge
from tests.faults.run import Evidence, Setting
from tests.faults.scenario import Result, summary
from tests.faults.schedule import Shape

SETTING = Setting(Shape(ranks=2, steps=2), seed=0, settings={})


def line(step: int, entered_s: float, left_s: float, digest: str = "a"):
    return {
        "step": step,
        "digest": digest,
        "entered_s": entered_s,
        "left_s": left_s,
        "no_core_s": 0.0,
    }


def evidence(first, second) -> Evidence:
    done = {rank: {"loss": 0.5, "closing_s": 0.1} for rank in range(2)}
    return Evidence(steps=[[first, second]], done=done)


def test_replicas_that_differ_are_found_step_by_step():
    found = evidence(
        [line(0, 0, 1), line(1, 2, 3, "b")], [line(0, 0, 1), line(1, 2, 3, "c")]
    )

    assert judge.diverged(found) == [1]


def test_ranks_are_compared_at_the_same_step():
    found = evidence([line(0, 0, 1)], [line(1, 0, 1)])

    assert judge.diverged(found) == [0]


def test_a_stall_begins_when_the_last_rank_is_there():
    found = evidence([line(0, 0.0, 5.0)], [line(0, 4.0, 5.5)])

    assert [stall.seconds for stall in judge.stalls(found)] == [1.0, 1.5]
    assert judge.longest_stall(found).rank == 1


def test_a_stopped_rank_is_no_stall_of_the_service():
    found = evidence([line(0, 0.0, 12.0)], [line(0, 1.0, 12.5)])
    found.stops.append((1, 0.5, 11.0))

    assert [stall.seconds for stall in judge.stalls(found)] == [1.0, 1.5]


def test_a_rank_that_left_before_the_last_came_has_no_stall():
    # Nothing was due: they did not wait for each other.
    found = evidence([line(0, 0.0, 0.5)], [line(0, 3.0, 3.25)])

    assert [stall.seconds for stall in judge.stalls(found)] == [0.0, 0.25]


@pytest.mark.parametrize("lost", ["end", "step", "nothing", "time"])
def test_a_run_that_did_not_end_says_who(lost):
    lines = [line(0, 0, 1), line(1, 2, 3)]
    found = evidence(lines, lines[:1] if lost == "step" else lines)
    if lost == "end":
        del found.done[1]
    if lost == "time":
        found.hung = "ranks [1] after step 1"
    said = judge.unfinished(found, SETTING)

    assert bool(said) == (lost != "nothing")
    assert lost == "nothing" or "1" in said


def result(seed: int, **changes) -> Result:
    given = Result(seed, [], "", judge.Stall(0.25), 0.50, 0.49, {"cut": 2}, [], 0.1, "")
    return replace(given, **changes)


def test_the_summary_counts_what_is_bad():
    results = [
        result(0),
        result(1, diverged=[7], undisturbed_loss=0.45),
        result(2, unfinished="rank 1 did not end well", stall=judge.Stall(0.5)),
    ]
    found = summary(results, wait_s=0.3)

    assert (found["runs"], found["diverged"], found["hung"]) == (3, 1, 1)
    assert found["longest_stall_over_wait_s"] == 0.2
    assert found["longest_stall_at"]["seed"] == 2
    assert found["loss_excess"] == pytest.approx(0.05)
    assert found["loss_noise"] == pytest.approx(0.04)
    assert found["events"] == {"cut": 6}
