"""Whether an event shows in the reports of the ranks and the metrics of the servers.

Weather that changes nothing leaves no trace: of a link that carries no layer, or hidden
by the lag. Only the first delay is asked for one, which every schedule makes long
enough, on a link that is in use.
"""

from collections.abc import Callable
from typing import Any

from tests.faults.processes import Scrape
from tests.faults.run import Evidence, Fired

Line = dict[str, Any]
Trace = Callable[[Fired, Evidence], bool]

_LEAST_SHARE = 0.7  # of an event, that is to show: links have delays of their own


def untraced(evidence: Evidence) -> list[str]:
    """Look for the traces of all events.

    Returns:
        `kind at step: place` for each place where an event does not show.
    """
    lacking = []
    for fired in _asked(evidence):
        for place, traces in (("report", _REPORT), ("metrics", _METRICS)):
            trace = traces.get(fired.event.kind)
            if trace is not None and not trace(fired, evidence):
                lacking.append(f"{fired.event.kind} at {fired.event.step}: {place}")
    return lacking


def _asked(evidence: Evidence) -> list[Fired]:
    delays = [fired for fired in evidence.fired if fired.event.kind == "delay"]
    first = min(delays, key=lambda fired: fired.event.step, default=None)
    asked = [f for f in evidence.fired if f.event.kind != "delay" or f is first]
    return [fired for fired in asked if not _cuts_nothing(fired, evidence)]


def _cuts_nothing(fired: Fired, evidence: Evidence) -> bool:
    # A link to a server that was killed for good has no connection.
    return fired.event.kind == "cut" and any(
        other.event.kind == "kill"
        and other.event.server == fired.event.server
        and other.time_s <= fired.time_s
        for other in evidence.fired
    )


# ---------------------------------------------------------------- reports


def _around(lines: list[Line], fired: Fired) -> tuple[Line | None, list[Line]]:
    before = [line for line in lines if line["left_s"] <= fired.time_s]
    after = [line for line in lines if line["left_s"] > fired.time_s]
    return (before[-1] if before else None), after


def _count(line: Line | None, part: str, name: str) -> float:
    return 0 if line is None else line["report"][part].get(name, 0)


def _grows(part: str, name: str, *, rank_only: bool) -> Trace:
    def trace(fired: Fired, evidence: Evidence) -> bool:
        start = evidence.steps[fired.start]
        ranks = [start[fired.event.rank]] if rank_only else start
        found = []
        for lines in ranks:
            before, after = _around(lines, fired)
            least = _count(before, part, name)
            found.append(any(_count(line, part, name) > least for line in after))
        return all(found)

    return trace


def _comes_back(fired: Fired, evidence: Evidence) -> bool:
    lost = _grows("transport", "disconnects", rank_only=False)
    found = _grows("transport", "connects", rank_only=False)
    if not lost(fired, evidence):
        return False
    # A job that starts again before its ranks are back connects anew.
    return found(fired, evidence) or fired.start + 1 < len(evidence.steps)


def _step_was_long(fired: Fired, evidence: Evidence) -> bool:
    return all(
        any(line["report"]["longest_step_s"] >= fired.event.amount for line in after)
        for lines in evidence.steps[fired.start]
        for _, after in [_around(lines, fired)]
    )


_REPORT: dict[str, Trace] = {
    "delay": _grows("versions", "waits", rank_only=False),
    "cut": _grows("transport", "disconnects", rank_only=True),
    "kill": _grows("transport", "disconnects", rank_only=False),
    "restart": _comes_back,
    "pause": _grows("versions", "waits", rank_only=False),
    "stall": _step_was_long,
}

# ---------------------------------------------------------------- metrics


def _scrapes(fired: Fired, evidence: Evidence, server: int) -> list[Scrape]:
    return [s for s in evidence.scrapes[server] if s.time_s > fired.time_s]


def _value(scrape: Scrape, name: str) -> float:
    return (scrape.samples or {}).get(name, 0.0)


def _is_gone(fired: Fired, evidence: Evidence) -> bool:
    after = _scrapes(fired, evidence, fired.event.server)
    return bool(after) and all(scrape.samples is None for scrape in after)


def _is_replaced(fired: Fired, evidence: Evidence) -> bool:
    after = _scrapes(fired, evidence, fired.event.server)
    return any(s.life and _value(s, "skfac_outcomes_total") for s in after)


def _does_not_answer(fired: Fired, evidence: Evidence) -> bool:
    after = _scrapes(fired, evidence, fired.event.server)
    return any(scrape.samples is None for scrape in after)


def _long_ones(name: str, labels: str = "") -> Trace:
    # Observations of a histogram that are about as long as the event, or longer.
    def trace(fired: Fired, evidence: Evidence) -> bool:
        least_s = _LEAST_SHARE * fired.event.amount

        def longer(scrape: Scrape) -> float:
            buckets = [
                (float(key.split("|")[1].removeprefix("le=")), value)
                for key, value in (scrape.samples or {}).items()
                if key.startswith(f"{name}_bucket|le=") and key.endswith(labels)
            ]
            below = [value for edge_s, value in buckets if edge_s <= least_s]
            return _value(scrape, f"{name}_count{labels}") - max(below, default=0.0)

        for scrapes in evidence.scrapes:
            known = [s for s in scrapes if s.samples is not None]
            before = [s for s in known if s.time_s <= fired.time_s]
            after = [s for s in known if s.time_s > fired.time_s]
            least = longer(before[-1]) if before else 0.0
            if any(longer(s) > least for s in after if s.life == after[0].life):
                return True
        return False

    return trace


_METRICS: dict[str, Trace] = {
    "delay": _long_ones("skfac_stage_seconds", "|stage=assemble"),
    "kill": _is_gone,
    "restart": _is_replaced,
    "pause": _does_not_answer,
    "stall": _long_ones("skfac_snapshot_interval_seconds"),
}
