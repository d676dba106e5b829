"""CopyEngine's schedule: priorities, spreading, hurry, pause, chunk sizes, groups; and random mixtures of it all."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moevement_ext import CopyEngine, EngineError

Bytes = npt.NDArray[np.uint8]
SIZE = 600
MARGIN = 16


def words(*values: int) -> npt.NDArray[np.uint64]:
    return np.array(values, dtype=np.uint64)


def pair(nbytes: int) -> tuple[Bytes, Bytes]:
    """A source without zero bytes, and a target of zeros."""
    return np.resize(np.arange(1, 252, dtype=np.uint8), nbytes), np.zeros(nbytes, dtype=np.uint8)


def submit(engine: CopyEngine, source: Bytes, target: Bytes, priority: int = 0, spread_seconds: float = 0.0) -> int:
    return engine.submit(
        words(source.ctypes.data),
        words(target.ctypes.data),
        words(source.nbytes),
        priority=priority,
        spread_seconds=spread_seconds,
    )


@dataclass(frozen=True)
class Batch:
    """Sizes of pieces that follow each other on the target's side, with gaps, and what happens to them."""

    pieces: list[tuple[int, int]]
    priority: int
    spread: bool
    cancelled: bool
    hurried: bool
    paused: bool
    chunks: tuple[int, int] | None


BATCHES = st.lists(
    st.builds(
        Batch,
        st.lists(st.tuples(st.integers(0, 60), st.sampled_from([0, 0, 0, 1, 7])), max_size=8),
        st.integers(0, 7),
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.none() | st.tuples(st.integers(1, 70), st.integers(1, 64)),
    ),
    max_size=8,
)


def place(batch: Batch, nbytes: int | None = None) -> tuple[list[int], list[int], list[int]]:
    """Source offsets, target offsets and sizes; with `nbytes`, of its first bytes only."""
    sources, targets, sizes, target, left = [], [], [], MARGIN, SIZE if nbytes is None else nbytes
    for index, (size, gap) in enumerate(batch.pieces):
        kept = min(size, left)
        sources.append(index * 37 % (SIZE - 60) if index % 2 else target)
        targets.append(target)
        sizes.append(kept)
        target, left = target + size + gap, left - kept
    return sources, targets, sizes


