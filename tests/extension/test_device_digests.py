"""DeviceDigests on the CPU, which runs the kernel's code, equals the definition in terms of python-xxhash."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from moevement_ext import DIGEST_LEAF_BYTES, DeviceDigests, DigestPool, EngineError, build_info

MEMORY = np.random.default_rng(2).integers(0, 256, 8 * DIGEST_LEAF_BYTES, dtype=np.uint8)
LIMITS = {"ranges_limit": 40, "bytes_limit": 64 * DIGEST_LEAF_BYTES}


def words(*values: int) -> npt.NDArray[np.uint64]:
    return np.array(values, dtype=np.uint64)


def model(data: bytes) -> bytes:
    """The definition."""
    leaves = [data[begin : begin + DIGEST_LEAF_BYTES] for begin in range(0, len(data), DIGEST_LEAF_BYTES)]
    return xxhash.xxh3_128_digest(b"".join(xxhash.xxh3_128_digest(leaf) for leaf in leaves))


def submit(digests: DeviceDigests, memory: npt.NDArray[np.uint8], ranges: list[tuple[int, int]]) -> int:
    base = memory.ctypes.data
    return digests.submit(words(*(base + offset for offset, _ in ranges)), words(*(nbytes for _, nbytes in ranges)))


# Around every length at which XXH3 goes another way, alone and behind whole leaves.
EDGES = st.sampled_from([0, 16, 128, 240, 256, 1024, 1088, 2048, DIGEST_LEAF_BYTES])
LENGTHS = st.builds(
    lambda leaves, edge, step: max(0, leaves * DIGEST_LEAF_BYTES + edge + step),
    st.integers(0, 2),
    EDGES,
    st.integers(-2, 2),
)
RANGES = st.lists(st.tuples(st.integers(0, 70), LENGTHS | st.integers(0, 3 * DIGEST_LEAF_BYTES)), max_size=8)

BITS = st.integers(0, 7)


@settings(deadline=None, max_examples=80)
@given(batches=st.lists(RANGES, min_size=1, max_size=3))
def test_digests_equal_the_definition_and_the_pool(batches: list[list[tuple[int, int]]]) -> None:
    with DeviceDigests(**LIMITS) as digests, DigestPool() as pool:
        for batch in batches:
            found = digests.wait(submit(digests, MEMORY, batch), 60.0)
            assert found == b"".join(model(MEMORY[offset : offset + size].tobytes()) for offset, size in batch)
            base = MEMORY.ctypes.data
            ticket = pool.submit(words(*(base + offset for offset, _ in batch)), words(*(size for _, size in batch)))
            assert pool.wait(ticket, 60.0) == found


@settings(deadline=None, max_examples=60)
@given(
    ranges=RANGES.filter(lambda ranges: any(size for _, size in ranges)), where=st.integers(0), bit=st.integers(0, 7)
)
def test_a_flipped_bit_changes_the_digest_of_its_range(ranges: list[tuple[int, int]], where: int, bit: int) -> None:
    copy = MEMORY.copy()
    full = [index for index, (_, size) in enumerate(ranges) if size]
    index = full[where % len(full)]
    offset, size = ranges[index]
    with DeviceDigests(**LIMITS) as digests:
        before = digests.wait(submit(digests, copy, ranges), 60.0)
        copy[offset + where % size] ^= 1 << bit
        after = digests.wait(submit(digests, copy, ranges), 60.0)
        assert before is not None and after is not None
        assert before[16 * index : 16 * index + 16] != after[16 * index : 16 * index + 16]
        copy[offset + where % size] ^= 1 << bit
        assert digests.wait(submit(digests, copy, ranges), 60.0) == before


def test_tickets_and_limits() -> None:
    digests = DeviceDigests(**LIMITS, blocks=3)
    assert digests.device_bytes == 0 and not digests.closed
    with pytest.raises(KeyError, match="never given out"):
        digests.wait(1, 0.0)
    first = submit(digests, MEMORY, [(0, 100)])
    with pytest.raises(EngineError, match=r"not over: one batch at a time \[csrc/device_digests.cpp:\d+\]"):
        submit(digests, MEMORY, [(0, 100)])
    assert digests.cancel(first)
    with pytest.raises(EngineError, match="cancelled"):
        digests.wait(first, 1.0)
    second = submit(digests, MEMORY, [(0, 100)])
    assert digests.wait(second, 1.0) == model(MEMORY[:100].tobytes()) == digests.wait(second, 0.0)
    assert digests.seconds(second) >= 0 and not digests.cancel(second)
    with pytest.raises(KeyError, match="dropped"):
        digests.seconds(first)
    with pytest.raises(ValueError, match="there is room for 40 ranges"):
        submit(digests, MEMORY, [(0, 1)] * 41)
    with pytest.raises(ValueError, match="range 1"):
        digests.submit(words(MEMORY.ctypes.data, 0), words(1, 1))
    with pytest.raises(ValueError, match="length"):
        digests.submit(words(1), words())
    with pytest.raises(ValueError, match="blocks"):
        digests.set_blocks(0)
    digests.set_blocks(5)
    digests.close()
    digests.close()
    assert digests.closed
    with pytest.raises(EngineError, match="closed"):
        submit(digests, MEMORY, [])


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(ValueError, match="'cpu' or 'cuda'"):
        DeviceDigests("tpu", **LIMITS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ranges_limit"):
        DeviceDigests(ranges_limit=0, bytes_limit=1)
    if not build_info().gather:
        with pytest.raises(EngineError, match=r"no digests on the GPU.*nvcc.*\[csrc/digest_device_cuda.cpp:\d+\]"):
            DeviceDigests("cuda", **LIMITS)


def test_a_fork_cannot_use_it_and_does_not_hang() -> None:
    digests = DeviceDigests(**LIMITS)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            digests.submit(words(), words())
        except EngineError:
            digests.close()
            del digests
            code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    digests.close()
