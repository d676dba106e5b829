"""One iteration of a neighbour's transcript as one contiguous buffer, for the way to a rank that replays."""

import json
import struct
from dataclasses import dataclass

import numpy as np

from megatron.moevement.errors import TranscriptInvalid
from megatron.moevement.store.format import digest_bytes
from megatron.moevement.transcript.keys import Direction
from megatron.moevement.transcript.log import TranscriptLog
from megatron.moevement.transcript.records import Index, Place, Receipt, Record, aligned, verified
from moevement_ext import DigestPool

_MAGIC = b"MOEVBND\x01"
# magic, bytes of the header, digest of the header
_PREFIX = struct.Struct("<8sQ16s")


@dataclass(frozen=True, slots=True)
class Bundle:
    """What a neighbour gives to a rank that replays `iteration`.

    Attributes:
        rank: the neighbour.
        run_id: of the transcript.
        iteration: which.
        direction: of `records`.
        records: what the neighbour sent in `direction`, in order.
        receipts: of what the neighbour received in the opposite direction, in order.
    """

    rank: int
    run_id: str
    iteration: int
    direction: Direction
    records: tuple[Record, ...]
    receipts: tuple[Receipt, ...]


def pack(log: TranscriptLog, iteration: int, direction: Direction) -> bytearray:
    """What the sender of `direction` gives to the receiver. Every record is verified when it is read.

    Raises:
        TranscriptInvalid: the transcript can't be used.
    """
    records, receipts = log.records(iteration, direction), log.receipts(iteration, direction.opposite)
    places, used = [], 0
    for record in records:
        # The digest is the one that was made at the commit: it covers the packed copy too.
        places.append(Place(record.key, used, len(record.data), record.digest))
        used = aligned(used + len(record.data))
    index = Index(log.rank, log.run_id, iteration, tuple(places), receipts).encode()
    header = json.dumps({"direction": direction.value, "data_bytes": used}).encode() + b"\n" + index
    prefix = _PREFIX.pack(_MAGIC, len(header), digest_bytes(header))
    start = aligned(len(prefix) + len(header))
    packed = bytearray(start + used)
    packed[: len(prefix) + len(header)] = prefix + header
    for record, place in zip(records, places, strict=True):
        packed[start + place.offset : start + place.offset + place.nbytes] = record.data
    return packed


def unpack(buffer: memoryview, digests: DigestPool) -> Bundle:
    """The bundle in `buffer`, verified; its records are views of the buffer.

    Raises:
        TranscriptInvalid: it is cut off, or a bit of it has changed.
    """
    if len(buffer) < _PREFIX.size:
        raise TranscriptInvalid("a packed transcript is cut off")
    magic, length, digest = _PREFIX.unpack(buffer[: _PREFIX.size])
    header = bytes(buffer[_PREFIX.size : _PREFIX.size + length])
    if magic != _MAGIC or len(header) != length or digest_bytes(header) != digest:
        raise TranscriptInvalid("the header of a packed transcript is damaged")
    first, body = header.split(b"\n", 1)
    about, index = json.loads(first), Index.decode(body)
    direction, whose = Direction(about["direction"]), f"transcript of rank {index.rank}, iteration {index.iteration}"
    start = aligned(_PREFIX.size + length)
    data = buffer[start : start + about["data_bytes"]]
    if len(data) != about["data_bytes"]:
        raise TranscriptInvalid(f"{whose}: cut off")
    records = verified(digests, _address(data), data, index.places, whose)
    return Bundle(index.rank, index.run_id, index.iteration, direction, records, index.receipts)


def _address(buffer: bytearray | memoryview) -> int:
    return int(np.frombuffer(buffer, dtype=np.uint8).ctypes.data) if len(buffer) else 0
