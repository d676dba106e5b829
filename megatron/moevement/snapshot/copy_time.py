"""How long an iteration leaves for copies: from the end of the optimizer step before, on the device, to the fence."""

import time

import numpy as np

from moevement_ext import CopyEngine

_NOTHING = np.zeros(0, dtype=np.uint64)


class CopyTime:
    """Times iterations. A training loop runs ahead of its device, so its own clock would count the step before too."""

    def __init__(self, engine: CopyEngine) -> None:
        self._engine = engine
        self._ticket: int | None = None
        self._submitted = 0.0
        self.seconds: list[float] = []

    def begin(self, stream: int) -> None:
        """Marks the start: `stream` has been given the whole optimizer step."""
        self._submitted = time.perf_counter()
        self._ticket = self._engine.submit(_NOTHING, _NOTHING, _NOTHING, stream=stream, label="start of an iteration")

    def fence(self) -> None:
        """Marks the end: gradients are final."""
        if self._ticket is None:
            return
        passed = time.perf_counter() - self._submitted
        # An empty copy starts, and is over, once the stream's work before it is.
        self.seconds.append(max(0.0, passed - self._engine.stats(self._ticket).queue_seconds))
        self._ticket = None
