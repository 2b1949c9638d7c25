"""How much memory a process takes, and took at most."""

import ctypes
import gc
import os
import re
from pathlib import Path


def resident_bytes(pid: int) -> int:
    """Memory that is in use now; of this process after what is free was given back.

    Returns:
        Its bytes.
    """
    if pid == os.getpid():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else a peak could hide in what is kept free
    return _status_bytes(pid, "VmRSS")


def reset_peak(pid: int) -> None:
    """Begin to measure the peak anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_bytes(pid: int) -> int:
    """Most memory that was in use since `reset_peak`.

    Returns:
        Its bytes.
    """
    return _status_bytes(pid, "VmHWM")


def _status_bytes(pid: int, name: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None, f"{name} is not in /proc/{pid}/status"
    return 1024 * int(found[1])
