"""Writes Grafana's dashboard: `python deploy/tools/dashboard.py`."""

import json
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent.parent / "helm/skfac/files/dashboard.json"

_ONE = '{instance=~"$instance"}'
_JOB = '{instance=~"$instance", session=~"$session"}'
_RATE = "[$__rate_interval]"
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3

Panel = tuple[str, str, str, dict[str, str]]  # title, unit, what it says, legend: query


def _rate(metric: str, by: str, where: str = _JOB) -> str:
    return f"sum by ({by}) (rate({metric}{where}{_RATE}))"


def _quantiles(metric: str, by: str = "session") -> dict[str, str]:
    legend = f"{{{{{by}}}}}"
    buckets = _rate(f"{metric}_bucket", f"{by}, le")
    return {
        f"{legend} p{100 * q:g}": f"histogram_quantile({q}, {buckets})"
        for q in (0.5, 0.99)
    }


def _mean(metric: str, by: str) -> str:
    return f"{_rate(f'{metric}_sum', by)} / {_rate(f'{metric}_count', by)}"


ROWS: dict[str, list[Panel]] = {
    "Latency": [
        (
            "Inversion latency",
            "s",
            "From the last rank's rows to the published version, by job.",
            _quantiles("skfac_inversion_seconds"),
        ),
        (
            "Where the time goes",
            "s",
            "Mean of each stage: assemble waits for ranks, queue for the solver.",
            {"{{stage}}": _mean("skfac_stage_seconds", "stage")},
        ),
        (
            "End to end",
            "s",
            "From a rank's capture until it has the last version, as the ranks say.",
            _quantiles("skfac_end_to_end_seconds"),
        ),
    ],
    "Freshness and losses": [
        (
            "Staleness at use",
            "none",
            "Steps since the capture of the oldest version that a rank's step used.",
            _quantiles("skfac_staleness_steps"),
        ),
        (
            "Outcomes",
            "ops",
            "(Layer, step)s by what became of them.",
            {"{{outcome}}": _rate("skfac_outcomes_total", "outcome")},
        ),
        (
            "Late and raw",
            "ops",
            "Versions that missed their deadline, and layer-steps without a version.",
            {
                "{{session}} late": _rate("skfac_late_total", "session"),
                "{{session}} too old": _rate("skfac_stale_total", "session"),
                "{{session}} raw": _rate("skfac_raw_gradients_total", "session"),
            },
        ),
        (
            "Retries",
            "ops",
            "Inversions tried again with more damping.",
            {"{{session}}": _rate("skfac_retries_total", "session")},
        ),
        (
            "Refused snapshots",
            "ops",
            "Snapshots that were not taken, by status.",
            {"{{session}} {{status}}": _rate("skfac_refused_total", "session, status")},
        ),
        (
            "Calls that failed",
            "ops",
            "Calls that ended with a status other than OK.",
            {
                "{{call}} {{status}}": _rate(
                    "skfac_call_errors_total", "call, status", _ONE
                )
            },
        ),
    ],
    "Load": [
        (
            "Queue",
            "none",
            "Complete (layer, step)s that wait for the solver.",
            {"{{instance}}": f"skfac_queue_depth{_ONE}"},
        ),
        (
            "Oldest in the queue",
            "s",
            "How long the oldest of them has waited.",
            {"{{instance}}": f"skfac_queue_oldest_seconds{_ONE}"},
        ),
        (
            "Batches",
            "none",
            "(Layer, step)s that were solved together, mean.",
            {
                "{{instance}}": f"rate(skfac_batch_size_sum{_ONE}{_RATE})"
                f" / rate(skfac_batch_size_count{_ONE}{_RATE})"
            },
        ),
        (
            "Bytes",
            "Bps",
            "Payload of accepted snapshots, and frames of outcomes.",
            {
                "{{session}} in": _rate("skfac_received_bytes_total", "session"),
                "{{session}} out": _rate("skfac_sent_bytes_total", "session"),
            },
        ),
        (
            "Sessions",
            "none",
            "Open sessions and how many there may be.",
            {
                "{{instance}}": f"skfac_sessions{_ONE}",
                "{{instance}} limit": f"skfac_sessions_limit{_ONE}",
            },
        ),
        (
            "Memory",
            "bytes",
            "Of the device; what it has; and the histories of the jobs.",
            {
                "{{instance}} {{kind}}": f"skfac_device_memory_bytes{_ONE}",
                "{{session}} history": f"skfac_history_bytes{_JOB}",
            },
        ),
    ],
    "Factors": [
        (
            "Rows of a version",
            "none",
            "Over all ranks, mean.",
            {"{{session}}": _mean("skfac_version_rows", "session")},
        ),
        (
            "Ranks of a version",
            "none",
            "Fewer than the world where a rank was too late, mean.",
            {"{{session}}": _mean("skfac_version_ranks", "session")},
        ),
        (
            "Rank of the inverses",
            "none",
            "Mean, by side and form.",
            {
                "{{session}} {{side}} {{method}}": _mean(
                    "skfac_inverse_rank", "session, side, method"
                )
            },
        ),
        (
            "Condition",
            "none",
            "An upper bound of κ = (λ_max + λ) / λ.",
            _quantiles("skfac_condition", "side"),
        ),
        (
            "Certificate",
            "s",
            "Until it expires.",
            {
                "{{instance}} {{certificate}}": (
                    f"skfac_certificate_expiry_timestamp_seconds{_ONE} - time()"
                )
            },
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    """Lay the panels out in rows of three.

    Returns:
        What Grafana imports.
    """
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": top, "w": _WIDTH * _COLUMNS, "h": 1}
        panels.append({"type": "row", "title": title, "gridPos": place, "panels": []})
        top += 1
        for index, panel in enumerate(row):
            across, down = index % _COLUMNS, index // _COLUMNS
            panels.append(_panel(panel, across * _WIDTH, top + down * _HEIGHT))
        top += -(-len(row) // _COLUMNS) * _HEIGHT
    for number, panel_ in enumerate(panels, start=1):
        panel_["id"] = number
    return {
        "uid": "skfac",
        "title": "skfac",
        "tags": ["skfac"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _panel(panel: Panel, x: int, y: int) -> dict[str, Any]:
    title, unit, text, queries = panel
    return {
        "type": "timeseries",
        "title": title,
        "description": text,
        "datasource": _SOURCE,
        "gridPos": {"x": x, "y": y, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend}
            for i, (legend, expr) in enumerate(queries.items())
        ],
    }


_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def _variables() -> list[dict[str, Any]]:
    source = {"name": "datasource", "type": "datasource", "query": "prometheus"}
    queries = {
        "instance": "label_values(skfac_sessions, instance)",
        "session": 'label_values(skfac_outcomes_total{instance=~"$instance"}, session)',
    }
    return [
        source,
        *(
            {
                "name": name,
                "type": "query",
                "datasource": _SOURCE,
                "query": query,
                "refresh": 2,  # whenever the time range changes: jobs come and go
                "multi": True,
                "includeAll": True,
                "allValue": ".*",
                "current": {"text": "All", "value": "$__all"},
            }
            for name, query in queries.items()
        ),
    ]


def written() -> str:
    """Write it as the file holds it.

    Returns:
        JSON with an end of line.
    """
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    TARGET.write_text(written())
