"""Behind the training loop: digests a copied slot, commits it and frees slots that no window needs."""

import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron.moevement import injection
from megatron.moevement.errors import SlotInvalid
from megatron.moevement.store.format import DigestedRegion, Manifest, join_digests, region_digests
from megatron.moevement.store.host_store import HostStore, SlotLease
from moevement_ext import DigestPool


@dataclass(frozen=True, slots=True)
class CopiedSlot:
    """A slot whose data is complete in host memory.

    `regions` lie in the data area; `data_bytes` is the area's used length. The copy began at `copy_started_time`
    (seconds since the epoch) and took `copy_seconds`. `piece_digests` were made of the source, on the device, in
    `digest_seconds`; where they are empty, digests are made of the copy.
    """

    lease: SlotLease
    manifest: Manifest
    regions: tuple[DigestedRegion, ...]
    data_bytes: int
    copy_started_time: float = 0.0
    copy_seconds: float = 0.0
    piece_digests: bytes = b""
    digest_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Committed:
    """What the committer reports of one slot; `error` is empty if the slot is committed.

    `digest_seconds` are the device's or the threads', whoever made the digests.
    """

    slot: CopiedSlot
    digest_seconds: float
    error: str = ""


class Committer:
    """One thread, at most one slot behind; `on_committed` runs on the thread after every slot.

    Without `digests` slots are committed without, unless they bring some.
    """

    def __init__(self, store: HostStore, digests: DigestPool | None, on_committed: Callable[[Committed], None]) -> None:
        self._store = store
        self._digests = digests
        self._on_committed = on_committed
        self._queue: queue.Queue[CopiedSlot | None] = queue.Queue(1)
        self._thread = threading.Thread(target=self._work, name="moevement-committer", daemon=True)
        self._thread.start()

    def submit(self, slot: CopiedSlot) -> None:
        """Hands over a copied slot, once the one before is committed or rejected.

        The ring has room for one iteration of delay between a copy and the news that every rank has committed it; with
        more, windows would be given up to make room. The wait is part of the stall.
        """
        self._queue.join()
        self._queue.put(slot)

    def drain(self) -> None:
        """Waits until every slot handed over is committed or rejected."""
        self._queue.join()

    def close(self) -> None:
        """Finishes the queue and ends the thread; may be called again, as an interrupted recovery does."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _work(self) -> None:
        while True:
            slot = self._queue.get()
            try:
                if slot is None:
                    return
                self._on_committed(self._try_commit(slot))
            except Exception:
                # Whoever is told of a commit can't end commits: training would wait for the next one forever.
                traceback.print_exc()
            finally:
                self._queue.task_done()

    def _try_commit(self, slot: CopiedSlot) -> Committed:
        try:
            return self._commit(slot)
        except Exception as error:
            # Reported as a failed slot. If it ended this thread, training would wait for a full queue forever.
            self._store.abandon(slot.lease)
            return Committed(slot, 0.0, f"{type(error).__name__}: {error}")

    def _commit(self, slot: CopiedSlot) -> Committed:
        started = time.perf_counter()
        digests: dict[str, str] = {}
        seconds = slot.digest_seconds
        if slot.piece_digests:
            digests = join_digests(slot.piece_digests, slot.regions)
        elif self._digests is not None:
            digests = region_digests(self._digests, slot.lease.data_address, slot.regions)
            seconds = time.perf_counter() - started
        injection.reached("commit", slot.lease.step)
        try:
            self._store.commit(slot.lease, replace(slot.manifest, digests=digests), slot.data_bytes)
        except SlotInvalid as error:
            return Committed(slot, seconds, str(error))
        return Committed(slot, seconds)
