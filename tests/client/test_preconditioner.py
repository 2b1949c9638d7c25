"""The public class on the embedded engine: resuming, reporting, refusing."""

import copy
import io
import threading
import warnings

import pytest
import torch
from torch import nn

import skfac.client
from skfac.client import (
    ConfigurationError,
    LateVersionError,
    Preconditioner,
    ServiceError,
)
from skfac.service.config import EngineConfig
from skfac.service.solver import Solver
from tests.support.models import backward, batch_at, flat_parameters, sgd, small_cnn
from tests.support.servers import serving


def test_exported_names_are_the_public_ones():
    public = {
        name for name, value in vars(skfac.client).items() if isinstance(value, type)
    }
    assert set(skfac.client.__all__) == public
    assert skfac.client.__all__ == sorted(skfac.client.__all__)


@pytest.mark.parametrize(
    ("lag", "update_every", "stop"), [(3, 2, 11), (0, 1, 6), (1, 5, 10)]
)
def test_a_run_resumes_to_the_bit(lag, update_every, stop):
    settings = {"lag": lag, "update_every": update_every, "on_late": "wait"}

    def train(model, optimizer, first, last, state=None):
        with Preconditioner(model, optimizer, **settings) as preconditioner:
            if state is not None:
                preconditioner.load_state_dict(state)
            for step in range(first, last):
                backward(model, step)
                preconditioner.step()
                optimizer.step()
                optimizer.zero_grad()
            return preconditioner.state_dict()

    model = small_cnn()
    optimizer = sgd(model)
    state = train(model, optimizer, 0, stop)
    saved = io.BytesIO()
    torch.save([state, model.state_dict(), optimizer.state_dict()], saved)
    train(model, optimizer, stop, 25, state)

    straight = small_cnn()
    train(straight, sgd(straight), 0, 25)
    resumed = small_cnn()
    resumed_optimizer = sgd(resumed)
    saved.seek(0)
    state, weights, momentum = torch.load(saved, weights_only=True)
    resumed.load_state_dict(weights)
    resumed_optimizer.load_state_dict(momentum)
    train(resumed, resumed_optimizer, stop, 25, state)

    assert torch.equal(flat_parameters(model), flat_parameters(straight))
    assert torch.equal(flat_parameters(resumed), flat_parameters(straight))


def test_a_state_of_another_model_is_refused():
    model, other = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2))
    with Preconditioner(model, sgd(model)) as preconditioner:
        state = preconditioner.state_dict()
        with pytest.raises(ConfigurationError, match="format 7"):
            preconditioner.load_state_dict({**state, "format": 7})
        model(torch.ones(2, 3)).sum().backward()
        preconditioner.step()
        with pytest.raises(ConfigurationError, match="before the first step"):
            preconditioner.load_state_dict(state)
    with (
        Preconditioner(other, sgd(other)) as preconditioner,
        pytest.raises(ConfigurationError, match=r"\['model'\].*\['0'\]"),
    ):
        preconditioner.load_state_dict(state)


def test_the_report_is_plain_and_complete():
    model = small_cnn()
    optimizer = sgd(model)
    with Preconditioner(model, optimizer, update_every=2, lag=1, on_late="wait") as pre:
        for step in range(6):
            backward(model, step)
            pre.step()
            optimizer.zero_grad()
        report = pre.report()

    layer = {"version": 4, "age": 1}
    waits = report["versions"].pop("waits", 0)
    assert report.pop("waited_s") >= 0
    assert waits <= 3
    assert report == {
        "step": 6,
        "connected": True,
        "failure": None,
        "layers": {"0": layer, "3": layer, "5": layer, "7": layer},
        "raw_gradients": 4,
        "versions": {"solved": 12},
        "transport": {"connects": 1},
    }


@pytest.mark.parametrize("embedded", [True, False])
def test_a_snapshot_is_forgotten_once_its_outcome_is_known(embedded):
    model = small_cnn()
    optimizer = sgd(model)
    with serving() as server:
        target = "embedded" if embedded else server.address
        with Preconditioner(
            model, optimizer, target=target, update_every=1, on_late="wait"
        ) as pre:
            for step in range(3):
                backward(model, step)
                pre.step()
                optimizer.zero_grad()
            pre.state_dict()  # waits for what is on its way
            pre._transport.push(pre._capture.take(0, 9, 0.1))
            kept = list(pre._transport._outbox._snapshots)  # type: ignore[attr-defined]
    assert kept in ([9], [])


