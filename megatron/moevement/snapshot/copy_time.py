"""How long an iteration leaves for copies: on the device, from one optimizer step's end to the next one's beginning."""

import time

import numpy as np

from moevement_ext import CopyEngine

_NOTHING = np.zeros(0, dtype=np.uint64)
# The device has come to both marks long before anybody asks.
_TIMEOUT_SECONDS = 60.0


class CopyTime:
    """Times iterations. A training loop runs ahead of its device, so that its own clock would tell something else."""

    def __init__(self, engine: CopyEngine) -> None:
        self._engine = engine
        self._begin: tuple[float, int] | None = None
        self._end: tuple[float, int] | None = None
        self._seconds: list[float] = []

    @property
    def seconds(self) -> list[float]:
        """Of every iteration that has been timed."""
        if self._begin is not None and self._end is not None:
            begin, end = self._reached(self._begin), self._reached(self._end)
            if begin is not None and end is not None:
                self._seconds.append(max(0.0, end - begin))
            self._begin = self._end = None
        return self._seconds

    def begin(self, stream: int) -> None:
        """Marks the start: `stream` has been given the whole optimizer step."""
        _ = self.seconds
        self._begin, self._end = self._mark(stream), None

    def fence(self, stream: int) -> None:
        """Marks the end: `stream` has been given all that makes the gradients."""
        if self._begin is not None and self._end is None:
            self._end = self._mark(stream)

    def _mark(self, stream: int) -> tuple[float, int]:
        label = "a mark of an iteration"
        return time.perf_counter(), self._engine.submit(_NOTHING, _NOTHING, _NOTHING, stream=stream, label=label)

    def _reached(self, mark: tuple[float, int]) -> float | None:
        # An empty copy starts, and is over, once the stream's work before it is.
        submitted, ticket = mark
        if not self._engine.wait(ticket, _TIMEOUT_SECONDS):
            return None
        return submitted + self._engine.stats(ticket).queue_seconds
