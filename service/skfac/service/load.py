"""How busy the solver is and what memory its device has left."""

import math
import os
from pathlib import Path

import torch

BUSY_OVER_S = 10.0
"""Time constant of `BusyShare`: what is this long ago counts 1/e."""


class BusyShare:
    """The share of the time that something is busy, the latest time counting most.

    It is the exact exponential average of busy (1) and idle (0), from 0 at the start,
    however often it changes. Its owner's lock guards it.
    """

    def __init__(self, now_s: float) -> None:
        self._since_s = now_s
        self._share = 0.0
        self._busy = False

    def set(self, now_s: float, *, busy: bool) -> None:
        """Say that it is busy, or idle, from now on."""
        self._share, self._since_s = self.at(now_s), now_s
        self._busy = busy

    def at(self, now_s: float) -> float:
        """Tell the share.

        Returns:
            0 to 1.
        """
        kept = math.exp(-(now_s - self._since_s) / BUSY_OVER_S)
        return self._share * kept + self._busy * (1.0 - kept)


def memory_bytes(device: str) -> tuple[int, int]:
    """Measure the memory of a device.

    Returns:
        Bytes in use and bytes in all: of a GPU by whomever, of a CPU the resident pages
        of this process and the memory of the machine. Zeros where the system does not
        tell.
    """
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        return total - free, total
    try:
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux
        return 0, 0
    page = os.sysconf("SC_PAGE_SIZE")
    return resident_pages * page, os.sysconf("SC_PHYS_PAGES") * page
