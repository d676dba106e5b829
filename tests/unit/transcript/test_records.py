"""Indexes go through JSON unchanged; places outside of the data and changed bytes are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.moevement.errors import TranscriptInvalid
from megatron.moevement.transcript.keys import BoundaryKey, Direction
from megatron.moevement.transcript.records import Index, Place, Receipt, aligned, index_room, place_digests, verified
from moevement_ext import DigestPool

KEYS = st.builds(
    BoundaryKey, st.sampled_from(Direction), st.integers(0, 99999), st.integers(0, 99999), st.integers(0, 99)
)
SIGNED = st.integers(-(1 << 63), (1 << 63) - 1)
PLACES = st.builds(Place, KEYS, st.integers(0, 1 << 40), st.integers(0, 1 << 34), st.just("0" * 32))


@given(st.lists(PLACES, max_size=50), st.lists(st.builds(Receipt, KEYS, SIGNED), max_size=50), st.integers(0, 1 << 40))
def test_an_index_survives_and_fits_its_room(places: list[Place], receipts: list[Receipt], iteration: int) -> None:
    index = Index(12345, "f" * 32, iteration, tuple(places), tuple(receipts))
    body = index.encode()
    assert Index.decode(body) == index
    assert len(body) <= index_room(len(places) + len(receipts))


@given(st.integers(0, 1 << 40))
def test_records_are_aligned(nbytes: int) -> None:
    assert aligned(nbytes) % 64 == 0 and 0 <= aligned(nbytes) - nbytes < 64


def test_what_does_not_fit_or_differs_is_refused() -> None:
    data = np.arange(256, dtype=np.uint8)
    key, pool, base = BoundaryKey(Direction.BACKWARD, 2, 1, 0), DigestPool(), data.ctypes.data
    place = Place(key, 64, 100)
    good = Place(key, 64, 100, place_digests(pool, base, [place])[0])
    (record,) = verified(pool, base, data.data, [good], "here")
    assert bytes(record.data) == data[64:164].tobytes() and record.digest == good.digest
    for outside in (Place(key, 200, 57), Place(key, -1, 4), Place(key, 0, -4)):
        with pytest.raises(TranscriptInvalid, match="here: gradient 2 .micro-batch 1, model chunk 0. lies outside"):
            verified(pool, base, data.data, [outside], "here")
    data[100] ^= 1
    with pytest.raises(TranscriptInvalid, match="here: the digest of gradient 2"):
        verified(pool, base, data.data, [good], "here")
    assert place_digests(pool, base, []) == []
