"""Reading slots: what is offered is verified, and the pieces are those of the table."""

import ctypes
from pathlib import Path

import pytest

from megatron.moevement.errors import SlotInvalid
from megatron.moevement.operators.table import OperatorTable
from megatron.moevement.recovery.sources import SlotReader
from megatron.moevement.store.format import HEADER_BYTES, Manifest
from megatron.moevement.store.host_store import HostStore
from megatron.moevement.types import Presence
from moevement_ext import DigestPool
from tests.support.slots import BUFFER, create_store
from tests.support.tables import small_table
from tests.unit.schedule.test_slots import schedule
from tests.unit.store.test_host_store import write

TABLE = small_table()


def stored(path: Path, *steps: int) -> HostStore:
    """A store with the slots of some steps of a rolling window of two."""
    store = create_store(path, TABLE)
    for step in steps:
        write(store, schedule(2, "rolling").spec(step))
    return store


def test_pieces_hold_what_was_written(tmp_path: Path) -> None:
    store = stored(tmp_path / "s", 4)
    reader, spec = SlotReader(store, TABLE, 0, digests=DigestPool()), schedule(2, "rolling").spec(4)
    found = reader.operators(4, TABLE.names)
    assert [o.name for o in found] == [*spec.full, *spec.weights_only]
    layout = {region.name: region for region in reader.layout(reader.manifest(4))}
    for operator in found:
        offset = layout[operator.name].offset
        for piece in operator.pieces:
            assert ctypes.string_at(piece.address, piece.nbytes) == bytes(
                ((offset + i) * 7 + 4) % 256 for i in range(piece.nbytes)
            )
            offset += piece.nbytes
        full = operator.presence is Presence.FULL
        assert full == (operator.name in spec.full) and bool(operator.adam_steps) == full
    assert [piece.nbytes for piece in reader.buffers(4)] == [BUFFER.nbytes]


def test_a_manifest_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stored(tmp_path / "s", 0, 1)
    reader, original, read = SlotReader(store, TABLE, 0, digests=DigestPool()), store.manifest, list[int]()

    def manifest(step: int) -> Manifest:
        read.append(step)
        return original(step)

    monkeypatch.setattr(store, "manifest", manifest)
    for _ in range(2):
        for step in (0, 1):
            assert reader.operators(step, TABLE.names)
            assert reader.buffers(step)
            assert reader.manifest(step) == original(step)
    assert read == [0, 1]


def test_only_the_named_operators_are_read(tmp_path: Path) -> None:
    reader = SlotReader(stored(tmp_path / "s", 0), TABLE, 0, digests=DigestPool())
    assert [o.name for o in reader.operators(0, {"output", "layer000.router", "elsewhere"})] == [
        "layer000.router",
        "output",
    ]
    assert reader.operators(0, set()) == []


def test_a_damaged_slot_is_rejected_and_the_others_are_not(tmp_path: Path) -> None:
    store = stored(tmp_path / "s", 0, 1, 2)
    data, _ = store.data(1)
    data[layout_end(store, 1) - 1] ^= 1
    usable, rejected = SlotReader(store, TABLE, 0, digests=DigestPool()).verified()
    assert set(usable) == {0, 2} and "digest of" in rejected[1]
    assert set(SlotReader(store, TABLE, 0, digests=None).verified()[0]) == {0, 1, 2}, "the control: digests find it"


def layout_end(store: HostStore, step: int) -> int:
    """The end of the last operator of the slot."""
    reader = SlotReader(store, TABLE, 0, digests=None)
    last = reader.layout(reader.manifest(step)).regions[-1]
    return last.offset + last.nbytes


def test_a_slot_of_another_model_is_refused(tmp_path: Path) -> None:
    store = stored(tmp_path / "s", 0)
    fewer = OperatorTable(o for o in TABLE if o.name != "layer001.expert003")
    with pytest.raises(SlotInvalid, match=r"layer001\.expert003 is not in the model"):
        SlotReader(store, fewer, 0, digests=DigestPool()).manifest(0)
    larger = small_table(expert_elements=100_000)
    with pytest.raises(SlotInvalid, match="longer than its room"):
        SlotReader(store, larger, 0, digests=DigestPool()).verify(0)


def test_another_rank_and_a_missing_step_are_refused(tmp_path: Path) -> None:
    store = stored(tmp_path / "s", 0)
    with pytest.raises(SlotInvalid, match="slot of rank 0"):
        SlotReader(store, TABLE, 1, digests=DigestPool()).verify(0)
    with pytest.raises(SlotInvalid, match="no slot of step 7"):
        SlotReader(store, TABLE, 0, digests=DigestPool()).verify(7)


def test_a_flipped_manifest_is_refused(tmp_path: Path) -> None:
    store = stored(tmp_path / "s", 0)
    offset = store.geometry.slot_offset(0)
    store.close()
    with (tmp_path / "s").open("r+b") as file:
        file.seek(offset + HEADER_BYTES)
        file.write(b"[")
    assert not HostStore.open(tmp_path / "s").committed
