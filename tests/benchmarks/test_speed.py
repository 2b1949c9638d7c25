"""The benchmarks of the solver and of scale, at their smallest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.speed.memory import peak_bytes, reset_peak, resident_bytes
from benchmarks.speed.models import WORKLOADS
from benchmarks.speed.shapes import gpt2, layers_of, resnet50

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def run(script, *options):
    done = subprocess.run(  # our own scripts
        [sys.executable, "-W", "error", str(ROOT / "benchmarks" / script), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_solver_is_timed():
    found = run("solver.py", "--dim=96", "--rows=8", "--factors=4", "--rounds=2")[-1]

    sizes = {"dim": 96, "rows": 8, "factors": 4, "rounds": 2}
    assert found.items() >= sizes.items()
    for name in ("ratio_to_products", "ratio_to_plain", "speedup_over_dense"):
        assert found[name] > 0


def test_scale_loses_nothing_and_draws(tmp_path):
    plot = tmp_path / "scale.png"

    found = run("scale.py", "--short", "--plot", str(plot))[-1]

    assert found["lost"] == 0
    assert [one["ranks"] for one in found["results"]] == [[1, 2]] * 4
    assert {one["mode"] for one in found["results"]} == {"sessions", "ranks"}
    assert found["memory_ratio"] > 0
    assert plot.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("layers", "count", "parameters"),
    [
        (resnet50(), 54, 25_503_912),  # torchvision's 25,557,032 less batch norm
        (gpt2(), 48, 12 * (12 * 768**2 + 9 * 768)),
    ],
)
def test_the_shapes_are_those_of_the_architectures(layers, count, parameters):
    assert len(layers) == count
    assert sum(one.d_in * one.d_out for one in layers) == parameters


def test_layers_repeat_under_other_names():
    taken = layers_of("gpt2", 200)

    assert len({one.name for one in taken}) == 200
    assert (taken[48].d_in, taken[48].d_out) == (taken[0].d_in, taken[0].d_out)


def test_a_peak_is_seen_after_it_is_over():
    before = resident_bytes(os.getpid())
    reset_peak(os.getpid())
    large = torch.ones(50 * 2**20, dtype=torch.uint8)

    del large

    assert resident_bytes(os.getpid()) < before + 40 * 2**20
    assert peak_bytes(os.getpid()) > before + 40 * 2**20


def test_no_gradient_of_the_deep_model_vanishes():
    """A CPU takes ten times as long for products with results below 1e-38."""
    torch.manual_seed(0)
    work = WORKLOADS["deep"](16, 8)
    model = work.build()
    work.loss(model).backward()

    lengths = [parameter.grad.norm() for parameter in model.parameters()]
    assert max(lengths) < 1e4 * min(lengths)
