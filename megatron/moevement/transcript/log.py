"""The boundary transcript of one rank, in a memory-mapped file that outlives the worker."""

import threading
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron.moevement.errors import SlotInvalid, StoreError, TranscriptInvalid
from megatron.moevement.store import format as fmt
from megatron.moevement.transcript.keys import BoundaryKey, Direction
from megatron.moevement.transcript.records import Index, Place, Receipt, Record, aligned, place_digests, verified
from moevement_ext import DigestPool, HostRegion

FORMAT_VERSION = 2
MAGIC = b"MOEVTRN" + bytes([FORMAT_VERSION])
_GEOMETRY = "geometry"


def transcript_path(directory: Path, rank: int) -> Path:
    """The transcript file of a rank."""
    return directory / f"rank{rank:05d}.transcript"


@dataclass(slots=True)
class _Draft:
    """An iteration that is being written to a segment."""

    segment: int
    sequence: int
    used: int = 0
    places: list[Place] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)


class TranscriptLog:
    """One segment an iteration, in a ring: what this rank sent, and receipts of what it received.

    `begin` and `add` belong to one thread; `note_received` and `commit` may run on another, before the next `begin`.
    Memory is taken once, when the file is created; nothing grows afterwards.
    """

    def __init__(self, path: Path, region: HostRegion, content: Mapping[str, Any], digests: DigestPool) -> None:
        self.path, self.content = path, content
        self.geometry = fmt.Geometry(**content[_GEOMETRY])
        self.rank, self.run_id = int(content["rank"]), str(content["run_id"])
        self._region, self._digests = region, digests
        self._view = memoryview(region)
        self._lock = threading.Lock()
        self._free: list[int] = []
        self._committed: dict[int, int] = {}
        self._drafts: dict[int, _Draft] = {}
        self._current: _Draft | None = None
        self._sequence = 0
        self.rejected: list[str] = []
        self._scan()

    @classmethod
    def create(
        cls, path: Path, content: Mapping[str, Any], shape: Mapping[str, int], digests: DigestPool, threads: int = 1
    ) -> "TranscriptLog":
        """Creates the file with all its memory, in place of an older one.

        Args:
            path: the file.
            content: what it says of itself besides its geometry, JSON: at least `rank` and `run_id`.
            shape: `slots` (segments), `manifest_bytes` (room of an index) and `data_bytes` of a segment.
            digests: does the digests.
            threads: how many fill the pages.

        Raises:
            StoreError: no space, or the directory can't be written.
        """
        length = len(fmt.encode_superblock({**content, _GEOMETRY: {**shape, "superblock_bytes": 1 << 40}}, MAGIC))
        full = {**content, _GEOMETRY: {**shape, "superblock_bytes": length}}
        nbytes = fmt.Geometry(**full[_GEOMETRY]).file_bytes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            region = HostRegion.create(str(path), nbytes, prefault=True, threads=threads)
        except OSError as error:
            raise StoreError(f"{path}: {nbytes / (1 << 30):.2f} GiB of transcript: {error.strerror}") from error
        block = fmt.encode_superblock(full, MAGIC).ljust(length, b"\0")
        memoryview(region)[: len(block)] = block
        return cls(path, region, full, digests)

    @classmethod
    def open(cls, path: Path, digests: DigestPool) -> "TranscriptLog":
        """Opens the file that an earlier worker of this rank left.

        Raises:
            StoreError: it can't be opened, is no transcript, or is of another format.
            TranscriptInvalid: it is damaged or cut off.
        """
        try:
            region = HostRegion.open(str(path), writable=True)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error
        try:
            content = fmt.decode_superblock(memoryview(region), str(path), MAGIC)
        except SlotInvalid as error:
            raise TranscriptInvalid(str(error)) from error
        wanted = fmt.Geometry(**content[_GEOMETRY]).file_bytes
        if region.nbytes < wanted:
            raise TranscriptInvalid(f"{path}: {region.nbytes} bytes long, its superblock says {wanted}")
        return cls(path, region, content, digests)

    def _scan(self) -> None:
        newest: dict[int, tuple[int, int]] = {}
        for segment in range(self.geometry.slots):
            word = self._region.load_word(self.geometry.slot_offset(segment))
            self._sequence = max(self._sequence, word)
            try:
                iteration = self._index(segment).iteration
            except TranscriptInvalid as error:
                if word != fmt.UNCOMMITTED:
                    self.rejected.append(str(error))
                continue
            newest[iteration] = max(newest.get(iteration, (0, 0)), (word, segment))
        self._committed = {iteration: segment for iteration, (_, segment) in newest.items()}
        self._free = sorted(set(range(self.geometry.slots)) - set(self._committed.values()))

    # ------------------------------------------------------------------------------------------------- writing

    def begin(self, iteration: int) -> int | None:
        """Opens a segment for `iteration`; a draft of it that was never committed is dropped.

        An earlier transcript of the same iteration stays until the new one is committed. Without a free segment the
        oldest iteration is given up.

        Returns:
            the iteration that was given up, None if there was room.
        """
        with self._lock:
            self._drop_draft(iteration)
            given_up = None
            if not self._free:
                if not self._committed:
                    raise StoreError(f"{self.path}: every segment is being written")
                given_up = iteration if iteration in self._committed else min(self._committed)
                self._free.append(self._committed.pop(given_up))
            self._sequence += 1
            segment = self._free.pop(0)
            self._region.store_word(self.geometry.slot_offset(segment), fmt.UNCOMMITTED)
            self._current = self._drafts[iteration] = _Draft(segment, self._sequence)
            return given_up

    def _drop_draft(self, iteration: int) -> None:
        draft = self._drafts.pop(iteration, None)
        if draft is not None:
            self._free.append(draft.segment)

    def add(self, key: BoundaryKey, nbytes: int) -> int:
        """Takes room for a sent tensor in the iteration begun last; the caller copies its bytes there before `commit`.

        Returns:
            the address.

        Raises:
            StoreError: the segment is full, or no iteration is begun.
        """
        draft = self._require()
        offset = draft.used
        if offset + nbytes > self.geometry.data_bytes:
            raise StoreError(f"{self.path}: no room for {key}: a segment holds {self.geometry.data_bytes} bytes")
        draft.used = aligned(offset + nbytes)
        draft.places.append(Place(key, offset, nbytes))
        return self._data_address(draft.segment) + offset

    def note_received(self, key: BoundaryKey, fingerprint: int) -> None:
        """Notes a tensor that was received in the iteration begun last."""
        self._require().receipts.append(Receipt(key, fingerprint))

    def _require(self) -> _Draft:
        if self._current is None:
            raise StoreError(f"{self.path}: no iteration is begun")
        return self._current

    def commit(self, iteration: int) -> None:
        """Digests the records of `iteration`, writes the index and then the commit word, in this order.

        Raises:
            StoreError: it isn't begun, or there is no room for the index; its segment is free again then.
        """
        draft = self._drafts.get(iteration)
        if draft is None:
            raise StoreError(f"{self.path}: iteration {iteration} is not begun")
        digests = place_digests(self._digests, self._data_address(draft.segment), draft.places)
        places = tuple(replace(place, digest=digest) for place, digest in zip(draft.places, digests, strict=True))
        body = Index(self.rank, self.run_id, iteration, places, tuple(draft.receipts)).encode()
        if len(body) > self.geometry.manifest_bytes:
            self.abandon(iteration)
            raise StoreError(f"{self.path}: an index of {len(body)} bytes, room for {self.geometry.manifest_bytes}")
        offset = self.geometry.slot_offset(draft.segment)
        self._view[offset + fmt.HEADER_BYTES : offset + fmt.HEADER_BYTES + len(body)] = body
        self._view[offset : offset + fmt.HEADER_BYTES] = fmt.encode_header(iteration, body, draft.used)
        self._region.store_word(offset, draft.sequence)
        with self._lock:
            older = self._committed.get(iteration)
            self._committed[iteration] = draft.segment
            self._forget(iteration, draft)
            if older is not None:
                self._invalidate(older)

    def abandon(self, iteration: int) -> None:
        """Gives up the draft of `iteration`, if there is one."""
        with self._lock:
            draft = self._drafts.get(iteration)
            if draft is not None:
                self._forget(iteration, draft)
                self._free.append(draft.segment)

    def _forget(self, iteration: int, draft: _Draft) -> None:
        del self._drafts[iteration]
        if self._current is draft:
            self._current = None

    def _invalidate(self, segment: int) -> None:
        self._region.store_word(self.geometry.slot_offset(segment), fmt.UNCOMMITTED)
        self._free.append(segment)

    def drop(self, iterations: Set[int]) -> None:
        """Frees those of `iterations` that are committed."""
        with self._lock:
            for iteration in iterations & self._committed.keys():
                self._invalidate(self._committed.pop(iteration))

    # ------------------------------------------------------------------------------------------------- reading

    @property
    def iterations(self) -> frozenset[int]:
        """Iterations that are committed: complete, as far as their indexes say."""
        with self._lock:
            return frozenset(self._committed)

    def records(self, iteration: int, direction: Direction) -> tuple[Record, ...]:
        """What was sent in `direction`, in order; views of this memory, valid until the iteration is dropped.

        Raises:
            TranscriptInvalid: the iteration isn't there, or a byte of it isn't what was sent.
        """
        segment, index = self._find(iteration)
        places = [place for place in index.places if place.key.direction is direction]
        start = self.geometry.slot_offset(segment) + fmt.HEADER_BYTES + self.geometry.manifest_bytes
        data = self._view[start : start + self.geometry.data_bytes]
        return verified(self._digests, self._data_address(segment), data, places, self._name(segment))

    def receipts(self, iteration: int, direction: Direction) -> tuple[Receipt, ...]:
        """Receipts of what came in `direction`, in order.

        Raises:
            TranscriptInvalid: the iteration isn't there, or its index is damaged.
        """
        return tuple(r for r in self._find(iteration)[1].receipts if r.key.direction is direction)

    def verify(self, iteration: int) -> str:
        """Why `iteration` can't be used; empty if every byte of it is as it was written."""
        try:
            for direction in Direction:
                self.records(iteration, direction)
        except TranscriptInvalid as error:
            return str(error)
        return ""

    def _find(self, iteration: int) -> tuple[int, Index]:
        with self._lock:
            segment = self._committed.get(iteration)
        if segment is None:
            raise TranscriptInvalid(f"{self.path}: no transcript of iteration {iteration}")
        index = self._index(segment)
        if index.iteration != iteration:
            raise TranscriptInvalid(f"{self._name(segment)}: is of iteration {index.iteration}, not {iteration}")
        return segment, index

    def _index(self, segment: int) -> Index:
        """The index of a committed segment, verified."""
        offset = self.geometry.slot_offset(segment)
        try:
            whole = self._view[offset : offset + self.geometry.slot_bytes]
            iteration, _, body = fmt.decode_header(whole, self.geometry)
        except SlotInvalid as error:
            raise TranscriptInvalid(f"{self._name(segment)}: {error}") from error
        index = Index.decode(body)
        if (index.rank, index.run_id, index.iteration) != (self.rank, self.run_id, iteration):
            raise TranscriptInvalid(
                f"{self._name(segment)}: is of rank {index.rank}, run {index.run_id}, iteration {index.iteration}; "
                f"expected {self.rank}, {self.run_id}, {iteration}"
            )
        return index

    def _name(self, segment: int) -> str:
        return f"{self.path}, segment {segment}"

    def _data_address(self, segment: int) -> int:
        offset = self.geometry.slot_offset(segment) + fmt.HEADER_BYTES + self.geometry.manifest_bytes
        return int(self._region.address) + offset

    @property
    def segment_ranges(self) -> list[tuple[int, int]]:
        """Address and bytes of every segment, in whole pages, for registration as pinned memory."""
        base, size = int(self._region.address), self.geometry.slot_bytes
        return [(base + self.geometry.slot_offset(segment), size) for segment in range(self.geometry.slots)]

    def close(self) -> None:
        """Unmaps the file. Views of it must not be used any more."""
        self._view.release()
        self._region.close()

    def remove(self) -> None:
        """Unmaps and deletes the file."""
        self.close()
        self.path.unlink(missing_ok=True)
