"""How a process gets the memory of large tensors from the C library.

By default glibc maps every block of 32 MiB or more anew and unmaps it when it is
freed, and returns what is free at the end of its heap. Each frame and each tensor of a
transfer then costs page faults, about as much time as copying it.
"""

import ctypes
import functools
import logging
import os
from collections.abc import Mapping

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_MiB = 1024 * 1024
_SETTINGS = (
    (_M_MMAP_THRESHOLD, (1024 * _MiB, 32 * _MiB)),  # the latter is glibc's old maximum
    (_M_TRIM_THRESHOLD, (2048 * _MiB - 1,)),
    (_M_TOP_PAD, (256 * _MiB,)),
)


@functools.cache
def keep_large_blocks() -> bool:
    """Tune glibc's allocator for large tensors, once a process.

    Nothing is done where the C library is another one, or where whoever started the
    process has chosen settings or an allocator by environment variables.

    Returns:
        Whether it is tuned now.
    """
    chosen = _chosen_by_user(os.environ)
    if chosen is not None:
        logger.debug("The allocator is left as it is: %s is set.", chosen)
        return False
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
        libc.gnu_get_libc_version  # noqa: B018  # others have mallopt, not these numbers
    except (AttributeError, OSError, TypeError):
        logger.debug("The allocator is left as it is: the C library is not glibc.")
        return False
    tuned = [
        any(mallopt(name, value) for value in values) for name, values in _SETTINGS
    ]
    logger.debug("The allocator keeps large blocks: %s.", all(tuned))
    return all(tuned)


def share_one_arena() -> bool:
    """Let all threads take memory from one arena, of a process that is all SKFAC's.

    By default glibc gives each thread an arena of its own. The rows that one thread
    receives are then freed to another arena than the one that the solver's thread takes
    the inverses from: neither can be reused for the other, and at the peak there is
    memory for both. `benchmarks/scale.py` measured 2.2 times what is live, not 1.3.

    Returns:
        Whether the C library knows how; threads that ran before keep their arenas.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_ARENA_MAX, 1))


def _chosen_by_user(environment: Mapping[str, str]) -> str | None:
    for name, value in environment.items():
        if name.startswith("MALLOC_"):
            return name
        if name in {"GLIBC_TUNABLES", "LD_PRELOAD"} and "malloc" in value:
            return name
    return None
