"""How much memory this process takes, and took at most."""

import ctypes
import gc
import re
from pathlib import Path

_PROCESS = Path("/proc/self")


def resident_bytes() -> int:
    """Memory that is in use now, after what is free was given back.

    Returns:
        Its bytes.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else a peak could hide in what is kept free
    return _status_bytes("VmRSS")


def reset_peak() -> None:
    """Begin to measure the peak anew."""
    (_PROCESS / "clear_refs").write_text("5")


def peak_bytes() -> int:
    """Most memory that was in use since `reset_peak`.

    Returns:
        Its bytes.
    """
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    text = (_PROCESS / "status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None, f"{name} is not in /proc/self/status"
    return 1024 * int(found[1])
