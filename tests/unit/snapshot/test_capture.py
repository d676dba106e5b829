"""Capture against plain memory: what is committed is what was there at the start of the iteration."""

from pathlib import Path

import pytest

from megatron.moevement.errors import MoevementError
from megatron.moevement.recovery.sources import SlotReader
from megatron.moevement.snapshot.capture import Capture
from megatron.moevement.store.committer import Committed, Committer
from megatron.moevement.types import Presence
from moevement_ext import CopyEngine, DigestPool
from tests.support.slots import MemoryState, create_store, record
from tests.support.tables import small_table
from tests.unit.schedule.test_slots import schedule


def test_a_captured_slot_holds_the_state_of_its_step(tmp_path: Path) -> None:
    table = small_table()
    store, state, plan = create_store(tmp_path / "s", table), MemoryState(table), schedule(3, "rolling")
    capture = Capture(state, store, CopyEngine(), 0, "run")
    done: list[Committed] = []
    committer = Committer(store, DigestPool(), done.append)
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
    reader = SlotReader(store, table, 0, digests=DigestPool())
    assert set(reader.verified()[0]) == {0, 1, 2}
    for step in range(3):
        data, base = store.data(step)
        for operator in reader.operators(step, table.names):
            found = b"".join(bytes(data[p.address - base : p.address - base + p.nbytes]) for p in operator.pieces)
            assert found == wanted[step, operator.name]
        assert reader.manifest(step).record == record(step - 1)


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
