"""The latest failures and refusals: few, short, each told once."""

from skfac.service.engine import RecentError
from skfac.service.recent_errors import KINDS_KEPT, MESSAGE_LENGTH, RecentErrors


def test_there_are_none_at_first():
    assert RecentErrors().status(1.0) == ()


def test_the_latest_comes_first():
    errors = RecentErrors()
    errors.add(1.0, "job", "fc0", "failed", "one")
    errors.add(3.0, "job", "", "NOT_FOUND", "two")

    assert errors.status(5.0) == (
        RecentError("job", "", "NOT_FOUND", "two", 1, 2.0),
        RecentError("job", "fc0", "failed", "one", 1, 4.0),
    )


def test_what_goes_on_failing_is_one_entry_with_the_latest_message():
    errors = RecentErrors()
    errors.add(0.0, "other", "fc0", "failed", "of another job")
    for step in range(1000):
        errors.add(float(step), "job", "fc0", "failed", f"step {step}")

    assert errors.status(1000.0) == (
        RecentError("job", "fc0", "failed", "step 999", 1000, 1.0),
        RecentError("other", "fc0", "failed", "of another job", 1, 1000.0),
    )


def test_their_number_is_bounded_and_the_longest_silent_goes():
    errors = RecentErrors()
    for number in range(KINDS_KEPT):
        errors.add(0.0, f"job {number}", "", "failed", "text")
    errors.add(1.0, "job 0", "", "failed", "again")
    errors.add(2.0, "new", "", "failed", "text")

    jobs = [error.job for error in errors.status(3.0)]
    assert len(jobs) == KINDS_KEPT
    assert jobs[:2] == ["new", "job 0"]
    assert "job 1" not in jobs


def test_a_long_message_is_cut():
    errors = RecentErrors()
    errors.add(0.0, "job", "", "failed", "x" * MESSAGE_LENGTH)
    errors.add(0.0, "job", "", "empty", "y" * (MESSAGE_LENGTH + 1))

    cut, whole = errors.status(0.0)
    assert whole.message == "x" * MESSAGE_LENGTH
    assert cut.message == "y" * (MESSAGE_LENGTH - 1) + "…"
