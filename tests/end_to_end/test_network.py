"""A network that is taken away and comes back, between two hosts.

Nothing is refused then and nothing reset: packets are lost, in both directions, and
only time tells.
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from skfac.client import Preconditioner
from tests.support.hosts import two_hosts
from tests.support.models import backward, sgd, small_cnn
from tests.support.servers import wait_for_line

pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]

WAIT_S = 2.0
PORT = 50051


def train(target: str) -> None:
    """Train until versions come over a second connection; says how it goes."""
    model = small_cnn()
    optimizer = sgd(model)
    settings = {"update_every": 2, "on_late": "keep", "wait_s": WAIT_S}
    step, said_s, longest_s, wanted = 0, time.monotonic(), 0.0, None
    with Preconditioner(model, optimizer, target=target, **settings) as pre:
        while wanted is None or pre.report()["versions"]["solved"] < wanted:
            began_s = time.monotonic()
            backward(model, step)
            pre.step()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            longest_s = max(longest_s, time.monotonic() - began_s)
            time.sleep(0.01)
            if time.monotonic() - said_s > 0.5:
                report = pre.report()
                said = {"step": step, "longest_s": longest_s, **report["transport"]}
                print(json.dumps({**said, **report["versions"]}), flush=True)
                said_s, longest_s = time.monotonic(), 0.0
                if wanted is None and report["transport"].get("connects") == 2:
                    wanted = report["versions"]["solved"] + 20


def lines_of(trainer: Any) -> Iterator[dict[str, Any]]:
    for line in trainer.stdout:
        if line.startswith("{"):
            yield json.loads(line)


def test_training_goes_on_without_a_network_and_finds_it_again():
    with two_hosts() as (here, there):
        target = f"{there.address}:{PORT}"
        options = "--metrics-address", "", "--set", "insecure_remote=true"
        with there.start(
            "-m", "tests.support.serve", "--address", target, *options
        ) as server:
            wait_for_line(server.stdout, "Serving on ")
            with here.start("-m", "tests.end_to_end.test_network", target) as trainer:
                lines = lines_of(trainer)
                before = next(line for line in lines if line.get("solved", 0) > 40)
                there.deafen()
                without = []
                for line in lines:
                    without.append(line)
                    if line.get("disconnects"):
                        break
                there.hear()
                after = list(lines)
                code = trainer.wait()
                trainer.kill()
            server.kill()

    assert code == 0
    assert before["shared_sent_bytes"] == 0
    # One wait for what was on its way, and no other.
    waits = [line["longest_s"] for line in without if line["longest_s"] > WAIT_S / 2]
    assert len(waits) == 1
    assert waits[0] < 2 * WAIT_S
    assert without[-1]["step"] - before["step"] > 100
    assert without[-1]["late"] > 0
    assert after[-1]["connects"] == 2
    assert after[-1]["solved"] > without[-1]["solved"]


if __name__ == "__main__":
    train(sys.argv[1])
