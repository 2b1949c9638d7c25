"""Repeats what an engine counts in Ray's metrics, under the same names."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.samples import Sample
from ray.util import metrics

_Series = tuple[tuple[str, str], ...]


class RayMetrics:
    """Brings Ray's metrics up to date with a registry whenever it is asked to.

    Ray's agent exports them as `ray_` and the name. Histograms get as many observations
    as the registry's, in the same buckets and with the same sum.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._mirrors: dict[str, metrics.Metric] = {}
        self._before: dict[tuple[str, _Series], float] = {}

    def update(self) -> None:
        """Repeat what changed since the last time."""
        now: dict[tuple[str, _Series], float] = {}
        for family in self._registry.collect():
            samples = [s for s in family.samples if not s.name.endswith("_created")]
            now |= {(s.name, tuple(s.labels.items())): s.value for s in samples}
            if family.type == "histogram":
                self._repeat_histogram(family, samples)
                continue
            for sample in samples:
                mirror = self._mirror(family, tuple(sample.labels))
                if isinstance(mirror, metrics.Gauge):
                    mirror.set(sample.value, sample.labels)
                elif (grown := self._grown(sample)) > 0:
                    mirror.inc(grown, sample.labels)  # type: ignore[attr-defined]
        self._before = now

    def _repeat_histogram(self, family: Metric, samples: Sequence[Sample]) -> None:
        series: dict[_Series, list[Sample]] = {}
        for sample in samples:
            labels = tuple(kv for kv in sample.labels.items() if kv[0] != "le")
            series.setdefault(labels, []).append(sample)
        for labels, own in series.items():
            buckets = [s for s in own if s.name.endswith("_bucket")]
            bounds = [float(sample.labels["le"]) for sample in buckets]
            grown = [0.0, *map(self._grown, buckets)]
            counts = [round(after - before) for before, after in pairwise(grown)]
            total = sum(self._grown(s) for s in own if s.name.endswith("_sum"))
            names = tuple(name for name, _ in labels)
            mirror = self._mirror(family, names, bounds[:-1])
            for value in _values(bounds, counts, total):
                mirror.observe(value, dict(labels))  # type: ignore[attr-defined]

    def _grown(self, sample: Sample) -> float:
        key = sample.name, tuple(sample.labels.items())
        return sample.value - self._before.get(key, 0.0)

    def _mirror(
        self, family: Metric, labels: tuple[str, ...], bounds: Sequence[float] = ()
    ) -> metrics.Metric:
        if family.name not in self._mirrors:
            name, text = family.name, family.documentation
            mirror: metrics.Metric
            if family.type == "histogram":
                mirror = metrics.Histogram(name, text, list(bounds), labels)
            else:
                kind = metrics.Counter if family.type == "counter" else metrics.Gauge
                mirror = kind(name, text, labels)
            self._mirrors[family.name] = mirror
        return self._mirrors[family.name]


def _values(
    bounds: Sequence[float], counts: Sequence[int], total: float
) -> Iterable[float]:
    # Where in their buckets the values are is not known, only what they add up to: all
    # are put at one share of the way through theirs. The last bucket has no end.
    ends = [*bounds[:-1], bounds[-2]]
    begins = [0.0, *bounds[:-1]]
    least = sum(c * b for c, b in zip(counts, begins, strict=True))
    room = sum(c * e for c, e in zip(counts, ends, strict=True)) - least
    share = min(max((total - least) / room, 1e-6), 1.0) if room else 1.0
    beyond = max(total - least - room, 0.0) / max(counts[-1], 1)
    for begin, end, count in zip(begins[:-1], ends[:-1], counts[:-1], strict=True):
        yield from [begin + share * (end - begin)] * count
    yield from [begins[-1] + max(beyond, begins[-1] * 1e-6)] * counts[-1]
