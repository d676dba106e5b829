"""Time for copies: from when the device is through with the step before, to when it has made the gradients."""

import time

import numpy as np
import pytest

from megatron.moevement.snapshot.copy_time import CopyTime
from moevement_ext import CopyEngine


class Stats:
    def __init__(self, queue_seconds: float) -> None:
        self.queue_seconds = queue_seconds


class Device(CopyEngine):
    """One whose device comes to every mark so many seconds after the host."""

    def __init__(self, behind: dict[int, float]) -> None:
        super().__init__()
        self.behind, self.over = behind, True

    def stats(self, ticket: int) -> Stats:  # type: ignore[override]
        return Stats(self.behind[ticket])

    def wait(self, ticket: int, timeout_seconds: float) -> bool:
        return self.over and super().wait(ticket, timeout_seconds)


def test_it_is_the_time_of_the_device_not_of_the_host_that_runs_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with Device({1: 0.25, 2: 0.5, 3: 0.25, 4: 0.0, 5: 2.0, 6: 0.5}) as engine:
        timed = CopyTime(engine)
        for duration in (1.0, 2.0, 0.125):
            timed.begin(0)
            now[0] += duration
            timed.fence(0)
            # A second one marks nothing.
            timed.fence(0)
        assert timed.seconds == [1.25, 1.75, 0.0]
        assert timed.seconds == [1.25, 1.75, 0.0], "to ask counts nothing"


def test_an_iteration_that_was_interrupted_or_not_begun_is_not_timed() -> None:
    with CopyEngine() as engine:
        timed = CopyTime(engine)
        timed.fence(0)
        timed.begin(0)
        timed.begin(0)
        assert timed.seconds == []
        timed.fence(0)
        assert len(timed.seconds) == 1


def test_a_mark_that_the_device_does_not_reach_is_left_out() -> None:
    with Device({1: 0.0, 2: 0.0}) as engine:
        engine.over = False
        timed = CopyTime(engine)
        timed.begin(0)
        timed.fence(0)
        assert timed.seconds == []


def test_it_queues_behind_what_the_engine_has_and_copies_nothing() -> None:
    with CopyEngine(chunk_bytes=10, bytes_per_second_limit=1000.0) as engine:
        memory = np.zeros(40, dtype=np.uint8)
        words = [np.array([v], dtype=np.uint64) for v in (memory.ctypes.data, memory.ctypes.data + 20, 20)]
        engine.submit(words[0], words[1], words[2])
        timed = CopyTime(engine)
        timed.begin(0)
        assert engine.wait(2, 20.0) and engine.stats(2).total_bytes == 0
        timed.fence(0)
        assert timed.seconds[0] >= 0.0
