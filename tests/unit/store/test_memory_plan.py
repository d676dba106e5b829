"""The memory plan is held to, and refusals name the flag."""

from pathlib import Path

import pytest

from megatron.moevement.errors import StoreError
from megatron.moevement.store import format as fmt
from megatron.moevement.store.host_store import HostStore
from megatron.moevement.store.memory_plan import MemoryPlan, check_room, manifest_room


def test_the_file_has_the_planned_size(tmp_path: Path) -> None:
    plan = MemoryPlan(slots=3, manifest_bytes=5000, data_bytes=12345)
    store = HostStore.create(tmp_path / "s", {"run_id": "r", "identity": {}}, 3, 5000, 12345)
    assert store.path.stat().st_size - store.geometry.superblock_bytes == plan.total_bytes
    assert store.geometry.slot_bytes == plan.slot_bytes and plan.slot_bytes % fmt.PAGE_BYTES == 0


def test_the_limit_is_a_refusal(tmp_path: Path) -> None:
    plan = MemoryPlan(4, 0, 1 << 30)
    check_room(MemoryPlan(1, 0, 4096), 0.001, tmp_path, 1, 0)
    with pytest.raises(StoreError, match="--sparse-ckpt-host-memory-gib 3: the plan needs 4"):
        check_room(plan, 3.0, tmp_path, 1, 0)


def test_too_little_space_is_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="--sparse-ckpt-dir .*: 8 ranks need"):
        check_room(MemoryPlan(4, 0, 1 << 50), 0.0, tmp_path / "not" / "there", 8, 0)


def test_manifest_room_grows_with_what_it_holds() -> None:
    assert (
        manifest_room(10, 20, 100)
        < manifest_room(11, 20, 100)
        < manifest_room(11, 21, 100)
        < manifest_room(11, 21, 200)
    )
