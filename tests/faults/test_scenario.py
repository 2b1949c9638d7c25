"""One short run with each kind of fault, against real processes."""

from dataclasses import replace

import pytest

from tests.faults import judge
from tests.faults.scenario import WAIT_S, faulty, play, write_digits
from tests.faults.schedule import KINDS, Shape, each_kind_once
from tests.faults.traces import untraced

SHAPE = Shape(ranks=2, steps=99, stall_s=2.0, pause_s=1.0)
SLACK_S = 5.0  # on a machine that other tests keep busy; `make faults` measures


@pytest.mark.timeout(240)
def test_replicas_stay_identical_whatever_happens(tmp_path):
    write_digits(tmp_path)
    setting = replace(faulty(0, SHAPE), every=20, pace_s=0.05)
    evidence = play(setting, each_kind_once(0, SHAPE), tmp_path)

    assert judge.unfinished(evidence, setting) == ""
    assert judge.diverged(evidence) == []
    assert judge.kinds(evidence) == dict.fromkeys(sorted(KINDS), 1)
    assert len(evidence.steps) == 2  # the job was started again after the crash
    assert evidence.steps[1][0][0]["step"] > 0  # from its checkpoint
    assert judge.longest_stall(evidence).seconds <= WAIT_S + SLACK_S
    assert not [one for one in untraced(evidence) if one.split()[0] in _SURE]
    # Every rank has links of its own, and they carry what they should.
    assert all(link["up"] > 0 < link["down"] for row in evidence.passed for link in row)
    for rank in range(SHAPE.ranks):
        assert evidence.done[rank]["report"]["failure"] is None


_SURE = {"kill", "restart", "cut", "stall"}
"""What shows on a machine of any speed; weather may come and go unnoticed."""
