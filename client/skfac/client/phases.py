"""Names for the parts of a step, as `torch.profiler` shows them.

`skfac.capture` makes rows, `skfac.enqueue` hands a snapshot over, `skfac.wait` looks
versions up and may wait for them, `skfac.apply` preconditions, `skfac.trust` measures
the step and scales it.
"""

from contextlib import AbstractContextManager
from typing import Literal

import torch

Phase = Literal["capture", "enqueue", "wait", "apply", "trust"]


def phase(name: Phase) -> AbstractContextManager[object]:
    """Name what runs inside; a microsecond when nothing is profiled.

    Returns:
        A context manager.
    """
    # torch.profiler.record_function costs ten times as much: it is an operator.
    named: AbstractContextManager[object]
    named = torch._C._profiler._RecordFunctionFast(f"skfac.{name}")
    return named
