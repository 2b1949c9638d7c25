"""A computation that a GPU may replay, where there is none; tests/gpu has the rest."""

import torch

from skfac.client.replay import RUNS_BEFORE, Replay


def test_without_a_gpu_it_runs_each_time():
    source, runs = torch.ones(3), []

    def body():
        runs.append(1)
        return source * 2

    replay = Replay(body, source.device)
    for number in range(2 * RUNS_BEFORE + 2):
        source.fill_(number)
        assert torch.equal(replay(), torch.full((3,), 2.0 * number))
    assert len(runs) == 2 * RUNS_BEFORE + 2
