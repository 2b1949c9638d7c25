"""Actors that die in mid-training, and what comes back."""

import time
from typing import Any

import torch

from skfac.client import Preconditioner
from skfac.wire.pool import actor_of_job
from tests.end_to_end.test_faults import Trainer, ages
from tests.support.cluster import crash, engine_processes
from tests.support.models import backward, flat_parameters, sgd, small_cnn
from tests.support.servers import LONG_S

WAIT_S = 1.0  # far longer than a step takes, even on a busy machine


def test_a_crashed_actor_costs_freshness_and_nothing_else(pool):
    settings = {"update_every": 2, "wait_s": WAIT_S}
    with Trainer(pool.target, **settings) as trainer:
        trainer.step_until(lambda report: report["versions"].get("solved", 0) >= 8)
        crash(pool.actors[0])
        trainer.step_until(lambda report: not report["connected"])
        stalls_s = [trainer.step() for _ in range(10)]
        lost = trainer.preconditioner.report()
        trainer.step_until(lambda report: report["connected"])
        back = trainer.step_until(lambda report: max(ages(report)) <= 3)

    assert max(stalls_s) < WAIT_S  # nobody waits for an actor that is gone
    assert min(ages(lost)) >= 10
    assert back["transport"]["connects"] == 2
    assert back["transport"]["disconnects"] == 1
    assert back["failure"] is None


def trajectory(target: Any, crashing: Any = None) -> list[torch.Tensor]:
    model = small_cnn()
    optimizer = sgd(model)
    taken = []
    settings = {"lag": 1, "update_every": 1, "on_late": "wait", "wait_s": LONG_S}
    with Preconditioner(model, optimizer, target=target, **settings) as pre:
        for step in range(12):
            backward(model, step)
            if step == 6 and crashing is not None:
                crash(crashing)
            pre.step()
            optimizer.step()
            optimizer.zero_grad()
            taken.append(flat_parameters(model))
    return taken


def test_waiting_outlives_a_crash_without_losing_a_bit(pool):
    crashed = trajectory(pool.target, pool.actors[0])

    assert all(map(torch.equal, crashed, trajectory("embedded")))


def test_a_session_is_on_one_actor_and_misses_no_other(ray_cluster):
    from skfac.service.ray import start_pool

    jobs = {actor_of_job(f"job {n}", 2): f"job {n}" for n in range(20)}
    with start_pool(2, name="pair", num_cpus=0) as pool:
        first, second = (
            Trainer(pool.target, job=jobs[index], update_every=1) for index in (0, 1)
        )
        with first, second:
            for trainer in (first, second):
                trainer.step_until(lambda report: None not in ages(report))
            sessions = [status["sessions"] for status in pool.status()]
            assert [[s["job"] for s in own] for own in sessions] == [
                [jobs[0]],
                [jobs[1]],
            ]
            crash(pool.actors[0])
            first.step_until(lambda report: not report["connected"])
            second.step_until(lambda report: max(ages(report)) <= 1)
            first.step_until(lambda report: report["connected"])
            first.step_until(lambda report: max(ages(report)) <= 1)

            assert second.preconditioner.report()["transport"]["connects"] == 1


def test_a_pool_that_is_stopped_for_good_is_only_gone(ray_cluster):
    from skfac.service.ray import start_pool

    with start_pool(name="gone", num_cpus=0) as pool:
        trainer = Trainer(pool.target, update_every=1, wait_s=WAIT_S)
        trainer.step_until(lambda report: report["versions"].get("solved", 0) >= 8)
    with trainer:
        trainer.step_until(lambda report: not report["connected"])
        trainer.step()
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 5  # closing waits for nobody


def test_a_frozen_actor_is_waited_for_once(pool):
    settings = {"update_every": 1, "wait_s": WAIT_S}
    with Trainer(pool.target, **settings) as trainer:
        trainer.step_until(lambda report: report["versions"].get("solved", 0) >= 8)
        processes = engine_processes()
        for process in processes:
            process.suspend()
        stalls_s = [trainer.step() for _ in range(12)]
        for process in processes:
            process.resume()
        trainer.step_until(lambda report: max(ages(report)) <= 1)

    assert sum(stalls_s) < 4 * WAIT_S


def test_layers_are_spread_over_a_pool_and_move_when_one_is_lost(ray_cluster):
    from skfac.service.ray import start_pool

    expected = trajectory("embedded")
    with start_pool(2, name="spread", num_cpus=0) as pool:
        for targets in (pool.targets, list(pool.actors)):
            assert all(map(torch.equal, trajectory(targets), expected))
        with Trainer(pool.targets, update_every=1, wait_s=WAIT_S) as trainer:
            trainer.step_until(lambda report: None not in ages(report))
            before = trainer.preconditioner.report()["transport"]["connects"]
            crash(pool.actors[0])
            trainer.step_until(lambda report: max(ages(report)) > 2)
            trainer.step_until(lambda report: max(ages(report)) <= 1)
            trainer.step_until(lambda r: r["transport"]["connects"] > before)
    assert before == 2
