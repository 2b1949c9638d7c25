"""The example for several ranks, started by torchrun as its help says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(240)  # three processes import torch; a busy machine

SCRIPT = Path(__file__).parents[2] / "examples" / "torchrun_train.py"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "NO_COLOR": "1"}


def start(*options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(  # our own script
        [
            *(sys.executable, "-m", "tests.support.interruptible"),
            *("-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
            *(str(SCRIPT), "--data", "digits", "--json", *options),
        ],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_ranks_end_alike_with_replicas_and_with_shards():
    runs = []
    for options in ((), ("--fsdp",)):
        with start("--epochs", "2", *options) as process:
            output, errors = process.communicate(timeout=220)
        assert process.returncode == 0, errors
        runs.append([json.loads(line) for line in output.splitlines()])
    for lines in runs:
        assert [line["epoch"] for line in lines] == [1, 2]  # of one rank
        assert {line["ranks"] for line in lines} == {2}
        assert lines[-1]["solved"] == 4 * 11  # layers, half of the steps
        assert lines[-1]["late"] == 0
        assert lines[-1]["val_accuracy"] > 0.85  # 0.1 is chance
    replicas, shards = (lines[-1]["val_loss"] for lines in runs)
    assert shards == pytest.approx(replicas, rel=0.02)


def test_ctrl_c_ends_all_ranks():
    with start("--epochs", "100000") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["epoch"] == 1
        process.send_signal(signal.SIGINT)
        began_s = time.monotonic()
        process.communicate(timeout=60)
        assert time.monotonic() - began_s < 30  # torchrun kills what takes longer
    assert process.returncode != 0


def test_without_torchrun_it_says_how_to_start_it():
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=os.environ | ENVIRONMENT | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "torchrun --nproc-per-node 2" in done.stderr
    assert "Traceback" not in done.stderr
