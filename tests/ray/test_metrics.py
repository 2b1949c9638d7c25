"""What an actor counts is in Ray's metrics, under the same names."""

import pytest

from skfac.service.metrics import Metrics


class Recorded:
    """One of Ray's metrics that remembers what it was told."""

    made: dict[str, "Recorded"]

    def __init__(self, name, description="", *arguments):
        *boundaries, tag_keys = arguments
        self.description, self.tag_keys = description, tag_keys
        self.boundaries = boundaries[0] if boundaries else None
        self.told: list[tuple[float, dict[str, str]]] = []
        type(self).made[name] = self

    def record(self, value, tags):
        assert set(tags) == set(self.tag_keys)
        self.told.append((value, dict(tags)))

    inc = set = observe = record


@pytest.fixture
def made(monkeypatch):
    pytest.importorskip("ray")
    from skfac.service import ray_metrics

    made: dict[str, Recorded] = {}
    monkeypatch.setattr(Recorded, "made", made, raising=False)
    for kind in ("Counter", "Gauge", "Histogram"):
        recorded = type(kind, (Recorded,), {})
        monkeypatch.setattr(ray_metrics.metrics, kind, recorded)
    return made


def test_counters_grow_and_gauges_are_set(made):
    from skfac.service.ray_metrics import RayMetrics

    counted = Metrics()
    mirror = RayMetrics(counted.registry)
    counted.queue_depth.set(3)
    counted.outcomes.labels("job", "solved").inc(2)
    mirror.update()
    counted.queue_depth.set(1)
    counted.outcomes.labels("job", "solved").inc(5)
    mirror.update()
    mirror.update()

    solved = {"session": "job", "outcome": "solved"}
    assert made["skfac_outcomes"].told == [(2, solved), (5, solved)]
    assert made["skfac_queue_depth"].told == [(3, {}), (1, {}), (1, {})]
    assert {f.name for f in counted.registry.collect() if f.samples} == set(made)
    assert made["skfac_outcomes"].description.startswith("What became of")


@pytest.mark.parametrize(
    "values", [[0.003], [0.003, 0.004, 0.7], [1e-5, 2e-3, 29.0], [45.0, 0.1], [5e-5]]
)
def test_histograms_have_the_same_buckets_and_sums(made, values):
    from skfac.service.ray_metrics import RayMetrics

    counted = Metrics()
    mirror = RayMetrics(counted.registry)
    for value in values:
        counted.inversion_s.labels("job").observe(value)
        mirror.update()
    told = made["skfac_inversion_seconds"]
    for value in values:
        counted.inversion_s.labels("job").observe(value)
    mirror.update()

    expected = sorted(values + values)
    observed = sorted(value for value, _ in told.told)
    assert {tags["session"] for _, tags in told.told} == {"job"}
    assert sum(observed) == pytest.approx(sum(expected), rel=1e-4)
    for bound in told.boundaries:
        below = sum(value <= bound for value in observed)
        assert below == sum(value <= bound for value in expected), bound


def test_an_actor_accepts_them_for_real(ray_cluster):
    from skfac.service.ray_metrics import RayMetrics

    counted = Metrics()
    counted.received_bytes.labels("job").inc(5)
    counted.inversion_s.labels("job").observe(0.1)
    counted.sessions.set(1)
    RayMetrics(counted.registry).update()
