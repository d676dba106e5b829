"""DigestPool equals its definition in terms of python-xxhash, bounds its queue and leaves the GIL alone."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from moevement_ext import DIGEST_LEAF_BYTES, DigestPool, EngineError
from tests.support.engines import only_when_the_gil_is_free

MEMORY = np.random.default_rng(1).integers(0, 256, 192 * DIGEST_LEAF_BYTES, dtype=np.uint8)


def words(*values: int) -> npt.NDArray[np.uint64]:
    return np.array(values, dtype=np.uint64)


def model(offset: int, nbytes: int) -> bytes:
    """The definition."""
    data = MEMORY[offset : offset + nbytes].tobytes()
    leaves = [data[begin : begin + DIGEST_LEAF_BYTES] for begin in range(0, nbytes, DIGEST_LEAF_BYTES)]
    return xxhash.xxh3_128_digest(b"".join(xxhash.xxh3_128_digest(leaf) for leaf in leaves))


def ranges(limit: int) -> st.SearchStrategy[tuple[int, int]]:
    """Offsets and sizes within MEMORY."""
    return st.tuples(st.integers(0, MEMORY.nbytes - limit), st.integers(0, limit))


EDGE = st.integers(-1, 1).map(lambda step: (0, 2 * DIGEST_LEAF_BYTES + step))
RANGES = st.lists(ranges(20) | ranges(5000) | ranges(DIGEST_LEAF_BYTES + 100) | EDGE, max_size=12)


@settings(deadline=None, max_examples=60)
@given(batches=st.lists(RANGES, max_size=4), threads=st.integers(1, 3))
def test_digests_equal_the_definition(batches: list[list[tuple[int, int]]], threads: int) -> None:
    base = MEMORY.ctypes.data
    with DigestPool(threads) as pool:
        tickets = [
            pool.submit(words(*(base + offset for offset, _ in batch)), words(*(nbytes for _, nbytes in batch)))
            for batch in batches
        ]
        for ticket, batch in zip(tickets, batches, strict=True):
            assert pool.wait(ticket, 60.0) == b"".join(model(*part) for part in batch)
            for offset, nbytes in batch[:2]:
                assert pool.digest(base + offset, nbytes) == model(offset, nbytes)


def test_a_flipped_bit_changes_the_digest() -> None:
    copy = MEMORY.copy()
    with DigestPool() as pool:
        before = pool.digest(copy.ctypes.data, copy.nbytes)
        assert before == model(0, MEMORY.nbytes)
        copy[DIGEST_LEAF_BYTES + 5] ^= 1
        assert pool.digest(copy.ctypes.data, copy.nbytes) != before


def test_empty_ranges_need_no_address() -> None:
    with DigestPool() as pool:
        assert pool.digest(0, 0) == xxhash.xxh3_128_digest(b"")
        assert pool.wait(pool.submit(words(0, 0), words(0, 0)), 0.0) == 2 * xxhash.xxh3_128_digest(b"")
        assert pool.wait(pool.submit(words(), words()), 0.0) == b""


def large(pool: DigestPool, times: int) -> int:
    """A ticket that takes a while."""
    return pool.submit(words(*[MEMORY.ctypes.data] * times), words(*[MEMORY.nbytes] * times))


def test_time_out_bounds_cancel_and_close() -> None:
    pool = DigestPool(1)
    tickets = [large(pool, 500) for _ in range(8)]
    with pytest.raises(EngineError, match=r"8 tickets are unfinished \[csrc/digest_pool.cpp:\d+\]"):
        large(pool, 1)
    assert pool.wait(tickets[-1], 0.0) is None
    assert pool.digest(MEMORY.ctypes.data, 100) == model(0, 100)
    assert pool.cancel(tickets[1])
    with pytest.raises(EngineError, match="cancelled"):
        pool.wait(tickets[1], 1.0)
    began = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - began < 2
    assert pool.closed
    with pytest.raises(EngineError, match="closed"):
        large(pool, 1)
    with pytest.raises(EngineError, match="cancelled"):
        pool.wait(tickets[-1], 1.0)


def test_bad_arguments() -> None:
    for threads in (0, 65):
        with pytest.raises(ValueError, match="threads"):
            DigestPool(threads)
    with DigestPool() as pool:
        with pytest.raises(ValueError, match="range 1"):
            pool.submit(words(MEMORY.ctypes.data, 0), words(1, 1))
        with pytest.raises(ValueError, match="wraps"):
            pool.digest(2**64 - 1, 2)
        with pytest.raises(ValueError, match="length"):
            pool.submit(words(1), words())
        with pytest.raises(ValueError, match="addresses"):
            pool.submit(np.array([1], dtype=np.int64), words(1))  # type: ignore[arg-type]
        with pytest.raises(KeyError, match="never given out"):
            pool.wait(1, 0.0)
        with pytest.raises(ValueError, match="timeout_seconds"):
            pool.wait(1, -1.0)


def test_threads_are_named() -> None:
    with DigestPool(2) as pool:
        assert pool.threads == 2
        assert pool.wait(large(pool, 1), 60.0) == model(0, MEMORY.nbytes)
        names = {task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
        assert {"moe-digest-0", "moe-digest-1"} <= names


def test_the_gil_is_free_while_a_thread_waits() -> None:
    """Another thread gets the GIL in the wait and nowhere else, and the wait ends because that thread runs."""
    pool = DigestPool(1)
    tickets = [large(pool, 50_000) for _ in range(2)]
    with only_when_the_gil_is_free(lambda: pool.cancel(tickets[1])), pytest.raises(EngineError, match="cancelled"):
        pool.wait(tickets[1], 600.0)
    assert pool.wait(tickets[0], 0.0) is None
    pool.close()


def test_a_fork_cannot_use_the_pool_and_does_not_hang() -> None:
    pool = DigestPool(2)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            pool.submit(words(), words())
        except EngineError:
            pool.close()
            del pool
            code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    pool.close()
