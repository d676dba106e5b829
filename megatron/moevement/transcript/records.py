"""What a transcript holds of one iteration, as values and as JSON; the same in the file and on the wire."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.moevement.errors import TranscriptInvalid
from megatron.moevement.store.format import DigestedRegion, region_digests
from megatron.moevement.transcript.keys import BoundaryKey, Direction
from moevement_ext import DigestPool

ALIGNMENT_BYTES = 64
# JSON of one entry: names, numbers and a digest.
ENTRY_BYTES = 160
INDEX_BASE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sent tensor lies in the data, and its digest (XXH3-128 over the XXH3-128 of every 4 MiB), if known."""

    key: BoundaryKey
    offset: int
    nbytes: int
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Receipt:
    """That a tensor was received, and its fingerprint."""

    key: BoundaryKey
    fingerprint: int


@dataclass(frozen=True, slots=True)
class Record:
    """A sent tensor: its bytes, verified against `digest`."""

    key: BoundaryKey
    data: memoryview
    digest: str


@dataclass(frozen=True, slots=True)
class Index:
    """One iteration of one rank, without the bytes themselves."""

    rank: int
    run_id: str
    iteration: int
    places: tuple[Place, ...]
    receipts: tuple[Receipt, ...]

    def encode(self) -> bytes:
        """As JSON."""
        places = [[*_key_list(p.key), p.offset, p.nbytes, p.digest] for p in self.places]
        receipts = [[*_key_list(r.key), r.fingerprint] for r in self.receipts]
        content = {"rank": self.rank, "run_id": self.run_id, "iteration": self.iteration}
        return json.dumps({**content, "sent": places, "received": receipts}, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, body: bytes) -> "Index":
        """What `encode` made; `body` is verified by the caller."""
        content: Mapping[str, Any] = json.loads(body)
        return cls(
            content["rank"],
            content["run_id"],
            content["iteration"],
            tuple(Place(_key(entry), *entry[4:]) for entry in content["sent"]),
            tuple(Receipt(_key(entry), entry[4]) for entry in content["received"]),
        )


def _key_list(key: BoundaryKey) -> list[str | int]:
    return [key.direction.value, key.order, key.micro_batch, key.chunk]


def _key(entry: Sequence[Any]) -> BoundaryKey:
    return BoundaryKey(Direction(entry[0]), entry[1], entry[2], entry[3])


def aligned(nbytes: int) -> int:
    """Bytes that a record of `nbytes` takes up."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def index_room(entries: int) -> int:
    """Room for an index of so many records and receipts, in bytes."""
    return INDEX_BASE_BYTES + ENTRY_BYTES * entries


def place_digests(pool: DigestPool, base: int, places: Sequence[Place]) -> list[str]:
    """Digests of the bytes at `places`, which lie at address `base`."""
    if not places:
        return []
    regions = [DigestedRegion(str(i), place.offset, (place.nbytes,)) for i, place in enumerate(places)]
    found = region_digests(pool, base, regions)
    return [found[str(i)] for i in range(len(places))]


def verified(pool: DigestPool, base: int, data: memoryview, places: Sequence[Place], whose: str) -> tuple[Record, ...]:
    """The records at `places` of `data`, which starts at address `base`.

    Raises:
        TranscriptInvalid: a place lies outside, or the bytes are not those that were digested.
    """
    for place in places:
        if place.offset < 0 or place.nbytes < 0 or place.offset + place.nbytes > len(data):
            raise TranscriptInvalid(f"{whose}: {place.key} lies outside of the data")
    for place, digest in zip(places, place_digests(pool, base, places), strict=True):
        if digest != place.digest:
            raise TranscriptInvalid(f"{whose}: the digest of {place.key} is wrong")
    return tuple(Record(p.key, data[p.offset : p.offset + p.nbytes], p.digest) for p in places)
