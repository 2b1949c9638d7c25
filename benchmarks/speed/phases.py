"""Where the time of a step goes, by torch's profiler."""

from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.trainers import Trainer

_PREFIX = "skfac."


def phases_of(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Profile some steps.

    Args:
        trainer: With SKFAC.
        steps: How many; the profiler takes ten times as long for them as they take.

    Returns:
        `phase_share`: the share of the steps' time that each phase of SKFAC takes, by
        the names that the client gives them; the rest is forward, backward and update.
    """
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            trainer.step()
    events = recorded.events()
    assert events is not None
    begin = min(event.time_range.start for event in events)
    end = max(event.time_range.end for event in events)
    spent: dict[str, float] = {}
    for event in events:
        if event.name.startswith(_PREFIX):
            name = event.name.removeprefix(_PREFIX)
            spent[name] = spent.get(name, 0.0) + event.time_range.elapsed_us()
    return {
        "phase_share": {
            name: round(us / (end - begin), 4) for name, us in spent.items()
        }
    }
