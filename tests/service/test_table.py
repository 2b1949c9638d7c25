"""How a status looks in terminals, wide, narrow and hostile."""

import io

import pytest
from rich.console import Console

from skfac.service.table import StatusView
from skfac.v1 import preconditioning_pb2 as pb

HOSTILE = "[red]fc\x1b[2J\x1b]0;owned\x07\n‮gpj"


def status(name: str = "encoder.0") -> pb.GetStatusResponse:
    latency = pb.LatencySummary(count=3, p50_s=0.0012, p99_s=2.5)
    layer = pb.LayerStatus(name=name, newest_step=40, rows=128, behind_steps=2)
    stale = pb.LayerStatus(name="stale", newest_step=30, rows=128, behind_steps=12)
    never = pb.LayerStatus(name="never")
    return pb.GetStatusResponse(
        version="1.2",
        device="cuda:0",
        uptime_s=100,
        sessions=[
            pb.SessionStatus(
                job=name,
                world_size=4,
                open_ranks=3,
                layers=[layer, stale, never],
                solved=1234,
                failed=2,
                superseded=3,
                inversion=latency,
            )
        ],
        load=pb.LoadStatus(
            queue_depth=7,
            queue_s=0.25,
            busy_share=0.625,
            memory_bytes=3 * 2**30,
            memory_total_bytes=80 * 2**30,
        ),
        stages=[pb.StageStatus(stage="solve", count=99, latest=latency)],
        errors=[
            pb.RecentError(
                job=name, layer=name, kind="failed", message=name, count=5, age_s=7
            )
        ],
    )


def printed(view: StatusView, width: int) -> str:
    output = io.StringIO()
    Console(file=output, width=width, force_terminal=False).print(view)
    return output.getvalue()


def rows_with(text: str, word: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if word in line]


def test_everything_is_shown_where_there_is_room():
    text = printed(StatusView(status()), 140)

    head = text.splitlines()[0]
    for part in (
        *("skfac 1.2 on cuda:0", "up 100 s", "1 sessions"),
        *("7 queued (the oldest for 250.00 ms)", "solver 62% busy"),
        "memory 3.0 of 80.0 GiB",
    ):
        assert part in head
    assert ["solve", "99", "1.20", "ms", "2.50", "s"] in rows_with(text, "solve ")
    assert [
        "7",
        "s",
        "encoder.0",
        "encoder.0",
        "failed",
        "5",
        "encoder.0",
    ] in rows_with(text, "failed  ")
    (session,) = rows_with(text, "3/4")
    assert session[:7] == ["encoder.0", "3/4", "3", "0", "s", "1234", "0"]
    assert session[7] == "5"


def test_the_layers_that_are_furthest_behind_come_first():
    lines = printed(StatusView(status()), 140).splitlines()

    names = [line.split()[1:] for line in lines if line.startswith("  encoder.0")]
    names = [row for row in names if "3/4" not in row]
    assert names == [
        ["never", "none", "0", "-"],
        ["stale", "30", "128", "12"],
        ["encoder.0", "40", "128", "2"],
    ]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100])
def test_a_narrow_terminal_has_fewer_columns_and_whole_numbers(width):
    text = printed(StatusView(status()), width)

    assert max(map(len, text.splitlines())) <= width
    if width >= 40:
        assert "1234" in text
        assert "2.50 s" in text
        assert "…" not in text


def test_a_warning_comes_first():
    assert printed(StatusView(status(), "No answer."), 80).startswith("No answer.\n")


def test_names_are_neither_markup_nor_control_codes():
    text = printed(StatusView(status(HOSTILE)), 200)

    assert "[red]fc�[2J�]0;owned��" in text
    assert not any(ord(c) < 32 and c != "\n" for c in text)
    assert "‮" not in text
