"""The bytes of a store file: superblock, slot headers and manifests. No pickle: JSON, and offsets that are checked.

    superblock   4 KiB    magic, length, digest, JSON
    slot 0..n-1  each:    header 64 B | manifest (up to MANIFEST_BYTES) | data

A slot is committed by the last write, of its header's first word. The word holds the slot's sequence number, so a
reader can tell whether the slot changed under it.
"""

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, chain
from typing import Any

import numpy as np
import xxhash

from megatron.moevement.errors import SlotInvalid, StoreError
from megatron.moevement.types import BufferInfo, IterationRecord, SlotSpec, StartState
from moevement_ext import DigestPool, EngineError

FORMAT_VERSION = 4
SUPERBLOCK_MAGIC = b"MOEVSTR" + bytes([FORMAT_VERSION])
PAGE_BYTES = 4096
_SUPERBLOCK = struct.Struct("<8sQ16s")
_HEADER = struct.Struct("<QQQQ16s")
HEADER_BYTES = 64
UNCOMMITTED = 0
DIGEST_BYTES = 16
DIGEST_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shape of a store file, in bytes: number of slots and the room that each has for manifest and data."""

    slots: int
    manifest_bytes: int
    data_bytes: int
    superblock_bytes: int

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot with its header, in whole pages."""
        return _pages(HEADER_BYTES + self.manifest_bytes + self.data_bytes)

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return self.superblock_bytes + self.slots * self.slot_bytes

    def slot_offset(self, index: int) -> int:
        """Where slot `index` starts."""
        return self.superblock_bytes + index * self.slot_bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a committed slot says of itself.

    `digests` (see `region_digests`) and `adam_steps` are by region name. `record` is that of the iteration before.
    """

    rank: int
    run_id: str
    spec: SlotSpec
    start: StartState
    record: IterationRecord | None
    adam_steps: Mapping[str, tuple[float, ...]]
    digests: Mapping[str, str]


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def digest_bytes(data: bytes | memoryview) -> bytes:
    """XXH3, 128 bits, of `data`. Releases the GIL for all but short inputs."""
    return xxhash.xxh3_128_digest(data)


@dataclass(frozen=True, slots=True)
class DigestedRegion:
    """A part of a slot with a digest of its own: pieces of `sizes` (bytes), one after the other from `offset` on."""

    name: str
    offset: int
    sizes: tuple[int, ...]


def region_digests(pool: DigestPool, base: int, regions: Sequence[DigestedRegion]) -> dict[str, str]:
    """Digests of regions in host memory, hexadecimal, by name. `join_digests` says what they are.

    Args:
        pool: does the work.
        base: address of the slot's data.
        regions: where they lie, from `base` on.

    Raises:
        EngineError: the pool is closed, or took longer than DIGEST_TIMEOUT_SECONDS.
    """
    sizes = np.array([size for region in regions for size in region.sizes], dtype=np.uint64)
    starts = [accumulate((region.offset, *region.sizes[:-1])) for region in regions if region.sizes]
    addresses = np.fromiter(chain.from_iterable(starts), np.uint64, len(sizes)) + np.uint64(base)
    ticket = pool.submit(addresses, sizes)
    found = pool.wait(ticket, DIGEST_TIMEOUT_SECONDS)
    if found is None:
        # Returns only when no thread reads the memory any more.
        pool.cancel(ticket)
        raise EngineError(f"digests took longer than {DIGEST_TIMEOUT_SECONDS:g} s")
    return join_digests(found, regions)


def join_digests(found: bytes, regions: Sequence[DigestedRegion]) -> dict[str, str]:
    """A region's digest, hexadecimal, by name: the XXH3-128 of its pieces' digests, 16 bytes each, in their order.

    A piece's digest is that of `DigestPool` and `DeviceDigests`. Pieces have digests of their own because they lie
    apart on the device.
    """
    digests, begin = {}, 0
    for region in regions:
        end = begin + DIGEST_BYTES * len(region.sizes)
        digests[region.name] = digest_bytes(found[begin:end]).hex()
        begin = end
    return digests


def encode_superblock(content: Mapping[str, Any], magic: bytes = SUPERBLOCK_MAGIC) -> bytes:
    """The superblock, padded to whole pages. `magic`: 7 bytes that say what the file is, and its format."""
    body = json.dumps(content, separators=(",", ":")).encode()
    block = _SUPERBLOCK.pack(magic, len(body), digest_bytes(body)) + body
    return block.ljust(_pages(len(block)), b"\0")


def decode_superblock(view: memoryview, path: str, wanted: bytes = SUPERBLOCK_MAGIC) -> dict[str, Any]:
    """The content of a superblock whose magic is `wanted`.

    Raises:
        StoreError: another kind of file, or of another format; a person must decide. The message names the file.
        SlotInvalid: torn or changed; the store is lost.
    """
    kind = "slot" if wanted == SUPERBLOCK_MAGIC else "transcript"
    if len(view) < _SUPERBLOCK.size:
        raise SlotInvalid(f"{path}: too short for a {kind} store")
    magic, length, digest = _SUPERBLOCK.unpack(view[: _SUPERBLOCK.size])
    if not any(view[: _SUPERBLOCK.size]):
        raise SlotInvalid(f"{path}: not finished: its worker died while it made the file")
    if magic[:7] != wanted[:7]:
        raise StoreError(f"{path}: not a {kind} store; remove it or use --sparse-ckpt-fresh")
    if magic != wanted:
        raise StoreError(
            f"{path}: {kind} format {magic[7]}, this version reads {wanted[7]}; use the version that wrote it, "
            "or --sparse-ckpt-fresh to discard it"
        )
    body = bytes(view[_SUPERBLOCK.size : _SUPERBLOCK.size + length])
    if len(body) != length or digest_bytes(body) != digest:
        raise SlotInvalid(f"{path}: the superblock is damaged")
    content: dict[str, Any] = json.loads(body)
    return content


def superblock_length(content: Mapping[str, Any]) -> int:
    """Bytes that the superblock of `content` takes, in whole pages."""
    return len(encode_superblock(content))


def _fields(value: SlotSpec | StartState | IterationRecord | BufferInfo) -> dict[str, Any]:
    # `asdict` would copy every name of every operator; nothing is changed here.
    return {field.name: getattr(value, field.name) for field in fields(value)}


def encode_manifest(manifest: Manifest) -> bytes:
    """JSON of a manifest; floats keep every bit (shortest round-trip text)."""
    start = _fields(manifest.start)
    start["blobs"] = {name: base64.b64encode(blob).decode() for name, blob in manifest.start.blobs.items()}
    start["buffers"] = [_fields(buffer) for buffer in manifest.start.buffers]
    return json.dumps(
        {
            "rank": manifest.rank,
            "run_id": manifest.run_id,
            "spec": _fields(manifest.spec),
            "start": start,
            "record": _fields(manifest.record) if manifest.record else None,
            "adam_steps": manifest.adam_steps,
            "digests": manifest.digests,
        },
        separators=(",", ":"),
    ).encode()


def decode_manifest(body: bytes) -> Manifest:
    """The manifest that `encode_manifest` wrote."""
    content = json.loads(body)
    start, record = content["start"], content["record"]
    start["blobs"] = {name: base64.b64decode(text, validate=True) for name, text in start["blobs"].items()}
    start["scalers"] = tuple(start["scalers"])
    start["buffers"] = tuple(BufferInfo(**{**item, "shape": tuple(item["shape"])}) for item in start["buffers"])
    if record is not None:
        record = IterationRecord(
            **{
                **record,
                "learning_rates": tuple(record["learning_rates"]),
                "weight_decays": tuple(record["weight_decays"]),
            }
        )
    return Manifest(
        rank=content["rank"],
        run_id=content["run_id"],
        spec=_decode_spec(content["spec"]),
        start=StartState(**start),
        record=record,
        adam_steps={name: tuple(steps) for name, steps in content["adam_steps"].items()},
        digests=content["digests"],
    )


def _decode_spec(content: dict[str, Any]) -> SlotSpec:
    names = ("full", "weights_only", "group_lengths")
    full, weights_only, lengths = (tuple(content[name]) for name in names)
    return SlotSpec(content["step"], content["index"], full, weights_only, lengths)


def encode_header(step: int, manifest: bytes, data_bytes: int) -> bytes:
    """A slot header whose commit word is still UNCOMMITTED."""
    return _HEADER.pack(UNCOMMITTED, step, len(manifest), data_bytes, digest_bytes(manifest)).ljust(HEADER_BYTES, b"\0")


def decode_header(view: memoryview, geometry: Geometry) -> tuple[int, int, bytes]:
    """Step, data bytes and manifest of a committed slot.

    Args:
        view: the whole slot.

    Raises:
        SlotInvalid: not committed, out of bounds, or the manifest's digest is wrong.
    """
    word, step, manifest_bytes, data_bytes, digest = _HEADER.unpack(view[: _HEADER.size])
    if word == UNCOMMITTED:
        raise SlotInvalid("not committed")
    if manifest_bytes > geometry.manifest_bytes or data_bytes > geometry.data_bytes:
        raise SlotInvalid("the header gives lengths that don't fit the slot")
    manifest = bytes(view[HEADER_BYTES : HEADER_BYTES + manifest_bytes])
    if digest_bytes(manifest) != digest:
        raise SlotInvalid("the manifest's digest is wrong")
    return step, data_bytes, manifest
