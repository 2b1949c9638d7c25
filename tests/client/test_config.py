"""Settings: defaults, ranges, and what is not built yet."""

from dataclasses import fields

import pytest

from skfac.client import ConfigurationError, PreconditionerConfig
from skfac.client.config import check_target
from skfac.curvature.settings import CurvatureSettings

# The keywords that the design promises.
KEYWORDS = {
    "damping", "damping_split", "update_every", "lag", "wait_s", "on_late",
    "max_staleness", "history", "window", "decay", "rank", "energy", "reduction",
    "positions", "trust", "kl_clip", "apply", "skip", "grad_scaler",
    "accumulation_steps", "process_group", "job", "credentials", "wire_dtype",
    "loss_reduction", "fisher", "resolve_every_s",
}  # fmt: skip


def test_all_keywords_are_accepted_and_documented():
    assert {field.name for field in fields(PreconditionerConfig)} == KEYWORDS
    defaults = {f.name: f.default for f in fields(PreconditionerConfig)}
    assert PreconditionerConfig(**defaults) == PreconditionerConfig()  # type: ignore[arg-type]
    for keyword in KEYWORDS:
        assert f"\n        {keyword}: " in str(PreconditionerConfig.__doc__)


def test_a_process_group_is_one_of_torch():
    with pytest.raises(ConfigurationError, match=r"group of torch\.distributed, got 3"):
        PreconditionerConfig(process_group=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [("wire_dtype", "bfloat16")])
def test_what_is_not_built_yet_says_so(name, value):
    with pytest.raises(ConfigurationError, match=rf"{name}=.*is not built yet"):
        PreconditionerConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("damping", 0),
        ("damping", -1.0),
        ("damping", float("nan")),
        ("damping", float("inf")),
        ("damping", True),
        ("damping", "much"),
        ("damping_split", "half"),
        ("kl_clip", 0.0),
        ("update_every", 0),
        ("update_every", 2.5),
        ("lag", -1),
        ("lag", lambda step: 1),
        ("wait_s", -0.1),
        ("on_late", "panic"),
        ("max_staleness", 0),
        ("history", "all"),
        ("window", 0),
        ("decay", 1.0),
        ("decay", -0.1),
        ("rank", 0),
        ("rank", 2.5),
        ("energy", 0.0),
        ("energy", 1.1),
        ("reduction", "mean"),
        ("positions", 0),
        ("positions", None),
        ("loss_reduction", "none"),
        ("fisher", "exact"),
        ("trust", "blind"),
        ("apply", "rows"),
        ("accumulation_steps", 0),
        ("resolve_every_s", 0),
        ("resolve_every_s", lambda step: 1.0),
        ("grad_scaler", object()),
        ("credentials", "a token"),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ConfigurationError, match=name):
        PreconditionerConfig(**{name: value})


def test_no_limit_is_a_rank():
    assert PreconditionerConfig(rank=None).curvature_at(0).rank is None
    schedule = PreconditionerConfig(rank=lambda step: step or None)
    assert [schedule.curvature_at(step).rank for step in (0, 3)] == [None, 3]


def test_row_space_needs_a_lag():
    with pytest.raises(ConfigurationError, match=r"apply='row' .* lag to 1"):
        PreconditionerConfig(apply="row", lag=0)


def test_a_staleness_that_no_version_could_meet_is_refused():
    PreconditionerConfig(update_every=10, lag=5, max_staleness=15)
    with pytest.raises(ConfigurationError, match=r"max_staleness = 14 .* = 15"):
        PreconditionerConfig(update_every=10, lag=5, max_staleness=14)


def test_an_unknown_keyword_names_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"'dampign'.*damping, damping_split"):
        PreconditionerConfig.of({"dampign": 1.0})


def test_the_settings_of_a_snapshot_follow_their_schedules():
    config = PreconditionerConfig(
        damping=lambda step: 1.0 / (step + 1),
        decay=lambda step: 0.1 * step,
        window=lambda step: step + 2,
        rank=lambda step: 10 * step,
        energy=lambda step: step / 4,
    )
    assert config.curvature_at(3) == CurvatureSettings(
        damping=0.25, decay=0.1 * 3, window=5, rank=30, energy=0.75
    )


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("damping", 0.0),
        ("kl_clip", float("nan")),
        ("decay", 1.0),
        ("window", 1.5),
        ("rank", 0),
        ("energy", 2.0),
        ("positions", 0),
        ("update_every", 0),
        ("wait_s", -1.0),
        ("max_staleness", 0),
    ],
)
def test_schedules_are_checked_at_each_step(name, wrong):
    right = {"decay": 0.5, "energy": 0.5}.get(name, 20)
    config = PreconditionerConfig(**{name: lambda step: wrong if step == 2 else right})
    assert config.at(name, 1) == right
    with pytest.raises(ConfigurationError, match=rf"{name} at step 2 must be"):
        config.at(name, 2)


def test_a_schedule_of_staleness_must_leave_time_for_versions():
    config = PreconditionerConfig(update_every=5, lag=2, max_staleness=lambda s: 8 - s)
    assert config.max_staleness_at(1) == 7
    with pytest.raises(ConfigurationError, match=r"max_staleness = 6 .* = 7"):
        config.max_staleness_at(2)


def test_a_schedule_of_updates_may_want_one_each_step():
    assert PreconditionerConfig(update_every=7).least_update_every == 7
    assert PreconditionerConfig(update_every=lambda step: 7).least_update_every == 1


def test_one_pattern_to_skip_may_be_a_string():
    assert PreconditionerConfig(skip="head.*").skip == ("head.*",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "target",
    [
        "embedded",
        "localhost:1",
        "10.0.0.1:65535",
        "[::1]:5",
        "unix:/a/b",
        "ray://a/b",
        "ray://a/b/0",
    ],
)
def test_targets(target):
    assert check_target(target) == target


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("dns:///skfac:50051", "is not a target"),
        ("ray://a", "is not ray://namespace/pool"),
        ("ray://127.0.0.1:10001", "is not ray://namespace/pool"),
        (3, "3 is not a target"),
        (["a:1", "b:1"], "is not a target"),
        ("localhost", "is not a target"),
        ("localhost:0", "needs a port from 1 to 65535"),
        ("localhost:99999", "needs a port from 1 to 65535"),
        ("localhost:port", "is not a target"),
        (":5", "is not a target"),
        ("unix:relative", "absolute path"),
    ],
)
def test_other_targets_are_refused_with_the_way_out(target, message):
    with pytest.raises(ConfigurationError, match=rf"{message}.*'host:port'"):
        check_target(target)


@pytest.mark.parametrize("job", [5, "", b"x"])
def test_a_job_has_a_name(job):
    with pytest.raises(ConfigurationError, match="job must be a name, or None"):
        PreconditionerConfig.of({"job": job})
