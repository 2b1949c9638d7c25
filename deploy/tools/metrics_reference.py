"""Writes docs/metrics.md: `python deploy/tools/metrics_reference.py`."""

from pathlib import Path

from skfac.service.metrics import CLOSED_KEPT, Metrics

TARGET = Path(__file__).parent.parent.parent / "docs" / "metrics.md"

_HEAD = f"""# Metrics

Made by `make docs` from the registry of a server; do not edit. Prometheus finds them at
`metrics_address`; units are seconds, bytes and steps. Besides these there are the usual
`process_` metrics. Counters have `_total` in queries, histograms `_bucket`, `_sum` and
`_count`.

Labels are bounded. `session` is a job's name: at most `max_sessions` are open, and the
series of the last {CLOSED_KEPT} closed ones stay so that no scrape misses their end.
`stage` is `assemble`, `queue`, `solve` or `publish`; `side` is `activations` or
`derivatives`; `method` is the form of an inverse, `low_rank`, `dense` or `diagonal`;
`status` and `call` are gRPC's. Numbers of single layers are in `skfac status` and on
the status page. Exemplars are off; `metrics_exemplars` adds layer and step to latency.

What ranks say comes with their next snapshot, so that the last steps of a job are not
in it, and nothing of a job that cannot push. A report has at most 256 steps.

| metric | type | labels | meaning |
|---|---|---|---|
"""


def written() -> str:
    """Write it as the file holds it.

    Returns:
        Markdown.
    """
    metrics = Metrics()
    rows = [
        f"| `{family.name}` | {family.type} | {_labels(metrics, family.name)} "
        f"| {family.documentation} |"
        for family in metrics.registry.collect()
        if family.name in metrics.labels
    ]
    return _HEAD + "\n".join(rows) + "\n"


def _labels(metrics: Metrics, name: str) -> str:
    return ", ".join(f"`{label}`" for label in metrics.labels[name])


if __name__ == "__main__":
    TARGET.write_text(written())