@pytest.mark.parametrize("embedded", [True, False])
def test_one_nan_costs_one_snapshot(embedded):
    model = small_cnn()
    optimizer = sgd(model)
    with (
        serving() as server,
        Preconditioner(
            model,
            optimizer,
            target="embedded" if embedded else server.address,
            update_every=1,
            on_late="wait",
        ) as pre,
    ):
        for step in range(4):
            backward(model, step)
            pre.step()
            optimizer.zero_grad()
        images, _ = batch_at(4)
        (model(images * float("nan"))).sum().backward()
        pre.step()
        optimizer.zero_grad()
        backward(model, 5)
        pre.step()
        report = pre.report()

        assert report["versions"]["refused"] == 4
        assert {layer["version"] for layer in report["layers"].values()} == {3}
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_layer_without_data_keeps_what_it_has():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    optimizer = sgd(model)
    with Preconditioner(model, optimizer, update_every=1, lag=0) as pre:
        for names in ("ab", "a", "ab"):
            x = torch.randn(4, 3)
            for name in names:
                x = model[name](x)
            x.square().sum(1).mean().backward()
            pre.step()
            optimizer.zero_grad()
            layers = pre.report()["layers"]
            if names == "a":
                assert (layers["a"]["version"], layers["b"]["version"]) == (1, 0)
        assert layers["b"]["version"] == 2
        assert pre.report()["versions"]["empty"] == 1


def test_versions_that_are_too_old_are_not_used():
    model = small_cnn()
    optimizer = sgd(model)
    with Preconditioner(
        model, optimizer, update_every=2, lag=0, max_staleness=2
    ) as pre:
        backward(model, 0)
        pre.step()
        pre._store.set_link(up=False)
        pre._transport.push = lambda snapshot: None  # type: ignore[method-assign]
        raw = []
        for step in range(1, 6):
            optimizer.zero_grad()
            backward(model, step)
            pre.step()
            raw.append(pre.report()["raw_gradients"])
    assert raw == [0, 0, 4, 8, 12]


def test_it_closes_itself_and_takes_no_more_steps():
    model = small_cnn()
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt), Preconditioner(model, sgd(model)) as pre:
        raise KeyboardInterrupt
    pre.close()

    assert set(threading.enumerate()) <= before
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ConfigurationError, match="closed"):
        pre.step()


def test_what_the_engine_refuses_leaves_nothing(monkeypatch):
    small = EngineConfig(max_layers=1)
    monkeypatch.setattr("skfac.client.embedded.EngineConfig", lambda: small)
    model = small_cnn()
    before = set(threading.enumerate())

    with pytest.raises(ServiceError, match="max_layers = 1"):
        Preconditioner(model, sgd(model))

    assert set(threading.enumerate()) <= before
    assert not any(module._forward_hooks for module in model.modules())


def test_a_step_that_raised_can_be_tried_again(monkeypatch):
    solve, allowed = Solver.solve, threading.Event()

    def delayed(self, task):
        allowed.wait(30)
        return solve(self, task)

    monkeypatch.setattr(Solver, "solve", delayed)
    model = small_cnn()
    with Preconditioner(model, sgd(model), lag=0, on_late="raise", wait_s=0.01) as pre:
        backward(model, 0)
        with pytest.raises(LateVersionError):
            pre.step()
        allowed.set()
        pre.state_dict()  # waits for what is on its way, as long as wait_s
        while pre.report()["versions"].get("solved", 0) < 4:
            pre.state_dict()
        pre.step()
        report = pre.report()

    assert report["step"] == 1
    assert {layer["version"] for layer in report["layers"].values()} == {0}


def test_several_ranks_are_refused_rather_than_diverge(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    model = small_cnn()

    with pytest.raises(ConfigurationError, match="4 ranks is not built yet"):
        Preconditioner(model, sgd(model))


def test_the_module_s_own_interface_is_untouched():
    model = small_cnn()
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Preconditioner(model, sgd(model)):
            assert model.state_dict().keys() == twin.state_dict().keys()
            assert [type(m) for m in model] == [type(m) for m in twin]
            images, _ = batch_at(0)
            assert torch.equal(model(images), twin(images))
