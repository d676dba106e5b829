"""Capture: copies the slot of Step t while iteration t runs, and fences it before the optimizer step.

Where the device makes digests it reads the same memory at the same time, so that they tell of errors of the copy too.
"""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron.moevement.errors import MoevementError
from megatron.moevement.operators.state import TrainingState
from megatron.moevement.snapshot.layout import SlotLayout, digested_regions, slot_layout
from megatron.moevement.store.committer import CopiedSlot
from megatron.moevement.store.format import DigestedRegion, Manifest
from megatron.moevement.store.host_store import HostStore, SlotLease
from megatron.moevement.types import IterationRecord, Presence, SlotSpec, StartState
from moevement_ext import CopyEngine, DeviceDigests, EngineError

FENCE_TIMEOUT_SECONDS = 120.0
# How exactly a stall is measured.
_STALL_SECONDS = 0.002
# A new order of experts makes new kinds of slots, W for each order.
BATCHES_KEPT_LIMIT = 256


@dataclass(frozen=True, slots=True)
class _Batch:
    """What the engine is given for one kind of slot: the same in every window, because tensors keep their storage.

    `sources` are addresses on the device but for the buffers, which come first; `offsets` and `sizes` are of all.
    """

    layout: SlotLayout
    digested: tuple[DigestedRegion, ...]
    sources: npt.NDArray[np.uint64]
    offsets: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.uint64]
    groups: list[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class _UnderWay:
    lease: SlotLease
    batch: _Batch
    manifest: Manifest
    ticket: int
    digest_ticket: int | None
    submitted_time: float


class Capture:
    """One slot at a time: `begin` before the forward pass, `fence` before the optimizer step.

    Args:
        state: the training state to copy from.
        store: where slots are leased.
        engine: copies without the GIL.
        rank, run_id: written to every manifest, so that a slot of another rank or run is recognised.
        digests: digests what is copied, on the device; None leaves that to whoever commits the slot.
    """

    def __init__(
        self,
        state: TrainingState,
        store: HostStore,
        engine: CopyEngine,
        rank: int,
        run_id: str,
        digests: DeviceDigests | None = None,
    ) -> None:
        self._state = state
        self._store = store
        self._engine = engine
        self._digests = digests
        self._rank = rank
        self._run_id = run_id
        self._under_way: _UnderWay | None = None
        self._batches: dict[tuple[tuple[str, ...], tuple[str, ...]], _Batch] = {}

    def begin(self, spec: SlotSpec, record: IterationRecord | None) -> int:
        """Starts copying the slot; returns its bytes.

        Args:
            spec: what the slot holds.
            record: of the iteration before, which a replay from the slot before needs.

        Raises:
            MoevementError: no free slot, or the copy engine refuses; nothing is under way then.
        """
        lease = self._store.lease(spec.step)
        if lease is None:
            raise MoevementError("no free slot")
        start, buffers = self._state.start_state(spec.step)
        try:
            batch = self._batch(spec, start)
        except MoevementError:
            self._store.abandon(lease)
            raise
        layout = batch.layout
        if layout.nbytes > lease.data_bytes:
            self._store.abandon(lease)
            raise MoevementError(f"the slot needs {layout.nbytes} bytes, there is room for {lease.data_bytes}")
        # Everything that a manifest needs is gathered here, where the device still makes the optimizer step before.
        manifest = Manifest(
            rank=self._rank,
            run_id=self._run_id,
            spec=spec,
            start=start,
            record=record,
            adam_steps={name: self._state.adam_steps(name) for name in spec.full},
            digests={},
        )
        sources = np.concatenate([np.array([piece.address for piece in buffers], dtype=np.uint64), batch.sources])
        digest_ticket = None
        try:
            submitted = time.time()
            digest_ticket = self._start_digests(spec, sources, batch.sizes)
            ticket = self._engine.submit(
                sources,
                batch.offsets + np.uint64(lease.data_address),
                batch.sizes,
                stream=self._state.stream(),
                label=f"Step {spec.step}",
                groups=batch.groups,
            )
        except (EngineError, ValueError) as error:
            self._give_up(lease, None, digest_ticket)
            raise MoevementError(f"copy engine: {error}") from error
        self._under_way = _UnderWay(lease, batch, manifest, ticket, digest_ticket, submitted)
        return layout.nbytes

    def fence(self) -> tuple[CopiedSlot | None, float]:
        """Waits until the slot under way has been read from the device.

        Returns:
            The copied slot, None if none was under way, and the seconds that training was held up: those of this call
            in which the device had nothing left to do.

        Raises:
            MoevementError: the copy failed or took too long; it is cancelled and the slot is free again.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return None, 0.0
        try:
            self._engine.hurry(under_way.ticket)
            finished, idle_since = self._wait(under_way.ticket)
            digests, digest_seconds = self._finish_digests(under_way.digest_ticket) if finished else (None, 0.0)
        except EngineError as error:
            self._give_up(under_way.lease, under_way.ticket, under_way.digest_ticket)
            raise MoevementError(f"copy engine: {error}") from error
        if not finished or digests is None:
            self._give_up(under_way.lease, under_way.ticket, under_way.digest_ticket)
            what = "digests" if finished else "copy"
            raise MoevementError(f"the {what} took longer than {FENCE_TIMEOUT_SECONDS:g} s")
        batch = under_way.batch
        copy = self._engine.stats(under_way.ticket)
        copied = CopiedSlot(
            under_way.lease,
            under_way.manifest,
            batch.digested,
            batch.layout.nbytes,
            under_way.submitted_time + copy.queue_seconds,
            copy.copy_seconds,
            digests,
            digest_seconds,
        )
        return copied, time.perf_counter() - idle_since if idle_since is not None else 0.0

    def _wait(self, ticket: int) -> tuple[bool, float | None]:
        """Whether the copy was done in time, and since when the device had nothing to do; None if it still has."""
        arrived = self._state.arrival()
        started = time.perf_counter()
        idle_since = started if arrived() else None
        while not (finished := self._engine.wait(ticket, _STALL_SECONDS)):
            now = time.perf_counter()
            if now - started > FENCE_TIMEOUT_SECONDS:
                break
            if idle_since is None and arrived():
                idle_since = now
        return finished, idle_since

    def cancel(self) -> None:
        """Drops the slot under way, if any."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            self._give_up(under_way.lease, under_way.ticket, under_way.digest_ticket)

    def _give_up(self, lease: SlotLease, ticket: int | None, digest_ticket: int | None) -> None:
        """Frees the slot. No chunk is in flight then; digests that the device still makes are of no use to anybody."""
        if digest_ticket is not None and self._digests is not None:
            self._digests.cancel(digest_ticket)
        if ticket is not None:
            self._engine.cancel(ticket)
        self._store.abandon(lease)

    def _start_digests(
        self, spec: SlotSpec, sources: npt.NDArray[np.uint64], sizes: npt.NDArray[np.uint64]
    ) -> int | None:
        if self._digests is None:
            return None
        names = f"{spec.full[0]} to {spec.full[-1]}" if spec.full else "no operator in full"
        return self._digests.submit(sources, sizes, self._state.stream(), f"Step {spec.step}, {names}")

    def _finish_digests(self, ticket: int | None) -> tuple[bytes | None, float]:
        """Digests and the device's seconds; empty where the device makes none, None if they take too long."""
        if self._digests is None or ticket is None:
            return b"", 0.0
        found = self._digests.wait(ticket, FENCE_TIMEOUT_SECONDS)
        return found, self._digests.seconds(ticket) if found else 0.0

    def _batch(self, spec: SlotSpec, start: StartState) -> _Batch:
        key = (spec.full, spec.weights_only)
        if key not in self._batches:
            if len(self._batches) >= BATCHES_KEPT_LIMIT:
                self._batches.clear()
            self._batches[key] = self._make_batch(spec, start)
        return self._batches[key]

    def _make_batch(self, spec: SlotSpec, start: StartState) -> _Batch:
        layout = slot_layout(self._state.table, spec.full, spec.weights_only, start.buffers)
        pieces = [piece for name in spec.full for piece in self._state.pieces(name, Presence.FULL)]
        pieces += [piece for name in spec.weights_only for piece in self._state.pieces(name, Presence.WEIGHTS_ONLY)]
        sizes = [size for region in layout for size in region.sizes]
        if sizes[len(start.buffers) :] != [piece.nbytes for piece in pieces]:
            raise MoevementError("the training state's pieces don't have the sizes of the operator table")
        return _Batch(
            layout,
            digested_regions(layout),
            np.array([piece.address for piece in pieces], dtype=np.uint64),
            np.array([offset for region in layout for offset in region.offsets], dtype=np.uint64),
            np.array(sizes, dtype=np.uint64),
            [(region.name, len(region.sizes)) for region in layout],
        )
