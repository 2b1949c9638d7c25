"""Damping that adapts: what raises it, what lowers it, and what it waits for."""

import math

import pytest
import torch
from torch import nn

from skfac.client import ConfigurationError, LevenbergMarquardt, Preconditioner
from tests.support.models import batch_at, sgd, small_cnn


@pytest.mark.parametrize(
    ("decrease", "expected"),
    [
        (0.9, 0.5),  # the model is right: trust it more
        (0.75, 1.0),
        (0.5, 1.0),
        (0.25, 1.0),
        (0.2, 2.0),
        (-3.0, 2.0),
        (-math.inf, 2.0),
        (math.nan, 2.0),
    ],
)
def test_damping_follows_the_ratio(decrease, expected):
    damping = LevenbergMarquardt(1.0, factor=2.0)
    damping.observe(0, decrease=decrease, predicted=1.0)

    assert damping(1) == expected


def test_a_model_that_predicts_no_decrease_is_distrusted():
    damping = LevenbergMarquardt(1.0, factor=2.0)
    damping.observe(0, decrease=1.0, predicted=0.0)

    assert damping(1) == 2.0


def test_damping_stays_in_its_range():
    damping = LevenbergMarquardt(1.0, factor=10.0, least=0.5, most=3.0)
    for expected in (3.0, 3.0):
        damping.observe(0, decrease=0.0, predicted=1.0)
        assert damping(1) == expected
    for expected in (0.5, 0.5):
        damping.observe(0, decrease=1.0, predicted=1.0)
        assert damping(1) == expected


def test_it_judges_only_steps_that_used_the_damping_it_has():
    damping = LevenbergMarquardt(1.0, every=1)
    assert damping.wants(3, 0)
    damping.observe(3, decrease=0.0, predicted=1.0)

    assert not damping.wants(4, 3)  # captured before the change
    assert damping.wants(5, 4)
    assert not damping.wants(5, None)  # a layer without a version


def test_it_asks_every_few_steps():
    damping = LevenbergMarquardt(1.0, every=4)
    assert [step for step in range(10) if damping.wants(step, 0)] == [0, 4, 8]


@pytest.mark.parametrize(
    "wrong",
    [
        {"start": 0.0},
        {"start": 1e-9},
        {"start": 100.0},
        {"least": 0.0},
        {"most": math.inf},
        {"factor": 1.0},
        {"every": 0},
    ],
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        LevenbergMarquardt(**wrong)


def adapting(damping, *, steps: int, state=None, lr: float = 0.05, spoil=0.0):
    """Train, showing the losses that are asked for.

    Returns:
        The dampings of the steps, the state at the end, and the report.
    """
    model = small_cnn()
    optimizer = sgd(model)
    optimizer.param_groups[0]["lr"] = lr
    values = []
    with Preconditioner(
        model, optimizer, damping=damping, lag=2, update_every=2, on_late="wait"
    ) as pre:
        if state is not None:
            pre.load_state_dict(state)
        for step in range(steps):
            images, labels = batch_at(step)
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            pre.step()
            optimizer.step()
            optimizer.zero_grad()
            if pre.wants_losses:
                pre.observe_losses(loss, loss.detach() + spoil)
            values.append(damping(step))
        return values, pre.state_dict(), pre.report()


def test_a_trainer_raises_its_damping_when_the_loss_rises():
    values, state, report = adapting(
        LevenbergMarquardt(0.1, every=1, factor=2.0), steps=12, spoil=1.0
    )

    # Step 2 is the first with versions. The change made after it is in the snapshot of
    # step 4, which is used from step 6 on: only that step is judged next.
    assert values[:10] == [0.1] * 2 + [0.2] * 4 + [0.4] * 4
    assert report["damping"] == values[-1]
    resumed = LevenbergMarquardt(0.1, every=1, factor=2.0)
    adapting(resumed, steps=0, state=state)
    assert resumed(0) == values[-1]
    assert not resumed.wants(11, 10)


@pytest.mark.parametrize("idle", ["unused", "frozen"])
def test_a_layer_without_gradients_is_not_waited_for(idle):
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    optimizer, damping = sgd(model), LevenbergMarquardt(0.1, every=1)
    judged = 0
    with Preconditioner(
        model, optimizer, damping=damping, update_every=1, on_late="wait"
    ) as pre:
        for step in range(8):
            model["other"].requires_grad_(step < 2)
            found = model["used"](torch.randn(5, 4))
            if idle == "frozen":
                found = found + model["other"](torch.randn(5, 4))
            found.square().mean().backward()
            pre.step()
            optimizer.zero_grad()
            if pre.wants_losses:
                judged += 1
                pre.observe_losses(1.0, 0.0)

    assert judged > 2


@pytest.mark.parametrize("trust", ["graft", "none"])
def test_a_small_step_does_what_was_predicted(trust):
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 3).double(), torch.randn(9, 4).double()
    optimizer, damping = torch.optim.SGD(model.parameters(), lr=1e-6), 0.1
    with Preconditioner(
        model, optimizer, damping=LevenbergMarquardt(damping), lag=0, trust=trust
    ) as pre:
        before = model(inputs).square().mean()
        before.backward()
        pre.step()
        optimizer.step()
        decrease = float(before.detach() - model(inputs).square().mean().detach())
        predicted = pre._apply.prediction.decrease

    assert decrease == pytest.approx(predicted, rel=1e-3)


def test_losses_are_asked_for_by_adaptive_damping_only():
    model = small_cnn()
    with Preconditioner(model, sgd(model)) as pre:
        assert not pre.wants_losses
        with pytest.raises(ConfigurationError, match="LevenbergMarquardt"):
            pre.observe_losses(1.0, 0.5)
