"""What a server counts and times, in base units, under the prefix `skfac_`."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
)

from skfac.curvature.inverse import DenseInverse, DiagonalInverse, LowRankInverse
from skfac.service.scheduler import Task
from skfac.service.solver import Solution
from skfac.service.stages import (
    ASSEMBLE,
    END_TO_END,
    PUBLISH,
    QUEUE,
    RECEIVE,
    SOLVE,
    StageTimes,
)
from skfac.wire.outcome import Version
from skfac.wire.report import StepReport

_SECONDS = (
    5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2,
    0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
)  # fmt: skip
_COUNTS = tuple(float(2**power) for power in range(15))
_STEPS = (0.0, *_COUNTS)
_CONDITIONS = tuple(10.0**power for power in range(1, 17))

_METHODS = {
    LowRankInverse: "low_rank",
    DenseInverse: "dense",
    DiagonalInverse: "diagonal",
}
_SIDES = ("activations", "derivatives")
_OUTCOMES = ("solved", "superseded", "failed", "empty")
_FULL = "RESOURCE_EXHAUSTED"
_LONGEST = 80  # of a layer's name in an exemplar, which is 128 characters at most

_Metric = Counter | Gauge | Histogram

CLOSED_KEPT = 64
"""Closed sessions whose series are still there."""


class Metrics:
    """One server's metrics in a registry of their own.

    The label `session` is the job's name. The series of a closed session stay, so that
    the last scrape misses nothing, until as many others as `CLOSED_KEPT` have closed:
    with the limit on sessions that bounds their number. Counters that alerts look at
    begin with 0 when the session opens: a counter that begins with 1 has no increase.

    Args:
        exemplars: Add layer and step of one inversion to the buckets of its latency.

    Attributes:
        registry: What Prometheus scrapes.
        labels: Names of the labels of each metric, by the metric's name.
    """

    def __init__(self, *, exemplars: bool = False) -> None:
        self.registry = CollectorRegistry()
        self.stages = StageTimes()
        self.labels: dict[str, tuple[str, ...]] = {}
        self._exemplars = exemplars
        self._per_session: list[_Metric] = []
        self._closed: dict[str, None] = {}  # jobs, the longest closed first
        self._known: set[str] = set()  # open ones, too
        self._make_latencies()
        self._make_results()
        self._make_counts()
        self._make_security()
        self._make_gauges()
        ProcessCollector(registry=self.registry)

    def open_session(self, job: str) -> None:
        """Keep a job's series, which go on if it was open before."""
        self._closed.pop(job, None)
        self._known.add(job)
        self.history_bytes.labels(job).set(0)
        for counter in (
            *(self.received_bytes, self.sent_bytes, self.retries),
            *(self.late, self.stale, self.raw_gradients),
        ):
            counter.labels(job)
        for outcome in _OUTCOMES:
            self.outcomes.labels(job, outcome)
        self.refused.labels(job, _FULL)

    def close_session(self, job: str) -> None:
        """Let a job's series go once enough others have closed after it."""
        self._closed.pop(job, None)
        self._closed[job] = None
        self.history_bytes.labels(job).set(0)
        if len(self._closed) > CLOSED_KEPT:
            oldest = next(iter(self._closed))
            del self._closed[oldest]
            self._known.discard(oldest)
            for metric in self._per_session:
                metric.remove_by_labels({"session": oldest})

    def expect_calls(self, *calls: str) -> None:
        """Begin to count how often each call finds no room."""
        for call in calls:
            self.call_errors.labels(call, _FULL)

    def observe(self, stage: str, job: str, seconds: float) -> None:
        """Add a time to one of the `STAGES`; that of `RECEIVE` has no job."""
        self.stages.add(stage, seconds)
        if stage == RECEIVE:
            self.receive_s.observe(seconds)
        elif stage == END_TO_END:
            self.end_to_end_s.labels(job).observe(seconds)
        else:
            self.stage_s.labels(job, stage).observe(seconds)

    def observe_interval(self, job: str, interval_s: float | None) -> None:
        """Time the snapshots of a rank; its first one has no interval."""
        if interval_s is not None:
            self.snapshot_interval_s.labels(job).observe(interval_s)

    def observe_solution(
        self, task: Task, solution: Solution, began_s: float, now_s: float
    ) -> None:
        """Count what became of a task, and what its stages took.

        Args:
            task: It.
            solution: Its outcome.
            began_s: When its batch went to the solver.
            now_s: When it came back.
        """
        job, outcome = task.spec.job, solution.outcome
        self.observe(ASSEMBLE, job, task.queued_s - task.assembly.started_s)
        self.observe(QUEUE, job, began_s - task.queued_s)
        self.observe(SOLVE, job, now_s - began_s)
        self.retries.labels(job).inc(solution.retries)
        if isinstance(outcome, Version):
            name = task.spec.layers[outcome.layer].name[:_LONGEST]
            exemplar = {"layer": name, "step": str(outcome.step)}
            inversion = self.inversion_s.labels(job)
            inversion.observe(
                now_s - task.queued_s, exemplar if self._exemplars else None
            )
            self._observe_version(job, outcome, solution.conditions)

    def _observe_version(
        self, job: str, version: Version, conditions: tuple[float, float]
    ) -> None:
        self.version_rows.labels(job).observe(version.rows)
        self.version_ranks.labels(job).observe(version.ranks)
        both = version.preconditioner
        inverses = both.activations, both.derivatives
        for side, inverse, condition in zip(_SIDES, inverses, conditions, strict=True):
            rank = self.inverse_rank.labels(job, side, _METHODS[type(inverse)])
            rank.observe(inverse.tensor.shape[-2])
            self.condition.labels(job, side).observe(condition)

    def observe_report(self, job: str, report: StepReport) -> None:
        """Count what a rank says of its steps."""
        for steps in report.staleness:
            self.staleness_steps.labels(job).observe(steps)
        for seconds in report.end_to_end_s:
            self.observe(END_TO_END, job, seconds)
        self.late.labels(job).inc(report.late)
        self.stale.labels(job).inc(report.stale)
        self.raw_gradients.labels(job).inc(report.raw)

    def observe_sent(self, job: str, nbytes: int) -> None:
        """Count bytes that a rank has taken, unless its job's series are gone."""
        if job in self._known:
            self.sent_bytes.labels(job).inc(nbytes)

    def observe_publish(self, job: str, seconds: float) -> None:
        """Time outcomes that a rank has taken, unless its job's series are gone."""
        if job in self._known:
            self.observe(PUBLISH, job, seconds)

    def measure(
        self,
        *,
        queue_oldest_s: Callable[[], float],
        device_memory: Callable[[], tuple[int, int]],
    ) -> None:
        """Tell how to find what is not counted but looked at, at each scrape.

        Args:
            queue_oldest_s: How long the oldest complete (layer, step) has waited.
            device_memory: Bytes in use and bytes that there are.
        """
        self.queue_oldest_s.set_function(queue_oldest_s)
        for place, kind in enumerate(("used", "total")):
            self.device_memory_bytes.labels(kind).set_function(
                lambda place=place: device_memory()[place]  # type: ignore[misc]
            )

    def _make_latencies(self) -> None:
        self.inversion_s = self._histogram(
            "skfac_inversion_seconds",
            "From the last rank's rows of a (layer, step) to its published version.",
            "session",
        )
        self.end_to_end_s = self._histogram(
            "skfac_end_to_end_seconds",
            "From the capture of a snapshot until its rank has the last of its "
            "versions from this server, as the rank says with a later snapshot.",
            "session",
        )
        self.stage_s = self._histogram(
            "skfac_stage_seconds",
            "Where time goes: assemble (first to last rank), queue, solve (the batch), "
            "publish (until a rank's stream has handed it on, once for each rank).",
            *("session", "stage"),
        )
        self.receive_s = self._histogram(
            "skfac_receive_seconds", "First to last frame of accepted snapshots."
        )
        self.snapshot_interval_s = self._histogram(
            "skfac_snapshot_interval_seconds",
            "From one snapshot of a rank to its next; long ones are of a trainer that "
            "stalls.",
            "session",
        )

    def _make_results(self) -> None:
        self.batch_size = self._histogram(
            "skfac_batch_size",
            "(Layer, step)s that were solved together.",
            buckets=_COUNTS,
        )
        self.version_rows = self._histogram(
            "skfac_version_rows",
            "Rows that a version's newest update is made of, over all ranks.",
            "session",
            buckets=_COUNTS,
        )
        self.version_ranks = self._histogram(
            "skfac_version_ranks",
            "Ranks whose rows are in it; fewer than the world after a timeout.",
            "session",
            buckets=_COUNTS,
        )
        self.inverse_rank = self._histogram(
            "skfac_inverse_rank",
            "Rows of the inverses of solved (layer, step)s.",
            *("session", "side", "method"),
            buckets=_COUNTS,
        )
        self.condition = self._histogram(
            "skfac_condition",
            "Condition κ = (λ_max + λ) / λ of damped factors that were inverted, with "
            "the trace for the largest eigenvalue λ_max, which is never above it.",
            *("session", "side"),
            buckets=_CONDITIONS,
        )
        self.staleness_steps = self._histogram(
            "skfac_staleness_steps",
            "Steps since the capture of the oldest version that a rank's step used, of "
            "this server's layers; as the rank says with a later snapshot.",
            "session",
            buckets=_STEPS,
        )

    def _make_security(self) -> None:
        self.denied = self._counter(
            "skfac_denied_calls",
            "Calls refused for want of credentials: no_credentials, unknown_token, "
            "unknown_certificate, other_job, other_session.",
            "reason",
        )
        self.reload_failures = self._counter(
            "skfac_reload_failures",
            "Changed files that were no good, so that the old ones stay in use: "
            "certificate, access.",
            "file",
        )
        self.certificate_expiry = self._gauge(
            "skfac_certificate_expiry_timestamp_seconds",
            "When a certificate in use expires, in Unix time: server, client_ca.",
            "certificate",
        )

    def _make_counts(self) -> None:
        self.received_bytes = self._counter(
            "skfac_received_bytes", "Payload of accepted snapshots.", "session"
        )
        self.sent_bytes = self._counter(
            "skfac_sent_bytes", "Frames of outcomes, once for each rank.", "session"
        )
        self.outcomes = self._counter(
            "skfac_outcomes",
            "What became of (layer, step)s: solved, superseded, failed, empty.",
            *("session", "outcome"),
        )
        self.late = self._counter(
            "skfac_late",
            "(Layer, version)s that a rank missed at their deadline, as it says.",
            "session",
        )
        self.stale = self._counter(
            "skfac_stale",
            "(Layer, step)s of ranks whose version was older than max_staleness.",
            "session",
        )
        self.raw_gradients = self._counter(
            "skfac_raw_gradients",
            "(Layer, step)s of ranks that used the raw gradient: those that are stale "
            "and those before the first version.",
            "session",
        )
        self.retries = self._counter(
            "skfac_retries", "Inversions tried again with more damping.", "session"
        )
        self.refused = self._counter(
            "skfac_refused", "Snapshots refused, by status.", *("session", "status")
        )
        self.call_errors = self._counter(
            "skfac_call_errors",
            "Calls that ended with another status than OK.",
            *("call", "status"),
        )
        self.state_files = self._counter(
            "skfac_state_files",
            "Histories on the volume: saved, failed, restored, mismatched, unreadable, "
            "expired.",
            "result",
        )
        self.idle_calls = self._counter(
            "skfac_idle_calls",
            "Calls ended after idle_s without what they waited for: message or room.",
            "waited_for",
        )
        self.lost_log_lines = self._counter(
            "skfac_lost_log_lines",
            "Lines of the log that were not written: nobody read those before them.",
        )

    def _make_gauges(self) -> None:
        self.queue_depth = self._gauge(
            "skfac_queue_depth", "Complete (layer, step)s that wait for the solver."
        )
        self.queue_oldest_s = self._gauge(
            "skfac_queue_oldest_seconds", "How long the oldest of them has waited."
        )
        self.history_bytes = self._gauge(
            "skfac_history_bytes", "What histories of layers take.", "session"
        )
        self.sessions = self._gauge("skfac_sessions", "Sessions that are open.")
        self.sessions_limit = self._gauge(
            "skfac_sessions_limit", "Sessions that may be open at once."
        )
        self.device_memory_bytes = self._gauge(
            "skfac_device_memory_bytes",
            "Memory of the device, used by this process and in total; on a CPU what is "
            "resident and what the machine has.",
            "kind",
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        made = Counter(name, text, labels, registry=self.registry)
        self._remember(name, labels, made)
        return made

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        made = Gauge(name, text, labels, registry=self.registry)
        self._remember(name, labels, made)
        return made

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS
    ) -> Histogram:
        made = Histogram(name, text, labels, buckets=buckets, registry=self.registry)
        self._remember(name, labels, made)
        return made

    def _remember(self, name: str, labels: tuple[str, ...], made: _Metric) -> None:
        self.labels[name] = labels
        if "session" in labels:
            self._per_session.append(made)
