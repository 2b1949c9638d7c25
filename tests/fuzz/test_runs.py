"""The long runs of `make fuzz` and `make soak`, for seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import run

pytestmark = pytest.mark.timeout(120)

TESTS = Path(__file__).parents[1]


def last_line(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=110
    )
    assert done.stdout.strip(), done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_short_fuzz_costs_nobody_anything():
    found = last_line(
        str(TESTS / "fuzz" / "run.py"),
        *("--frames", "500", "--streams", "10", "--baseline-s", "1"),
    )
    assert (found["frames"], found["streams"], found["connections"]) == (500, 10, 10)
    assert (found["crashes"], found["versions_lost"]) == (0, 0)
    assert found["honest_steps"] > 0
    assert found["growth_descriptors"] <= 8
    assert found["threads_beyond_pool"] == 0


GOOD = {
    "crashes": 0, "versions_lost": 0, "threads_beyond_pool": 0, "growth_bytes": 0,
    "growth_descriptors": 0, "p99_ratio": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crashes", 1),
        ("versions_lost", 1),
        ("threads_beyond_pool", 1),
        ("growth_bytes", 2**26),
        ("growth_descriptors", 9),
        ("p99_ratio", 2.1),
        ("p99_ratio", None),
    ],
)
def test_a_fuzz_fails_by_each_measure(name, value):
    assert run.passed(GOOD)
    assert not run.passed({**GOOD, name: value})


def test_a_short_soak_runs(tmp_path):
    plot = tmp_path / "soak.png"
    found = last_line(
        str(TESTS / "soak" / "run.py"), "--minutes", "0.05", "--plot", str(plot)
    )
    assert found["server_alive"]
    assert found["errors"] == []
    assert found["sessions"] > 0
    assert found["shm_left"] == 0
    assert plot.stat().st_size > 0
