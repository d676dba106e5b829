"""The bandwidth probe: copies real memory with the engine that slots use, and leaves nothing behind."""

import ctypes
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as given_by
from hypothesis import strategies as st

from megatron.moevement.operators.state import MemoryRange
from megatron.moevement.snapshot import bandwidth
from megatron.moevement.snapshot.bandwidth import Chunks, LinkProbe, choose_chunks, measure_bandwidth, measure_digests
from moevement_ext import CopyEngine, DeviceDigests, DigestPool, EngineError
from tests.support.engines import SlowDigests
from tests.support.slots import MemoryState
from tests.support.tables import small_table

MIB = 1 << 20
CHUNKS = Chunks(64 * 1024, 2)


def memory(nbytes: int) -> tuple[MemoryRange, ctypes.Array[ctypes.c_char]]:
    """A range, and what keeps it alive."""
    buffer = ctypes.create_string_buffer(nbytes)
    return MemoryRange(ctypes.addressof(buffer), nbytes), buffer


def measured(engine: CopyEngine, sources: list[MemoryRange], directory: Path) -> float:
    """Bytes per second of a probe that is made and closed."""
    probe = LinkProbe(engine, sources, directory, 3, 0)
    try:
        return measure_bandwidth(probe, engine, [CHUNKS])[CHUNKS]
    finally:
        probe.close()
        probe.close()


def test_a_capped_engine_is_measured_at_its_cap(tmp_path: Path) -> None:
    source, _keep = memory(MIB)
    found = measured(CopyEngine(bytes_per_second_limit=8 * MIB), [source], tmp_path / "new")
    # The first chunk needs no waiting, and a busy machine can only be slower.
    assert 0 < found < 16 * MIB
    assert measured(CopyEngine(), [source], tmp_path / "new") > found, "the control: without the cap it is faster"
    assert list((tmp_path / "new").iterdir()) == []


def test_a_file_of_a_killed_probe_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".bandwidth.rank00003").write_bytes(b"left behind")
    source, _keep = memory(4096)
    assert measured(CopyEngine(), [source], tmp_path) > 0
    assert list(tmp_path.iterdir()) == []


def test_the_probe_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "MEASURE_BYTES_LIMIT", 10_000)
    source, _keep = memory(64 * 1024)
    for sources in ([source, source], [source]):
        probe = LinkProbe(CopyEngine(), sources, tmp_path, 3, 0)
        assert 9000 < probe.nbytes <= 10_000 and (tmp_path / ".bandwidth.rank00003").stat().st_size < 16 << 10
        probe.close()


def test_the_probe_takes_pieces_from_all_over_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "MEASURE_BYTES_LIMIT", 4096)
    given: list[list[int]] = []

    class Noting(CopyEngine):
        def submit(self, sources: Any, *arguments: Any, **options: Any) -> int:
            given.append(sources.tolist())
            return super().submit(sources, *arguments, **options)

    source, _keep = memory(40 * 1024)
    pieces = [MemoryRange(source.address + 1024 * number, 1024) for number in range(40)]
    measured(Noting(), pieces, tmp_path)
    # 32 extents of 128 bytes, 1280 bytes apart.
    assert given[0] == [source.address + 1280 * number // 256 * 256 for number in range(32)]


@given_by(
    sizes=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 60_000)), min_size=1, max_size=40),
    limit=st.integers(1, 40_000),
)
def test_a_sample_is_of_the_pieces_and_no_byte_is_taken_twice(sizes: list[int], limit: int) -> None:
    pieces, address = list[MemoryRange](), 1 << 20
    for size in sizes:
        pieces.append(MemoryRange(address, size))
        address += size + 512
    chosen = bandwidth.sample(pieces, limit)
    assert sum(one.nbytes for one in chosen) <= limit and all(one.nbytes > 0 for one in chosen)
    for one in chosen:
        assert any(p.address <= one.address and one.address + one.nbytes <= p.address + p.nbytes for p in pieces)
    assert all(one.address + one.nbytes <= other.address for one, other in itertools.pairwise(chosen))
    if sum(sizes) > 2 * limit and limit >= 8192:
        assert sum(one.nbytes for one in chosen) > 0.9 * limit - 32, "almost as much as it may be"


