"""One arena for all threads, as glibc itself counts them."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys, tempfile, threading
from skfac.wire.allocator import share_one_arena

libc = ctypes.CDLL(None)
if not hasattr(libc, "malloc_info"):
    sys.exit(77)
if sys.argv[1] == "shared":
    assert share_one_arena()
libc.malloc.restype = ctypes.c_void_p
thread = threading.Thread(target=lambda: [libc.malloc(50_000) for _ in range(9)])
thread.start()
thread.join()
libc.fopen.restype = ctypes.c_void_p
with tempfile.NamedTemporaryFile("r") as found:
    stream = ctypes.c_void_p(libc.fopen(found.name.encode(), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    print(found.read().count("<heap nr="))
"""


@pytest.mark.parametrize("how", ["shared", "apart"])
def test_threads_share_an_arena(how):
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        capture_output=True,
        text=True,
        check=False,
    )

    if found.returncode == 77:
        pytest.skip("the C library is not glibc")
    assert not found.stderr
    assert (int(found.stdout) == 1) == (how == "shared")
