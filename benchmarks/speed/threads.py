"""Which threads of a trainer take its core's time, by the kernel's count."""

import threading
from collections.abc import Mapping
from pathlib import Path

from benchmarks.speed.trainers import Trainer

_TASKS = Path("/proc/self/task")
_NAMES = {"MainThread": "trainer", "skfac-receive": "receive", "skfac-link": "link"}


def cpu_ms_by_thread(
    trainers: Mapping[str, Trainer], steps: int
) -> dict[str, dict[str, float]]:
    """Take steps with each trainer, and read what each thread has run meanwhile.

    Args:
        trainers: By name.
        steps: Of each.

    Returns:
        For each trainer the milliseconds a step of its own thread ("trainer"), of the
        one that receives versions, of the one that keeps the connection, and of those
        of gRPC, which encode snapshots, too. What other trainers' threads do meanwhile
        is among them.
    """
    found = {}
    for name, trainer in trainers.items():
        before = _run_ns()
        for _ in range(steps):
            trainer.step()
        found[name] = {
            group: round((ns - before.get(group, 0)) / 1e6 / steps, 3)
            for group, ns in sorted(_run_ns().items())
        }
    return found


def _run_ns() -> dict[str, int]:
    names = {one.native_id: one.name for one in threading.enumerate()}
    spent: dict[str, int] = {}
    for task in _TASKS.iterdir():
        group = _NAMES.get(names.get(int(task.name), ""), "grpc")
        # Nanoseconds on a processor come first; see the kernel's sched-stats.
        ns = int((task / "schedstat").read_text().split()[0])
        spent[group] = spent.get(group, 0) + ns
    return spent
