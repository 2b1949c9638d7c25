"""Runs this Python with some arguments, and Ctrl-C as in a terminal.

A test run in the background ignores it, and so would its children. To change that
between fork and exec (`preexec_fn`) is not safe beside gRPC: its threads may run in
the child by then and abort it, as its descriptors are closed (grpc/grpc#43055).
"""

import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])  # noqa: S606
