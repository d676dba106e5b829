"""CopyEngine on the CPU: right bytes, bounded queues, cancels that leave nothing in flight, no GIL while it waits."""

from __future__ import annotations

import array
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moevement_ext import CopyEngine, EngineError, build_info
from tests.support.engines import only_when_the_gil_is_free

Bytes = npt.NDArray[np.uint8]
# Slow enough that a test can act while 1,000 bytes are copied, in chunks of 10.
SLOW = 1_000.0


def words(*values: int) -> npt.NDArray[np.uint64]:
    return np.array(values, dtype=np.uint64)


def copy_all(engine: CopyEngine, source: Bytes, target: Bytes, label: str = "") -> int:
    """Submit one copy of the whole of `source`."""
    assert source.nbytes == target.nbytes
    return engine.submit(words(source.ctypes.data), words(target.ctypes.data), words(source.nbytes), label=label)


def pair(nbytes: int) -> tuple[Bytes, Bytes]:
    """A source without zero bytes, and a target of zeros."""
    source = np.resize(np.arange(1, 252, dtype=np.uint8), nbytes)
    return source, np.zeros(nbytes, dtype=np.uint8)


def slow_engine(max_queued_tickets: int = 64) -> CopyEngine:
    return CopyEngine(chunk_bytes=10, bytes_per_second_limit=SLOW, max_queued_tickets=max_queued_tickets)


@dataclass(frozen=True)
class Piece:
    source: int
    target: int
    nbytes: int


