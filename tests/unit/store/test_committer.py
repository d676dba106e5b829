"""The committer: digests before the commit, rejections reported, everything handed over finished at the end."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.moevement.recovery.sources import SlotReader
from megatron.moevement.snapshot.layout import digested_regions, slot_layout
from megatron.moevement.store.committer import Committed, Committer, CopiedSlot
from megatron.moevement.store.host_store import HostStore
from moevement_ext import DigestPool
from tests.support.slots import BUFFER, create_store, expected_digest, manifest, write_leased
from tests.support.tables import small_table
from tests.unit.schedule.test_slots import schedule

TABLE = small_table()


def copied(store: HostStore, step: int) -> CopiedSlot:
    """A slot whose data is in place and not committed."""
    spec, lease = schedule(1, "fixed").spec(step), store.lease(step)
    assert lease is not None
    layout = slot_layout(TABLE, spec.full, spec.weights_only, [BUFFER])
    write_leased(lease, bytes((i + step) % 256 for i in range(layout.nbytes)))
    return CopiedSlot(lease, manifest(spec), digested_regions(layout), layout.nbytes)


@pytest.mark.parametrize("digest", [True, False])
def test_digests_are_those_of_the_data(tmp_path: Path, digest: bool) -> None:
    store, done = create_store(tmp_path / "s", TABLE), list[Committed]()
    committer, slot = Committer(store, DigestPool() if digest else None, done.append), copied(store, 3)
    assert 3 not in store.committed
    committer.submit(slot)
    committer.drain()
    assert [c.error for c in done] == [""] and done[0].slot is slot and 3 in store.committed
    data, _ = store.data(3)
    wanted = {region.name: expected_digest(data[region.offset :], region.sizes) for region in slot.regions}
    assert store.manifest(3).digests == (wanted if digest else {})
    assert bool(SlotReader(store, TABLE, 0, digests=DigestPool()).verified()[0]) == digest
    committer.close()


def test_closing_finishes_what_was_handed_over(tmp_path: Path) -> None:
    store, done = create_store(tmp_path / "s", TABLE), list[int]()
    committer = Committer(store, DigestPool(), lambda c: done.append(c.slot.lease.step))
    slots = [copied(store, step) for step in range(4)]
    for slot in slots:
        committer.submit(slot)
    committer.close()
    assert done == [0, 1, 2, 3] and set(store.committed) == {0, 1, 2, 3}
    # A recovery that is interrupted before it has a new committer closes this one again.
    for _ in range(3):
        committer.close()
        committer.drain()


def test_who_is_told_of_a_commit_cannot_end_commits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = create_store(tmp_path / "s", TABLE)

    def broken(_: Committed) -> None:
        raise RuntimeError("the listener is broken")

    committer = Committer(store, DigestPool(), broken)
    for step in range(3):
        committer.submit(copied(store, step))
    committer.close()
    assert set(store.committed) == {0, 1, 2} and capsys.readouterr().err.count("RuntimeError: ") == 3


def test_a_slot_without_room_is_reported_and_free_again(tmp_path: Path) -> None:
    path, done = tmp_path / "s", list[Committed]()
    store = HostStore.create(path, {"identity": {}, "run_id": "run"}, 1, manifest_bytes=256, data_bytes=1 << 16)
    committer = Committer(store, DigestPool(), done.append)
    committer.submit(copied(store, 0))
    committer.close()
    assert "there is room for 256" in done[0].error
    assert not store.committed and store.free_slots == 1


def test_a_slot_waits_until_the_one_before_is_committed(tmp_path: Path) -> None:
    store = create_store(tmp_path / "s", TABLE, slots=3)
    go, taken = threading.Event(), threading.Event()

    def hold(_: Committed) -> None:
        taken.set()
        go.wait(20)

    committer = Committer(store, None, hold)
    committer.submit(copied(store, 0))
    assert taken.wait(20)
    second = threading.Thread(target=committer.submit, args=(copied(store, 9),))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "digests that are behind make the training loop wait"
    go.set()
    second.join(20)
    committer.close()
    assert 9 in store.committed


def test_a_slot_that_cannot_be_written_is_reported_and_the_next_one_is_committed(tmp_path: Path) -> None:
    store, done = create_store(tmp_path / "s", TABLE), list[Committed]()
    committer = Committer(store, DigestPool(), done.append)
    bad = copied(store, 0)
    committer.submit(replace(bad, manifest=replace(bad.manifest, run_id=object())))  # JSON has no such value
    committer.submit(copied(store, 1))
    committer.close()
    assert [bool(c.error) for c in done] == [True, False] and "TypeError" in done[0].error
    assert set(store.committed) == {1} and store.free_slots == 3
