"""The allocator is tuned, unless whoever started the process has chosen otherwise."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import mmap, resource, torch
from skfac.wire.allocator import keep_large_blocks
print(keep_large_blocks(), keep_large_blocks())
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(48 * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def run(**environment: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.split()


def test_large_blocks_are_kept():
    *tuned, faults = run()

    assert tuned == ["True", "True"]
    assert int(faults) < 1000


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_ARENA_MAX": "4"},
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
        {"LD_PRELOAD": "/nonexistent/libjemalloc.so.2"},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_what_the_user_has_chosen_stays(environment):
    *tuned, faults = run(**environment)

    assert tuned == ["False", "False"]
    assert int(faults) > 10_000  # 12,288 pages each time, ten times
