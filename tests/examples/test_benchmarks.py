"""The benchmarks of speed run; what they find is for a quiet machine to say.

`tests/benchmarks/test_speed.py` has the solver, and scale without a server.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(180)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QUICK = ("--width", "32", "--batch", "8", "--rounds", "1", "--steps", "12")


def run(name: str, *options: str) -> dict:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("model", ["mlp", "cnn", "transformer"])
def test_steps_are_timed(model):
    found = run(
        "step", *QUICK, "--model", model, "--update-every", "3", "--against", "muon"
    )

    assert {"ratio_to_sgd", "ratio_to_adamw", "wait_share"} <= found.keys()
    assert found["ratios_to_sgd"].keys() == {
        "sgd", "adamw", "muon", "every 3", "every 10",
    }  # fmt: skip
    assert found["versions"]["solved"] > 0
    for spent in found["cpu_ms_by_thread"].values():
        assert set(spent) == {"trainer", "receive", "link", "grpc"}
        assert spent["trainer"] > spent["receive"] > 0
    assert {"capture", "enqueue", "wait", "apply", "trust"} == set(found["phase_share"])


@pytest.mark.parametrize(
    ("name", "options", "keys"),
    [
        (
            "transport",
            ("--short",),
            {
                "inline_ratio_to_tcp", "inline_over_naive", "packed_ratio_to_tcp",
                "shm_ratio_to_memcpy", "shm_ratio_to_tcp_cubic",
                "bare_ratio_to_tcp", "inline_ratio_to_bare", "packed_ratio_to_bare",
            },
        ),
        ("scaling", ("--short",), {"measured", "core", "gpu"}),
        (
            "scale",
            ("--short", "--models", "gpt2", "--modes", "ranks", "--transport", "grpc"),
            {"memory_ratio"},
        ),
    ],
    ids=["transport", "scaling", "scale over gRPC"],
)  # fmt: skip
def test_the_others_run(name, options, keys):
    assert keys <= run(name, *options).keys()
