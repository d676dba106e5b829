"""One iteration and one recovery, read top to bottom: the face of sparse checkpointing for a training loop."""

import itertools
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.errors import MoevementError
from megatron.moevement.events import EventLog
from megatron.moevement.operators.state import TrainingState
from megatron.moevement.planning import Measured, SparsePlan, make_plan
from megatron.moevement.recovery.conversion import Conversion, Progress, convert
from megatron.moevement.recovery.plan import newest_run, slots_to_keep
from megatron.moevement.recovery.sources import SlotReader
from megatron.moevement.recovery.start import Choice, choose_source, find_store, restart_count, store_path
from megatron.moevement.schedule.age import SnapshotAge
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.schedule.ordering import capture_order, should_reorder
from megatron.moevement.schedule.slots import SlotSchedule, schedule_of
from megatron.moevement.schedule.window import divide, slot_bytes
from megatron.moevement.slot_memory import SlotMemory, together
from megatron.moevement.snapshot.bandwidth import Chunks, measure_digests
from megatron.moevement.snapshot.calibration import Calibration
from megatron.moevement.snapshot.capture import Capture
from megatron.moevement.store.committer import Committed, Committer
from megatron.moevement.store.host_store import HostStore, discard
from megatron.moevement.types import IterationRecord
from moevement_ext import CopyEngine, DigestPool


