"""Which part of the study the command line asks for."""

from collections.abc import Sequence

from benchmarks.study.plan import Variant, Wanted, variants
from benchmarks.study.tasks import TASKS


def parse(texts: Sequence[str]) -> Wanted:
    """Read selections like `task=characters,optimizer=skfac`.

    Args:
        texts: Each selects what has all of its values; nothing at all selects all.

    Returns:
        Whether one of them selects a variant on a task.

    Raises:
        ValueError: If one of them selects nothing.
    """
    choices = [_pairs(text) for text in texts]
    for text, pairs in zip(texts, choices, strict=True):
        if not any(pairs.items() <= _facts(t, v).items() for t, v in _everything()):
            raise ValueError(_nothing(text))

    def wanted(task: str, variant: Variant) -> bool:
        facts = _facts(task, variant).items()
        return not choices or any(pairs.items() <= facts for pairs in choices)

    return wanted


def _pairs(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    return {key.strip(): value.strip() for key, _, value in pairs}


def _facts(task: str, variant: Variant) -> dict[str, str]:
    return {
        "task": task,
        "optimizer": variant.optimizer,
        "history": str(variant.history),
        "lag": str(variant.lag),
        "update_every": str(variant.update_every),
        "defaults": "yes" if variant.defaults else "no",
    }


def _everything() -> list[tuple[str, Variant]]:
    return [(task, variant) for task in TASKS for variant in variants()]


def _nothing(text: str) -> str:
    values: dict[str, dict[str, None]] = {}
    for pair in _everything():
        for key, value in _facts(*pair).items():
            values.setdefault(key, {})[value] = None
    known = "; ".join(f"{key}={'|'.join(found)}" for key, found in values.items())
    return f"{text!r} selects nothing. There is {known}."
