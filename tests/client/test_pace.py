"""How long steps take, whoever is slow."""

from skfac.client.pace import Pace


def test_the_longest_step_is_kept():
    now_s = iter([5.0, 6.0, 9.0, 9.5])
    pace = Pace(lambda: next(now_s))

    assert pace.longest_s == 0.0
    found = []
    for _ in range(4):
        pace.step()
        found.append(pace.longest_s)
    assert found == [0.0, 1.0, 3.0, 3.0]
