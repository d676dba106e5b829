"""The memory of slots: taken on all ranks or on none, pinned slot by slot, given back."""

from pathlib import Path

import pytest

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.errors import StoreError
from megatron.moevement.planning import SparsePlan, make_plan
from megatron.moevement.recovery.start import store_path
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.slot_memory import SlotMemory, together
from moevement_ext import CopyEngine
from tests.support.engines import PinningEngine
from tests.support.tables import small_table
from tests.support.toy import ToyState, alone, on_ranks

TABLE = small_table()
CONTENT = {"identity": {"--seed": 1}, "operators": "[]"}


def memory(
    directory: Path, agreement: Agreement, engine: CopyEngine | None = None, **knobs: float
) -> tuple[SlotMemory, SparsePlan]:
    """The memory of a rank, and a plan for it."""
    config = SparseCheckpointConfig(enabled=True, directory=directory, **knobs)  # type: ignore[arg-type]
    path = store_path(config.job_directory, agreement.rank)
    plan = make_plan(config, ToyState(TABLE), agreement, None, 2)
    return SlotMemory(config, agreement, engine or CopyEngine(), path, agreement.size), plan


def test_what_is_taken_is_what_was_planned_and_goes(tmp_path: Path) -> None:
    slots, plan = memory(tmp_path, alone())
    slots.check(plan)
    store = slots.create(plan, CONTENT, threads=2)
    assert store.geometry.slots == plan.memory.slots and store.content["run_id"] and slots.pinned
    size = store.path.stat().st_size
    assert 0 <= size - plan.memory.total_bytes <= 65536
    slots.lock()
    slots.give_back(store, keep=True)
    assert store.path.stat().st_size == size
    again = slots.create(plan, CONTENT, threads=1)
    slots.lock()
    slots.give_back(again, keep=False)
    assert not any(tmp_path.iterdir()), "neither slots nor lock nor an empty directory"


def test_every_slot_is_pinned_by_itself(tmp_path: Path) -> None:
    engine = PinningEngine()
    slots, plan = memory(tmp_path, alone(), engine)
    store = slots.create(plan, CONTENT, threads=1)
    assert not slots.pinned and slots.pinned_slots == 1
    engine.go.set()
    slots.wait_until_pinned()
    assert slots.pinned and slots.pinned_slots == plan.memory.slots and not slots.problem
    assert engine.registered == [address for address, _ in store.slot_ranges]
    assert all(address % 4096 == 0 and nbytes % 4096 == 0 for address, nbytes in store.slot_ranges)
    slots.give_back(store, keep=False)
    assert not engine.registered


def test_a_rank_without_room_stops_all_and_leaves_nothing(tmp_path: Path) -> None:
    def one(agreement: Agreement) -> None:
        slots, plan = memory(tmp_path, agreement)
        if agreement.rank == 1:
            (tmp_path / "default").mkdir(exist_ok=True)
            store_path(tmp_path / "default", 1).mkdir()
        slots.create(plan, CONTENT, threads=1)

    results = on_ranks(2, one)
    assert all(isinstance(result, StoreError) for result in results) and len({str(r) for r in results}) == 1
    assert not store_path(tmp_path / "default", 0).exists()


def test_a_limit_of_one_rank_is_refused_by_all(tmp_path: Path) -> None:
    def one(agreement: Agreement) -> None:
        slots, plan = memory(tmp_path, agreement, host_memory_gib=1e-6 if agreement.rank else 0)
        slots.check(plan)

    results = on_ranks(2, one)
    assert all(isinstance(r, StoreError) and "--sparse-ckpt-host-memory-gib" in str(r) for r in results)


def test_together_passes_what_all_ranks_can_do() -> None:
    done: list[int] = []
    together(alone(), lambda: done.append(1))
    assert done == [1]
    with pytest.raises(StoreError, match="full"):
        together(alone(), lambda: (_ for _ in ()).throw(StoreError("full")))
