"""How a server's status looks in a terminal."""

from rich import box
from rich.console import Group
from rich.table import Table

from skfac.service.config import MiB
from skfac.v1 import preconditioning_pb2 as pb


def status_table(status: pb.GetStatusResponse) -> Group:
    """Lay out a status: the sessions, then the layers of each.

    Returns:
        Something that rich prints.
    """
    title = (
        f"skfac {status.version} on {status.device}, up {status.uptime_s:.0f} s, "
        f"{len(status.sessions)} sessions"
    )
    caption = (
        "lost: superseded or failed; history: memory of earlier updates; "
        "p50 and p99 of the inversion latency"
    )
    sessions = Table(title=title, caption=caption, box=box.SIMPLE_HEAD)
    sessions.add_column("job", overflow="fold")
    numbers = (
        *("ranks", "age", "solved", "queued", "lost", "refused"),
        *("history", "p50", "p99"),
    )
    for column in numbers:
        sessions.add_column(column, justify="right", no_wrap=True)
    for session in status.sessions:
        sessions.add_row(
            session.job,
            f"{session.open_ranks}/{session.world_size}",
            f"{session.age_s:.0f} s",
            str(session.solved),
            str(session.queued),
            str(session.superseded + session.failed),
            str(session.refused),
            f"{session.history_bytes / MiB:.1f} MiB",
            f"{session.inversion.p50_s * 1e3:.2f} ms",
            f"{session.inversion.p99_s * 1e3:.2f} ms",
        )
    return Group(sessions, *map(_layer_table, status.sessions))


def _layer_table(session: pb.SessionStatus) -> Table:
    table = Table(title=f"layers of {session.job}", box=box.SIMPLE_HEAD)
    table.add_column("layer", overflow="fold")
    for column in ("version (step)", "rows"):
        table.add_column(column, justify="right")
    for layer in session.layers:
        version = str(layer.newest_step) if layer.HasField("newest_step") else "none"
        table.add_row(layer.name, version, str(layer.rows))
    return table
