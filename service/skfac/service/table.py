"""How a server's status looks in a terminal of any width."""

from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from skfac.service.config import GiB, MiB
from skfac.v1 import preconditioning_pb2 as pb

_Column = tuple[str, int]  # title, and the narrowest terminal that has it
_Row = Sequence[str | Text]

_SESSIONS: tuple[_Column, ...] = (
    *(("job", 0), ("ranks", 0), ("layers", 90), ("age", 70), ("solved", 0)),
    *(("queued", 100), ("lost", 50), ("refused", 90), ("history", 110)),
    *(("p50", 100), ("p99", 40)),
)
_STAGES: tuple[_Column, ...] = (("stage", 0), ("timed", 60), ("p50", 0), ("p99", 0))
_ERRORS: tuple[_Column, ...] = (
    *(("ago", 0), ("job", 0), ("layer", 60), ("kind", 80), ("times", 90)),
    ("message", 0),
)
_LAYERS: tuple[_Column, ...] = (
    *(("job", 60), ("layer", 0), ("version (step)", 0), ("rows", 80), ("behind", 0)),
)
_NOTE = (
    "lost: superseded or failed; history: memory of earlier updates; p50, p99: of the "
    "inversion latency; behind: steps from the version to the newest rows"
)
_TABLE_LINES = 5  # of a table besides its rows
_WORDS = frozenset({"job", "layer", "kind", "stage", "message"})


class StatusView:
    """A status that rich prints: load, stages, sessions, errors and layers.

    Columns that a narrow terminal has no room for are left out; where lines are few, so
    are the note, stages and errors, and then layers. Those furthest behind come first.

    Args:
        status: What the server answered.
        warning: A line above it; empty for none.
        height: Lines that there are; None for any number.
    """

    def __init__(
        self,
        status: pb.GetStatusResponse,
        warning: str = "",
        height: int | None = None,
    ) -> None:
        self._status = status
        self._warning = warning
        self._height = height

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        """Lay it out for the width there is.

        Yields:
            Lines and tables.
        """
        status, width = self._status, options.max_width
        stages = _table("where time goes", _STAGES, _stages(status), width)
        note = Text(_NOTE, style="dim")
        parts: list[Text | Table] = [_headline(status), stages]
        parts += [_table("sessions", _SESSIONS, _sessions(status), width), note]
        if self._warning:
            parts.insert(0, Text(self._warning, style="bold red"))
        spare: list[Text | Table] = [note, stages]
        if status.errors:
            spare.append(_table("recent errors", _ERRORS, _errors(status), width))
            parts.append(spare[-1])
        rows = list(_layers(status))
        left = 0
        if self._height is not None:
            heights = {id(p): len(console.render_lines(p, options)) for p in parts}
            left = self._make_room(parts, spare, heights, len(rows))
        yield from parts
        yield _table("layers", _LAYERS, rows[: len(rows) - left], width)
        if left:
            yield Text(f"and {left} more: `skfac status` shows all", style="dim")

    def _make_room(
        self,
        parts: list[Text | Table],
        spare: Sequence[Text | Table],
        heights: dict[int, int],
        count: int,
    ) -> int:
        # For so many rows below the parts, of which spare ones are taken out if there
        # is too little. Returns how many rows there is no room for.
        room = (self._height or 0) - _TABLE_LINES - sum(heights.values())
        for part in spare:
            if room < count:
                parts.remove(part)
                room += heights[id(part)]
        return 0 if room >= count else count - max(room - 1, 1)


def _headline(status: pb.GetStatusResponse) -> Text:
    load = status.load
    parts = [
        f"skfac {status.version} on {status.device}, up {status.uptime_s:.0f} s",
        f"{len(status.sessions)} sessions",
        f"{load.queue_depth} queued" + _oldest(load),
        f"solver {load.busy_share:.0%} busy",
    ]
    if load.memory_total_bytes:
        used, total = load.memory_bytes / GiB, load.memory_total_bytes / GiB
        parts.append(f"memory {used:.1f} of {total:.1f} GiB")
    return Text(", ".join(parts))


def _oldest(load: pb.LoadStatus) -> str:
    return f" (the oldest for {_seconds(load.queue_s)})" if load.queue_depth else ""


def _stages(status: pb.GetStatusResponse) -> Iterator[_Row]:
    for stage in status.stages:
        latest = stage.latest
        quantiles = _seconds(latest.p50_s), _seconds(latest.p99_s)
        yield stage.stage, str(stage.count), *quantiles


def _sessions(status: pb.GetStatusResponse) -> Iterator[_Row]:
    for session in status.sessions:
        yield (
            _plain(session.job),
            f"{session.open_ranks}/{session.world_size}",
            str(len(session.layers)),
            f"{session.age_s:.0f} s",
            str(session.solved),
            str(session.queued),
            str(session.superseded + session.failed),
            str(session.refused),
            f"{session.history_bytes / MiB:.1f} MiB",
            _seconds(session.inversion.p50_s),
            _seconds(session.inversion.p99_s),
        )


def _errors(status: pb.GetStatusResponse) -> Iterator[_Row]:
    for error in status.errors:
        words = map(_plain, (error.job, error.layer, error.kind))
        yield f"{error.age_s:.0f} s", *words, str(error.count), _plain(error.message)


def _layers(status: pb.GetStatusResponse) -> Iterator[_Row]:
    told = [
        (session.job, layer) for session in status.sessions for layer in session.layers
    ]
    for job, layer in sorted(told, key=lambda pair: -_behind(pair[1])):
        known = layer.HasField("newest_step")
        yield (
            _plain(job),
            _plain(layer.name),
            str(layer.newest_step) if known else "none",
            str(layer.rows),
            str(layer.behind_steps) if known else "-",
        )


def _behind(layer: pb.LayerStatus) -> float:
    return layer.behind_steps if layer.HasField("newest_step") else float("inf")


def _table(
    title: str, columns: Sequence[_Column], rows: Iterable[_Row], width: int
) -> Table:
    shown = [place for place, (_, least) in enumerate(columns) if width >= least]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for place in shown:
        name, _ = columns[place]
        if name in _WORDS:
            least = min(24, width // 4) if name == "job" else None
            table.add_column(name, overflow="fold", min_width=least)
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[place] for place in shown))
    return table


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _plain(name: str) -> Text:
    # Names come from clients: neither rich's markup nor a terminal's control codes.
    return Text(
        "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    )
