"""The examples do what their help says, run as a trainer runs them."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
OPTIMIZERS = ["sgd", "adamw", "skfac"]
PNG = b"\x89PNG\r\n\x1a\n"


def command(script, *options):
    return [sys.executable, "-W", "error", str(EXAMPLES / script), *options]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}


def run(script, *options):
    return subprocess.run(  # our own scripts
        command(script, *options),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def json_lines_of(done):
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_runs(lines, metric, steps):
    results = [line for line in lines if "report" in line]
    assert [line["optimizer"] for line in results] == OPTIMIZERS
    assert lines[-1] is results[-1]
    for result in results:
        own = [line for line in lines if line["optimizer"] == result["optimizer"]]
        assert own[-1] is result
        keys = ["optimizer", "steps", "val_loss", metric, "seconds", "report"]
        assert list(result) == keys
        assert result["steps"] == steps
        for key in ("val_loss", metric, "seconds"):
            assert math.isfinite(result[key])
            assert result[key] > 0
        losses = [line for line in own if "loss" in line]
        assert [list(line) for line in losses] == [
            ["optimizer", "step", "seconds", "loss"]
        ] * (steps // 10)
        validations = [line for line in own[:-1] if "val_loss" in line]
        assert [line["step"] for line in validations] == [0, steps]
        assert result["val_loss"] == validations[-1]["val_loss"]
        assert result["val_loss"] < validations[0]["val_loss"]
    reports = [result["report"] for result in results]
    assert reports[:2] == [None, None]
    assert reports[2]["step"] == steps
    assert reports[2]["versions"]["solved"] > 0


def test_autoencoder_compares_all_optimizers_as_json_and_draws_them(tmp_path):
    plot = tmp_path / "losses.png"
    done = run("autoencoder.py", "--epochs", "1", "--json", "--plot", str(plot))
    check_runs(json_lines_of(done), "val_squared_error", steps=31)
    assert plot.read_bytes().startswith(PNG)


def test_classifier_compares_all_optimizers_as_json_and_draws_them(tmp_path):
    plot = tmp_path / "losses.png"
    data = ("--data", "digits")
    done = run("classifier.py", *data, "--epochs", "1", "--json", "--plot", str(plot))
    check_runs(json_lines_of(done), "val_accuracy", steps=11)
    assert plot.read_bytes().startswith(PNG)


def test_one_optimizer_alone_gets_a_table_and_no_progress_outside_a_terminal():
    done = run("classifier.py", "--data", "digits", "--optimizer", "skfac")
    assert (done.returncode, done.stderr) == (0, "")
    assert "val accuracy" in done.stdout
    assert "layer versions solved, 0 late" in done.stdout
    assert "adamw" not in done.stdout


def test_an_unknown_optimizer_is_refused_with_the_choices_named():
    done = run("autoencoder.py", "--optimizer", "lbfgs")
    assert done.returncode == 2
    assert all(name in done.stderr for name in ["lbfgs", *OPTIMIZERS])
    assert "Traceback" not in done.stderr


def test_a_target_that_is_none_is_refused_before_anything_is_trained():
    done = run("classifier.py", "--target", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'nowhere' is not a target" in done.stderr


def test_ctrl_c_ends_cleanly():
    options = [
        "--data",
        "digits",
        "--optimizer",
        "skfac",
        "--json",
        "--epochs",
        "100000",
    ]
    python, *arguments = command("classifier.py", *options)
    process = subprocess.Popen(  # our own scripts
        [python, "-m", "tests.support.interruptible", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["step"] == 0
        assert json.loads(process.stdout.readline())["step"] == 10
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, errors = process.communicate(timeout=20)
        assert time.monotonic() - start < 10
    assert process.returncode == 130
    assert "Traceback" not in errors
