"""S8: an engine in Ray's actors takes the same steps, to the bit."""

import pytest
import torch

from tests.end_to_end.test_bits import through


@pytest.mark.parametrize(
    ("lag", "update_every", "history"),
    [(0, 3, "snapshot"), (3, 1, "snapshot"), (1, 2, "window"), (1, 2, "ema")],
)
def test_ray_takes_the_steps_of_the_embedded_engine(pool, lag, update_every, history):
    settings = {"history": history, "window": 3, "decay": 0.8, "rank": 40}

    embedded = through("embedded", lag, update_every, **settings)
    remote = through(pool.target, lag, update_every, **settings)

    for step, (mine, theirs) in enumerate(zip(remote, embedded, strict=True)):
        assert torch.equal(mine, theirs), f"step {step}"


def test_handles_are_as_good_and_double_precision_too(pool):
    settings = {"history": "window", "window": 3, "wire_dtype": "float64"}
    embedded = through("embedded", 1, 2, **settings)

    assert all(map(torch.equal, through(pool.actors[0], 1, 2, **settings), embedded))
