"""Capture against plain memory: what is committed is what was there at the start of the iteration."""

import ctypes
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.moevement.errors import MoevementError
from megatron.moevement.recovery.sources import SlotReader
from megatron.moevement.snapshot.capture import Capture
from megatron.moevement.store.committer import Committed, Committer
from megatron.moevement.types import Presence
from moevement_ext import CopyEngine, DeviceDigests, DigestPool
from tests.support.engines import SlowDigests
from tests.support.slots import MemoryState, create_store, record
from tests.support.tables import small_table
from tests.unit.schedule.test_slots import schedule


def device_digests() -> DeviceDigests:
    """Digests of the source, with room for any slot."""
    return DeviceDigests(ranges_limit=1000, bytes_limit=64 << 20)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_captured_slot_holds_the_state_of_its_step(tmp_path: Path, on_device: bool) -> None:
    table = small_table(expert_elements=30_000)
    store, state, plan = create_store(tmp_path / "s", table), MemoryState(table), schedule(3, "rolling")
    capture = Capture(state, store, CopyEngine(), 0, "run", device_digests() if on_device else None)
    done: list[Committed] = []
    # Without threads: whose digests they are, the device's or none.
    committer = Committer(store, None if on_device else DigestPool(), done.append)
    wanted = {}
    for step in range(3):
        state.fill(step)
        spec = plan.spec(step)
        for presence, names in ((Presence.FULL, spec.full), (Presence.WEIGHTS_ONLY, spec.weights_only)):
            wanted.update({(step, name): state.contents(name, presence) for name in names})
        capture.begin(spec, record(step - 1))
        copied, stall = capture.fence()
        assert copied is not None and stall >= 0
        state.fill(step + 100)  # the optimizer step writes right behind the fence
        committer.submit(copied)
    committer.close()
    assert [c.slot.lease.step for c in done] == [0, 1, 2] and not any(c.error for c in done)
    assert all(c.digest_seconds == c.slot.digest_seconds for c in done) == on_device
    reader = SlotReader(store, table, 0, digests=DigestPool())
    assert set(reader.verified()[0]) == {0, 1, 2}
    for step in range(3):
        data, base = store.data(step)
        for operator in reader.operators(step, table.names):
            found = b"".join(bytes(data[p.address - base : p.address - base + p.nbytes]) for p in operator.pieces)
            assert found == wanted[step, operator.name]
        assert reader.manifest(step).record == record(step - 1)


@pytest.mark.parametrize("at_once", [False, True])
def test_only_the_time_in_which_the_device_has_nothing_to_do_is_a_stall(tmp_path: Path, at_once: bool) -> None:
    class Ahead(MemoryState):
        def arrival(self) -> Callable[[], bool]:
            return lambda: at_once

    table = small_table(expert_elements=3000)
    store, state = create_store(tmp_path / "s", table), Ahead(table)
    spec = schedule(3, "rolling").spec(0)
    # At least so long that it takes several looks at the device.
    engine = CopyEngine(chunk_bytes=1000, bytes_per_second_limit=200_000.0)
    capture = Capture(state, store, engine, 0, "run")
    started, nbytes = time.perf_counter(), capture.begin(spec, record(0))
    copied, stall = capture.fence()
    assert copied is not None and time.perf_counter() - started > nbytes / 400_000 > 0.02
    assert (stall > nbytes / 400_000) if at_once else (stall == 0.0)


def test_adams_counters_are_those_of_the_step_that_begins(tmp_path: Path) -> None:
    class Counting(MemoryState):
        steps = 3.0

        def adam_steps(self, operator: str) -> tuple[float, ...]:
            return tuple(self.steps for _ in self.table[operator].slices)

    table = small_table()
    store, state = create_store(tmp_path / "s", table), Counting(table)
    capture = Capture(state, store, CopyEngine(), 0, "run")
    spec = schedule(3, "rolling").spec(0)
    capture.begin(spec, record(0))
    state.steps = 4.0
    copied, _ = capture.fence()
    assert copied is not None
    assert {step for steps in copied.manifest.adam_steps.values() for step in steps} == {3.0}


def test_a_full_ring_refuses(tmp_path: Path) -> None:
    table = small_table()
    store = create_store(tmp_path / "s", table, slots=1)
    capture = Capture(MemoryState(table), store, CopyEngine(), 0, "run")
    capture.begin(schedule(2, "fixed").spec(0), None)
    with pytest.raises(MoevementError, match="no free slot"):
        Capture(MemoryState(table), store, CopyEngine(), 0, "run").begin(schedule(2, "fixed").spec(1), None)
    capture.cancel()
    assert store.free_slots == 1 and capture.fence() == (None, 0.0)


