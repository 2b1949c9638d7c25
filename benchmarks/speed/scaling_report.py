"""Writes the figures of `scaling.py` into docs/scaling.md, and draws them."""

from pathlib import Path
from typing import Any

BEGIN = "<!-- {}: make scaling -->"
END = "<!-- end of {} -->"
_NAMES = {None: "no cap", 256: "cap 256"}


def write(found: dict[str, Any], docs: Path) -> None:
    """Replace both tables between their marks, and draw the plot.

    Args:
        found: What `scaling.py` prints.
        docs: Folder with `scaling.md`.
    """
    page = docs / "scaling.md"
    text = page.read_text()
    for name, lines in (
        ("measured", _measured(found["measured"])),
        ("calculated", _calculated(found)),
    ):
        begin, end = BEGIN.format(name), END.format(name)
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = "\n".join([before + begin, *lines, end + after])
    page.write_text(text)
    draw(found, docs / "images" / "scaling.png")


def _measured(found: dict[str, Any]) -> list[str]:
    load, cores = found["load_average_before"], found["cores"]
    state = "quiet" if load < 0.5 else "**busy: these figures are to be run again**"
    one = found["one_engine"]
    first = one["cpu_seconds"][0]
    return [
        f"Load average before the run {load} on {cores} cores: {state}. Solver: "
        f"{found['solver_gflops']:.1f} Gflop/s on one core.",
        "",
        "| one engine, ranks of one job | CPU seconds / of 1 rank | / bare solver |",
        "|---|---|---|",
        *(
            f"| {ranks} | {spent / first:.1f} | {ratio:.2f} |"
            for ranks, spent, ratio in zip(
                one["ranks"], one["cpu_seconds"], one["queue_ratio"], strict=True
            )
        ),
        "",
        *_spread(found["spread"]),
    ]


def _spread(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return ["Spreading over servers and actors is **still to be measured**."]
    first = found[0]["step_s"]
    return [
        "| layers spread over | a step with `lag=0` / with one server |",
        "|---|---|",
        *(f"| {r['count']} {r['what']} | {r['step_s'] / first:.2f} |" for r in found),
    ]


def _calculated(found: dict[str, Any]) -> list[str]:
    lines = [
        "| model | ranks | inverses | up, MB | down, MB | down / all-reduce "
        "| solve, s: core; GPU | servers: cores; GPUs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for core, gpu in zip(found["core"], found["gpu"], strict=True):
        lines.append(
            f"| {core['model']} | {core['ranks']:,} | {_NAMES[core['cap']]} | "
            f"{_number(core['up'] / 1e6)} | {_number(core['down'] / 1e6)} | "
            f"{core['down_share']:.2f} | "
            f"{_number(core['solve_s'])}; {_number(gpu['solve_s'])} | "
            f"{_servers(core)}; {_servers(gpu)} |"
        )
    return lines


def _servers(one: dict[str, Any]) -> str:
    return "none do" if one["servers"] is None else str(one["servers"])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw what was measured on the left, and what was calculated on the right."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    one = found["measured"]["one_engine"]
    left.plot(one["ranks"], one["cpu_seconds"], "o-")
    left.set(xscale="log", yscale="log", xlabel="ranks", ylabel="CPU seconds")
    left.set_xticks(one["ranks"], map(str, one["ranks"]))
    left.minorticks_off()
    left.set_title("Measured: one engine, one core, GPT-2")
    for color, model in enumerate(dict.fromkeys(r["model"] for r in found["core"])):
        for cap, style in ((None, "-"), (256, "--")):
            own = [r for r in found["core"] if (r["model"], r["cap"]) == (model, cap)]
            ranks = [r["ranks"] for r in own]
            share = [r["down_share"] for r in own]
            label = f"{model}, {_NAMES[cap]}"
            right.plot(ranks, share, style, marker="o", color=f"C{color}", label=label)
    right.axhline(1, color="grey", linewidth=1)
    right.set(xscale="log", yscale="log", xlabel="ranks", ylabel="over the all-reduce")
    right.set_xticks(ranks, map(str, ranks))
    right.minorticks_off()
    right.legend(fontsize=8)
    right.set_title("Calculated: bytes of inverses that a rank gets a step")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
