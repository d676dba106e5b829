"""The slots of one rank while iterations run: begun, fenced, committed, retained; one store and one schedule."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.errors import MoevementError
from megatron.moevement.events import EventLog
from megatron.moevement.operators.state import TrainingState
from megatron.moevement.planning import SparsePlan
from megatron.moevement.recovery.plan import announcement, newest_run, slots_to_keep
from megatron.moevement.schedule.age import SnapshotAge
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.schedule.reordering import Reordering
from megatron.moevement.schedule.slots import SlotSchedule
from megatron.moevement.snapshot.capture import Capture
from megatron.moevement.store.committer import Committed, Committer
from megatron.moevement.store.host_store import HostStore
from megatron.moevement.types import IterationRecord, SlotSpec
from moevement_ext import CopyEngine, DeviceDigests, DigestPool


@dataclass(frozen=True, slots=True)
class Tools:
    """What takes slots of `state`: copy engine, digest threads, the world, who is told, and the device's digests.

    Where the device makes none, the threads do; without either, slots are committed without digests.
    """

    config: SparseCheckpointConfig
    state: TrainingState
    agreement: Agreement
    engine: CopyEngine
    digests: DigestPool | None
    events: EventLog
    device_digests: DeviceDigests | None = None


@dataclass(frozen=True, slots=True)
class Retention:
    """The run that slots are of, the newest step that every rank can load, and slots of the longest run."""

    run_id: str
    loadable_everywhere: int
    longest_run: int


# What `SlotCycle.status` says where no slots are taken.
NO_SLOTS: Mapping[str, Any] = {
    **dict.fromkeys(("slot_bytes", "oldest_age_steps", "oldest_age_bound_steps", "window", "window_index"), 0),
    **dict.fromkeys(("memory_used_bytes", "failed_slots"), 0),
    **dict.fromkeys(("stall_seconds", "fence_started_time"), 0.0),
    "oldest_operator": "",
}


_NEVER = -1


class SlotCycle:
    """Takes a slot in every iteration.

    Args:
        tools: how.
        store: where slots go.
        plan: how much room there is.
        schedule: which operators a slot holds.
        first_step: step of the first slot.
    """

    def __init__(
        self, tools: Tools, store: HostStore, plan: SparsePlan, schedule: SlotSchedule, first_step: int
    ) -> None:
        self._tools, self.store, self._plan, self.schedule = tools, store, plan, schedule
        self._first_step, names = first_step, tools.state.table.names
        self._order = Reordering(tools.config, tools.state.table)
        whose = (tools.agreement.rank, store.content["run_id"])
        self._capture = Capture(tools.state, store, tools.engine, *whose, tools.device_digests)
        self._committer = Committer(store, tools.digests, self._on_committed)
        self._age = SnapshotAge(names, max(plan.longest_run, schedule.window), first_step)
        self.failed_slots, self._step, self._failing = 0, first_step, threading.Lock()
        self._slot_bytes, self._stall_seconds, self._fence_started_time = 0, 0.0, 0.0

    def continue_from(self, specs: Mapping[int, SlotSpec], last: int) -> None:
        """Goes on behind a recovery to step `last` from slots of these specs, the same on all ranks of the stage."""
        for step in sorted(specs):
            if step < last:
                self._age.note(step, specs[step].full)
        self._order.restart(last)
        # Whoever kept its state while this stage recovered leaves no window out: the question is collective.
        self._first_step = _NEVER

    @property
    def announcement(self) -> tuple[int, int]:
        """What this rank tells the others of its slots."""
        return announcement(frozenset(self.store.committed))

    @property
    def has_window(self) -> bool:
        """Whether the committed slots hold a window."""
        return newest_run(self.store.committed, self._tools.state.table.names) is not None

    def begin(self, step: int, record: IterationRecord | None, loadable_everywhere: int) -> None:
        """Starts copying the slot of `step`. A capture that fails is counted and reported, training goes on.

        Args:
            step: which.
            record: of the iteration before.
            loadable_everywhere: newest step that every rank is known to be able to load, -1 if none.
        """
        self._retain(loadable_everywhere)
        self._step = step
        spec = self.schedule.spec(step)
        try:
            self._slot_bytes = self._capture.begin(spec, record)
            self._age.capture(step, spec.full)
        except MoevementError as error:
            # Under way only if an operator was found too old, which a broken schedule alone can cause.
            self._capture.cancel()
            self._fail(step, str(error))

    def fence(self) -> None:
        """Returns when every copy of the slot has been read from the device."""
        try:
            copied, stalled = self._capture.fence()
        except MoevementError as error:
            self._fail(self._step, str(error))
            return
        submitted = time.perf_counter()
        if copied is not None:
            self._committer.submit(copied)
        self._stall_seconds = stalled + time.perf_counter() - submitted
        self._fence_started_time = time.time() - self._stall_seconds

    def interrupt(self) -> None:
        """Drops the slot under way, and waits for those that are copied."""
        self._capture.cancel()
        self._committer.drain()

    def close(self) -> None:
        """Drops the slot under way and ends the commits. The store stays open."""
        self._capture.cancel()
        self._committer.close()

    def status(self, iteration: int) -> dict[str, Any]:
        """The figures of an iteration for displays."""
        oldest, age = self._age.oldest(iteration + 1)
        return {
            "slot_bytes": self._slot_bytes,
            "stall_seconds": self._stall_seconds,
            "fence_started_time": self._fence_started_time,
            "oldest_age_steps": age,
            "oldest_age_bound_steps": self._age.bound,
            "oldest_operator": oldest,
            "window": self.schedule.window,
            "window_index": self.schedule.index(iteration),
            "memory_used_bytes": len(self.store.committed) * self._plan.memory.slot_bytes,
            "failed_slots": self.failed_slots,
        }

    def maybe_reorder(self, step: int) -> None:
        """At the start of a window: orders experts by popularity again if it has changed enough (paper 3.2)."""
        tools, schedule = self._tools, self.schedule
        # With one group there is no order.
        if not tools.config.reorder or schedule.window == 1 or schedule.index(step) or step == self._first_step:
            return
        counts, most = tools.state.popularity(), max(self._plan.slot_bytes) + self._plan.spare_bytes

        def report(chosen: SlotSchedule, refused: bool) -> None:
            tools.events.emit("reorder", step=step, refused=refused, **schedule_fields(chosen))

        self.schedule = self._order.next_schedule(schedule, step, counts, most, tools.agreement, report)

    def _on_committed(self, slot: Committed) -> None:
        """Runs on the committer's thread."""
        if slot.error:
            self._fail(slot.slot.lease.step, slot.error)
            return
        threads = "threads" if self._tools.digests is not None else "nobody"
        self._tools.events.emit(
            "slot",
            step=slot.slot.lease.step,
            data_bytes=slot.slot.data_bytes,
            digest_seconds=slot.digest_seconds,
            digested_by="device" if slot.slot.piece_digests else threads,
            copy_started_time=slot.slot.copy_started_time,
            copy_seconds=slot.slot.copy_seconds,
        )

    def _fail(self, step: int, why: str) -> None:
        """A failed save never ends training: counted, reported, and the next iteration tries again.

        Runs on the committer's thread too.
        """
        with self._failing:
            self.failed_slots += 1
            self._age.restart(step)
        self._tools.events.emit("slot_failed", step=step, reason=why, failed_slots=self.failed_slots)

    def _retain(self, loadable_everywhere: int) -> None:
        """Frees slots that no window needs; if that is not enough, waits for the digests, then gives up the oldest."""
        store = self.store
        self._drop_unneeded(loadable_everywhere)
        if store.free_slots:
            return
        self._committer.drain()
        self._drop_unneeded(loadable_everywhere)
        if not store.free_slots:
            oldest = min(store.committed)
            store.drop([oldest])
            self._tools.events.emit("window_given_up", step=oldest, reason="no free slot")

    def _drop_unneeded(self, loadable_everywhere: int) -> None:
        committed = frozenset(self.store.committed)
        self.store.drop(committed - slots_to_keep(committed, loadable_everywhere, self._plan.longest_run))


def schedule_fields(schedule: SlotSchedule) -> dict[str, Any]:
    """What events say of a schedule."""
    return {"window": schedule.window, "window_mode": schedule.mode, "groups": schedule.groups}
