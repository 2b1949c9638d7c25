"""The split of λ over the two factors."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skfac.curvature.damping import split_damping

MEANS = {"mean_eigenvalue_activations": 9.0, "mean_eigenvalue_derivatives": 0.25}
positive = st.floats(1e-8, 1e8)


def test_pi_weighs_the_factors_by_their_mean_eigenvalues():
    shares = split_damping(0.04, "pi", **MEANS)

    # π = √(9 / 0.25) = 6.
    assert shares.activations == pytest.approx(6 * 0.2)
    assert shares.derivatives == pytest.approx(0.2 / 6)


def test_equal_gives_both_factors_the_root():
    shares = split_damping(0.04, "equal", **MEANS)

    assert shares.activations == shares.derivatives == pytest.approx(0.2)


@pytest.mark.parametrize(("activations", "derivatives"), [(0, 1), (1, 0), (0, 0)])
def test_a_zero_trace_gives_both_factors_the_root(activations, derivatives):
    shares = split_damping(
        0.04,
        "pi",
        mean_eigenvalue_activations=float(activations),
        mean_eigenvalue_derivatives=float(derivatives),
    )

    assert shares.activations == shares.derivatives == pytest.approx(0.2)


@given(damping=positive, activations=positive, derivatives=positive)
def test_the_shares_multiply_to_the_damping(damping, activations, derivatives):
    shares = split_damping(
        damping,
        "pi",
        mean_eigenvalue_activations=activations,
        mean_eigenvalue_derivatives=derivatives,
    )

    assert shares.activations * shares.derivatives == pytest.approx(damping, rel=1e-12)
    # Both factors are damped by the same share of their mean eigenvalue.
    assert shares.activations / activations == pytest.approx(
        shares.derivatives / derivatives, rel=1e-12
    )


@pytest.mark.parametrize("split", ["pi", "equal"])
@pytest.mark.parametrize("damping", [0.0, -1e-3, math.inf, -math.inf, math.nan])
def test_rejects_damping_that_is_not_positive_and_finite(damping, split):
    with pytest.raises(ValueError, match=f"positive and finite, got {damping}"):
        split_damping(damping, split, **MEANS)
