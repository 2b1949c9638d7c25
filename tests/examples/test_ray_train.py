"""Ray Train with two workers; nearly all the time is what Ray takes to start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "ray_train.py"


@pytest.mark.timeout(150)
def test_two_workers_train_with_one_pool(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--epochs", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=140,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert metrics["epoch"] == 2
    assert metrics["val_accuracy"] > 0.9  # 0.1 is chance
    assert metrics["solved"] == 2 * 2 * 6  # layers, epochs, snapshots of an epoch
    assert list(tmp_path.iterdir()) == []
