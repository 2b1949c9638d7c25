"""What the evidence of a run says: replicas, ends, stalls and losses.

The stall of a step is what `Preconditioner.step()` took on a rank, counted from the
moment when the last rank entered it, without the time that any rank was stopped by the
harness. All ranks decide together there, so what comes before that moment waits for a
trainer, and so does what a stopped rank makes the others wait. Nothing else is taken
off: neither the work of the step nor the time that a busy machine makes it wait.
"""

from collections import Counter
from dataclasses import dataclass

from tests.faults.run import Evidence, Setting


@dataclass(frozen=True)
class Stall:
    """What one step of one rank took.

    Attributes:
        seconds: How long it was.
        step: When.
        rank: Who.
        no_core_s: How long this rank could have gone on and had no core.
    """

    seconds: float = 0.0
    step: int = -1
    rank: int = -1
    no_core_s: float = 0.0


def diverged(evidence: Evidence) -> list[int]:
    """Find the steps after which parameters differ between ranks.

    Returns:
        The steps, of all starts of the job.
    """
    return [
        lines[0]["step"]
        for start in evidence.steps
        for lines in zip(*start, strict=False)
        if len({(line["step"], line["digest"]) for line in lines}) > 1
    ]


def unfinished(evidence: Evidence, setting: Setting) -> str:
    """Find what a run lacks that is over.

    Returns:
        A sentence; empty if every rank took all steps and said so.
    """
    if evidence.hung:
        return evidence.hung
    shape = setting.shape
    for rank in range(shape.ranks):
        if rank not in evidence.done:
            return f"rank {rank} did not end well"
        taken = {line["step"] for start in evidence.steps for line in start[rank]}
        if taken != set(range(shape.steps)):
            return f"rank {rank} took {len(taken)} of {shape.steps} steps"
    return ""


def stalls(evidence: Evidence) -> list[Stall]:
    """Measure every step of every rank.

    Returns:
        One for each.
    """
    found = []
    for start in evidence.steps:
        for lines in zip(*start, strict=False):
            together_s = max(line["entered_s"] for line in lines)
            for rank, line in enumerate(lines):
                left_s = max(line["left_s"], together_s)
                stopped_s = _stopped_s(evidence, together_s, left_s)
                seconds = left_s - together_s - stopped_s
                found.append(Stall(seconds, line["step"], rank, line["no_core_s"]))
    return found


def longest_stall(evidence: Evidence) -> Stall:
    """Find the longest of `stalls`.

    Returns:
        It.
    """
    return max(stalls(evidence), key=lambda stall: stall.seconds, default=Stall())


def loss(evidence: Evidence) -> float:
    """Find the loss over all digits at the end, which is that of every rank.

    Returns:
        It; NaN if no rank ended.
    """
    return max((line["loss"] for line in evidence.done.values()), default=float("nan"))


def kinds(evidence: Evidence) -> dict[str, int]:
    """Count the events that happened.

    Returns:
        How many of each kind.
    """
    return dict(sorted(Counter(fired.event.kind for fired in evidence.fired).items()))


def _stopped_s(evidence: Evidence, began_s: float, ended_s: float) -> float:
    # Stops of ranks do not overlap: a schedule has one at a time.
    overlaps = (
        min(ended_s, stop[2]) - max(began_s, stop[1]) for stop in evidence.stops
    )
    return sum(max(overlap, 0.0) for overlap in overlaps)
