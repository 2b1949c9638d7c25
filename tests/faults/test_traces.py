"""Which events must show, of evidence that is known."""

import pytest

from tests.faults.processes import Scrape
from tests.faults.run import Evidence, Fired
from tests.faults.schedule import Event
from tests.faults.traces import untraced


def seen(time_s: float, disconnects: int) -> dict:
    return {"left_s": time_s, "report": {"transport": {"disconnects": disconnects}}}


@pytest.mark.parametrize(
    ("disconnects", "killed", "lacking"),
    [
        (1, [], []),
        (0, [], ["cut at 7: report"]),
        (1, [(1, 2.0)], []),  # no connection to it was left to cut
        (1, [(0, 2.0)], ["cut at 7: report"]),
        (1, [(1, 4.0)], ["cut at 7: report"]),
    ],
)
def test_a_cut_shows_unless_its_server_was_gone(disconnects, killed, lacking):
    lines = [seen(1.0, 0)]
    if killed:
        lines.append(seen(2.5, 1))  # of the kill
    lines.append(seen(6.0, disconnects))
    kills = [Fired(Event("kill", 3, server=s), time_s, 0) for s, time_s in killed]
    cut = Fired(Event("cut", 7, rank=0, server=1), 3.0, 0)
    gone = [Scrape(9.0, 0, None)]
    evidence = Evidence(steps=[[lines]], fired=[*kills, cut], scrapes=[gone, gone])

    assert [what for what in untraced(evidence) if "cut" in what] == lacking