@settings(deadline=None, max_examples=150)
@given(batches=BATCHES, chunk_bytes=st.sampled_from([1, 5, 64, 4096]), chunks_in_flight=st.integers(1, 3))
def test_nothing_is_lost_and_nothing_else_is_touched(
    batches: list[Batch], chunk_bytes: int, chunks_in_flight: int
) -> None:
    source, _ = pair(SIZE)
    running = []
    with CopyEngine(chunk_bytes=chunk_bytes, chunks_in_flight=chunks_in_flight) as engine:
        for batch in batches:
            target = np.zeros(SIZE + 2 * MARGIN, dtype=np.uint8)
            sources, targets, sizes = place(batch)
            ticket = engine.submit(
                words(*(source.ctypes.data + offset for offset in sources)),
                words(*(target.ctypes.data + offset for offset in targets)),
                words(*sizes),
                priority=batch.priority,
                spread_seconds=0.003 if batch.spread else 0.0,
                groups=[(f"operator {index}", 1) for index in range(len(sizes))],
            )
            running.append((ticket, batch, target))
            if batch.chunks:
                engine.set_chunks(*batch.chunks)
            if batch.paused:
                engine.pause()
            if batch.hurried:
                engine.hurry(running[len(running) // 2][0])
            if batch.cancelled:
                chosen = running[len(running) // 3][0]
                assert engine.cancel(chosen) == (engine.state(chosen) == "cancelled")
        for ticket, batch, target in running:
            assert engine.wait(ticket, 60.0)
            stats = engine.stats(ticket)
            assert engine.done(ticket) == (stats.bytes == stats.total_bytes) or engine.state(ticket) == "cancelled"
            # A cancelled ticket has copied a prefix, and nothing behind it.
            expected = np.zeros_like(target)
            for begin, place_begin, nbytes in zip(*place(batch, stats.bytes), strict=True):
                expected[place_begin : place_begin + nbytes] = source[begin : begin + nbytes]
            np.testing.assert_array_equal(target, expected)


def test_a_higher_priority_overtakes() -> None:
    low, low_target = pair(1000)
    high, high_target = pair(20)
    with CopyEngine(chunk_bytes=10, bytes_per_second_limit=2000.0) as engine:
        bulk = submit(engine, low, low_target)
        queued = submit(engine, low, low_target)
        while engine.stats(bulk).bytes == 0:
            time.sleep(0.001)
        urgent = submit(engine, high, high_target, priority=1)
        assert engine.wait(urgent, 10.0)
        assert (high_target == high).all()
        assert (engine.state(bulk), engine.state(queued)) == ("running", "queued")
        assert engine.cancel(bulk)
        assert engine.cancel(queued)


def test_spread_and_hurry() -> None:
    source, target = pair(1000)
    with CopyEngine(chunk_bytes=10) as engine:
        ticket = submit(engine, source, target, spread_seconds=0.3)
        assert engine.wait(ticket, 60.0)
        stats = engine.stats(ticket)
        assert stats.queue_seconds + stats.copy_seconds > 0.28
        slow = submit(engine, source, target, spread_seconds=500.0)
        assert not engine.wait(slow, 0.05)
        assert engine.stats(slow).bytes < 100
        engine.hurry(slow)
        assert engine.wait(slow, 10.0)
        with pytest.raises(KeyError, match="never given out"):
            engine.hurry(99)
    assert (source == target).all()


def test_copy_now_does_not_wait_behind_a_spread_ticket() -> None:
    source, target = pair(1000)
    with CopyEngine(chunk_bytes=10) as engine:
        slow = submit(engine, source, target, spread_seconds=500.0)
        engine.copy_now(words(source.ctypes.data), words(target.ctypes.data), words(10), timeout_seconds=10.0)
        assert engine.done(slow)


def test_a_lost_resume_stops_nothing() -> None:
    source, target = pair(1000)
    with CopyEngine(chunk_bytes=10) as engine:
        pauses = [engine.pause(stream) for stream in (None, 0, None)]
        assert engine.wait(submit(engine, source, target), 10.0)
        for pause in (*pauses, pauses[0], 99):
            engine.resume(pause)
    assert (source == target).all()


def test_options_are_checked() -> None:
    source, target = pair(20)
    with CopyEngine(max_chunk_bytes=1024, chunk_bytes=16) as engine:
        for priority in (-1, 8):
            with pytest.raises(ValueError, match="priority"):
                submit(engine, source, target, priority=priority)
        for spread in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="spread_seconds"):
                submit(engine, source, target, spread_seconds=spread)
        for groups in ([("a", 2)], [("a", 0)], [("a", 1), ("b", 1)]):
            with pytest.raises(ValueError, match="groups"):
                engine.submit(words(source.ctypes.data), words(target.ctypes.data), words(20), groups=groups)
        for chunk_bytes, chunks_in_flight in ((0, 1), (1025, 1), (1, 0), (1, 65)):
            with pytest.raises(ValueError, match="chunk"):
                engine.set_chunks(chunk_bytes, chunks_in_flight)
        engine.set_chunks(1024, 64)
    with pytest.raises(ValueError, match="burst_chunks_in_flight"):
        CopyEngine(burst_chunks_in_flight=65)
    with pytest.raises(ValueError, match="max_chunk_bytes"):
        CopyEngine(max_chunk_bytes=0)
    # A chunk larger than the default of max_chunk_bytes is as right as it was without that limit.
    with CopyEngine(chunk_bytes=64 << 20) as engine:
        engine.set_chunks(64 << 20, 2)
    with pytest.raises(EngineError, match="closed"):
        submit(engine, source, target)
