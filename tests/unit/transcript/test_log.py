"""The transcript: what was committed is read back in every bit; what is torn, stale, foreign or flipped is refused."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.moevement.errors import StoreError, TranscriptInvalid
from megatron.moevement.store.format import HEADER_BYTES
from megatron.moevement.store.host_store import HostStore
from megatron.moevement.transcript.keys import BoundaryKey, Direction
from megatron.moevement.transcript.log import TranscriptLog, transcript_path
from megatron.moevement.transcript.records import aligned
from moevement_ext import DigestPool
from tests.support.transcripts import MIDDLE, RECORD_BYTES, SHAPE, content, create, write


def reopened(path: Path) -> TranscriptLog:
    """As a replacement sees it."""
    return TranscriptLog.open(path, DigestPool())


def check(log: TranscriptLog, iteration: int) -> None:
    """Every record and receipt of the iteration is as it was written."""
    for direction in Direction:
        records = log.records(iteration, direction)
        assert [record.key for record in records] == [*MIDDLE.sent(direction)]
        assert all(bytes(r.data) == content(iteration, direction, r.key.order) for r in records)
        receipts = log.receipts(iteration, direction)
        assert [receipt.key for receipt in receipts] == [*MIDDLE.received(direction)]
        assert all(receipt.fingerprint == iteration * 1000 - receipt.key.order for receipt in receipts)


def test_a_replacement_finds_the_iterations(tmp_path: Path) -> None:
    path = transcript_path(tmp_path / "job", 1)
    log = create(path)
    for iteration in range(3):
        write(log, iteration)
    log.close()
    found = reopened(path)
    assert found.iterations == {0, 1, 2} and (found.rank, found.run_id) == (1, "run") and not found.rejected
    for iteration in range(3):
        check(found, iteration)
        assert found.verify(iteration) == ""
    found.drop(found.iterations - {2})
    assert found.iterations == {2} == reopened(path).iterations
    found.remove()
    assert not path.exists()


def test_an_iteration_that_is_not_committed_is_not_there(tmp_path: Path) -> None:
    log = create(tmp_path / "t")
    write(log, 5, commit=False)
    assert log.iterations == frozenset() == reopened(tmp_path / "t").iterations
    with pytest.raises(TranscriptInvalid, match="no transcript of iteration 5"):
        log.records(5, Direction.FORWARD)
    log.abandon(5)
    with pytest.raises(StoreError, match="not begun"):
        log.commit(5)
    with pytest.raises(StoreError, match="no iteration is begun"):
        log.add(BoundaryKey(Direction.FORWARD, 0, 0, 0), 1)
    log.abandon(5)


def test_an_iteration_is_replaced_only_by_a_committed_one(tmp_path: Path) -> None:
    log = create(tmp_path / "t")
    write(log, 7)
    write(log, 7, commit=False)
    check(log, 7)
    check(reopened(tmp_path / "t"), 7)
    log.commit(7)
    for _ in range(10):
        write(log, 7)
    check(reopened(tmp_path / "t"), 7)
    assert log.iterations == {7}


def test_a_full_ring_gives_up_the_oldest(tmp_path: Path) -> None:
    log = create(tmp_path / "t")
    for iteration in range(4):
        assert log.begin(iteration) is None
        log.commit(iteration)
    assert log.begin(2) == 2
    log.commit(2)
    assert log.begin(4) == 0
    assert log.iterations == {1, 2, 3}
    for iteration in (5, 6, 7):
        log.begin(iteration)
    with pytest.raises(StoreError, match="every segment"):
        log.begin(8)


def test_the_next_iteration_may_begin_before_the_commit(tmp_path: Path) -> None:
    log = create(tmp_path / "t")
    write(log, 0, commit=False)
    write(log, 1, commit=False)
    log.commit(0)
    log.commit(1)
    check(log, 0)
    check(log, 1)


def test_there_is_no_room_beyond_the_plan(tmp_path: Path) -> None:
    log = create(tmp_path / "t")
    log.begin(0)
    with pytest.raises(StoreError, match="no room for activation 3"):
        log.add(BoundaryKey(Direction.FORWARD, 3, 3, 0), SHAPE["data_bytes"] + 1)
    for order in range(1000):
        log.note_received(BoundaryKey(Direction.FORWARD, order, 0, 0), order)
    with pytest.raises(StoreError, match="index of"):
        log.commit(0)
    assert log.iterations == frozenset()
    write(log, 0)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(tmp_path: Path, position: float, bit: int) -> None:
    path = tmp_path / "t"
    log = create(path)
    write(log, 3)
    start = log.geometry.slot_offset(0)
    log.close()
    data = bytearray(path.read_bytes())
    index_bytes = int.from_bytes(data[start + 16 : start + 24], "little")
    first = HEADER_BYTES + SHAPE["manifest_bytes"]
    records = [first + number * aligned(RECORD_BYTES) + i for number in range(8) for i in range(RECORD_BYTES)]
    # Iteration, length and digest of the index, the index, the records; the commit word is any number but 0.
    places = [*range(8, 24), *range(32, 48), *range(HEADER_BYTES, HEADER_BYTES + index_bytes), *records]
    data[start + places[int(position * len(places))]] ^= 1 << bit
    path.write_bytes(data)
    found = reopened(path)
    assert 3 not in found.iterations or found.verify(3)


def test_the_superblock_is_guarded(tmp_path: Path) -> None:
    path = tmp_path / "t"
    create(path).close()
    whole = path.read_bytes()
    for damage, error, text in (
        (whole[:40] + b"?" + whole[41:], TranscriptInvalid, "superblock is damaged"),
        (whole[: len(whole) // 2], TranscriptInvalid, "bytes long"),
        (b"MOEVTRN\x09" + whole[8:], StoreError, "transcript format 9, this version reads 2"),
        (b"something else" + whole[14:], StoreError, "not a transcript store"),
    ):
        path.write_bytes(damage)
        with pytest.raises(error, match=text):
            reopened(path)
    path.write_bytes(whole)
    with pytest.raises(StoreError, match="not a slot store"):
        HostStore.open(path)
    with pytest.raises(StoreError, match="No such file"):
        reopened(tmp_path / "absent")


def test_a_foreign_segment_is_refused(tmp_path: Path) -> None:
    for name, run_id, rank in (("mine", "run", 1), ("theirs", "other", 1), ("rank", "run", 2)):
        log = create(tmp_path / name, rank, run_id)
        write(log, 4)
        offset = log.geometry.slot_offset(0)
        log.close()
    mine = bytearray((tmp_path / "mine").read_bytes())
    for name in ("theirs", "rank"):
        path = tmp_path / "mixed"
        path.write_bytes(bytes(mine[:offset]) + (tmp_path / name).read_bytes()[offset:])
        found = reopened(path)
        assert found.iterations == frozenset() and "expected 1, run, 4" in found.rejected[0]


def test_the_newer_of_two_is_used(tmp_path: Path) -> None:
    """A worker that dies between the commit word and the release of the older segment leaves both."""
    path = tmp_path / "t"
    log = create(path)
    write(log, 1)
    shutil.copy(path, tmp_path / "before")
    write(log, 1)
    offset, size = log.geometry.slot_offset(0), log.geometry.slot_bytes
    log.close()
    data = bytearray(path.read_bytes())
    data[offset : offset + size] = (tmp_path / "before").read_bytes()[offset : offset + size]
    path.write_bytes(data)
    found = reopened(path)
    check(found, 1)
    write(found, 2)
    write(found, 3)
    write(found, 4)
    assert reopened(path).iterations == {1, 2, 3, 4}


def write_until_killed(path: str) -> None:
    """Writes iterations for ever."""
    log, iteration = reopened(Path(path)), 0
    while True:
        write(log, iteration)
        log.drop(log.iterations - {iteration - 1, iteration})
        iteration += 1


def test_a_killed_writer_leaves_whole_iterations(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for number in range(4):
        path = tmp_path / f"t{number}"
        create(path).close()
        process = context.Process(target=write_until_killed, args=(str(path),), daemon=True)
        process.start()
        while process.is_alive() and max(reopened(path).iterations, default=0) < 5 + number:
            process.join(0.002)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        found = reopened(path)
        assert found.iterations
        for iteration in found.iterations:
            check(found, iteration)


def test_no_room_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="GiB of transcript"):
        TranscriptLog.create(Path("/proc/nothing/t"), {"rank": 0, "run_id": ""}, SHAPE, DigestPool())
