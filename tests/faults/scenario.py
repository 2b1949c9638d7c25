"""The scenario of `make faults`: a job without faults, and the same job with them."""

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.faults import judge
from tests.faults.run import Evidence, Run, Setting
from tests.faults.schedule import Event, Shape, planned
from tests.faults.traces import untraced

WAIT_S = 0.3
SETTINGS = {
    "update_every": 2,
    "lag": 2,
    "wait_s": WAIT_S,
    "damping": 0.03,
    "kl_clip": 0.05,
}
# A version whose rows are not all there is given up before the run is over.
SERVER = {"assembly_timeout_s": 1.0}
PACE_S = 0.08
CHECKPOINT_EVERY = 50


@dataclass(frozen=True)
class Result:
    """What one seed gave.

    Attributes:
        seed: Of the schedule, the links and the order of the digits.
        diverged: Steps after which ranks differed, with faults or without.
        unfinished: What the run lacks; empty if it ended well.
        stall: The longest one.
        loss: At the end, under faults.
        undisturbed_loss: At the end, without.
        events: How many of each kind.
        untraced: Events that do not show.
        closing_s: The longest time that a rank took to leave.
        folder: Digits, logs and checkpoints of the run.
    """

    seed: int
    diverged: list[int]
    unfinished: str
    stall: judge.Stall
    loss: float
    undisturbed_loss: float
    events: dict[str, int]
    untraced: list[str]
    closing_s: float
    folder: str

    @property
    def good(self) -> bool:
        """Whether replicas were identical and the run ended."""
        return not (self.diverged or self.unfinished)


def faulty(seed: int, shape: Shape, **settings: Any) -> Setting:
    """The job under faults.

    Tensors go through the links with even seeds, and through shared memory with odd
    ones, as of ranks on the servers' hosts.
    """
    return Setting(
        shape,
        seed,
        SETTINGS | {"on_late": "keep"} | settings,
        server=SERVER,
        pace_s=PACE_S,
        every=CHECKPOINT_EVERY,
        shared=seed % 2 == 1,
    )


def quiet(seed: int, shape: Shape, **settings: Any) -> Setting:
    """The same job, in which every version comes in time."""
    waiting = SETTINGS | {"on_late": "wait"} | settings
    return Setting(shape, seed, waiting, links=False)


def write_digits(folder: Path) -> None:
    """Put the digits where ranks look: scikit-learn takes seconds to import."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    torch.save((inputs, torch.as_tensor(labels)), folder / "digits.pt")


def play(
    setting: Setting,
    plan: tuple[Event, ...],
    folder: Path,
    progress: Callable[[int], None] = lambda _: None,
) -> Evidence:
    """Run a job in a folder that has the digits.

    Returns:
        The evidence.
    """
    with Run(setting, plan, folder, progress) as run:
        return run.play()


def one_seed(
    seed: int, shape: Shape, progress: Callable[[str, int], None], **settings: Any
) -> Result:
    """Run the job of a seed without faults, and with them.

    Args:
        seed: The seed.
        shape: Ranks, servers and steps.
        progress: Called with what is running and its steps so far.
        settings: Keywords of `Preconditioner` in both.

    Returns:
        What it gave.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"skfac-faults-{seed}-"))
    undisturbed, disturbed = folder / "undisturbed", folder / "disturbed"
    for one in (undisturbed, disturbed):
        one.mkdir()
        write_digits(one)
    before = play(
        quiet(seed, shape, **settings), (), undisturbed, lambda n: progress("quiet", n)
    )
    setting, plan = faulty(seed, shape, **settings), planned(seed, shape)
    evidence = play(setting, plan, disturbed, lambda n: progress("faults", n))
    unfinished = judge.unfinished(evidence, setting)
    if judge.unfinished(before, setting):
        unfinished = f"undisturbed: {judge.unfinished(before, setting)}"
    return Result(
        seed,
        judge.diverged(before) + judge.diverged(evidence),
        unfinished,
        judge.longest_stall(evidence),
        judge.loss(evidence),
        judge.loss(before),
        judge.kinds(evidence),
        untraced(evidence),
        max((line["closing_s"] for line in evidence.done.values()), default=0.0),
        str(folder),
    )


def summary(results: list[Result], wait_s: float) -> dict[str, Any]:
    """Put the results of all seeds into one line.

    The noise is the spread of the undisturbed losses, which differ in the order of the
    digits; the excess is the most that faults made the loss of a seed worse.

    Returns:
        Plain data.
    """
    quiet_losses = [result.undisturbed_loss for result in results]
    noise = max(quiet_losses) - min(quiet_losses)
    excess = max(result.loss - result.undisturbed_loss for result in results)
    worst = max(results, key=lambda result: result.stall.seconds)
    events: Counter[str] = Counter()
    for result in results:
        events.update(result.events)
    return {
        "runs": len(results),
        "diverged": sum(bool(result.diverged) for result in results),
        "hung": sum(bool(result.unfinished) for result in results),
        "longest_stall_over_wait_s": round(worst.stall.seconds - wait_s, 4),
        "longest_stall_at": {
            "seed": worst.seed,
            "step": worst.stall.step,
            "rank": worst.stall.rank,
            "without_a_core_s": round(worst.stall.no_core_s, 4),
        },
        "wait_s": wait_s,
        "loss_excess": excess,
        "loss_noise": noise,
        "losses": [result.loss for result in results],
        "undisturbed_losses": quiet_losses,
        "longest_closing_s": round(max(r.closing_s for r in results), 3),
        "events": dict(sorted(events.items())),
        "untraced": {str(r.seed): r.untraced for r in results if r.untraced},
        "seeds": [result.seed for result in results],
    }
