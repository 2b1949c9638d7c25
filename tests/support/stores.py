"""A store as a trainer of one rank uses it."""

from skfac.client.store import Store
from skfac.wire.outcome import Version


def versions_at(store: Store, step: int, wait_s: float) -> list[Version | None]:
    """Look at what is due and use what is there; raises as `Store.adopt` does."""
    proposal = store.propose(step, wait_s)
    if proposal is not None:
        store.adopt(proposal, proposal.numbers)
    return store.in_use
