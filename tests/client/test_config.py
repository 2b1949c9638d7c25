"""Settings: defaults, ranges, and what is not built yet."""

from dataclasses import fields

import pytest

from skfac.client import ConfigurationError, PreconditionerConfig
from skfac.client.config import check_target

# The keywords that the design promises.
KEYWORDS = {
    "damping", "damping_split", "update_every", "lag", "wait_s", "on_late",
    "max_staleness", "history", "window", "decay", "rank", "energy", "reduction",
    "positions", "trust", "kl_clip", "apply", "skip", "grad_scaler",
    "accumulation_steps", "process_group", "job", "credentials", "wire_dtype",
}  # fmt: skip


def test_all_keywords_are_accepted_and_documented():
    assert {field.name for field in fields(PreconditionerConfig)} == KEYWORDS
    defaults = {f.name: f.default for f in fields(PreconditionerConfig)}
    assert PreconditionerConfig(**defaults) == PreconditionerConfig()  # type: ignore[arg-type]
    for keyword in KEYWORDS:
        assert f"\n        {keyword}: " in str(PreconditionerConfig.__doc__)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("history", "window"),
        ("history", "ema"),
        ("reduction", "authors"),
        ("reduction", "subsample"),
        ("reduction", "expand"),
        ("trust", "graft"),
        ("trust", "none"),
        ("apply", "row"),
        ("wire_dtype", "bfloat16"),
        ("window", 3),
        ("decay", 0.9),
        ("rank", 64),
        ("energy", 0.9),
        ("positions", 4),
        ("accumulation_steps", 4),
        ("process_group", object()),
        ("grad_scaler", object()),
        ("credentials", object()),
    ],
)
def test_what_is_not_built_yet_says_so(name, value):
    with pytest.raises(ConfigurationError, match=rf"{name}=.*is not built yet"):
        PreconditionerConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("damping", 0),
        ("damping", -1.0),
        ("damping", float("nan")),
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
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ConfigurationError, match=name):
        PreconditionerConfig(**{name: value})


def test_a_staleness_that_no_version_could_meet_is_refused():
    PreconditionerConfig(update_every=10, lag=5, max_staleness=15)
    with pytest.raises(ConfigurationError, match=r"max_staleness = 14 .* = 15"):
        PreconditionerConfig(update_every=10, lag=5, max_staleness=14)


def test_an_unknown_keyword_names_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"'dampign'.*damping, damping_split"):
        PreconditionerConfig.of({"dampign": 1.0})


def test_schedules_are_functions_of_the_step():
    config = PreconditionerConfig(
        damping=lambda step: 1.0 / (step + 1), kl_clip=lambda step: float(2 - step)
    )
    assert config.damping_at(3) == 0.25
    assert config.kl_clip_at(1) == 1.0
    with pytest.raises(ConfigurationError, match=r"kl_clip at step 2 .* got 0\.0"):
        config.kl_clip_at(2)


def test_one_pattern_to_skip_may_be_a_string():
    assert PreconditionerConfig(skip="head.*").skip == ("head.*",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "target", ["embedded", "localhost:1", "10.0.0.1:65535", "[::1]:5", "unix:/a/b"]
)
def test_targets(target):
    assert check_target(target) == target


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("dns:///skfac:50051", "not built yet"),
        ("ray://a/b", "not built yet"),
        (["a:1", "b:1"], "not built yet"),
        ("localhost", "is not a target"),
        ("localhost:0", "is not a target"),
        ("localhost:99999", "is not a target"),
        ("localhost:port", "is not a target"),
        (":5", "is not a target"),
        ("unix:relative", "absolute path"),
    ],
)
def test_other_targets_are_refused_with_the_way_out(target, message):
    with pytest.raises(ConfigurationError, match=rf"{message}.*'host:port'"):
        check_target(target)
