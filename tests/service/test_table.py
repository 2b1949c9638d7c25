"""How a status looks in terminals, wide, narrow and hostile."""

import io

import pytest
from rich.console import Console
from rich.screen import Screen

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


def on_a_screen(view: StatusView, width: int, height: int) -> list[str]:
    output = io.StringIO()
    console = Console(file=output, width=width, height=height, force_terminal=True)
    console.print(Screen(view))
    return output.getvalue().splitlines()


@pytest.mark.parametrize("height", [15, 18, 24, 30])
def test_a_screen_shows_layers_and_says_how_many_it_does_not(height):
    told = status()
    (session,) = told.sessions
    session.layers.extend(
        pb.LayerStatus(name=f"late{i}", newest_step=i, behind_steps=40 - i)
        for i in range(30)
    )

    lines = on_a_screen(StatusView(told, height=height), 80, height)

    assert len(lines) <= height
    shown = sum("late" in line or "never" in line for line in lines)
    (rest,) = [line for line in lines if "more: `skfac status` shows all" in line]
    assert int(rest.split("and ")[1].split()[0]) == 33 - shown
    assert shown >= 1
    assert any("encoder.0" in line and "3/4" in line for line in lines)


def test_a_large_screen_shows_everything():
    lines = on_a_screen(StatusView(status(), height=60), 80, 60)

    text = "\n".join(lines)
    assert "where time goes" in text
    assert "more: `skfac" not in text


def test_a_job_has_one_line_in_a_pipe():
    told = status("resnet50-imagenet-run-7")

    (row,) = rows_with(printed(StatusView(told), 80), "3/4")

    assert row[0] == "resnet50-imagenet-run-7"


def test_a_warning_comes_first():
    assert printed(StatusView(status(), "No answer."), 80).startswith("No answer.\n")


def test_names_are_neither_markup_nor_control_codes():
    text = printed(StatusView(status(HOSTILE)), 200)

    assert "[red]fc�[2J�]0;owned��" in text
    assert not any(ord(c) < 32 and c != "\n" for c in text)
    assert "‮" not in text
