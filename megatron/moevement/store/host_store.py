"""Slots in a memory-mapped file that outlives the worker: lease, commit, read, verify."""

import errno
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.moevement.errors import SlotInvalid, StoreError
from megatron.moevement.store import format as fmt
from megatron.moevement.types import SlotInfo
from moevement_ext import HostRegion

_GEOMETRY = "geometry"


@dataclass(frozen=True, slots=True)
class SlotLease:
    """A slot that is being written: its place in the ring, and the address and room of its data area."""

    index: int
    step: int
    sequence: int
    data_address: int
    data_bytes: int


class HostStore:
    """The slots of one rank. Leasing and committing may happen on different threads.

    Memory is taken once, when the file is created; nothing grows afterwards.
    """

    def __init__(self, path: Path, region: HostRegion, content: Mapping[str, Any]) -> None:
        self.path = path
        self.content = content
        self.geometry = fmt.Geometry(**content[_GEOMETRY])
        self._region = region
        self._view = memoryview(region)
        self._lock = threading.Lock()
        self._free: list[int] = []
        self._by_step: dict[int, tuple[int, SlotInfo]] = {}
        self.rejected: list[str] = []
        self._sequence = 0
        self._scan()

    @classmethod
    def create(
        cls, path: Path, content: Mapping[str, Any], slots: int, manifest_bytes: int, data_bytes: int, threads: int = 1
    ) -> "HostStore":
        """Creates the file with all its memory.

        Args:
            path: file to create; it must not exist.
            content: what the superblock holds besides the geometry; JSON values.
            slots, manifest_bytes, data_bytes: number of slots, and room in each.
            threads: how many fill the pages.

        Raises:
            StoreError: no space, or the directory can't be written.
        """
        shape = {"slots": slots, "manifest_bytes": manifest_bytes, "data_bytes": data_bytes}
        # The superblock holds its own length, so its length is settled with a number that is at least as long.
        length = fmt.superblock_length({**content, _GEOMETRY: {**shape, "superblock_bytes": 1 << 40}})
        geometry = fmt.Geometry(**shape, superblock_bytes=length)
        full = {**content, _GEOMETRY: {**shape, "superblock_bytes": length}}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            region = HostRegion.create(str(path), geometry.file_bytes, prefault=True, threads=threads)
        except OSError as error:
            raise StoreError(_creation_message(path, geometry.file_bytes, error)) from error
        block = fmt.encode_superblock(full).ljust(length, b"\0")
        memoryview(region)[: len(block)] = block
        return cls(path, region, full)

    @classmethod
    def open(cls, path: Path) -> "HostStore":
        """Opens an existing file.

        Raises:
            StoreError: it can't be opened, or is of another format.
            SlotInvalid: it is damaged, cut off, or its worker died before it was finished.
        """
        try:
            # A region of no bytes can't be mapped.
            if path.is_file() and path.stat().st_size == 0:
                raise SlotInvalid(f"{path}: empty: its worker died while it made the file")
            region = HostRegion.open(str(path), writable=True)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}; use --sparse-ckpt-fresh to start without it") from error
        content = fmt.decode_superblock(memoryview(region), str(path))
        geometry = fmt.Geometry(**content[_GEOMETRY])
        if region.nbytes < geometry.file_bytes:
            raise SlotInvalid(f"{path}: {region.nbytes} bytes long, its superblock says {geometry.file_bytes}")
        return cls(path, region, content)

    def _scan(self) -> None:
        for index in range(self.geometry.slots):
            offset = self.geometry.slot_offset(index)
            word = self._region.load_word(offset)
            self._sequence = max(self._sequence, word)
            try:
                step, _, manifest = self._read(index)
                decoded = fmt.decode_manifest(manifest)
            except SlotInvalid as error:
                self._free.append(index)
                if word != fmt.UNCOMMITTED:
                    self.rejected.append(f"slot {index}: {error}")
                continue
            info = SlotInfo(
                step, word, frozenset(decoded.spec.full), frozenset(decoded.spec.weights_only), self.geometry.slot_bytes
            )
            older = self._by_step.get(step)
            if older is not None and older[1].sequence > word:
                self._free.append(index)
                continue
            if older is not None:
                self._free.append(older[0])
            self._by_step[step] = (index, info)

    def _read(self, index: int) -> tuple[int, int, bytes]:
        offset = self.geometry.slot_offset(index)
        return fmt.decode_header(self._view[offset : offset + self.geometry.slot_bytes], self.geometry)

    @property
    def committed(self) -> dict[int, SlotInfo]:
        """Committed slots by step, as they are now."""
        with self._lock:
            return {step: info for step, (_, info) in self._by_step.items()}

    @property
    def free_slots(self) -> int:
        """Slots that can be leased now."""
        with self._lock:
            return len(self._free)

    def lease(self, step: int) -> SlotLease | None:
        """A free slot for `step`, marked uncommitted; None if there is none: the ring refuses rather than grows."""
        with self._lock:
            if not self._free:
                return None
            index = self._free.pop(0)
            self._sequence += 1
            offset = self.geometry.slot_offset(index)
            self._region.store_word(offset, fmt.UNCOMMITTED)
            data = offset + fmt.HEADER_BYTES + self.geometry.manifest_bytes
            return SlotLease(index, step, self._sequence, self._region.address + data, self.geometry.data_bytes)

    def commit(self, lease: SlotLease, manifest: fmt.Manifest, data_bytes: int) -> None:
        """Writes header and manifest, then the commit word last.

        An older slot of the same step becomes free. Raises SlotInvalid if the manifest doesn't fit; the slot is
        free again then.
        """
        body = fmt.encode_manifest(manifest)
        if len(body) > self.geometry.manifest_bytes or data_bytes > self.geometry.data_bytes:
            self.abandon(lease)
            raise SlotInvalid(
                f"slot of step {lease.step} needs {len(body)} + {data_bytes} bytes, "
                f"there is room for {self.geometry.manifest_bytes} + {self.geometry.data_bytes}"
            )
        offset = self.geometry.slot_offset(lease.index)
        self._view[offset + fmt.HEADER_BYTES : offset + fmt.HEADER_BYTES + len(body)] = body
        self._view[offset : offset + fmt.HEADER_BYTES] = fmt.encode_header(lease.step, body, data_bytes)
        self._region.store_word(offset, lease.sequence)
        info = SlotInfo(
            lease.step,
            lease.sequence,
            frozenset(manifest.spec.full),
            frozenset(manifest.spec.weights_only),
            self.geometry.slot_bytes,
        )
        with self._lock:
            older = self._by_step.get(lease.step)
            self._by_step[lease.step] = (lease.index, info)
            if older is not None:
                self._invalidate(older[0])

    def abandon(self, lease: SlotLease) -> None:
        """Gives a leased slot back without committing it."""
        with self._lock:
            self._free.append(lease.index)

    def _invalidate(self, index: int) -> None:
        self._region.store_word(self.geometry.slot_offset(index), fmt.UNCOMMITTED)
        self._free.append(index)

    def drop(self, steps: Iterable[int]) -> None:
        """Frees the committed slots of these steps.

        Whoever decides names what goes, not what stays: a slot may be committed while it decides.
        """
        with self._lock:
            for step in steps:
                if step in self._by_step:
                    self._invalidate(self._by_step.pop(step)[0])

    def manifest(self, step: int) -> fmt.Manifest:
        """The manifest of the committed slot of `step`; verified against its digest.

        Raises:
            SlotInvalid: there is no such slot, or it is damaged.
        """
        with self._lock:
            if step not in self._by_step:
                raise SlotInvalid(f"no slot of step {step}")
            index = self._by_step[step][0]
        found, _, body = self._read(index)
        manifest = fmt.decode_manifest(body)
        if found != step or manifest.start.step != step:
            raise SlotInvalid(f"the slot says step {manifest.start.step}, the header {found}, wanted {step}")
        return manifest

    def data(self, step: int) -> tuple[memoryview, int]:
        """The data area of the committed slot of `step`, and its address."""
        with self._lock:
            if step not in self._by_step:
                raise SlotInvalid(f"no slot of step {step}")
            index = self._by_step[step][0]
        offset = self.geometry.slot_offset(index) + fmt.HEADER_BYTES + self.geometry.manifest_bytes
        return self._data(index), self._region.address + offset

    def _data(self, index: int) -> memoryview:
        offset = self.geometry.slot_offset(index) + fmt.HEADER_BYTES + self.geometry.manifest_bytes
        return self._view[offset : offset + self.geometry.data_bytes]

    @property
    def slot_ranges(self) -> list[tuple[int, int]]:
        """Address and bytes of every slot, in whole pages, for registration as pinned memory."""
        base, size = int(self._region.address), self.geometry.slot_bytes
        return [(base + self.geometry.slot_offset(index), size) for index in range(self.geometry.slots)]

    def close(self) -> None:
        """Unmaps the file. Views of it must not be used any more."""
        self._view.release()
        self._region.close()

    def remove(self) -> None:
        """Unmaps and deletes the file."""
        self.close()
        self.path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Deletes a store file if there is one.

    Raises:
        StoreError: it can't be deleted.
    """
    refuse_directory(path)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(_creation_message(path, 0, error)) from error


def refuse_directory(path: Path) -> None:
    """Refuses something else than a file in the store's place.

    Raises:
        StoreError: it is a directory, which a person must remove.
    """
    if path.is_dir():
        raise StoreError(f"{path} is a directory; remove it")


def _creation_message(path: Path, nbytes: int, error: OSError) -> str:
    needed = f"{nbytes / (1 << 30):.2f} GiB"
    if error.errno in (errno.ENOSPC, errno.ENOMEM):
        return (
            f"--sparse-ckpt-dir {path.parent}: no room for {needed} of slots; choose a larger file system, a smaller "
            "--sparse-ckpt-window, or raise the size of the tmpfs"
        )
    if error.errno == errno.EEXIST and path.exists():
        return f"{path}: exists already; use --sparse-ckpt-fresh or another --sparse-ckpt-name"
    return f"--sparse-ckpt-dir {path.parent}: {error.strerror}; choose a directory that can be written"
