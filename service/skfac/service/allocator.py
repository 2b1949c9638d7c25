"""How this process gets memory from the C library."""

import ctypes

_M_ARENA_MAX = -8  # of glibc's <malloc.h>


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
