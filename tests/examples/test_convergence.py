"""The convergence study plans, records and resumes what it says."""

import json
import math
from dataclasses import replace

import pytest

from benchmarks.study import plan, progress, records, selection, tables
from benchmarks.study.plan import Trial, Variant
from benchmarks.study.runs import Done, check, recipe
from benchmarks.study.tasks import TASKS, build_mlp
from skfac.client import ConfigurationError


def everything(task, variant):
    return True


def skfac(history="snapshot", lag=1, update_every=1):
    return Variant(
        optimizer="skfac", history=history, lag=lag, update_every=update_every
    )


def trial_of(variant, *, seed=0, task="fashion-mlp", **changes):
    settings = plan.settings_of(variant)[0] | changes
    return Trial(task=task, variant=variant, settings=settings, seed=seed, stage="tune")


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
        "sgd": ([9.0, 3.0, 5.0], [9.0, 7.0, 4.0], [9.0, 7.0, 6.0]),
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


def with_defaults(tmp_path, losses):
    found = finished(tmp_path)
    variant = plan.defaults_variant()
    for settings in plan.settings_of(variant):
        found.add(replace(trial_of(variant), settings=settings), record([9.0] * 3))
    best = plan.settings_of(variant)[0]
    for seed in (1, 2, 3):
        trial = replace(trial_of(variant), settings=best, stage="final", seed=seed)
        found.add(trial, record(losses))
    found.compare()
    return found


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([9.0, 1.5, 5.5], "10 of 20 | yes | 5.500, SGD 5.000 | **no**"),
        ([9.0, 8.0, 1.5], "20 of 20 | **no** | 1.500, SGD 5.000 | yes"),
        ([9.0, 8.0, 5.0], "- | **no** | 5.000, SGD 5.000 | yes"),
    ],
)
def test_the_verdict_is_about_half_of_adamws_steps_and_the_end_of_sgd(
    tmp_path, losses, verdict
):
    page = tmp_path / "page.md"
    names = ["verdict", "losses", "steps", "seconds", "freshness", "settings"]
    page.write_text("".join(f"<!-- table: {n} -->\n<!-- end -->\n" for n in names))
    tables.fill(page, with_defaults(tmp_path, losses))
    assert f"| Fashion-MNIST MLP | {verdict} |" in page.read_text()


def test_tables_say_what_is_worse_than_sgd_and_what_is_not_there(tmp_path):
    found = with_defaults(tmp_path, [9.0, 1.5, 5.5])
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
    assert "| SKFAC, defaults | - | 5.500 (5.500 to 5.500) ▼ | - | - |" in text
    assert "| AdamW | - | 10 | - | - |" in text
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has places for the tables"):
        tables.fill(page, found)
