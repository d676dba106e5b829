"""A packed iteration is the one that was logged; every flipped bit and every cut is noticed."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.moevement.errors import TranscriptInvalid
from megatron.moevement.transcript.keys import Direction
from megatron.moevement.transcript.packing import pack, unpack
from moevement_ext import DigestPool
from tests.support.transcripts import MIDDLE, RECORD_BYTES, content, create, write

POOL = DigestPool()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    log = create(tmp_path_factory.mktemp("log") / "t")
    write(log, 6)
    return bytes(pack(log, 6, Direction.BACKWARD))


def test_what_is_packed_comes_out(packed: bytes) -> None:
    bundle = unpack(memoryview(packed), POOL)
    assert (bundle.rank, bundle.run_id, bundle.iteration, bundle.direction) == (1, "run", 6, Direction.BACKWARD)
    assert [record.key for record in bundle.records] == [*MIDDLE.sent(Direction.BACKWARD)]
    for record in bundle.records:
        assert bytes(record.data) == content(6, Direction.BACKWARD, record.key.order)
    # The receiver of gradients is who has sent the activations.
    assert [receipt.key for receipt in bundle.receipts] == [*MIDDLE.received(Direction.FORWARD)]


def test_what_is_not_there_or_damaged_is_not_packed(tmp_path: Path) -> None:
    log = create(tmp_path / "t")
    write(log, 6)
    with pytest.raises(TranscriptInvalid, match="no transcript of iteration 7"):
        pack(log, 7, Direction.FORWARD)
    log.records(6, Direction.FORWARD)[2].data[5] ^= 1
    with pytest.raises(TranscriptInvalid, match="the digest of activation 2"):
        pack(log, 6, Direction.FORWARD)
    assert pack(log, 6, Direction.BACKWARD)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(packed: bytes, position: float, bit: int) -> None:
    changed = bytearray(packed)
    place = int(position * len(changed))
    changed[place] ^= 1 << bit
    try:
        bundle = unpack(memoryview(changed), POOL)
    except TranscriptInvalid:
        return
    # Between records there are bytes that nobody reads.
    whole = unpack(memoryview(packed), POOL)
    assert [bytes(r.data) for r in bundle.records] == [bytes(r.data) for r in whole.records]
    assert bundle.receipts == whole.receipts and bundle.iteration == whole.iteration


def test_a_flipped_byte_of_a_record_is_noticed(packed: bytes) -> None:
    changed = bytearray(packed)
    place = packed.index(content(6, Direction.BACKWARD, 3)) + RECORD_BYTES - 1
    changed[place] ^= 128
    with pytest.raises(TranscriptInvalid, match="transcript of rank 1, iteration 6: the digest of gradient 3"):
        unpack(memoryview(changed), POOL)


@given(length=st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_a_cut_is_noticed(packed: bytes, length: float) -> None:
    with pytest.raises(TranscriptInvalid):
        unpack(memoryview(packed)[: int(length * len(packed))], POOL)
