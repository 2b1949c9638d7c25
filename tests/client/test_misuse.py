"""What people do wrong, and what they are told."""

import copy
import threading

import pytest
import torch
from torch import nn

from skfac.client import ConfigurationError, Preconditioner
from tests.support.models import backward, sgd, small_cnn
from tests.support.servers import serving


def _without_rate() -> torch.optim.Optimizer:
    optimizer = sgd(nn.Linear(2, 2))
    optimizer.param_groups[0]["lr"] = None  # as that of a library with its own schedule
    return optimizer


@pytest.mark.parametrize("settings", [{"apply": "row"}, {"apply": "gradient"}])
def test_a_layer_has_one_preconditioner_at_a_time(settings):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = sgd(model)
    first = Preconditioner(model, optimizer, skip=("1",), **settings)
    threads = threading.active_count()

    with Preconditioner(model, optimizer, skip=("0",), **settings):
        pass  # other layers
    copied = copy.deepcopy(model)
    with Preconditioner(copied, sgd(copied), **settings):
        pass  # whose hooks do nothing
    with pytest.raises(ConfigurationError, match=r"'0' has another.*call its close"):
        Preconditioner(model, optimizer, **settings)

    assert threading.active_count() == threads
    first.close()
    with Preconditioner(model, optimizer, **settings):
        pass


def test_a_step_in_the_wrong_place_is_said_once(caplog):
    model = small_cnn()
    optimizer = sgd(model)
    with Preconditioner(model, optimizer) as pre:
        for step in range(3):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            pre.step()
    with Preconditioner(model, optimizer) as pre:
        for step in range(3):
            backward(model, step)
            pre.step()
            optimizer.zero_grad()

    assert caplog.text.count("step() found no gradients: call it after backward") == 1
    assert caplog.text.count("optimizer.step() used raw gradients") == 1


@pytest.mark.parametrize("by", ["loop", "closure"])
def test_a_step_in_its_place_is_not_talked_about(caplog, by):
    model = small_cnn()
    optimizer = sgd(model)
    with Preconditioner(model, optimizer) as pre:

        def closure() -> None:
            backward(model, 0)
            pre.step()

        for _ in range(3):
            if by == "closure":
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            optimizer.zero_grad()
    optimizer.step()  # nobody looks any more

    assert "optimizer.step()" not in caplog.text


def test_an_optimizer_without_hooks_may_be_used():
    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.param_groups = optimizer.param_groups
            self.step = optimizer.step

    model = small_cnn()
    with Preconditioner(model, Wrapper(sgd(model))) as pre:
        backward(model, 0)
        pre.step()
        assert pre.report()["step"] == 1


@pytest.mark.parametrize("fault", ["eval", "before"])
def test_a_snapshot_without_any_rows_is_said_once(caplog, fault):
    model = small_cnn().eval() if fault == "eval" else small_cnn()
    with Preconditioner(model, sgd(model), update_every=1) as pre:
        for step in range(3):
            if fault == "eval":
                backward(model, step)
            pre.step()

    text = "No layer had rows at step 0: was the model in eval() mode"
    assert [r.message for r in caplog.records if "had rows at" in r.message] == [
        f"{text}, or step() called before backward()?",
    ]


@pytest.mark.parametrize(
    ("model", "optimizer", "message"),
    [
        (sgd(nn.Linear(2, 2)), nn.Linear(2, 2), "model must be a module, got SGD"),
        (nn.Linear(2, 2), iter(()), "optimizer must be one of torch's, got tuple_it"),
        (nn.Linear(2, 2), sgd(nn.Linear(2, 2)), "none of this model's parameters"),
        (nn.Linear(2, 2), _without_rate(), "group 0 of SGD has no learning rate"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(model, optimizer, message):
    with pytest.raises(ConfigurationError, match=message):
        Preconditioner(model, optimizer)


def test_counts_of_a_connection_are_there_from_the_start():
    model = small_cnn()
    with (
        serving() as server,
        Preconditioner(model, sgd(model), target=server.address) as pre,
    ):
        counts = pre.report()["transport"]

    assert counts["denials"] == counts["disconnects"] == counts["renewals"] == 0


@pytest.mark.parametrize("way", ["unfrozen", "added"])
def test_layers_that_train_later_are_said_once(caplog, way):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(way != "unfrozen")
    own = model if way == "unfrozen" else model[1:]
    optimizer = sgd(own)
    with Preconditioner(model, optimizer, update_every=1) as pre:
        for step in range(4):
            if step == 2 and way == "unfrozen":
                model[0].requires_grad_(True)
            elif step == 2:
                optimizer.add_param_group({"params": list(model[0].parameters())})
            optimizer.zero_grad()
            model(torch.randn(3, 4)).square().sum().backward()
            pre.step()
            assert ("train now" in caplog.text) == (step >= 2)

    assert caplog.text.count("0.weight, 0.bias train now, and did not") == 1