def test_small_pieces_have_their_share_of_the_bytes() -> None:
    large, small = 64 * MIB, 4096
    pieces = [MemoryRange((number + 1) << 32, large if number % 2 else small) for number in range(40)]
    chosen = bandwidth.sample(pieces, 64 * MIB)
    # By count they would be half of it; a few lie where an extent goes on beyond its piece.
    assert sum(one.nbytes <= small for one in chosen) < 5 and len(chosen) > 32


def test_a_rank_that_owns_nothing_has_no_limit(tmp_path: Path) -> None:
    assert measured(CopyEngine(), [], tmp_path / "new") == float("inf")
    assert not (tmp_path / "new").exists()


def test_nothing_is_left_after_a_failure(tmp_path: Path) -> None:
    engine = CopyEngine()
    engine.close()
    source, _keep = memory(4096)
    with pytest.raises(EngineError):
        measured(engine, [source], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_beside_an_iteration_it_copies_until_it_is_stopped(tmp_path: Path) -> None:
    source, _keep = memory(MIB)
    with CopyEngine(chunk_bytes=1 << 16, bytes_per_second_limit=8 * MIB) as engine:
        probe = LinkProbe(engine, [source, source], tmp_path, 3, 0)
        # 2 GiB would take minutes at the cap.
        probe.start(1024)
        time.sleep(0.2)
        assert 0 < probe.stop() < 16 * MIB
        # An iteration that was interrupted leaves its copies behind.
        probe.start(1024)
        probe.start(1024)
        assert engine.state(2) == "cancelled"
        probe.close()
        assert engine.state(3) == "cancelled" and list(tmp_path.iterdir()) == []


SMALL, LARGE = Chunks(4 * MIB, 2), Chunks(16 * MIB, 2)


def test_chunks_weigh_the_delay_of_small_copies_against_the_link() -> None:
    rates = {SMALL: 49e9, LARGE: 54e9}
    # 20 copies that wait for 0.31 ms each are 2% of 0.3 s, with small chunks 0.6%; the link loses 9%, 4% more than
    # measurements differ.
    assert choose_chunks(rates, 20, 0.3) == LARGE
    assert choose_chunks(rates, 200, 0.3) == SMALL
    assert choose_chunks(rates, 200, 30.0) == LARGE
    assert choose_chunks({SMALL: 52e9, LARGE: 54e9}, 1, 0.3) == SMALL


def test_with_nothing_to_weigh_the_smallest_of_the_best_is_chosen() -> None:
    assert choose_chunks({LARGE: 5e10, SMALL: 5e10}, 0, 0.3) == SMALL
    assert choose_chunks({LARGE: float("inf"), SMALL: float("inf")}, 9, 0.3) == SMALL
    assert choose_chunks({SMALL: 4e10, LARGE: 5e10}, 9, 0.0) == LARGE


def test_digests_are_measured_where_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "DIGEST_MEASURE_BYTES", MIB)
    state = MemoryState(small_table())
    assert measure_digests(None, state) == float("inf")
    with DigestPool() as pool:
        assert 0 < measure_digests(pool, state) < float("inf")
        pool.close()
        # With the device's digests nobody asks the pool.
        with DeviceDigests(ranges_limit=1000, bytes_limit=64 * MIB) as device:
            assert 0 < measure_digests(pool, state, device) < float("inf")
        with pytest.raises(EngineError, match="closed"):
            measure_digests(None, state, device)


def test_a_digest_probe_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "TIMEOUT_SECONDS", 0.01)
    device = SlowDigests(ranges_limit=1000, bytes_limit=64 * MIB)
    with pytest.raises(EngineError, match="digest probe took longer than"):
        measure_digests(None, MemoryState(small_table()), device)
    assert device.cancelled == [1]