def test_a_refusing_engine_gives_the_slot_back(tmp_path: Path) -> None:
    table = small_table()
    store, engine = create_store(tmp_path / "s", table), CopyEngine()
    engine.close()
    with pytest.raises(MoevementError, match="copy engine"):
        Capture(MemoryState(table), store, engine, 0, "run").begin(schedule(2, "fixed").spec(0), None)
    assert store.free_slots == 4


def test_digests_of_the_source_notice_a_wrong_copy(tmp_path: Path) -> None:
    table = small_table(expert_elements=30_000)
    spec = schedule(2, "rolling").spec(1)
    for flip in (None, 0, 1, -1):
        store = create_store(tmp_path / f"s{flip}", table)
        state, pool, errors = MemoryState(table), DigestPool(), list[str]()
        state.fill(5)
        capture = Capture(state, store, CopyEngine(), 0, "run", device_digests())
        capture.begin(spec, None)
        copied, _ = capture.fence()
        assert copied is not None
        pieces = [
            (region.offset + sum(region.sizes[:i])) for region in copied.regions for i in range(len(region.sizes))
        ]
        if flip is not None:
            # As if the link had turned a bit: digests that are made of the copy can't know.
            ctypes.memset(copied.lease.data_address + pieces[flip], 0xFF, 1)
        committer = Committer(store, pool, lambda done, errors=errors: errors.append(done.error))  # type: ignore[misc]
        committer.submit(copied)
        committer.close()
        assert errors == [""]
        usable, rejected = SlotReader(store, table, 0, digests=pool).verified()
        assert bool(usable) == (flip is None)
        assert flip is None or "the digest of" in rejected[1]
        store.drop([0, 1])
        again = store.lease(1)
        assert again is not None
        ctypes.memmove(again.data_address, copied.lease.data_address, copied.data_bytes)
        late = Committer(store, pool, lambda done, errors=errors: errors.append(done.error))  # type: ignore[misc]
        late.submit(replace(copied, lease=again, piece_digests=b""))
        late.close()
        assert set(SlotReader(store, table, 0, digests=pool).verified()[0]) == {1}, "the control"


def test_digests_that_fail_give_the_slot_back(tmp_path: Path) -> None:
    table = small_table()
    store, digests, spec = create_store(tmp_path / "s", table), device_digests(), schedule(2, "fixed").spec(0)
    capture = Capture(MemoryState(table), store, CopyEngine(), 0, "run", digests)
    for _ in range(3):
        capture.begin(spec, None)
        capture.cancel()
    assert store.free_slots == 4 and capture.fence() == (None, 0.0)
    capture.begin(spec, None)
    digests.close()
    with pytest.raises(MoevementError, match=r"Step 0, .* are cancelled"):
        capture.fence()
    with pytest.raises(MoevementError, match="closed"):
        capture.begin(spec, None)
    assert store.free_slots == 4
    small = DeviceDigests(ranges_limit=1, bytes_limit=1)
    with pytest.raises(MoevementError, match="there is room for 1 ranges"):
        Capture(MemoryState(table), store, CopyEngine(), 0, "run", small).begin(spec, None)
    assert store.free_slots == 4


def test_the_fence_waits_for_digests_too(tmp_path: Path) -> None:
    table = small_table()
    store, digests = create_store(tmp_path / "s", table), SlowDigests(ranges_limit=1000, bytes_limit=64 << 20)
    capture = Capture(MemoryState(table), store, CopyEngine(), 0, "run", digests)
    capture.begin(schedule(2, "fixed").spec(0), None)
    with pytest.raises(MoevementError, match="the digests took longer than"):
        capture.fence()
    assert digests.cancelled == [1] and store.free_slots == 4


def test_a_refusing_engine_cancels_the_digests(tmp_path: Path) -> None:
    table = small_table()
    store, engine, digests = create_store(tmp_path / "s", table), CopyEngine(), device_digests()
    capture = Capture(MemoryState(table), store, engine, 0, "run", digests)
    engine.close()
    for _ in range(2):
        with pytest.raises(MoevementError, match="the copy engine is closed|engine"):
            capture.begin(schedule(2, "fixed").spec(0), None)
    assert store.free_slots == 4
