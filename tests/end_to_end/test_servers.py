"""Layers spread over several servers, of which one is lost and comes back."""

import pytest
import torch

from skfac.client import ConfigurationError, Preconditioner
from tests.support.models import backward, flat_parameters, sgd, small_cnn
from tests.support.servers import LONG_S, ServerProcess

STEPS = 12


def train(target, *, steps: int = STEPS, on_late="wait", **settings):
    model = small_cnn()
    optimizer = sgd(model)
    with Preconditioner(
        model,
        optimizer,
        target=target,
        on_late=on_late,
        wait_s=LONG_S,
        apply="gradient",
        **settings,
    ) as preconditioner:
        for step in range(steps):
            backward(model, step)
            preconditioner.step()
            optimizer.step()
            optimizer.zero_grad()
        return flat_parameters(model), preconditioner.report()


def owners(preconditioner: Preconditioner) -> list[int]:
    """The number of each layer's server."""
    return [server.number for server in preconditioner._servers._assigned]


def test_two_servers_give_the_bits_of_one():
    with ServerProcess() as first, ServerProcess() as second:
        alone, _ = train(first.address)
        both, report = train([first.address, second.address])

    assert torch.equal(alone, both)
    assert report["transport"]["connects"] == 2
    assert report["connected"]


def test_histories_are_exported_and_imported_server_by_server():
    settings = {"history": "ema", "rank": 30, "update_every": 1}
    with ServerProcess() as first, ServerProcess() as second:
        targets = [first.address, second.address]
        model = small_cnn()
        optimizer = sgd(model)
        with Preconditioner(
            model, optimizer, target=targets, on_late="wait", **settings
        ) as preconditioner:
            for step in range(4):
                backward(model, step)
                preconditioner.step()
                optimizer.zero_grad()
            state = preconditioner.state_dict()
        with Preconditioner(
            model, optimizer, target=targets[::-1], on_late="wait", **settings
        ) as preconditioner:
            preconditioner.load_state_dict(state)
            for step in range(2):
                backward(model, step)
                preconditioner.step()
                optimizer.zero_grad()
            updates = [
                layer["updates"] for layer in preconditioner.report()["layers"].values()
            ]

    assert updates == [5] * 4  # four of before, and one that is in use by now


def test_the_layers_of_a_lost_server_move_and_return():
    with ServerProcess() as first, ServerProcess() as second:
        model = small_cnn()
        optimizer = sgd(model)
        with Preconditioner(
            model,
            optimizer,
            target=[first.address, second.address],
            update_every=1,
            wait_s=LONG_S,
        ) as preconditioner:
            step = 0

            def train_until(done) -> None:
                nonlocal step
                while not done(preconditioner.report()):
                    backward(model, step)
                    preconditioner.step()
                    optimizer.step()
                    optimizer.zero_grad()
                    step += 1

            def fresh(report) -> bool:
                ages = [
                    layer["age"] if layer else None
                    for layer in report["layers"].values()
                ]
                return ages == [1] * 4

            train_until(fresh)
            homes = owners(preconditioner)
            assert set(homes) == {0, 1}
            second.kill()
            train_until(lambda report: not report["connected"])
            train_until(lambda r: fresh(r) and set(owners(preconditioner)) == {0})
            with ServerProcess(second.address):
                train_until(lambda report: report["connected"])
                train_until(lambda r: fresh(r) and owners(preconditioner) == homes)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ([], "at least one server"),
        (["embedded", "127.0.0.1:1"], "cannot be one of"),
        (["127.0.0.1:1", "nowhere"], "is not a target"),
        ("dns:///no-such-name.invalid:1", "cannot be looked up"),
    ],
)
def test_wrong_targets_say_so(target, text):
    model = small_cnn()
    with pytest.raises(ConfigurationError, match=text):
        Preconditioner(model, sgd(model), target=target)
