"""Time for copies: from when the device is through with the step before, to the fence."""

import time

import numpy as np
import pytest

from megatron.moevement.snapshot import copy_time
from megatron.moevement.snapshot.copy_time import CopyTime
from moevement_ext import CopyEngine


def test_the_time_that_the_device_still_works_for_the_step_before_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Stats:
        queue_seconds = 0.25

    class Busy(CopyEngine):
        def stats(self, _ticket: int) -> Stats:  # type: ignore[override]
            return Stats()

    with Busy() as engine:
        timed = CopyTime(engine)
        for duration in (1.0, 2.0, 0.125):
            timed.begin(0)
            now[0] += duration
            timed.fence()
            timed.fence()
        assert timed.seconds == [0.75, 1.75, 0.0], "a second fence counts nothing"


def test_it_queues_behind_what_the_engine_has_and_copies_nothing() -> None:
    with CopyEngine(chunk_bytes=10, bytes_per_second_limit=1000.0) as engine:
        memory = np.zeros(40, dtype=np.uint8)
        words = [np.array([v], dtype=np.uint64) for v in (memory.ctypes.data, memory.ctypes.data + 20, 20)]
        engine.submit(words[0], words[1], words[2])
        timed = CopyTime(engine)
        timed.begin(0)
        assert engine.wait(2, 20.0) and engine.stats(2).total_bytes == 0
        timed.fence()
        assert timed.seconds[0] >= 0.0
    assert copy_time.CopyTime(CopyEngine()).seconds == []
