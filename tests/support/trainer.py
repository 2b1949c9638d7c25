"""A trainer as a process of its own: trains until it is told to stop."""

import signal
import sys

from skfac.client import Preconditioner
from tests.support.models import backward, sgd, small_cnn


def train(target: str) -> None:
    model = small_cnn()
    optimizer = sgd(model)
    step = 0
    with Preconditioner(model, optimizer, target=target, update_every=2) as pre:
        while True:
            backward(model, step)
            pre.step()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == 20:
                print("Trained 20 steps", flush=True)


if __name__ == "__main__":
    # A shell's background jobs inherit that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        train(sys.argv[1])
    except KeyboardInterrupt:
        sys.exit(130)
