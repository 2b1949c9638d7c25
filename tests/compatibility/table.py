"""The table of docs/compatibility.md, from the runs that the tests look at.

`python -m tests.compatibility.table` trains everything and writes it.
"""

from pathlib import Path

from tests.compatibility.cells import MODES, Run, problems, run
from tests.support.architectures import ARCHITECTURES

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"
BEGIN = "<!-- table: python -m tests.compatibility.table -->"
END = "<!-- end of table -->"
HEADER = ("model", "preconditioned layers", "passes through", *MODES)


def counts_of(found: Run) -> list[str]:
    """The second and third cell of a model's line."""
    passed = ", ".join(f"{count} {kind}" for kind, count in found.passed.items())
    return [str(found.tracked), passed or "nothing"]


def cell(name: str, mode: str) -> str:
    """Train a model in a mode; says ✓ and how, or what is wrong."""
    for apply in MODES[mode].applies:
        if wrong := problems(name, apply, run(name, mode, apply)):
            return "✗ " + "; ".join(wrong)
    return f"✓ {MODES[mode].detail(ARCHITECTURES[name])}".rstrip()


def committed() -> dict[str, dict[str, str]]:
    """The table in the document.

    Returns:
        The cells by header, by model.
    """
    _, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    text, end, _ = rest.partition(END)
    assert end, f"{DOCUMENT} has no table between {BEGIN!r} and {END!r}."
    lines = [
        [part.strip() for part in line.strip("|").split("|")]
        for line in text.strip().splitlines()
    ]
    header, _, *rows = lines
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def rendered() -> str:
    """Train everything and make the table."""
    lines = [HEADER, ("---",) * len(HEADER)]
    for name in ARCHITECTURES:
        cells = [cell(name, mode) for mode in MODES]
        counts = counts_of(run(name, "eager", "gradient"))
        lines.append((name, *counts, *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Write the table into the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    table = f"{BEGIN}\n{rendered()}\n{END}"
    DOCUMENT.write_text(before + table + after, encoding="utf-8")


if __name__ == "__main__":
    main()
