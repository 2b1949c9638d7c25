"""Outcomes in order, as many as some rank may still need."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skfac.service.publisher import Publisher
from skfac.wire.outcome import Outcome
from skfac.wire.session import SessionSpec
from tests.support.values import layer_spec, loss, session_spec, version

PAIR = session_spec(layer_spec("a"), layer_spec("b"), lag=3)


def publisher_of(*published: Outcome, spec: SessionSpec = PAIR) -> Publisher:
    publisher = Publisher(spec)
    for number, outcome in enumerate(published):
        publisher.publish(outcome, now_s=100.0 + number)
    return publisher


def test_nothing_was_published():
    publisher = publisher_of()

    assert publisher.position == 0
    assert publisher.after(0, {}) == []
    assert publisher.newest_versions() == {}


def test_outcomes_come_in_the_order_they_were_published():
    outcomes = [version(1, 1), loss(1, 0), version(0, 1), version(2, 0)]

    publisher = publisher_of(*outcomes)

    assert publisher.position == 4
    assert publisher.after(0, {}) == outcomes


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), max_size=8), st.data())
def test_only_what_is_newer_than_position_and_held(keys, data):
    outcomes = [loss(step, layer) for layer, step in keys]
    position = data.draw(st.integers(0, len(outcomes)))
    held = data.draw(st.dictionaries(st.integers(0, 1), st.integers(0, 5)))
    spec = session_spec(layer_spec("a"), layer_spec("b"), lag=9)

    found = publisher_of(*outcomes, spec=spec).after(position, held)

    assert found == [
        outcome
        for outcome in outcomes[position:]
        if outcome.layer not in held or outcome.step > held[outcome.layer]
    ]


def test_a_held_step_is_not_sent_again():
    publisher = publisher_of(
        *(loss(step, layer) for step in (0, 1) for layer in (0, 1))
    )

    assert publisher.after(0, {0: 0, 1: 1}) == [loss(1, 0)]


@pytest.mark.parametrize(("lag", "update_every"), [(0, 1), (3, 1), (20, 10)])
def test_each_layer_keeps_as_many_as_are_in_flight_and_one(lag, update_every):
    spec = session_spec(
        layer_spec("a"), layer_spec("b"), lag=lag, update_every=update_every
    )
    kept = spec.versions_in_flight + 1

    publisher = publisher_of(
        loss(0, 1), *(loss(step, 0) for step in range(9)), spec=spec
    )

    assert publisher.position == 10
    assert publisher.after(0, {}) == [
        loss(0, 1),
        *(loss(step, 0) for step in range(9 - kept, 9)),
    ]


def test_the_newest_version_is_not_a_loss():
    newest = version(1, 0)

    publisher = publisher_of(version(0, 0), newest, loss(2, 0), version(5, 1))

    assert publisher.newest_versions()[0] is newest


def test_losses_do_not_hide_that_a_version_was_solved():
    newest = version(0)

    publisher = publisher_of(newest, *(loss(step) for step in range(1, 9)))

    assert publisher.newest_versions()[0] is newest
