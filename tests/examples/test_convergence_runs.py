"""The convergence study trains what it says, and its own baselines are right."""

import gzip
import json
from dataclasses import replace
from pydoc_data.topics import topics

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.study import optimizers, plan
from benchmarks.study.dense_kfac import DenseKfac, DenseKfacSettings
from benchmarks.study.muon import Muon
from benchmarks.study.plan import Trial, Variant
from benchmarks.study.runs import outcome_of
from benchmarks.study.tasks import (
    CharacterTransformer,
    Task,
    build_cnn,
    fashion_mnist,
    python_manual,
)
from skfac.client import Preconditioner

NEEDS = {"soap": "heavyball", "singd": "singd"}


def skfac(history="snapshot", lag=1, update_every=1):
    return Variant(
        optimizer="skfac", history=history, lag=lag, update_every=update_every
    )


def trial_of(variant, *, seed=0, task="fashion-mlp", **changes):
    settings = plan.settings_of(variant)[0] | changes
    return Trial(task=task, variant=variant, settings=settings, seed=seed, stage="tune")


def small_task(steps=3):
    drawn = torch.Generator().manual_seed(0)
    inputs = torch.randn(8 * steps, 6, generator=drawn)
    labels = torch.randint(3, (8 * steps,), generator=drawn)
    return Task(
        inputs=inputs,
        targets=labels,
        val_inputs=inputs,
        val_targets=labels,
        build_model=lambda: nn.Sequential(
            nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
        ),
        loss=cross_entropy,
        loss_name="loss",
        metric=cross_entropy,
        metric_name="metric",
        batch_size=8,
        validate_every=2,
    )


@pytest.mark.parametrize(
    "variant",
    [*map(plan.baseline, ("sgd", "adamw", "muon", "soap", "singd", "dense-kfac"))]
    + [skfac(h, lag) for h in plan.HISTORIES for lag in (0, 1)]
    + [plan.defaults_variant()],
    ids=lambda variant: variant.title,
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_short_run_of_everything_can_be_repeated_and_learns(variant):
    if variant.optimizer in NEEDS:
        pytest.importorskip(NEEDS[variant.optimizer])
    task = small_task()
    trial = replace(trial_of(variant), settings=plan.settings_of(variant)[2])
    first, second = (outcome_of(trial, task, epochs=1) for _ in range(2))
    points = first["val_losses"]
    assert [step for step, _, _ in points] == [0, 2, 3]
    assert [loss for *_, loss in points] == [loss for *_, loss in second["val_losses"]]
    assert first["final_val_loss"] == points[-1][-1]
    assert first["final_val_loss"] < points[0][-1]
    assert (first["steps"], first["diverged"]) == (3, False)
    assert ("versions" in first) == (variant.history is not None)
    other = outcome_of(replace(trial, seed=1), task, epochs=1)
    assert other["final_val_loss"] != first["final_val_loss"]


def test_a_run_that_diverges_ends_early_without_a_final_loss():
    trial = trial_of(plan.baseline("sgd"), lr=1e30)
    outcome = outcome_of(trial, small_task(steps=30), epochs=1)
    assert outcome["diverged"]
    assert outcome["final_val_loss"] is None
    assert outcome["steps"] == 30
    assert outcome["val_losses"][-1][0] < 10
    json.dumps(outcome, allow_nan=False)


# The data


def test_fashion_mnist_is_read_from_its_files_and_asked_for_if_it_is_not_there(
    tmp_path,
):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion"):
        fashion_mnist(train=3, validation=2, folder=tmp_path / "nowhere")
    pixels, labels = torch.zeros(9, 784, dtype=torch.uint8), torch.arange(9)
    pixels[torch.arange(9), torch.arange(9)] = 255
    for name, header, values in (
        ("images-idx3", 16, pixels),
        ("labels-idx1", 8, labels),
    ):
        raw = bytes([77] * header) + bytes(values.flatten().tolist())
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(raw))
    split = fashion_mnist(train=3, validation=2, folder=tmp_path)
    both = torch.cat([split.inputs, split.val_inputs]).flatten(1)
    assert split.val_inputs.shape == (2, 1, 28, 28)
    assert torch.equal(both.sum(1), torch.ones(5))
    assert torch.equal(both.argmax(1), torch.cat([split.labels, split.val_labels]))
    assert sorted(both.argmax(1).tolist()) == [0, 1, 2, 3, 4]


