"""The versions that one step uses, looked up once, by whoever needs them first.

With several ranks that is where they agree.
"""

import threading
from collections.abc import Sequence

from skfac.client.config import PreconditionerConfig
from skfac.client.step_log import StepLog
from skfac.client.store import Store
from skfac.client.world import World
from skfac.wire.errors import SkfacError
from skfac.wire.outcome import Version


class DueVersions:
    """Asks the store once a step: in the first backward that needs it, or after it.

    Backwards may run on several threads, one for each device.
    """

    def __init__(
        self,
        store: Store,
        config: PreconditionerConfig,
        world: World,
        layers: int,
        log: StepLog,
    ) -> None:
        self._store = store
        self._log = log
        self._config = config
        self._world = world
        self._none: list[Version | None] = [None] * layers
        self._lock = threading.Lock()
        self._step = -1
        self._found: list[Version | None] = self._none
        self._error: SkfacError | None = None

    def at(self, step: int) -> Sequence[Version | None]:
        """Find the versions of a step, waiting as the settings say.

        Returns:
            One a layer; None where it is missing or too old.

        Raises:
            ConfigurationError: If a schedule gives a value out of range.
            SkfacError: As `Store.adopt` does; a further call asks again.
        """
        with self._lock:
            if self._step != step:
                self._look_up(step)
            if self._error is not None:
                self._step = -1
                raise self._error
            return self._found

    def in_backward(self, step: int) -> Sequence[Version | None]:
        """As `at`, but an error is kept for `at`: a backward must not end in it.

        Returns:
            One a layer; all None after an error.
        """
        with self._lock:
            if self._step != step:
                self._look_up(step)
            return self._found

    def _look_up(self, step: int) -> None:
        self._step, self._found, self._error = step, self._none, None
        try:
            oldest = step - self._config.max_staleness_at(step)
            wait_s = self._config.at("wait_s", step)
            proposal = self._store.propose(step, wait_s)
            if proposal is not None:
                least = self._world.least(proposal.numbers)
                if proposal.on_time:
                    settled = proposal.agreed(least).settled
                    self._log.late([i for i, done in enumerate(settled) if not done])
                self._store.adopt(proposal, least)
            versions = self._store.in_use
        except SkfacError as error:
            self._error = error
            return
        self._found = [
            v if v is not None and v.step >= oldest else None for v in versions
        ]
        self._log.used(step, versions, self._found)
