"""What a version tells of its server that a trainer should know."""

import logging
from collections import Counter
from collections.abc import Sequence

from skfac.wire.outcome import Version
from skfac.wire.session import LayerSpec

logger = logging.getLogger(__name__)


class Notices:
    """Counts and says what changes the curvature and nobody asked for.

    Args:
        layers: Of the session.
        counts: `history_losses` and `overdamped` are counted there.
    """

    def __init__(self, layers: Sequence[LayerSpec], counts: Counter[str]) -> None:
        self._layers = layers
        self._counts = counts
        self._updates = [0] * len(layers)
        self._overdamped: set[int] = set()  # that it was said of

    def look(self, version: Version) -> None:
        """Look at a version that has arrived."""
        self._look_at_history(version)
        self._look_at_damping(version)

    def _look_at_history(self, version: Version) -> None:
        # A server that was restarted begins anew, which changes the curvature.
        before = self._updates[version.layer]
        self._updates[version.layer] = version.updates
        if version.updates >= before:
            return
        self._counts["history_losses"] += 1
        logger.warning(
            "The history of layer %r has %d updates and had %d: the server was "
            "restarted, or its window made smaller.",
            self._layers[version.layer].name,
            version.updates,
            before,
        )

    def _look_at_damping(self, version: Version) -> None:
        if version.damping_factor == 1:
            return
        self._counts["overdamped"] += 1
        if version.layer in self._overdamped:
            return
        self._overdamped.add(version.layer)
        logger.warning(
            "Layer %r has %g times the damping that was asked for, at step %d: with "
            "less its factors have no inverse in the dtype of its rows. Smaller "
            "inputs, more damping, or wire_dtype='float64' help.",
            self._layers[version.layer].name,
            version.damping_factor,
            version.step,
        )