def test_the_text_is_cut_into_windows_that_do_not_overlap_and_predict_themselves():
    text = python_manual(length=50, train=20, validation=4)

    def written(codes):
        return "".join(text.vocabulary[code] for code in codes.flatten().tolist())

    assert text.inputs.shape == text.targets.shape == (20, 50)
    assert written(text.inputs)[1:] == written(text.targets)[:-1]
    assert written(text.inputs).startswith('The "assert" statement')
    whole = "".join(topics[name] for name in sorted(topics))
    assert written(text.val_targets) in whole[-5 * 50 :]
    assert len(whole) - whole.rindex(written(text.val_targets)) < 4 * 50 + 50
    assert text.val_inputs.shape == text.val_targets.shape == (4, 50)
    with pytest.raises(ValueError, match="ask for fewer"):
        python_manual(length=50, train=20000, validation=4)


# The baselines that are the study's own


def gradients(model, inputs, targets):
    model.zero_grad()
    cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def build_small_mlp():
    return nn.Sequential(nn.Linear(49, 12), nn.ReLU(), nn.Linear(12, 10, bias=False))


def cases():
    drawn = torch.Generator().manual_seed(1)
    images = torch.rand(9, 1, 28, 28, generator=drawn)
    labels = torch.randint(10, (9,), generator=drawn)
    text = torch.randint(11, (5, 7), generator=drawn)
    return {
        "mlp": (build_small_mlp, images[..., ::4, ::4].flatten(1), labels),
        "cnn": (build_cnn, images, labels),
        "characters": (lambda: CharacterTransformer(11), text, text.roll(1, 1)),
    }


@pytest.mark.parametrize("name", ["mlp", "cnn", "characters"])
@pytest.mark.parametrize(("split", "decay"), [("pi", 0.9), ("equal", 0.0)])
@pytest.mark.filterwarnings("ignore::skfac.client.PassThroughWarning")
def test_dense_kfac_takes_the_steps_of_skfac_that_waits_for_each_inverse(
    name, split, decay
):
    build, inputs, targets = cases()[name]
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    both = []
    for dense in (True, False):
        torch.manual_seed(0)
        model = build().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        common = {"damping": 0.05, "kl_clip": 0.002, "damping_split": split}
        preconditioner = None
        if dense:
            settings = DenseKfacSettings(**common, update_every=2, decay=decay)
            DenseKfac(model, optimizer, settings)
        else:
            preconditioner = Preconditioner(
                model,
                optimizer,
                **common,
                history="ema",
                decay=decay,
                rank=None,
                lag=0,
                update_every=2,
                wire_dtype="float64",
            )
        for step in range(4):
            order = torch.arange(len(inputs)).roll(step)[: len(inputs) - 2]
            gradients(model, inputs[order], targets[order])
            if preconditioner is not None:
                preconditioner.step()
            optimizer.step()
        if preconditioner is not None:
            preconditioner.close()
        both.append([parameter.detach() for parameter in model.parameters()])
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_muon_takes_torchs_steps_up_to_its_rounding():
    results = []
    for make in (Muon, torch.optim.Muon):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(9, 5)), nn.Parameter(torch.randn(4, 12))]
        extra = {} if make is Muon else {"weight_decay": 0.0}
        optimizer = make(weights, lr=0.1, momentum=0.9, **extra)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape)
            optimizer.step()
        results.append([weight.detach() for weight in weights])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)


def test_what_muon_does_not_take_gets_adamw_with_the_same_schedule():
    torch.manual_seed(0)
    model = build_cnn()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = optimizers.muon(model, {"lr": 0.1, "adamw_lr": 0.01})
    optimizer.param_groups[0] |= {"initial_lr": 0.1, "lr": 0.025}
    gradients(model, torch.rand(4, 1, 28, 28), torch.arange(4))
    optimizer.step()
    taken = {id(p) for p in optimizer.param_groups[0]["params"]}
    for parameter, old in zip(model.parameters(), before, strict=True):
        moved = (parameter.detach() - old).abs().max().item()
        if id(parameter) in taken:
            assert parameter.ndim == 4
            assert moved > 0.0026
        else:
            # Adam's first step is its learning rate: a quarter of 0.01 by now.
            assert moved == pytest.approx(0.0025, rel=1e-3)
            assert parameter.grad is None