SIZE = 400
PIECES = st.builds(Piece, st.integers(0, SIZE // 2), st.integers(0, SIZE // 2), st.integers(0, SIZE // 2))


@settings(deadline=None, max_examples=60)
@given(
    batches=st.lists(st.tuples(st.lists(PIECES, max_size=8), st.booleans()), max_size=6),
    chunk_bytes=st.sampled_from([1, 3, 64, 4096]),
    chunks_in_flight=st.integers(1, 3),
)
def test_done_tickets_are_right_and_other_bytes_stay(
    batches: list[tuple[list[Piece], bool]], chunk_bytes: int, chunks_in_flight: int
) -> None:
    """Each batch has its own target; later pieces of a batch win where pieces overlap."""
    source, _ = pair(SIZE)
    with CopyEngine(chunk_bytes=chunk_bytes, chunks_in_flight=chunks_in_flight) as engine:
        running = []
        for pieces, cancelled in batches:
            target = np.zeros(SIZE, dtype=np.uint8)
            ticket = engine.submit(
                words(*(source.ctypes.data + piece.source for piece in pieces)),
                words(*(target.ctypes.data + piece.target for piece in pieces)),
                words(*(piece.nbytes for piece in pieces)),
            )
            if cancelled:
                assert engine.cancel(ticket) == (engine.state(ticket) == "cancelled")
            running.append((ticket, pieces, target))
        for ticket, pieces, target in running:
            assert engine.wait(ticket, 60.0)
            stats = engine.stats(ticket)
            assert engine.done(ticket) == (engine.state(ticket) == "done")
            assert stats.total_bytes == sum(piece.nbytes for piece in pieces)
            if engine.done(ticket):
                assert stats.bytes == stats.total_bytes
            # A cancelled batch is a prefix of the batch, byte by byte.
            expected, left = np.zeros(SIZE, dtype=np.uint8), stats.bytes
            for piece in pieces:
                nbytes = min(piece.nbytes, left)
                expected[piece.target : piece.target + nbytes] = source[piece.source : piece.source + nbytes]
                left -= nbytes
            np.testing.assert_array_equal(target, expected)


def test_overlapping_pieces_are_copied_in_order() -> None:
    first, target = pair(1000)
    second = np.full(1000, 77, dtype=np.uint8)
    with CopyEngine(chunk_bytes=16) as engine:
        stats = engine.copy_now(
            words(first.ctypes.data, second.ctypes.data),
            words(target.ctypes.data, target.ctypes.data + 500),
            words(1000, 500),
        )
    assert stats.bytes == stats.total_bytes == 1500
    assert (target[:500] == first[:500]).all()
    assert (target[500:] == 77).all()


def test_zero_sizes_need_no_address() -> None:
    with CopyEngine() as engine:
        assert engine.copy_now(words(0, 0), words(0, 0), words(0, 0)).bytes == 0
        assert engine.copy_now(words(), words(), words()).bytes == 0


def test_any_uint64_buffer_is_taken() -> None:
    source, target = pair(100)
    with CopyEngine() as engine:
        engine.copy_now(
            array.array("Q", [source.ctypes.data]),
            memoryview(array.array("Q", [target.ctypes.data])),
            array.array("L", [100]),
        )
    assert (source == target).all()


@pytest.mark.parametrize(
    "bad",
    [np.array([1], dtype=np.int64), np.array([1.0]), words(1, 2), words(1).reshape(1, 1), words(1, 2, 3, 4)[::4][:0]],
    ids=["signed", "float", "longer", "2-D", "shorter"],
)
def test_bad_buffers_are_refused(bad: npt.NDArray[np.uint64]) -> None:
    good = words(64)
    with CopyEngine() as engine:
        for buffers in ((bad, good, good), (good, bad, good), (good, good, bad)):
            with pytest.raises(ValueError, match=r"sources|destinations|sizes"):
                engine.submit(*buffers)


def test_strided_buffers_are_refused() -> None:
    strided = words(1, 2, 3, 4)[::2]
    with CopyEngine() as engine, pytest.raises(ValueError, match="contiguous"):
        engine.submit(strided, strided, strided)


def test_dangerous_pieces_are_refused() -> None:
    memory = np.zeros(64, dtype=np.uint8)
    here = memory.ctypes.data
    with CopyEngine() as engine:
        for source, target, nbytes in ((0, here, 1), (here, 0, 1), (here, 2**64 - 2, 4), (here, here + 8, 9)):
            with pytest.raises(ValueError, match="piece 0"):
                engine.submit(words(source), words(target), words(nbytes))


def test_cancel_running_and_queued() -> None:
    source, target = pair(1000)
    _, other = pair(1000)
    with slow_engine() as engine:
        running, queued = copy_all(engine, source, target), copy_all(engine, source, other)
        while engine.stats(running).bytes == 0:
            time.sleep(0.001)
        assert (engine.state(running), engine.state(queued)) == ("running", "queued")
        assert engine.cancel(queued)
        assert engine.cancel(running)
        assert engine.cancel(running)
        seen = target.copy()
        time.sleep(0.03)
        copied = engine.stats(running).bytes
        assert 0 < copied < 1000
        assert (target == seen).all()
        assert (target[:copied] == source[:copied]).all()
        assert not target[copied:].any()
        assert not other.any()
        for ticket in (running, queued):
            assert engine.wait(ticket, 0.0)
            assert engine.state(ticket) == "cancelled"
            assert not engine.done(ticket)
        finished = engine.submit(words(), words(), words())
        assert engine.wait(finished, 10.0)
        assert not engine.cancel(finished)


def test_queue_is_bounded() -> None:
    source, target = pair(1000)
    with slow_engine(max_queued_tickets=2) as engine:
        tickets = [copy_all(engine, source, target) for _ in range(2)]
        with pytest.raises(EngineError, match=r"max_queued_tickets is 2 \[csrc/copy_engine.cpp:\d+\]"):
            copy_all(engine, source, target)
        engine.cancel(tickets[0])
        copy_all(engine, source, target)


def test_records_are_bounded() -> None:
    with CopyEngine(max_finished_tickets=2) as engine:
        tickets = []
        for _ in range(4):
            tickets.append(engine.submit(words(), words(), words()))
            assert engine.wait(tickets[-1], 10.0)
        assert [engine.state(ticket) for ticket in tickets[2:]] == ["done", "done"]
        for ask in (engine.state, engine.done, engine.stats, engine.cancel, lambda ticket: engine.wait(ticket, 1.0)):
            with pytest.raises(KeyError, match="dropped"):
                ask(tickets[0])
        with pytest.raises(KeyError, match="never given out"):
            engine.state(99)


def test_close_cancels_and_later_submits_fail() -> None:
    source, target = pair(1000)
    engine = slow_engine()
    tickets = [copy_all(engine, source, target) for _ in range(3)]
    began = time.monotonic()
    engine.close()
    engine.close()
    assert time.monotonic() - began < 2.5
    assert engine.closed
    assert engine.failure is None
    assert [engine.state(ticket) for ticket in tickets] == ["cancelled"] * 3
    with pytest.raises(EngineError, match="closed"):
        copy_all(engine, source, target)
    with pytest.raises(EngineError, match="closed"):
        engine.register_host(source.ctypes.data, 1000)


def test_wait_and_copy_now_time_out() -> None:
    source, target = pair(1000)
    with slow_engine() as engine:
        ticket = copy_all(engine, source, target)
        assert engine.wait(ticket, 0.0) is False
        assert engine.wait(ticket, 0.02) is False
        assert not engine.done(ticket)
        engine.cancel(ticket)
        with pytest.raises(EngineError, match=r"copy \(restore\) takes longer than 0.02"):
            engine.copy_now(
                words(source.ctypes.data), words(target.ctypes.data), words(1000), label="restore", timeout_seconds=0.02
            )
        for timeout in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="timeout_seconds"):
                engine.wait(ticket, timeout)


def test_bandwidth_limit_and_stats() -> None:
    source, target = pair(100)
    with slow_engine() as engine:
        first, second = copy_all(engine, source, target), copy_all(engine, source, target)
        assert engine.wait(second, 60.0)
        # 20 chunks of 10 ms, of which the first starts at once.
        assert engine.stats(second).queue_seconds >= 0.08
        assert engine.stats(first).copy_seconds + engine.stats(second).copy_seconds >= 0.17
    assert (source == target).all()


def test_the_gil_is_free_while_a_thread_waits() -> None:
    """Another thread gets the GIL in the wait and nowhere else, and the wait ends because that thread runs."""
    source, target = pair(100_000)
    with slow_engine() as engine:
        ticket = copy_all(engine, source, target)
        with only_when_the_gil_is_free(lambda: engine.cancel(ticket)):
            assert engine.wait(ticket, 60.0)
        assert engine.state(ticket) == "cancelled"

        def cancel_once_it_is_there() -> None:
            while True:
                with contextlib.suppress(KeyError):
                    engine.cancel(ticket + 1)
                    return

        with only_when_the_gil_is_free(cancel_once_it_is_there), pytest.raises(EngineError, match="cancelled"):
            engine.copy_now(words(source.ctypes.data), words(target.ctypes.data), words(source.nbytes))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also in a job that a shell runs in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_a_wait() -> None:
    source, target = pair(10_000)
    with slow_engine() as engine:
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            engine.copy_now(words(source.ctypes.data), words(target.ctypes.data), words(10_000))
        timer.join()
        assert engine.state(1) == "cancelled"


def test_a_fork_cannot_use_the_engine_and_does_not_hang() -> None:
    engine = CopyEngine()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            engine.submit(words(), words(), words())
        except EngineError:
            engine.close()
            del engine
            code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    engine.close()


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="chunk_bytes"):
        CopyEngine(chunk_bytes=0)
    with pytest.raises(ValueError, match="chunk_bytes"):
        CopyEngine(chunk_bytes=2**31)
    with pytest.raises(ValueError, match="chunks_in_flight"):
        CopyEngine(chunks_in_flight=0)
    with pytest.raises(ValueError, match="max_queued_tickets"):
        CopyEngine(max_queued_tickets=0)
    with pytest.raises(ValueError, match="max_finished_tickets"):
        CopyEngine(max_finished_tickets=0)
    for limit in (-1.0, 0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="bytes_per_second_limit"):
            CopyEngine(bytes_per_second_limit=limit)
    with pytest.raises(ValueError, match="device"):
        CopyEngine("tpu")  # type: ignore[arg-type]


def test_registering_host_memory_means_nothing_on_the_cpu() -> None:
    memory = np.zeros(4096, dtype=np.uint8)
    with CopyEngine() as engine:
        assert engine.register_host(memory.ctypes.data, 4096) is False
        assert engine.unregister_host(memory.ctypes.data) is False
        with pytest.raises(ValueError, match="address"):
            engine.register_host(0, 4096)


def test_without_a_gpu_the_cuda_engine_is_refused_and_the_cpu_engine_works() -> None:
    script = (
        "from moevement_ext import CopyEngine, EngineError\n"
        "CopyEngine('cpu').close()\n"
        "try:\n    CopyEngine('cuda')\n"
        "except EngineError as problem:\n    print(problem)\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert re.search(r"\[csrc/(copy_engine_cuda\.cpp|cuda_support\.h):\d+\]$", shown.stdout)


def test_build_info() -> None:
    info = build_info()
    assert info.cuda == (info.cuda_version is not None)
    assert info.compiler.startswith(("gcc ", "clang "))