@dataclass(frozen=True, slots=True)
class StartPoint:
    """Where training starts: Step `step` (None: from scratch), already in place if it came from slots."""

    source: str
    step: int | None
    conversion: Conversion | None
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the manager is told of the job: how it was built and where it runs.

    `identity` holds, by flag, every value that slots must have been written with. `ranks_on_node` share the slots'
    directory. `deterministic` makes a difference between a replay and what was recorded an error. The copy engine works
    with the best of `chunks`; the model waits for `awaited_copies` small copies to the host in an iteration.
    """

    identity: Mapping[str, Any]
    ranks_on_node: int
    deterministic: bool
    chunks: tuple[Chunks, ...] = (Chunks(4 << 20, 2),)
    awaited_copies: int = 0


# What a rank says it can load while its slots' memory isn't pinned yet; slots are captured once all ranks' memory is.
NOT_PINNED = -2


class SparseCheckpointManager:
    """Takes a slot in every iteration and recovers from slots.

    The training loop calls `start` once, then for every iteration `begin_iteration`, `before_optimizer_step` and
    `end_iteration`, and `finish` at the end. All are collective: every rank calls them for the same steps.
    """

    def __init__(
        self,
        config: SparseCheckpointConfig,
        state: TrainingState,
        agreement: Agreement,
        engine: CopyEngine,
        events: EventLog,
        surroundings: Surroundings,
    ) -> None:
        self._config, self._state, self._agreement, self._engine = config, state, agreement, engine
        self._events, self._surroundings = events, surroundings
        self._path = store_path(config.job_directory, agreement.rank)
        self._identity = {
            **surroundings.identity,
            "--sparse-ckpt-window-mode": config.window_mode,
            "--sparse-ckpt-reorder": config.reorder,
        }
        self._threads = config.threads(surroundings.ranks_on_node)
        self._digests = DigestPool(self._threads) if config.digest else None
        self._memory = SlotMemory(config, agreement, engine, self._path, surroundings.ranks_on_node)
        self._store: HostStore | None = None
        self._capture: Capture | None = None
        self._committer: Committer | None = None
        self._schedule: SlotSchedule | None = None
        self._age: SnapshotAge | None = None
        self._record: IterationRecord | None = None
        self._counts: dict[str, int] = {}
        self._loadable = self._loadable_everywhere = -1
        self._iteration_starts: list[float] = []
        place, copies = (config.job_directory, agreement.rank), (surroundings.chunks, surroundings.awaited_copies)
        self._calibration = Calibration(engine, state, *place, *copies)
        # The first order by popularity may come with the first window; `_ordered_at` is then far in the past.
        self._first_step, self._ordered_at = 0, -(1 << 62)
        self._slot_bytes, self._stall_seconds, self._fence_started_time = 0, 0.0, 0.0
        self.plan: SparsePlan | None = None
        self.failed_slots = 0

    @property
    def capturing(self) -> bool:
        """Whether iterations take slots: the window is chosen and its memory is pinned on all ranks."""
        return self._capture is not None

    # ------------------------------------------------------------------------------------------------ recovery

    def start(self, dense_step: int | None) -> StartPoint:
        """Recovers from the slots of an earlier worker if there are any that all ranks can load.

        Args:
            dense_step: step of the newest dense checkpoint, None without one. The caller loads it if the result's
                source is `dense`.

        Raises:
            StoreError: the slots are of another model, layout or format, or there is no room for new ones.
            RecoveryError: the replay wasn't exact.
        """
        if self._config.fresh and restart_count() == 0:
            together(self._agreement, lambda: discard(self._path))
        path = None if self._config.dry_run else self._path
        wanted = {**self._identity}
        if self._config.window is not None:
            wanted["--sparse-ckpt-window"] = self._config.window
        found = find_store(path, wanted, self._agreement)
        choice = choose_source(found, self._state, self._agreement, self._digests, dense_step)
        self._events.emit("start", run=_run_list(choice), dense_step=choice.dense_step, reasons=choice.reasons)
        if choice.run is None:
            if found.store is not None:
                found.store.close()
            self._first_step = choice.dense_step or 0
            if self._config.window is not None:
                self._adopt(None, self._config.window)
            source = "scratch" if choice.dense_step is None else "dense"
            return StartPoint(source, choice.dense_step, None, choice.reasons)
        assert found.store is not None
        return self._recover(found.store, choice)

    def _recover(self, store: HostStore, choice: Choice) -> StartPoint:
        run = choice.run
        assert run is not None
        reader = SlotReader(store, self._state.table, self._agreement.rank, self._digests)
        steps_with_work = [*run.steps]
        self._events.emit("recovery_started", first=run.first, last=run.last, replays=run.replays)
        self._memory.pin(store)
        self._memory.wait_until_pinned()
        conversion = convert(
            self._state, reader, run, self._agreement, self._surroundings.deterministic, self._report_conversion
        )
        specs = {step: reader.manifest(step).spec for step in steps_with_work}
        schedule = schedule_of(specs, run.last, self._config.window_mode)
        self.plan = make_plan(self._config, self._state, self._agreement, None, schedule.window)
        # Slots of later steps belong to iterations that will run again; each is replaced by its own capture.
        store.keep_only(frozenset(step for step in store.committed if step <= run.last))
        self._use(store, schedule, run.last)
        for step, spec in specs.items():
            if self._age is not None and step < run.last:
                self._age.note(step, spec.full)
        self._record, self._ordered_at = reader.manifest(run.last).record, run.last
        self._loadable = self._loadable_everywhere = run.last
        self._events.emit(
            "recovery_finished",
            step=run.last,
            replays=conversion.replays,
            compared=conversion.compared,
            different=conversion.different,
            seconds=conversion.seconds,
            **_schedule_fields(schedule),
        )
        return StartPoint("slots", run.last, conversion, choice.reasons)

    def _report_conversion(self, progress: Progress) -> None:
        self._events.emit(
            "conversion",
            step=progress.step,
            loaded_full=progress.loaded_full,
            frozen=progress.frozen,
            replayed=progress.replayed,
            seconds=progress.seconds,
        )

    # ----------------------------------------------------------------------------------------------- iteration

    def begin_iteration(self, step: int) -> None:
        """Starts copying the slot of `step`. A capture that fails is counted and reported, training goes on."""
        self._iteration_starts.append(time.perf_counter())
        if self._store is None:
            self._measure(step)
        elif not self._calibration.done and self._calibration.iterations >= self._config.measure_iterations:
            self._calibration.run(self._events)
        if self._store is None or not self._calibration.done:
            self._calibration.begin_iteration()
        elif self._capture is None and self._loadable_everywhere > NOT_PINNED:
            self._begin_captures(step)
        if self._schedule is None or self._capture is None:
            return
        self._maybe_reorder(step)
        self._retain()
        spec = self._schedule.spec(step)
        try:
            self._slot_bytes = self._capture.begin(spec, self._record)
        except MoevementError as error:
            self._slot_failed(step, str(error))
            return
        assert self._age is not None
        self._age.capture(step, spec.full)

    def before_optimizer_step(self) -> None:
        """The fence: returns when every copy of the slot has been read from the device."""
        self._calibration.fence()
        if self._capture is None or self._committer is None:
            return
        started, self._fence_started_time = time.perf_counter(), time.time()
        try:
            copied, _ = self._capture.fence()
        except MoevementError as error:
            self._slot_failed(-1, str(error))
            return
        if copied is not None:
            self._committer.submit(copied)
        self._stall_seconds = time.perf_counter() - started

    def end_iteration(self, record: IterationRecord) -> None:
        """Notes the record of the iteration for the next slot, and tells the other ranks what this one can load."""
        self._record = record
        if self._store is not None:
            known = self._agreement.finish_minimum()
            if known is not None:
                self._loadable_everywhere = max(self._loadable_everywhere, known)
            if self._capture is None:
                self._loadable = -1 if self._memory.pinned else NOT_PINNED
                self._events.emit("pinning", slots=self._memory.pinned_slots, of=self._store.geometry.slots)
            self._agreement.start_minimum(self._loadable)
        self._events.emit("iteration", **self.status(record))

    def status(self, record: IterationRecord) -> dict[str, Any]:
        """The figures of an iteration for displays: bytes, seconds and steps as their names say."""
        step = record.iteration + 1
        oldest, age = self._age.oldest(step) if self._age is not None else ("", 0)
        committed = len(self._store.committed) if self._store is not None else 0
        window = self._schedule.window if self._schedule is not None else 0
        return {
            "iteration": record.iteration,
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "skipped": record.skipped,
            "learning_rate": record.learning_rates[0] if record.learning_rates else 0.0,
            "seconds": time.perf_counter() - self._iteration_starts[-1] if self._iteration_starts else 0.0,
            "slot_bytes": self._slot_bytes,
            "stall_seconds": self._stall_seconds,
            "fence_started_time": self._fence_started_time,
            "oldest_age_steps": age,
            "oldest_age_bound_steps": self._age.bound if self._age is not None else 0,
            "oldest_operator": oldest,
            "window": window,
            "window_index": self._schedule.index(record.iteration) if self._schedule is not None else 0,
            "loadable_step": self._loadable_everywhere,
            "memory_used_bytes": committed * self.plan.memory.slot_bytes if self.plan is not None else 0,
            "memory_limit_bytes": self.plan.memory.total_bytes if self.plan is not None else 0,
            "failed_slots": self.failed_slots,
        }

    def finish(self, durable: bool) -> bool:
        """Ends cleanly; removes the slots if the last step is durable elsewhere and they are not to be kept.

        Returns whether the slots are kept.
        """
        if self._capture is not None:
            self._capture.cancel()
        self._agreement.finish_minimum()
        if self._committer is not None:
            self._committer.close()
        self._agreement.barrier()
        kept = self._store is not None and (self._config.keep or not durable)
        if self._store is not None:
            self._memory.give_back(self._store, kept)
        if self._digests is not None:
            self._digests.close()
        self._engine.close()
        self._events.emit("finished", kept=kept)
        return kept

    # ---------------------------------------------------------------------------------------------------- parts

    def _measure(self, step: int) -> None:
        """Chooses W once enough iterations are timed; the first one includes warm-up and isn't counted."""
        times = self._iteration_starts
        if len(times) <= self._config.measure_iterations:
            return
        iteration = statistics.median(after - before for before, after in itertools.pairwise(times[1:]))
        self._first_step = step
        found = self._calibration.run(self._events)
        rates = (found.bytes_per_second, iteration, found.copy_seconds, found.chunks)
        self._adopt(Measured(*rates, measure_digests(self._digests)), None)

    def _adopt(self, measured: Measured | None, window: int | None) -> None:
        """Makes the plan and takes its memory, on all ranks or on none."""
        self.plan = make_plan(self._config, self._state, self._agreement, measured, window)
        self._memory.check(self.plan)
        if self._config.dry_run:
            return
        identity = {**self._identity, "--sparse-ckpt-window": self.plan.schedule.window}
        content = {"identity": identity, "operators": self._state.table.to_json()}
        self._store = self._memory.create(self.plan, content, self._threads)
        self._events.emit("plan", **_schedule_fields(self.plan.schedule), memory_bytes=self.plan.memory.total_bytes)
        self._loadable = self._loadable_everywhere = -1 if self._memory.pinned else NOT_PINNED
        if min(self._agreement.gather(self._loadable)) > NOT_PINNED:
            self._begin_captures(self._first_step)

    def _begin_captures(self, step: int) -> None:
        """The memory of all ranks is pinned: the first slot is that of `step`."""
        assert self._store is not None and self.plan is not None
        self._first_step = step
        self._events.emit("pinned", step=step, problem=self._memory.problem)
        self._use(self._store, self.plan.schedule, step)

    def _use(self, store: HostStore, schedule: SlotSchedule, step: int) -> None:
        assert self.plan is not None
        self._store, self._schedule = store, schedule
        self._capture = Capture(self._state, store, self._engine, self._agreement.rank, store.content["run_id"])
        self._committer = Committer(store, self._digests, self._on_committed)
        self._age = SnapshotAge(self._state.table.names, max(self.plan.longest_run, schedule.window), step)

    def _on_committed(self, slot: Committed) -> None:
        """Runs on the committer's thread."""
        if slot.error:
            self._slot_failed(slot.slot.lease.step, slot.error)
            return
        assert self._store is not None
        run = newest_run(self._store.committed, self._state.table.names)
        self._loadable = run.last if run is not None else -1
        self._events.emit(
            "slot",
            step=slot.slot.lease.step,
            data_bytes=slot.slot.data_bytes,
            digest_seconds=slot.digest_seconds,
            copy_started_time=slot.slot.copy_started_time,
            copy_seconds=slot.slot.copy_seconds,
        )

    def _slot_failed(self, step: int, why: str) -> None:
        """A failed save never ends training: counted, reported, and the next iteration tries again."""
        self.failed_slots += 1
        if self._age is not None and self._iteration_starts:
            self._age.restart(max(step, 0))
        self._events.emit("slot_failed", step=step, reason=why, failed_slots=self.failed_slots)

    def _retain(self) -> None:
        """Frees slots that no window needs; if that is not enough, waits for the digests, then gives up the oldest."""
        assert self._store is not None and self.plan is not None and self._committer is not None
        store = self._store
        store.keep_only(slots_to_keep(frozenset(store.committed), self._loadable_everywhere, self.plan.longest_run))
        if store.free_slots:
            return
        self._committer.drain()
        store.keep_only(slots_to_keep(frozenset(store.committed), self._loadable_everywhere, self.plan.longest_run))
        if not store.free_slots:
            oldest = min(store.committed)
            store.keep_only(frozenset(step for step in store.committed if step > oldest))
            self._events.emit("window_given_up", step=oldest, reason="no free slot")

    def _maybe_reorder(self, step: int) -> None:
        """At the start of a window: orders experts by popularity again if it has changed enough (paper 3.2)."""
        schedule, config = self._schedule, self._config
        assert schedule is not None and self.plan is not None
        if not config.reorder or schedule.index(step) or step == self._first_step:
            return
        counts = self._state.popularity()
        groups = schedule.groups
        due = step - self._ordered_at >= config.reorder_windows * schedule.window
        if due and should_reorder(self._counts, counts, config.reorder_change, config.reorder_share):
            order = capture_order(self._state.table, counts)
            groups = divide(self._state.table, order, schedule.window, schedule.mode)
        worst = max(slot_bytes(self._state.table, groups, schedule.mode))
        # All or none: data-parallel replicas must freeze the same operators in a replay.
        too_large = self._agreement.maximum([float(worst > max(self.plan.slot_bytes) + self.plan.spare_bytes)])[0]
        if groups != schedule.groups and not too_large:
            self._schedule, self._counts, self._ordered_at = SlotSchedule(groups, schedule.mode), counts, step
        if groups != schedule.groups:
            self._events.emit("reorder", step=step, refused=bool(too_large), **_schedule_fields(self._schedule))


def _schedule_fields(schedule: SlotSchedule | None) -> dict[str, Any]:
    """What events say of a schedule."""
    if schedule is None:
        return {}
    return {"window": schedule.window, "window_mode": schedule.mode, "groups": schedule.groups}


def _run_list(choice: Choice) -> list[int] | None:
    return [choice.run.first, choice.run.last] if choice.run is not None else None
