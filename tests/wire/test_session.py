"""What a job declares: checks, differences and versions in flight."""

from dataclasses import fields, replace
from typing import Any

import pytest

from skfac.wire.errors import InvalidRequestError
from skfac.wire.session import SessionSpec
from tests.support.values import layer_spec, session_spec

OTHER_VALUES: dict[str, Any] = {
    "job": "another job",
    "instance": "run 2",
    "world_size": 2,
    "damping_split": "equal",
    "history": "ema",
    "update_every": 2,
    "lag": 1,
    "on_late": "wait",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"job": ""}, "A job name has 1 to 200 characters, got 0"),
        ({"job": 201 * "j"}, "A job name has 1 to 200 characters, got 201"),
        ({"world_size": 0}, "world_size and update_every must be at least 1, got 0 "),
        ({"update_every": 0}, "must be at least 1, got 1 and 0"),
        ({"layers": ()}, "Job 'job' declares no layers"),
        ({"lag": 64, "update_every": 1}, "keeps 65 versions .* at most 64"),
        (
            {"layers": (layer_spec("a"), layer_spec("b"), layer_spec("b", 9))},
            "Layer 'b' is declared twice",
        ),
    ],
)
def test_wrong_sessions_are_refused(changes, message):
    with pytest.raises(InvalidRequestError, match=message):
        session_spec(**changes)


@pytest.mark.parametrize(("d_in", "d_out"), [(0, 1), (1, 0), (-1, 1), (2**40 + 1, 1)])
def test_layers_without_a_weight_are_refused(d_in, d_out):
    with pytest.raises(InvalidRequestError, match=f"'fc' declares a {d_out} × {d_in}"):
        layer_spec("fc", d_in, d_out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 0}, "'fc' declares 0 groups of a 2 × 3 weight"),
        ({"groups": -1}, "'fc' declares -1 groups"),
        ({"groups": 2**39}, f"'fc' declares {2**39} groups .* extents up to {2**40}"),
        ({"groups": 2**39, "d_in": 1, "d_out": 3}, "extents up to"),
        ({"groups": 2, "diagonal": True}, "a diagonal layer has one group"),
    ],
)
def test_layers_with_wrong_groups_are_refused(changes, message):
    with pytest.raises(InvalidRequestError, match=message):
        layer_spec(**{"d_in": 3, "d_out": 2, **changes})


def test_the_most_groups_are_accepted():
    layer_spec("fc", 1, 2, groups=2**39)
    layer_spec("fc", 1, 1, groups=2**40)
    layer_spec("fc", 9, 2, diagonal=True)


def test_layers_without_a_name_are_refused():
    with pytest.raises(InvalidRequestError, match="empty name"):
        layer_spec("")


def test_the_smallest_session_and_the_longest_name_are_accepted():
    session_spec(layer_spec("a", 1, 1), world_size=1, update_every=1, lag=0)
    session_spec(layer_spec(1000 * "n", 2**40, 2**40), job=200 * "j")
    with pytest.raises(InvalidRequestError, match="a name of 1001 characters"):
        layer_spec(1001 * "n")


@pytest.mark.parametrize(
    ("lag", "update_every", "versions"),
    [
        (0, 1, 1),
        (1, 1, 2),
        (3, 1, 4),
        (20, 10, 3),
        (21, 10, 4),
        (5, 10, 2),
        (10, 10, 2),
        (0, 10, 1),
    ],
)
def test_versions_in_flight(lag, update_every, versions):
    spec = session_spec(lag=lag, update_every=update_every)

    assert spec.versions_in_flight == versions


def test_equal_sessions_have_no_difference():
    spec = session_spec(layer_spec("a"), layer_spec("b"))

    assert spec.first_difference(replace(spec)) is None


def test_every_field_with_a_choice_has_another_value_here():
    free = {field.name for field in fields(SessionSpec)} - {"layers"}

    assert set(OTHER_VALUES) == free


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_the_field_that_differs_is_named(name):
    mine = session_spec()
    theirs = replace(mine, **{name: OTHER_VALUES[name]})

    assert mine.first_difference(theirs) == (
        f"{name} is {OTHER_VALUES[name]!r} instead of {getattr(mine, name)!r}"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"name": "c"},
        {"kind": "conv2d"},
        {"d_in": 9},
        {"d_out": 9},
        {"bias": False},
        {"groups": 2},
        {"diagonal": True},
    ],
)
def test_the_layer_that_differs_is_named(change):
    first, second = layer_spec("a"), layer_spec("b")
    other = replace(second, **change)

    difference = session_spec(first, second).first_difference(
        session_spec(first, other, lag=3)
    )

    assert difference == f"layer 1 is {other} instead of {second}"


@pytest.mark.parametrize(("mine", "theirs"), [(1, 2), (2, 1)])
def test_the_number_of_layers_that_differs_is_named(mine, theirs):
    layers = layer_spec("a"), layer_spec("b")

    difference = session_spec(*layers[:mine]).first_difference(
        session_spec(*layers[:theirs])
    )

    assert difference == f"it has {theirs} layers instead of {mine}"
