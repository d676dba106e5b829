"""What this rank does between a failure and training again, told as `recovery_phase` events, with seconds per phase."""

import time
from typing import Any

from megatron.moevement.events import EventLog
from megatron.moevement.recovery.phases import Phase

REPLAYING = frozenset({Phase.CONVERT, Phase.CATCH_UP})


class PhaseLog:
    """Emits an event when a phase begins and when one of its iterations is done.

    It hears of a conversion through the manager's own events. A process that takes over a rank begins in LEAVE.

    Args:
        events: heard and told.
    """

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._phase, self._done, self._of, self._target = Phase.TRAIN, 0, 0, 0
        self._since = self._started = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._replayed = 0
        events.listen(self._hear)

    @property
    def seconds(self) -> dict[str, float]:
        """By phase since the first failure of this recovery, the present phase included."""
        now = time.perf_counter() - self._since
        return {**self._seconds, self._phase: self._seconds.get(self._phase, 0.0) + now}

    @property
    def total_seconds(self) -> float:
        """Since the first failure of this recovery."""
        return time.perf_counter() - self._started

    @property
    def replayed(self) -> int:
        """Iterations that this rank has replayed since that failure, those of interrupted replays included."""
        return self._replayed

    def enter(self, phase: Phase, iterations: int = 0) -> None:
        """A phase begins, if it hasn't yet; `iterations` is how many it replays or serves."""
        if phase == self._phase:
            return
        if self._phase == Phase.TRAIN:
            self._started, self._seconds, self._replayed = time.perf_counter(), {}, 0
        else:
            self._seconds = self.seconds
        self._phase, self._done, self._of, self._since = phase, 0, iterations, time.perf_counter()
        self._emit()

    def load(self, target: int) -> None:
        """LOAD begins, of a replay that ends at Step `target`."""
        self._target = target
        self.enter(Phase.LOAD)

    def advance(self, iteration: int) -> None:
        """An iteration of the phase is done."""
        self._done += 1
        self._replayed += self._phase in REPLAYING
        self._emit(iteration=iteration, seconds=time.perf_counter() - self._since)

    def _emit(self, **more: Any) -> None:
        self._events.emit("recovery_phase", phase=self._phase, done=self._done, of=self._of, **more)

    def _hear(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if self._phase == Phase.LOAD and kind == "recovery_started" and event["replays"]:
            self.enter(Phase.CONVERT, event["replays"])
        elif self._phase in REPLAYING and kind == "conversion" and event["replayed"]:
            self.advance(event["step"])
        elif (
            self._phase in (Phase.LOAD, Phase.CONVERT) and kind == "recovery_finished" and event["step"] < self._target
        ):
            self.enter(Phase.CATCH_UP, self._target - event["step"])
