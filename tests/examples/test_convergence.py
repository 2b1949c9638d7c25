"""The convergence study plans, records, resumes and trains what it says."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.study import optimizers, plan, progress, records, selection, tables
from benchmarks.study.dense_kfac import DenseKfac, DenseKfacSettings
from benchmarks.study.muon import Muon
from benchmarks.study.plan import Trial, Variant
from benchmarks.study.runs import Done, check, outcome_of, recipe
from benchmarks.study.tasks import (
    TASKS,
    CharacterTransformer,
    Task,
    build_cnn,
    build_mlp,
)
from skfac.client import ConfigurationError, Preconditioner

NEEDS = {"soap": "heavyball", "singd": "singd"}


def everything(task, variant):
    return True


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


def record(losses, *, steps=(0, 10, 20), end=None):
    points = [[s, s / 10, loss] for s, loss in zip(steps, losses, strict=True)]
    return {
        "steps": steps[-1],
        "val_losses": points,
        "final_val_loss": losses[-1] if end is None else end,
        "seconds": 2.0,
        "diverged": False,
        "wall_s": 3.0,
    }


# The plan


def test_the_plan_has_every_optimizer_and_every_combination_of_skfac_once():
    found = [(v.optimizer, v.history, v.lag, v.update_every) for v in plan.variants()]
    combinations = [
        ("skfac", history, lag, every)
        for history in ("snapshot", "window", "ema")
        for lag in (0, 1, 5, 20)
        for every in (1, 10)
    ]
    others = {"sgd", "adamw", "muon", "soap", "singd", "dense-kfac"}
    ordinary = [v for v in plan.variants() if v.history and not v.defaults]
    assert sorted(set(combinations)) == sorted(
        (v.optimizer, v.history, v.lag, v.update_every) for v in ordinary
    )
    assert {optimizer for optimizer, *_ in found} == others | {"skfac"}
    assert len(found) == 24 + 6 + 1
    assert [v.defaults for v in plan.variants()].count(True) == 1


def test_all_groups_have_the_same_number_of_different_trials():
    groups = plan.groups(everything)
    assert len(groups) == len(TASKS) * (6 + 6 + 1)
    trials = plan.tuning(everything)
    assert {trial.seed for trial in trials} == {0}
    for task, group in groups:
        own = [t for t in trials if (t.task, t.variant) == (task, group)]
        assert len({json.dumps(t.key()) for t in own}) == len(own) == plan.TRIALS


def test_skfac_is_tuned_at_lag_1_and_its_other_lags_take_what_won_there():
    assert {v.group.lag for v in plan.variants() if v.history} == {1}
    chosen = {skfac("ema", 1, 10): {"lr": 7.0}}
    trials = plan.finals(everything, lambda task, group: chosen.get(group))
    assert {t.variant for t in trials} == {skfac("ema", n, 10) for n in (0, 1, 5, 20)}
    assert {t.seed for t in trials} == {1, 2, 3}
    assert all(t.settings == {"lr": 7.0} for t in trials)
    assert len(trials) == len(TASKS) * 4 * 3


def test_the_library_defaults_get_no_keyword_and_new_defaults_are_new_runs():
    variant = plan.defaults_variant()
    trial = trial_of(variant)
    model = build_mlp()
    _, preconditioner = recipe(trial, model)
    assert preconditioner is not None
    with preconditioner:
        assert preconditioner.config == type(preconditioner.config)()
    library = trial.settings["library"]
    assert library["damping"] == preconditioner.config.damping
    changed = trial.settings | {"library": library | {"damping": 123.0}}
    assert replace(trial, settings=changed).key() != trial.key()


def test_selections_are_of_any_text_that_has_all_of_its_values():
    wanted = selection.parse(
        ["task=characters,optimizer=skfac,lag=5,defaults=no", "optimizer=sgd"]
    )
    assert wanted("characters", skfac(lag=5))
    assert not wanted("characters", skfac(lag=20))
    assert not wanted("fashion-mlp", skfac(lag=5))
    assert wanted("fashion-mlp", plan.baseline("sgd"))
    assert {v.lag for _, v in plan.groups(wanted) if v.history} == {1}
    assert selection.parse([])("characters", skfac())
    for text in ("optimizer=lbfgs", "colour=red", "nonsense"):
        with pytest.raises(ValueError, match=f"'{text}' selects nothing.*muon"):
            selection.parse([text])


def test_what_the_library_refuses_is_refused_before_anything_runs():
    check(trial_of(skfac("ema")))
    with pytest.raises(ConfigurationError, match="history"):
        check(replace(trial_of(skfac()), variant=skfac("hourglass")))
    with pytest.raises(ConfigurationError, match="damping"):
        check(trial_of(skfac(), damping=-1.0))


# The record


def test_a_record_is_resumed_and_not_repeated(tmp_path, monkeypatch):
    path = tmp_path / "results" / "runs.json"
    asked = []

    def run_all(trials, *, jobs):
        for trial in trials:
            asked.append(trial)
            if trial.settings["lr"] == 0.3:
                yield Done(trial=trial, outcome=None, failure="Oops")
            else:
                yield Done(trial=trial, outcome=record([3.0, 2.0, 1.0]))

    class Costs:
        def seconds(self, trials):
            return sum(t.settings["lr"] for t in trials)

    monkeypatch.setattr(progress, "run_all", run_all)
    trials = [trial_of(plan.baseline("sgd"), lr=lr) for lr in (0.1, 0.3, 0.2)]

    def complete():
        found = records.Records(path)
        return progress.complete("tuning", trials, found, Costs(), jobs=1)

    assert [done.failure for done in complete()] == ["Oops"]
    assert [t.settings["lr"] for t in asked] == [0.3, 0.2, 0.1]
    assert len(json.loads(path.read_text())) == 2
    asked.clear()
    assert "Oops" in complete()[0].text
    assert [t.settings["lr"] for t in asked] == [0.3]
    assert [p.name for p in path.parent.iterdir()] == ["runs.json"]


def test_runs_are_told_apart_by_everything_that_makes_them_different(tmp_path):
    found = records.Records(tmp_path / "runs.json")
    trial = trial_of(skfac())
    found.add(trial, record([1.0, 1.0, 1.0]))
    others = [
        replace(trial, seed=1),
        replace(trial, task="fashion-cnn"),
        replace(trial, settings=trial.settings | {"lr": 9.0}),
        trial_of(skfac("ema")),
        trial_of(skfac(lag=5)),
        trial_of(skfac(update_every=10)),
    ]
    assert found.of(trial) is not None
    assert [found.of(other) for other in others] == [None] * len(others)
    keys = {"task", "optimizer", "seed", "history", "lag", "update_every", "stage"}
    keys |= {"steps_to_adamw_best", "final_val_loss", "sgd_final_val_loss", "seconds"}
    keys |= {"settings", "steps", "val_losses", "diverged"}
    assert keys <= json.loads((tmp_path / "runs.json").read_text())[0].keys()


@pytest.mark.parametrize(
    ("losses", "target", "expected"),
    [
        ([3.0, 2.0, 1.0], 2.0, 10),
        ([3.0, 2.0, 1.0], 1.99, 20),
        ([3.0, 1.0, 2.0], 1.5, 10),
        ([3.0, 2.0, 1.0], 0.9, None),
        ([3.0, None, 1.0], 2.5, 20),
        ([3.0, 2.0, 1.0], None, None),
    ],
)
def test_steps_to_a_loss_are_those_of_the_first_validation_there(
    losses, target, expected
):
    assert records.steps_to(record(losses), target) == expected


def finished(tmp_path):
    # AdamW's best losses are 1.5, 1.0 and 2.0; SGD ends at 5, 4 and 6.
    found = records.Records(tmp_path / "runs.json")
    curves = {
        "adamw": ([9.0, 1.5, 3.0], [9.0, 1.0, 1.2], [9.0, 8.0, 2.0]),
        "sgd": ([9.0, 7.0, 5.0], [9.0, 7.0, 4.0], [9.0, 7.0, 6.0]),
    }
    for name, finals in curves.items():
        variant = plan.baseline(name)
        for number, settings in enumerate(plan.settings_of(variant)):
            trial = replace(trial_of(variant), settings=settings)
            end = 1.0 if number == 2 else 2.0
            found.add(trial, record([9.0, 5.0, end]))
        best = plan.settings_of(variant)[2]
        for seed, losses in enumerate(finals, start=1):
            trial = replace(trial_of(variant), settings=best, stage="final", seed=seed)
            found.add(trial, record(losses))
    return found


def test_runs_are_compared_with_the_medians_of_tuned_adamw_and_sgd(tmp_path):
    found = finished(tmp_path)
    trial = trial_of(skfac())
    found.add(trial, record([9.0, 1.5, 1.5]))
    other = trial_of(skfac(), task="fashion-cnn")
    found.add(other, record([9.0, 1.5, 1.5]))
    found.compare()
    found = records.Records(tmp_path / "runs.json")
    assert found.of(trial)["steps_to_adamw_best"] == 10
    assert found.of(trial)["sgd_final_val_loss"] == 5.0
    assert found.of(other)["steps_to_adamw_best"] is None
    assert found.of(other)["sgd_final_val_loss"] is None
    steps = [r["steps_to_adamw_best"] for r in found if r["optimizer"] == "adamw"]
    assert steps[-3:] == [10, 10, None]


def test_the_best_settings_are_those_that_ended_lowest_in_a_complete_group(tmp_path):
    found = records.Records(tmp_path / "runs.json")
    group = plan.baseline("soap")
    settings = plan.settings_of(group)
    ends = [4.0, math.inf, 2.0, 3.0, 2.0]
    assert len(settings) == len(ends) + 1
    for own, end in zip(settings, ends, strict=False):
        outcome = record([9.0, 0.5, end])
        outcome["final_val_loss"] = end if math.isfinite(end) else None
        outcome["val_losses"][-1][-1] = outcome["final_val_loss"]
        found.add(replace(trial_of(group), settings=own), outcome)
    assert found.best("fashion-mlp", group) is None
    last = replace(trial_of(group), settings=settings[-1])
    found.add(last, record([9.0, 0.1, 7.0]))
    assert found.best("fashion-mlp", group) == settings[2]
    assert found.best("fashion-cnn", group) is None


def test_tables_say_what_is_worse_than_sgd_and_what_is_not_there(tmp_path):
    found = finished(tmp_path)
    variant = plan.defaults_variant()
    for settings in plan.settings_of(variant):
        found.add(replace(trial_of(variant), settings=settings), record([9.0] * 3))
    best = plan.settings_of(variant)[0]
    for seed in (1, 2, 3):
        trial = replace(trial_of(variant), settings=best, stage="final", seed=seed)
        found.add(trial, record([9.0, 1.5, 5.5]))
    found.compare()
    page = tmp_path / "page.md"
    names = ["verdict", "losses", "steps", "seconds", "freshness", "settings"]
    page.write_text(
        "".join(f"<!-- table: {name} -->\nold\n<!-- end -->\nkept\n" for name in names)
    )
    tables.fill(page, found)
    text = page.read_text()
    tables.fill(page, found)
    assert page.read_text() == text
    assert "old" not in text
    assert text.count("kept") == len(names)
    verdict = "| Fashion-MNIST MLP | 10 of 20 | yes | 5.500, SGD 5.000 | **no** |"
    assert verdict in text
    assert "| SKFAC, defaults | - | 5.500 (5.500 to 5.500) ▼ | - | - |" in text
    assert "| AdamW | - | 10 | - | - |" in text
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has places for the tables"):
        tables.fill(page, found)


# The runs


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
