"""What a rank tells a server about its steps: counted for people, nothing more."""

import math
from dataclasses import dataclass

from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.errors import InvalidRequestError

MAX_REPORTED = 256
"""Steps, and latencies, that one report may have."""


@dataclass(frozen=True)
class StepReport:
    """How a rank's steps since its previous snapshot fared with some layers.

    Attributes:
        staleness: For each step the steps since the capture of the oldest version that
            it used; steps that used none are absent. At most `MAX_REPORTED`.
        late: (Layer, version)s that were missing at their deadline.
        stale: (Layer, step)s whose version was older than `max_staleness`.
        raw: (Layer, step)s that used the raw gradient, those included.
        end_to_end_s: Seconds from the capture of a snapshot until the rank had the last
            of its versions, finite and not negative. At most `MAX_REPORTED`.

    Raises:
        InvalidRequestError: If there are too many numbers, or one is out of range.
    """

    staleness: tuple[int, ...] = ()
    late: int = 0
    stale: int = 0
    raw: int = 0
    end_to_end_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("staleness", "end_to_end_s"):
            count = len(getattr(self, name))
            if count > MAX_REPORTED:
                raise InvalidRequestError(
                    f"A report has {count} numbers in {name}; at most {MAX_REPORTED} "
                    "are taken, the latest."
                )
        for seconds in self.end_to_end_s:
            if not 0 <= seconds < math.inf:
                raise InvalidRequestError(
                    f"A report has an end_to_end_s of {seconds}; it must be finite and "
                    "not negative."
                )


NO_STEPS = StepReport()
"""What there is to say before any step."""


def encode_report(report: StepReport) -> pb.StepReport:
    """Write a report.

    Returns:
        The message.
    """
    return pb.StepReport(
        staleness=report.staleness,
        late=report.late,
        stale=report.stale,
        raw=report.raw,
        end_to_end_s=report.end_to_end_s,
    )


def decode_report(message: pb.StepReport) -> StepReport:
    """Read a report.

    Returns:
        It; an empty one if none was sent.

    Raises:
        InvalidRequestError: If there are too many numbers, or one is out of range.
    """
    return StepReport(
        tuple(message.staleness),
        message.late,
        message.stale,
        message.raw,
        tuple(message.end_to_end_s),
    )
