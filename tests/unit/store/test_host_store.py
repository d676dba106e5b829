"""Slots: committed by one last write, refused when torn, short, swapped or flipped."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.moevement.errors import SlotInvalid, StoreError
from megatron.moevement.recovery.sources import SlotReader
from megatron.moevement.snapshot.layout import digested_regions, slot_layout
from megatron.moevement.store import format as fmt
from megatron.moevement.store.committer import Committer, CopiedSlot
from megatron.moevement.store.host_store import HostStore, discard
from megatron.moevement.types import SlotSpec
from moevement_ext import DigestPool
from tests.support.slots import BUFFER, create_store, manifest, write_leased
from tests.support.tables import small_table
from tests.unit.schedule.test_slots import schedule

TABLE = small_table()


def write(store: HostStore, spec: SlotSpec, rank: int = 0, run_id: str = "run") -> None:
    """Commits a slot with digests."""
    lease = store.lease(spec.step)
    assert lease is not None
    layout = slot_layout(TABLE, spec.full, spec.weights_only, [BUFFER])
    write_leased(lease, bytes((i * 7 + spec.step) % 256 for i in range(layout.nbytes)))
    regions = digested_regions(layout)
    errors: list[str] = []
    committer = Committer(store, DigestPool(), lambda done: errors.append(done.error))
    committer.submit(CopiedSlot(lease, manifest(spec, rank, run_id), regions, layout.nbytes))
    committer.close()
    assert errors == [""]


def reopened(path: Path, verify: bool = True) -> tuple[HostStore, dict[int, str]]:
    """The store as a new process sees it, and the steps whose slots are usable or not."""
    store = HostStore.open(path)
    return store, SlotReader(store, TABLE, 0, DigestPool() if verify else None).verified()[1]


def test_a_new_process_finds_the_slots(tmp_path: Path) -> None:
    store, plan = create_store(tmp_path / "s", TABLE), schedule(2, "fixed")
    for step in range(3):
        write(store, plan.spec(step))
    found, rejected = reopened(tmp_path / "s")
    assert set(found.committed) == {0, 1, 2} and not rejected and found.free_slots == 1
    assert found.manifest(1) == store.manifest(1)
    assert found.content["identity"] == {"--seed": 1}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(tmp_path: Path, position: float, bit: int) -> None:
    path = tmp_path / "s"
    path.unlink(missing_ok=True)
    store, spec = create_store(path, TABLE, slots=1), schedule(2, "rolling").spec(4)
    write(store, spec)
    layout = slot_layout(TABLE, spec.full, spec.weights_only, [BUFFER])
    geometry = store.geometry
    slot, manifest_bytes = geometry.slot_offset(0), len(fmt.encode_manifest(store.manifest(4)))
    data = slot + fmt.HEADER_BYTES + geometry.manifest_bytes
    used = [slot + i for i in range(48)] + [slot + fmt.HEADER_BYTES + i for i in range(manifest_bytes)]
    used += [data + r.offset + i for r in layout for i in range(r.nbytes)]
    where = used[int(position * len(used))]
    before = store.manifest(4)
    store.close()
    with path.open("r+b") as file:
        file.seek(where)
        byte = file.read(1)[0]
        file.seek(where)
        file.write(bytes([byte ^ (1 << bit)]))
    found, rejected = reopened(path)
    if where < slot + 8:
        # The commit word is a sequence number; a wrong one hides nothing but the order of two slots of one step.
        assert not found.committed or found.manifest(4) == before
    elif slot + 24 <= where < slot + 32:
        assert True  # the header's length of the data area is informative; the layout gives the one that is used
    else:
        assert 4 in rejected or 4 not in found.committed
    found.close()


def test_swapped_slots_are_refused(tmp_path: Path) -> None:
    store, plan = create_store(tmp_path / "s", TABLE), schedule(1, "fixed")
    write(store, plan.spec(0), rank=1)
    write(store, plan.spec(1), run_id="other")
    _, rejected = reopened(tmp_path / "s")
    assert set(rejected) == {0, 1} and "rank 1" in rejected[0] and "other" in rejected[1]


def test_slots_without_digests_need_digests_off(tmp_path: Path) -> None:
    store, spec = create_store(tmp_path / "s", TABLE), schedule(1, "fixed").spec(0)
    lease = store.lease(0)
    assert lease is not None
    store.commit(lease, manifest(spec), 0)
    assert "no digest" in reopened(tmp_path / "s")[1][0]
    assert not reopened(tmp_path / "s", verify=False)[1]


def test_a_leased_slot_is_not_committed(tmp_path: Path) -> None:
    store = create_store(tmp_path / "s", TABLE)
    write(store, schedule(1, "fixed").spec(0))
    store.drop([0])
    assert store.free_slots == 4
    assert store.lease(1) is not None
    assert not HostStore.open(tmp_path / "s").committed


def test_a_newer_slot_of_a_step_replaces_the_older(tmp_path: Path) -> None:
    store, spec = create_store(tmp_path / "s", TABLE), schedule(1, "fixed").spec(3)
    write(store, spec)
    write(store, spec)
    assert store.free_slots == 3
    assert HostStore.open(tmp_path / "s").committed[3].sequence == 2


def _write_until_killed(path: Path) -> None:
    store, plan = HostStore.open(path), schedule(2, "rolling")
    for step in range(10**6):
        store.drop(old for old in store.committed if not step - 2 <= old < step)
        write(store, plan.spec(step))


def test_slots_of_a_killed_writer_are_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "s"
    create_store(path, TABLE).close()
    context = multiprocessing.get_context("fork")
    for delay in (0.05, 0.11, 0.17, 0.23, 0.31):
        writer = context.Process(target=_write_until_killed, args=(path,))
        writer.start()
        writer.join(delay)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        store, rejected = reopened(path)
        assert not rejected
        store.close()


@pytest.mark.parametrize(
    ("damage", "error", "text"),
    [
        (lambda b: b"\0" * 8 + b[8:], StoreError, "not a slot store"),
        (lambda b: b[:7] + b"\x09" + b[8:], StoreError, "slot format 9"),
        (lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:], SlotInvalid, "superblock is damaged"),
        (lambda b: b[:100], SlotInvalid, "superblock is damaged"),
        (lambda b: b[: len(b) // 2], SlotInvalid, "superblock says"),
        (lambda b: b[:10], SlotInvalid, "too short"),
        (lambda b: b"", SlotInvalid, "died while it made the file"),
        (lambda b: b"\0" * len(b), SlotInvalid, "died while it made the file"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, damage: object, error: type[Exception], text: str) -> None:
    path = tmp_path / "s"
    create_store(path, TABLE).close()
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(error, match=text) as caught:
        HostStore.open(path)
    assert str(path) in str(caught.value)


def test_creation_errors_name_the_flag(tmp_path: Path) -> None:
    store = create_store(tmp_path / "s", TABLE)
    with pytest.raises(StoreError, match="--sparse-ckpt-fresh"):
        create_store(store.path, TABLE)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="--sparse-ckpt-dir") as caught:
        create_store(tmp_path / "file" / "s", TABLE)
    assert isinstance(caught.value.__cause__, OSError)


def test_too_large_a_manifest_is_refused_and_the_slot_freed(tmp_path: Path) -> None:
    store = HostStore.create(tmp_path / "s", {"run_id": "run", "identity": {}}, 1, 64, 4096)
    lease = store.lease(0)
    assert lease is not None
    with pytest.raises(SlotInvalid, match="there is room for 64"):
        store.commit(lease, manifest(schedule(1, "fixed").spec(0)), 10)
    assert store.free_slots == 1


def test_a_directory_in_a_store_s_place_is_left_to_a_person(tmp_path: Path) -> None:
    (tmp_path / "rank00000.slots").mkdir()
    with pytest.raises(StoreError, match="rank00000.slots is a directory; remove it"):
        discard(tmp_path / "rank00000.slots")
    discard(tmp_path / "none.slots")
