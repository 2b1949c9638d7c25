"""What a server counts and times, in base units, under the prefix `skfac_`."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from skfac.curvature.layer import LayerPreconditioner

_SECONDS = (
    5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2,
    0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
)  # fmt: skip

_COUNTS = tuple(float(2**power) for power in range(15))

CLOSED_KEPT = 64
"""Closed sessions whose series are still there."""


class Metrics:
    """One server's metrics in a registry of their own.

    The label `session` is the job's name. The series of a closed session stay, so that
    the last scrape misses nothing, until as many others as `CLOSED_KEPT` have closed:
    with the limit on sessions that bounds their number.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._closed: dict[str, None] = {}  # jobs, the longest closed first
        session = ("session",)
        self.inversion_s = self._histogram(
            "skfac_inversion_seconds",
            "From the last rank's rows of a (layer, step) to its published version.",
            session,
        )
        self.stage_s = self._histogram(
            "skfac_stage_seconds",
            "Where time goes: assemble (first to last rank), queue, solve (the batch).",
            ("session", "stage"),
        )
        self.receive_s = self._histogram(
            "skfac_receive_seconds", "First to last frame of accepted snapshots.", ()
        )
        self.batch_size = Histogram(
            "skfac_batch_size",
            "(Layer, step)s that were solved together.",
            buckets=_COUNTS,
            registry=self.registry,
        )
        self.inverse_rank = Histogram(
            "skfac_inverse_rank",
            "Rows of the inverses of solved (layer, step)s.",
            ("session", "side"),
            buckets=_COUNTS,
            registry=self.registry,
        )
        self.received_bytes = self._counter(
            "skfac_received_bytes", "Payload of accepted snapshots.", session
        )
        self.sent_bytes = self._counter(
            "skfac_sent_bytes", "Frames of outcomes, once for each rank.", session
        )
        self.outcomes = self._counter(
            "skfac_outcomes",
            "What became of (layer, step)s: solved, superseded, failed, empty.",
            ("session", "outcome"),
        )
        self.retries = self._counter(
            "skfac_retries", "Inversions tried again with more damping.", session
        )
        self.refused = self._counter(
            "skfac_refused", "Snapshots refused, by status.", ("session", "status")
        )
        self.queue_depth = self._gauge(
            "skfac_queue_depth", "Complete (layer, step)s that wait for the solver."
        )
        self.history_bytes = self._gauge(
            "skfac_history_bytes", "What histories of layers take.", session
        )
        self.sessions = self._gauge("skfac_sessions", "Sessions that are open.")

    def open_session(self, job: str) -> None:
        """Keep a job's series, which go on if it was open before."""
        self._closed.pop(job, None)
        self.history_bytes.labels(job).set(0)

    def close_session(self, job: str) -> None:
        """Let a job's series go once enough others have closed after it."""
        self._closed.pop(job, None)
        self._closed[job] = None
        self.history_bytes.labels(job).set(0)
        if len(self._closed) > CLOSED_KEPT:
            oldest = next(iter(self._closed))
            del self._closed[oldest]
            self._remove(oldest)

    def observe_ranks(self, job: str, preconditioner: LayerPreconditioner) -> None:
        """Count the rows of both inverses of a version."""
        activations, derivatives = preconditioner.tensors
        self.inverse_rank.labels(job, "activations").observe(activations.shape[-2])
        self.inverse_rank.labels(job, "derivatives").observe(derivatives.shape[-2])

    def _remove(self, job: str) -> None:
        per_session: list[Counter | Gauge | Histogram] = [
            self.history_bytes,
            self.inverse_rank,
            self.inversion_s,
            self.stage_s,
            self.received_bytes,
            self.sent_bytes,
            self.outcomes,
            self.retries,
            self.refused,
        ]
        for metric in per_session:
            metric.remove_by_labels({"session": job})

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, labels: tuple[str, ...]) -> Histogram:
        return Histogram(name, text, labels, buckets=_SECONDS, registry=self.registry)
