"""A version is applied at the same step on all ranks or on none, whatever arrives when.

There is no network: several stores stand for the ranks, and their numbers are combined
as `World.least` does.
"""

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skfac.client.store import Store
from skfac.curvature.inverse import LowRankInverse
from skfac.curvature.layer import LayerPreconditioner
from skfac.wire.outcome import Loss, Version
from skfac.wire.session import LayerSpec, SessionSpec

LAYERS = 2
STEPS = 12


@dataclass(frozen=True)
class Event:
    """What happens to one rank just before it looks at a step."""

    at: int
    rank: int
    kind: str
    layer: int
    captured: int
    life: int  # of the server: each makes other versions


def events(ranks: int):
    return st.lists(
        st.builds(
            Event,
            at=st.integers(0, STEPS - 1),
            rank=st.integers(0, ranks - 1),
            kind=st.sampled_from(["version", "loss", "lose", "down", "up"]),
            layer=st.integers(0, LAYERS - 1),
            captured=st.integers(0, STEPS - 1),
            life=st.integers(0, 1),
        ),
        max_size=60,
    )


def store_of(ranks: int, lag: int, update_every: int) -> Store:
    layers = [LayerSpec(f"{i}", "linear", 2, 2, bias=False) for i in range(LAYERS)]
    store = Store(
        SessionSpec(
            job="job",
            instance="1",
            world_size=ranks,
            layers=tuple(layers),
            damping_split="pi",
            history="snapshot",
            update_every=update_every,
            lag=lag,
            on_late="keep",
        )
    )
    store.link(0).set_link(up=True)
    return store


def version(layer: int, step: int, life: int) -> Version:
    inverse = LowRankInverse(torch.full((1, 2), float(life)), 1.0)
    both = LayerPreconditioner(inverse, inverse)
    return Version(layer, step, both, rows=1, ranks=1, updates=1)


def happen(store: Store, event: Event) -> None:
    if event.kind == "version":
        store.link(0).receive([version(event.layer, event.captured, event.life)])
    elif event.kind == "loss":
        store.link(0).receive([Loss(event.layer, event.captured, "failed", "")])
    elif event.kind == "lose":
        store.link(0).lose(event.captured, "superseded", "")
    else:
        store.link(0).set_link(up=event.kind == "up")


def in_use(store: Store) -> list[tuple[int, float] | None]:
    return [
        None if v is None else (v.step, float(v.preconditioner.tensors[0][0, 0]))
        for v in store.in_use
    ]


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    ranks=st.integers(2, 4),
    lag=st.integers(0, 4),
    update_every=st.integers(1, 4),
)
def test_all_ranks_use_the_same_versions_at_every_step(data, ranks, lag, update_every):
    stores = [store_of(ranks, lag, update_every) for _ in range(ranks)]
    planned = data.draw(events(ranks))
    here: list[set[tuple[int, int, float]]] = [set() for _ in range(ranks)]
    for step in range(STEPS):
        if step % update_every == 0:
            for store in stores:
                store.expect(step)
        for event in [e for e in planned if e.at == step]:
            happen(stores[event.rank], event)
            if event.kind == "version":
                here[event.rank].add((event.layer, event.captured, float(event.life)))
        before = in_use(stores[0])
        proposals = [store.propose(step, 0.0) for store in stores]

        # Ranks reduce their numbers or none of them does: else a collective would hang.
        assert len({p.step if p else None for p in proposals}) == 1
        if proposals[0] is not None:
            columns = zip(*(p.numbers for p in proposals), strict=True)
            least = [min(column) for column in columns]
            for store, proposal in zip(stores, proposals, strict=True):
                store.adopt(proposal, least)

        used = [in_use(store) for store in stores]
        assert all(other == used[0] for other in used)
        for layer, (old, new) in enumerate(zip(before, used[0], strict=True)):
            if new == old:
                continue
            assert new is not None
            assert old is None or new[0] > old[0]  # never backwards
            assert new[0] + lag <= step  # and not before its time
            assert all((layer, *new) in known for known in here)
