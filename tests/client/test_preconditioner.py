"""The public class on the embedded engine: resuming, reporting, refusing."""

import copy
import io
import threading
import warnings
from contextlib import nullcontext

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
    ("settings", "stop"),
    [
        ({"lag": 3, "update_every": 2}, 11),
        ({"lag": 0, "update_every": 1}, 6),
        ({"lag": 1, "update_every": 5}, 10),
        ({"update_every": lambda step: 2 + step % 3}, 9),
        ({"update_every": 2, "history": "window", "window": 3}, 9),
        ({"update_every": 2, "history": "ema", "rank": 30}, 9),
        ({"lag": 2, "update_every": 1, "history": "ema", "rank": None}, 9),
        ({"update_every": 2, "reduction": "subsample", "positions": 2}, 7),
        ({"update_every": 2, "trust": "graft", "energy": 0.9}, 7),
    ],
)
@pytest.mark.parametrize("embedded", [True, False])
def test_a_run_resumes_to_the_bit(settings, stop, embedded):
    settings = {"on_late": "wait"} | settings

    def train(model, optimizer, first, last, state=None):
        with (
            nullcontext() if embedded else serving() as server,
            Preconditioner(
                model,
                optimizer,
                target=server.address if server else "embedded",
                **settings,
            ) as preconditioner,
        ):
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
    with Preconditioner(
        model,
        optimizer,
        update_every=2,
        lag=1,
        on_late="wait",
        apply="row",
        kl_clip=1e-3,
    ) as pre:
        for step in range(6):
            backward(model, step)
            pre.step()
            optimizer.zero_grad()
        report = pre.report()

    layer = {"version": 4, "age": 1, "updates": 1, "damping_factor": 1.0}
    waits = report["versions"].pop("waits", 0)
    assert report.pop("waited_s") >= 0
    assert 0 < report.pop("trust_scale") < 1
    assert report.pop("longest_step_s") > 0
    assert waits <= 3
    assert report == {
        "step": 6,
        "rank": 0,
        "world_size": 1,
        "connected": True,
        "failure": None,
        "layers": {
            "0": layer | {"rank": [10, 6], "apply": "gradient"},
            "3": layer | {"rank": [24, 24], "apply": "row"},
            "5": layer | {"rank": [24, 8], "apply": "row"},
            "7": layer | {"rank": [9, 5], "apply": "row"},
        },
        "raw_gradients": 4,
        "not_finite": 0,
        "damping": 0.03,
        "versions": {"solved": 12},
        "transport": {"connects": 1},
        "servers": {"embedded": {"connected": True, "layers": 4}},
        "server_changes": 0,
        "lookup_failures": 0,
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
            pre._servers._servers[0].transport.push(pre._capture.take(9))
            kept = list(pre._servers._servers[0].transport._outbox._snapshots)  # type: ignore[attr-defined]
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
        pre._store.link(0).set_link(up=False)
        pre._servers.push = lambda snapshot: None  # type: ignore[method-assign]
        raw = []
        for step in range(1, 6):
            optimizer.zero_grad()
            backward(model, step)
            pre.step()
            raw.append(pre.report()["raw_gradients"])
    assert raw == [0, 0, 4, 8, 12]


def test_a_schedule_of_updates_says_when_to_capture():
    model = small_cnn()
    optimizer = sgd(model)
    with Preconditioner(
        model, optimizer, update_every=lambda step: 1 + step, lag=0
    ) as pre:
        versions = []
        for step in range(9):
            backward(model, step)
            pre.step()
            optimizer.zero_grad()
            versions.append(pre.report()["layers"]["0"]["version"])
    assert versions == [0, 1, 1, 3, 3, 3, 3, 7, 7]


def test_schedules_reach_the_engine():
    model = small_cnn()
    optimizer = sgd(model)
    with Preconditioner(
        model,
        optimizer,
        update_every=1,
        lag=0,
        damping_split="equal",
        damping=lambda step: 4.0 / (1 + step),
        rank=lambda step: 8 - step,
    ) as pre:
        found = []
        for step in range(3):
            backward(model, step)
            pre.step()
            optimizer.zero_grad()
            version = pre._store.in_use[1]
            assert version is not None
            derivatives = version.preconditioner.derivatives
            found.append((len(derivatives.tensor), derivatives.damping))
    ranks = [rank for rank, _ in found]
    assert ranks == [8, 7, 6]
    # At least √λ; the trace that the rank cuts off comes on top.
    assert all(d >= (4.0 / (1 + s)) ** 0.5 for s, (_, d) in enumerate(found))
    assert found[0][1] == pytest.approx(2.0, rel=0.05)


def test_the_monte_carlo_fisher_is_of_the_model_s_own_targets():
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    with Preconditioner(
        model, optimizer, update_every=2, lag=0, fisher="monte_carlo"
    ) as pre:
        pushed = []
        push = pre._servers.push

        def record(snapshot):
            pushed.append(snapshot.wait().layers[0].derivatives)
            push(snapshot)

        pre._servers.push = record  # type: ignore[method-assign]
        for _ in range(3):
            outputs = model(torch.randn(4, 3))
            pre.capture_from((outputs * torch.tensor([5.0, 7.0])).sum(1).mean())
            assert model.weight.grad is None
            outputs.square().sum(1).mean().backward()
            pre.step()
            optimizer.zero_grad()
        assert len(pushed) == 2
        for derivatives in pushed:
            torch.testing.assert_close(
                derivatives, torch.tensor([5.0, 7.0]).expand(4, 2)
            )
        for _ in range(2):
            model(torch.randn(4, 3)).sum().backward()
            if pre.report()["step"] == 3:
                pre.step()
        with pytest.raises(ConfigurationError, match=r"capture_from.*not called"):
            pre.step()


def test_a_sampled_loss_needs_the_setting():
    model = nn.Linear(3, 2)
    with (
        Preconditioner(model, sgd(model)) as pre,
        pytest.raises(ConfigurationError, match="fisher='monte_carlo'"),
    ):
        pre.capture_from(model(torch.randn(4, 3)).sum())


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
    monkeypatch.setattr("skfac.client.embedded.EngineConfig", lambda **_: small)
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
